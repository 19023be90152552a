-- Fake quantisation: values and gradients against plain Lua, observers, FakeQuantize, models made ready for
-- quantisation-aware training (under autocast, with the scaler, inside hm.checkpoint) and their integers.
--
-- The row itself is proved by ops_elementwise_spec (straight-through derivative) and cuda_parity_spec.
-- One case alone:  make test SPEC=spec/nn_quantize_spec.lua FILTER='ties'

local hm = require "halfmoon"
local devices = require "spec.support.devices"
local numbers = require "spec.support.numbers"
local raises = require "spec.support.raises"

local nn, amp, optim = hm.nn, hm.amp, hm.optim
local F, quantize = nn.functional, nn.quantize
local inf, nan = math.huge, 0 / 0

-- ====== The rule in plain Lua ======

--- To float32, by the engine's exact conversion.
local function f32(v) return (string.unpack("<f", string.pack("<f", v))) end

local function round_even(v)
  local below = math.floor(v)
  local rest = v - below
  if rest < 0.5 or (rest == 0.5 and below % 2 == 0) then return below end
  return below + 1
end

--- q before and after it is limited.  Products and quotients of float32 numbers are rounded once from double.
local function grid(v, o)
  local q = f32(v * f32(1 / f32(o.scale)))
  if q == q and math.abs(q) < inf then q = round_even(q) end
  q = q + (o.zero_point or 0)
  local low, high = o.quant_min or -128, o.quant_max or 127
  return q, q < low and low or q > high and high or q
end

local function plain(v, o)
  if v ~= v then return v end
  local _, q = grid(v, o)
  return f32((q - (o.zero_point or 0)) * f32(o.scale))
end

local function mapped(list, fn)
  local out = {}
  for i, v in ipairs(list) do out[i] = fn(v, i) end
  return out
end

--- A fixed random tensor, a leaf.
local function random(shape, seed)
  hm.manual_seed(seed or 1)
  return hm.randn(shape)
end

local VALUES = {-1e9, -12.85, -12.75, -0.36, -0.35, -0.25, -0.15, -0.05, -0.0, 0.0, 0.01, 0.05, 0.15, 0.25, 0.35,
  3.14159, 12.65, 12.75, 12.76, 99.5, 1e30, 1e-30}
local CASES = {
  {scale = 0.1}, {scale = 0.1, zero_point = 7}, {scale = 0.25, zero_point = -128}, {scale = 0.3, quant_min = 0,
    quant_max = 15, zero_point = 4}, {scale = 2.5, quant_min = -127},
}

-- ====== The function ======

describe("fake_quantize", function()
  for n, case in ipairs(CASES) do
    it(("gives what plain Lua gives, case %d"):format(n), function()
      local x = hm.tensor(VALUES)
      numbers.assert_same(F.fake_quantize(x, case), mapped(VALUES, function(v) return plain(f32(v), case) end))
    end)
    it(("passes the gradient where nothing was limited, case %d"):format(n), function()
      local x = hm.tensor(VALUES, {requires_grad = true})
      local weights = mapped(VALUES, function(_, i) return i * 0.5 - 3.25 end)
      F.fake_quantize(x, case):backward(hm.tensor(weights))
      numbers.assert_same(x.grad, mapped(VALUES, function(v, i)
        local q, limited = grid(f32(v), case)
        return q == limited and weights[i] or 0
      end))
    end)
  end

  it("rounds ties to the even integer", function()
    local x = hm.tensor {-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5}
    numbers.assert_same(F.fake_quantize(x, {scale = 1}), {-2, -2, 0, 0, 2, 2, 4})
    numbers.assert_same(F.fake_quantize(x, {scale = 1, zero_point = 3}), {-2, -2, 0, 0, 2, 2, 4})
    -- the limits are compared after rounding: 127.5 is the tie that leaves the grid
    local edge = hm.tensor({127.49, 127.5, -128.5, -128.51}, {requires_grad = true})
    local y = F.fake_quantize(edge, {scale = 1})
    numbers.assert_same(y, {127, 127, -128, -128})
    y:sum():backward()
    numbers.assert_same(edge.grad, {1, 0, 1, 0})
  end)

  it("keeps NaN, and limits infinities", function()
    for _, dtype in ipairs {"f64", "f32", "f16", "bf16"} do
      local x = hm.tensor({nan, inf, -inf, 1}, {dtype = dtype, requires_grad = true})
      local y = F.fake_quantize(x, {scale = 0.5, quant_min = -4, quant_max = 3})
      numbers.assert_same(y, {nan, 1.5, -2, 1}, dtype)
      y:sum():backward()
      numbers.assert_same(x.grad, {1, 0, 0, 1}, dtype)
    end
    numbers.assert_same(F.fake_quantize(hm.tensor {1, 2}, {scale = hm.tensor(nan)}), {nan, nan})
  end)

  it("computes half types in float32 and rounds once; float64 in float64", function()
    for _, dtype in ipairs {"f16", "bf16"} do
      local x = hm.tensor(VALUES):clamp(-1000, 1000):to(dtype)
      local y = F.fake_quantize(x, {scale = 0.1, zero_point = 3})
      assert.equal(x.dtype, y.dtype)
      numbers.assert_same(y, F.fake_quantize(x:float(), {scale = 0.1, zero_point = 3}):to(dtype), dtype)
    end
    local y = F.fake_quantize(hm.tensor({0.3}, {dtype = "f64"}), {scale = 0.1})
    assert.equal("float64", y.dtype)
    assert.equal(3 * 0.1, y:item())
  end)

  it("takes a scale and a zero point for each entry of a dim", function()
    local x = random {3, 4, 5}
    local scale, zero_point = hm.tensor {0.02, 0.1, 0.5, 1.5}, hm.tensor({3, 0, -7, 100}, {dtype = "i32"})
    for _, axis in ipairs {2, -2} do
      local leaf = x:clone():requires_grad_()
      local y = F.fake_quantize(leaf, {scale = scale, zero_point = zero_point, axis = axis})
      y:backward(hm.full({3, 4, 5}, 2))
      for c = 1, 4 do
        local o = {scale = scale[c]:item(), zero_point = zero_point[c]:item()}
        numbers.assert_same(y:select(2, c), F.fake_quantize(x:select(2, c), o))
        numbers.assert_same(leaf.grad:select(2, c), mapped(numbers.flat(x:select(2, c)), function(v)
          local q, limited = grid(v, o)
          return q == limited and 2 or 0
        end))
      end
    end
    local half = F.fake_quantize(x:half(), {scale = scale, zero_point = zero_point, axis = 2})
    assert.equal("float16", half.dtype) -- the scale does not widen it
  end)

  it("takes tensors that broadcast, empty tensors, and any layout", function()
    local x = random {4, 3}
    local scale = hm.tensor {0.1, 0.2, 0.3}
    numbers.assert_same(F.fake_quantize(x, {scale = scale}), F.fake_quantize(x, {scale = scale, axis = 2}))
    local turned = F.fake_quantize(x:t(), {scale = scale, axis = 1})
    numbers.assert_same(turned, F.fake_quantize(x, {scale = scale, axis = 2}):t())
    numbers.assert_same(F.fake_quantize(x, {scale = hm.tensor(0.1)}), F.fake_quantize(x, {scale = 0.1}))
    assert.same({0, 3}, F.fake_quantize(hm.zeros {0, 3}, {scale = scale, axis = 2}).shape)
    assert.same({2, 0}, F.fake_quantize(hm.zeros {2, 0}, {scale = hm.zeros {0}, axis = 2}).shape)
    numbers.assert_same(x:fake_quantize(0.5, 2, 0, 10), F.fake_quantize(x, {scale = 0.5, zero_point = 2, quant_min = 0,
      quant_max = 10}))
  end)

  it("is float32 inside autocast, and its gradient has the dtype of x", function()
    for _, low in ipairs {"float16", "bfloat16"} do
      local x = random({8}):to(low):requires_grad_()
      local y
      do
        local _ <close> = amp.autocast(low)
        y = F.fake_quantize(x, {scale = 0.1})
      end
      assert.equal("float32", y.dtype)
      y:sum():backward()
      assert.equal(low, x.grad.dtype)
      numbers.assert_same(y, F.fake_quantize(x:detach():float(), {scale = 0.1}))
    end
  end)

  it("says what it does not take", function()
    local x = hm.ones {2, 3}
    raises("option 'scale' is missing", F.fake_quantize, x, {})
    raises("must be above 0 and finite", F.fake_quantize, x, {scale = 0})
    raises("whole number from quant_min -128 to quant_max 127", F.fake_quantize, x, {scale = 1, zero_point = 128})
    raises("whole number", F.fake_quantize, x, {scale = 1, zero_point = 0.5})
    raises("must be below quant_max", F.fake_quantize, x, {scale = 1, quant_min = 5, quant_max = 5})
    raises("within 2^24", F.fake_quantize, x, {scale = 1, quant_max = 2 ^ 31})
    raises("scale must be [3]", F.fake_quantize, x, {scale = hm.ones {2}, axis = 2})
    raises("dim 3", F.fake_quantize, x, {scale = hm.ones {2}, axis = 3})
    local wanting = hm.ones({3}, {requires_grad = true})
    raises("the scale has no derivative", F.fake_quantize, x, {scale = wanting})
    raises("the scale has no derivative", F.fake_quantize, x, {scale = wanting, axis = 2})
    raises("the scale has no derivative", x.fake_quantize, x, wanting, 0)
    raises("the zero_point has no derivative", hm.fake_quantize, x, 0.5, wanting)
    raises("the scale has no derivative", x.fake_quantize_, x:clone(), wanting, 0)
    numbers.assert_same(hm.no_grad(function() return x:fake_quantize(wanting, 0) end), x)
    raises("did you mean 'quant_max'", F.fake_quantize, x, {scale = 1, quantmax = 3})
    raises("x must be a tensor", F.fake_quantize, 3, {scale = 1})
  end)
end)

-- ====== Observers ======

--- Scale and zero point as numbers.
local function qparams(observer)
  local scale, zero_point = observer:calculate_qparams()
  return scale:item(), zero_point:item()
end

describe("observers", function()
  it("keep the range of all they have seen", function()
    local o = nn.MinMaxObserver()
    local x = hm.tensor {-1, 3}
    assert.equal(x, o(x))
    o(hm.tensor {-2, 0.5})
    assert.equal(-2, o.min_val:item())
    assert.equal(3, o.max_val:item())
    local scale, zero_point = qparams(o)
    assert.equal(f32(5 / 255), scale)
    assert.equal(-128 + 102, zero_point) -- 2 / (5 / 255) = 102
  end)

  it("or move towards each batch", function()
    local o = nn.MovingAverageMinMaxObserver {averaging_constant = 0.25}
    o(hm.tensor {-1, 3})
    numbers.assert_same(o.max_val, {3})
    o(hm.tensor {-2, 1})
    numbers.assert_same(o.min_val, {-1.25})
    numbers.assert_same(o.max_val, {2.5})
  end)

  it("or have a range for each channel", function()
    local o = nn.PerChannelMinMaxObserver(3, {axis = 2})
    o(hm.tensor {{1, -2, 3}, {-4, 5, 3}})
    numbers.assert_same(o.min_val, {-4, -2, 3})
    numbers.assert_same(o.max_val, {1, 5, 3})
    o(hm.zeros {2, 3, 4})
    numbers.assert_same(o.min_val, {-4, -2, 0})
    local moving = nn.MovingAveragePerChannelMinMaxObserver(2, {averaging_constant = 0.5})
    moving(hm.tensor {{1, 2}, {3, 5}})
    moving(hm.tensor {{1, 4}, {3, 7}})
    numbers.assert_same(moving.max_val, {3, 6})
    numbers.assert_same(nn.PerChannelMinMaxObserver(2)(hm.tensor {1, 2}), {1, 2}) -- nothing beside the channels
    raises("made for 3 channels in dim 2, x is f32[2,4]", o, hm.zeros {2, 4})
  end)

  it("find scales and zero points: 0 is on the grid, scales have a floor", function()
    local function of(opts, ...)
      local o = nn.MinMaxObserver(opts)
      o(hm.tensor {...})
      return qparams(o)
    end
    assert.same({f32(4 / 255), -128}, {of({}, 2, 4)}) -- all positive: from 0
    assert.same({f32(4 / 255), 127}, {of({}, -4, -1)})
    assert.same({f32(4 / 127.5), 0}, {of({symmetric = true}, -1, 4)})
    assert.same({f32(4 / 127), 0}, {of({symmetric = true, quant_min = -127}, -4, 1)})
    assert.same({f32(4 / 127.5), 128}, {of({symmetric = true, quant_min = 0, quant_max = 255}, -4, 1)})
    assert.same({f32(5 / 15), 3}, {of({quant_min = 0, quant_max = 15}, -1, 4)})
    assert.same({2.0 ^ -23, -128}, {of({}, 0, 0)})
    assert.same({0.5, -128}, {of({eps = 0.5}, 0, 1)})
    assert.same({1, 0}, {qparams(nn.MinMaxObserver())}) -- nothing seen
  end)

  it("leave out what is not finite, channel by channel, and go on afterwards", function()
    for _, make in ipairs {nn.MinMaxObserver, nn.MovingAverageMinMaxObserver} do
      local o = make()
      for _, bad in ipairs {inf, -inf, nan} do
        o(hm.tensor {1, bad}) -- before anything was seen
        assert.same({1, 0}, {qparams(o)})
      end
      o(hm.tensor {-1, 2})
      for _, bad in ipairs {inf, -inf, nan} do o(hm.tensor {-100, bad, 100}) end
      o(hm.tensor {-3e38, 3e38}) -- the width would be infinite
      numbers.assert_same(o.min_val, {-1})
      numbers.assert_same(o.max_val, {2})
      o(hm.tensor {-1, 6})
      assert.is_true(o.max_val:item() > 2)
    end
    local o = nn.PerChannelMinMaxObserver(2)
    o(hm.tensor {{1, inf}, {2, 3}})
    o(hm.tensor {{5, 6}, {nan, 9}})
    numbers.assert_same(o.min_val, {5, 2})
    numbers.assert_same(o.max_val, {6, 3})
  end)

  it("watch in training only, and nothing that is empty; they can forget", function()
    local o = nn.MinMaxObserver():eval()
    o(hm.tensor {1, 2})
    o:train()(hm.zeros {0})
    assert.same({1, 0}, {qparams(o)})
    o(hm.tensor {1, 2})
    assert.equal(2, o.max_val:item())
    o:reset_min_max_vals()
    assert.same({1, 0}, {qparams(o)})
  end)

  it("stay float32 when the model is made half, and take any dtype", function()
    local o = nn.MinMaxObserver():half()
    for _, dtype in ipairs {"f16", "bf16", "f64"} do o(hm.tensor({-1, 2}, {dtype = dtype})) end
    assert.equal("float32", o.min_val.dtype)
    assert.equal(2, o.max_val:item())
  end)

  it("say what is wrong with their options", function()
    raises("0 among them", nn.MinMaxObserver, {quant_min = 1})
    raises("averaging_constant", nn.MovingAverageMinMaxObserver, {averaging_constant = 0})
    raises("number of channels", nn.PerChannelMinMaxObserver)
    raises("unknown option 'axis'", nn.MinMaxObserver, {axis = 1})
  end)
end)

-- ====== FakeQuantize ======

describe("nn.FakeQuantize", function()
  it("watches, then rounds; both can be switched", function()
    local fake = nn.FakeQuantize {observer = "min_max"}
    local x = hm.tensor {-1, 0.3, 4}
    local y = fake(x)
    numbers.assert_same(y, F.fake_quantize(x, {scale = fake.scale, zero_point = fake.zero_point}))
    assert.equal(f32(5 / 255), fake.scale:item())
    fake:disable_observer()
    fake(x * 10)
    assert.equal(f32(5 / 255), fake.scale:item())
    fake:enable_observer():disable_fake_quant()
    numbers.assert_same(fake(x * 10), x * 10)
    assert.equal(f32(50 / 255), fake.scale:item())
    fake:enable_fake_quant():eval()
    fake(x * 100)
    assert.equal(f32(50 / 255), fake.scale:item())
  end)

  it("can be called several times before backward", function()
    local fake = nn.FakeQuantize()
    local x = random({16}):requires_grad_()
    local y = fake(x) + fake(x * 3) + fake(x * 9)
    y:sum():backward()
    assert.is_true(x.grad:isfinite():all():item())
    assert.is_true(x.grad:ne(0):any():item())
  end)

  it("keeps its state in state dicts, also from an earlier object that goes on", function()
    local a, b = nn.FakeQuantize {channels = 3, axis = 2}, nn.FakeQuantize {channels = 3, axis = 2}
    a(random {5, 3})
    b:load_state_dict(a:state_dict())
    local x = random({5, 3}, 2)
    numbers.assert_same(b:eval()(x), a:eval()(x))
    a:train()
    b:train()
    numbers.assert_same(b(x * 2), a(x * 2))
    numbers.assert_same(b.observer.max_val, a.observer.max_val)
    local names = {}
    for name in pairs(a:state_dict()) do names[#names + 1] = name end
    table.sort(names)
    assert.same({"observer.max_val", "observer.min_val", "scale", "zero_point"}, names)
  end)

  it("takes an observer, and names what it does not take", function()
    local observer = nn.MinMaxObserver {quant_min = 0, quant_max = 15}
    local fake = nn.FakeQuantize {observer = observer}
    fake(hm.tensor {0, 30})
    assert.equal(2, fake.scale:item())
    assert.matches("0 to 15", tostring(fake), 1, true)
    raises("must be \"moving_average\", \"min_max\" or an observer", nn.FakeQuantize, {observer = "minmax"})
    raises("option 'quant_min' belongs to the observer", nn.FakeQuantize, {observer = observer, quant_min = 0})
    raises("is no observer", nn.FakeQuantize, {observer = nn.Linear(1, 1)})
  end)

  it("does not watch what hm.checkpoint runs again, and gives the same gradient", function()
    local function gradient(through)
      local fake, x = nn.FakeQuantize {averaging_constant = 0.5}, random({32}):requires_grad_()
      fake(x:detach() * 0.5)
      through(function(t) return fake(t) * t end, x):sum():backward()
      return x.grad, fake
    end
    local want, without = gradient(function(fn, x) return fn(x) end)
    local got, with = gradient(hm.checkpoint)
    numbers.assert_same(got, want)
    numbers.assert_same(with.observer.max_val, without.observer.max_val)
    numbers.assert_same(with.scale, without.scale)
  end)
end)

-- ====== Models ======

local function new_model()
  hm.manual_seed(3)
  return nn.Sequential(
    nn.Conv2d(1, 4, 3, {padding = 1}), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 9, 16), nn.ReLU(),
    nn.Linear(16, 3))
end

--- Images whose brightest third is their class.
local function new_data()
  local x = random({48, 1, 6, 6}, 4) * 0.3
  local y = {}
  for i = 1, 48 do
    y[i] = i % 3
    local rows = x[i]:select(1, 1):narrow(1, 2 * y[i] + 1, 2)
    rows:add_(1)
  end
  return x, hm.tensor(y, {dtype = "i64"})
end

local function count_equal(a, b) return a:eq(b):sum():item() end

describe("prepare_qat", function()
  it("replaces layers and keeps parameters, names, hooks and mode", function()
    local model = new_model()
    local before, params, seen = model:state_dict(), model:parameters(), 0
    model[5]:register_forward_hook(function() seen = seen + 1 end)
    model:eval()
    assert.equal(model, quantize.prepare_qat(model, {except = "0"}))
    assert.equal("Conv2d", model[1].__class)
    assert.equal("QATLinear", model[5].__class)
    assert.is_false(model[5].weight_fake_quant.training)
    for i, p in ipairs(model:parameters()) do assert.equal(params[i], p) end
    local after = model:state_dict()
    for name, t in pairs(before) do numbers.assert_same(after[name], t, name) end
    model(hm.zeros {2, 1, 6, 6})
    assert.equal(1, seen)
    quantize.prepare_qat(model) -- the rest
    assert.equal("QATConv2d", model[1].__class)
    raises("has no Linear or Conv2d to replace", quantize.prepare_qat, model)
  end)

  it("leaves out names with all below them, and keeps what is shared shared", function()
    local Net = nn.class("Net")
    function Net:init()
      self.body = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
      self.head = nn.Linear(2, 2)
      self.again = self.head
    end
    local net = quantize.prepare_qat(Net(), {except = {"body"}})
    assert.equal("Linear", net.body[2].__class)
    assert.equal("QATLinear", net.head.__class)
    assert.is_true(rawequal(net.head, net.again))
    raises({'names "heat"', "did you mean 'head'"}, quantize.prepare_qat, Net(), {except = "heat"})
    local alone = nn.Linear(2, 2)
    assert.equal(alone.weight, quantize.prepare_qat(alone).weight)
    raises("expected a Linear", nn.QATLinear, nn.ReLU())
  end)

  it("computes with rounded weights and inputs", function()
    local plain_layer = nn.Linear(6, 4)
    local x = random {5, 6}
    local layer = quantize.prepare_qat(plain_layer)
    local y = layer(x)
    local w = F.fake_quantize(plain_layer.weight, {scale = layer.weight_fake_quant.scale, axis = 1, quant_min = -127})
    local input = layer.input_fake_quant
    local q = F.fake_quantize(x, {scale = input.scale, zero_point = input.zero_point})
    numbers.assert_same(y, F.linear(q, w, plain_layer.bias))
    assert.is_true(count_equal(q, x) < 30)
    -- the largest weight of each row lies on the grid, and is trained
    y:sum():backward()
    assert.is_true(plain_layer.weight.grad:ne(0):all():item())
    numbers.assert_near(w:abs():amax({2}), plain_layer.weight:abs():amax({2}), 1e-6, 0)

    local conv = nn.Conv2d(2, 3, 3, {padding = "same", padding_mode = "reflect"})
    local image = random {2, 2, 5, 5}
    local wanted = conv(image)
    local got = quantize.prepare_qat(conv)(image)
    numbers.assert_near(got, wanted, 0, 0.05)
    assert.is_true(count_equal(got, wanted) < got:numel())
  end)

  it("takes options for weights and inputs, or leaves either floating", function()
    local x = random {5, 6}
    local layer = quantize.prepare_qat(nn.Linear(6, 4), {activation = false})
    assert.is_false(layer.input_fake_quant)
    local w = F.fake_quantize(layer.weight, {scale = layer.weight_fake_quant.scale, axis = 1, quant_min = -127})
    numbers.assert_same(layer(x), F.linear(x, w, layer.bias))
    local given = nn.Linear(6, 4)
    layer = quantize.prepare_qat(given, {
      weight = false, activation = {observer = "min_max", quant_min = 0, quant_max = 3},
    })
    assert.is_false(layer.weight_fake_quant)
    local y, input = layer(x), layer.input_fake_quant
    local q = F.fake_quantize(x, {scale = input.scale, zero_point = input.zero_point, quant_min = 0, quant_max = 3})
    assert.is_true(count_equal(q, x) < 30)
    numbers.assert_same(y, F.linear(q, given.weight, given.bias))
    layer = quantize.prepare_qat(nn.Linear(6, 4), {weight = {observer = "min_max", quant_min = -7, quant_max = 7}})
    layer(x)
    numbers.assert_near(layer.weight_fake_quant.scale, layer.weight:detach():abs():amax({2}) / 7, 1e-6, 0)
    raises("one observer cannot serve all layers", quantize.prepare_qat, nn.Linear(6, 4),
      {weight = {observer = nn.MinMaxObserver()}})
    raises("unknown option 'weights'", quantize.prepare_qat, nn.Linear(6, 4), {weights = {}})
  end)

  it("goes through state dicts, of its own and of the float model", function()
    local x, y = new_data()
    local a, b = quantize.prepare_qat(new_model()), quantize.prepare_qat(new_model())
    F.cross_entropy(a(x), y):backward()
    optim.SGD(a:parameters(), {lr = 0.5}):step()
    a(x)
    b:load_state_dict(a:state_dict())
    numbers.assert_same(b:eval()(x), a:eval()(x))
    local float = new_model()
    local result = b:load_state_dict(float:state_dict(), {strict = false})
    assert.equal(0, #result.unexpected)
    numbers.assert_same(b[5].weight, float[5].weight)
  end)

  it("moves and converts with the model", function()
    local model = quantize.prepare_qat(new_model()):half()
    local x = random({2, 1, 6, 6}):half()
    assert.equal("float16", model(x).dtype)
    assert.equal("float32", model[5].input_fake_quant.scale.dtype)
    assert.equal("int32", model[5].input_fake_quant.zero_point.dtype)
    local copy = model:clone()
    numbers.assert_same(copy:eval()(x), model:eval()(x))
  end)
end)

-- ====== Training ======

local function train(model, low, steps)
  local x, y = new_data()
  local opt = optim.Adam(model:parameters(), {lr = 0.01})
  local scaler = amp.GradScaler {enabled = low == "float16", init_scale = 2.0 ^ 10}
  local first, last
  for step = 1, steps or 25 do
    opt:zero_grad()
    local loss
    do
      local _ <close> = amp.autocast {dtype = low or "float16", enabled = low ~= false}
      loss = F.cross_entropy(model(x), y)
    end
    scaler:scale(loss):backward()
    assert.is_true(scaler:step(opt))
    scaler:update()
    last = loss:item()
    if step == 1 then first = last end
  end
  return first, last
end

describe("quantisation-aware training", function()
  for _, low in ipairs {false, "float16", "bfloat16"} do
    it("lowers the loss in " .. (low or "float32"), function()
      local model = quantize.prepare_qat(new_model())
      local first, last = train(model, low, devices.pick(25, 12))
      assert(last < devices.pick(0.5, 0.8) * first, ("%g -> %g"):format(first, last))
      -- and what was trained is what the integers compute
      local x = new_data()
      local want = model:eval()(x)
      for name, entry in pairs(quantize.convert(model)) do
        local layer = model:get_submodule(name)
        local _ <close> = hm.no_grad()
        layer.weight:copy_(quantize.dequantize(entry))
        layer.weight_fake_quant:disable_fake_quant()
      end
      numbers.assert_same(model(x), want)
    end)
  end

  it("survives an overflow: the step is skipped, and ranges stay", function()
    local model = quantize.prepare_qat(new_model())
    local x, y = new_data()
    local opt = optim.SGD(model:parameters(), {lr = 0.1})
    local scaler = amp.GradScaler {init_scale = 2.0 ^ 10}
    local function step(input, factor)
      opt:zero_grad()
      local loss
      do
        local _ <close> = amp.autocast("float16")
        loss = F.cross_entropy(model(input), y) * factor
      end
      scaler:scale(loss):backward()
      local stepped = scaler:step(opt)
      scaler:update()
      return stepped
    end
    assert.is_true(step(x, 1))
    local state = {}
    for name, t in pairs(model:state_dict()) do state[name] = t:clone() end
    -- NaN in the activations: nothing of it may stay
    local bad = x:clone()
    bad[1] = nan
    assert.is_false(step(bad, 1))
    for name, t in pairs(model:state_dict()) do
      assert.is_true(t:isfinite():all():item(), name)
      if name:find("input_fake_quant", 1, true) then numbers.assert_same(t, state[name], name) end
    end
    -- infinite gradients: the forward was sound
    assert.is_false(step(x, 2.0 ^ 120))
    -- infinite activations are limited like other large numbers, and do not move the range
    local scale = model[1].input_fake_quant.scale:item()
    bad[1] = inf
    step(bad, 1)
    assert.equal(scale, model[1].input_fake_quant.scale:item())
    assert.is_true(step(x, 1))
    assert.is_true(model(x):isfinite():all():item())
  end)

  it("is the same inside hm.checkpoint", function()
    local x, y = new_data()
    local function gradients(region)
      local model = quantize.prepare_qat(new_model())
      for _ = 1, 2 do
        model:zero_grad()
        local _ <close> = amp.autocast("bfloat16")
        F.cross_entropy(region(model, x), y):backward()
      end
      local list = {}
      for _, p in ipairs(model:parameters()) do list[#list + 1] = p.grad end
      return list, model:state_dict()
    end
    local want, state = gradients(function(model, input) return model(input) end)
    local got, other = gradients(hm.checkpoint)
    for i = 1, #want do numbers.assert_same(got[i], want[i]) end
    for name, t in pairs(state) do numbers.assert_same(other[name], t, name) end
  end)

  it("calibrates: ranges of what passes in evaluation mode, nothing rounded, all put back", function()
    local model = quantize.prepare_qat(new_model())
    local float, x = new_model():eval(), new_data()
    model[5]:eval()
    quantize.calibrate(model, function(m)
      assert.is_false(m.training)
      local y = m(x)
      assert.is_false(y.requires_grad)
      numbers.assert_same(y, float(x))
    end)
    assert.is_true(model.training)
    assert.is_false(model[5].training)
    assert.is_true(model[1].input_fake_quant.fake_quant_enabled)
    numbers.assert_same(model[1].input_fake_quant.observer.max_val, x:amax())
    raises("on purpose", quantize.calibrate, model, function() error("on purpose") end)
    assert.is_true(model[1].input_fake_quant.fake_quant_enabled)
    local y, want = model:eval()(x), float(x)
    assert.is_true((y - want):abs():amax():item() < 0.05)
    assert.is_true(count_equal(y, want) < y:numel())
  end)

  it("switches all quantizers of a model", function()
    local model, x = quantize.prepare_qat(new_model()), new_data()
    local want = new_model()(x)
    numbers.assert_same(quantize.disable_fake_quant(model)(x), want)
    assert.is_true(count_equal(quantize.enable_fake_quant(model)(x), want) < want:numel())
    local scale = quantize.disable_observer(model)[1].input_fake_quant.scale:item()
    model(x * 50)
    assert.equal(scale, model[1].input_fake_quant.scale:item())
    quantize.enable_observer(model)(x * 50)
    assert.is_true(model[1].input_fake_quant.scale:item() > scale)
    raises("expected a module", quantize.disable_observer, 3)
  end)
end)

-- ====== Integers ======

describe("convert", function()
  it("gives integers that say exactly what the model computes with", function()
    for _, dtype in ipairs {"f32", "f16", "bf16", "f64"} do
      local model = quantize.prepare_qat(new_model()):to(dtype)
      model(random({2, 1, 6, 6}):to(dtype))
      model:eval()
      local out, names = quantize.convert(model), {}
      for name, entry in pairs(out) do
        names[#names + 1] = name
        local layer = model:get_submodule(name)
        assert.equal("uint8", entry.weight.dtype)
        assert.same(layer.weight.shape, entry.weight.shape)
        assert.equal(127, entry.zero_point[1]:item())
        assert.equal(layer.weight:size(1), entry.scale:size(1))
        numbers.assert_same(quantize.dequantize(entry), layer.weight_fake_quant(layer.weight), name .. " " .. dtype)
        assert.equal(layer.weight.dtype, quantize.dequantize(entry).dtype)
        numbers.assert_same(entry.bias, layer.bias)
        numbers.assert_same(entry.input.scale, layer.input_fake_quant.scale)
        assert.is_false(layer.input_fake_quant.observer_enabled)
      end
      table.sort(names)
      assert.same({"0", "4", "6"}, names)
    end
  end)

  it("uses int32 where uint8 is too small, and follows the options", function()
    local layer = quantize.prepare_qat(nn.Linear(6, 4), {
      weight = {quant_min = -2000, quant_max = 2000}, activation = false,
    })
    local entry = quantize.convert(layer)[""]
    assert.equal("int32", entry.weight.dtype)
    assert.is_nil(entry.input)
    numbers.assert_same(quantize.dequantize(entry), layer:eval().weight_fake_quant(layer.weight))
    numbers.assert_same(entry.zero_point, {0, 0, 0, 0})
    layer = quantize.prepare_qat(nn.Linear(6, 4, {bias = false}), {weight = {symmetric = false, quant_min = -8,
      quant_max = 7}})
    entry = quantize.convert(layer)[""]
    assert.is_nil(entry.bias)
    assert.is_true(entry.weight:amax():item() <= 15)
    numbers.assert_same(quantize.dequantize(entry), layer:eval().weight_fake_quant(layer.weight))
    raises("prepare_qat(model) first", quantize.convert, new_model())
    raises("expected an entry", quantize.dequantize, {})
  end)

  it("goes through a file", function()
    local path = os.tmpname()
    local model = quantize.prepare_qat(new_model())
    local out = quantize.convert(model)
    assert(hm.save(path, out))
    local back = assert(hm.load(path))
    os.remove(path)
    numbers.assert_same(quantize.dequantize(back["4"]), quantize.dequantize(out["4"]))
    assert.equal(1, back["4"].axis)
  end)
end)
