-- Linear layers that apply their activation themselves: F.linear, nn.Linear and the transformer's feed-forward block against the same made
-- of two ops, values and gradients; when autocast keeps the two apart; what else looks at a layer: quantisation, layer scales, debug.

local hm = require "halfmoon"
local core = require "halfmoon.core"
local devices = require "spec.support.devices"
local fixed = require "spec.support.inputs"
local layers = require "spec.support.layers"
local numbers = require "spec.support.numbers"
local raises = require "spec.support.raises"

local nn, amp, autograd = hm.nn, hm.amp, hm.autograd
local F = nn.functional
local filled, keys = fixed.filled, fixed.keys

local ACTIVATIONS = {relu = F.relu, gelu_tanh = core.gelu_tanh}
-- Of the largest value.  On the CPU everything is the same to the bit; cublasLt applies gelu before it rounds.
local TOLERANCE = {float64 = 1e-12, float32 = 1e-5, float16 = 2.0 ^ -8, bfloat16 = 2.0 ^ -5}

--- linear and the activation, one after the other.
local function composed(x, w, b, name) return ACTIVATIONS[name](F.linear(x, w, b)) end

--- The same tensors: shape, dtype and, on the CPU, every bit.  low: the dtype that they were computed in, if that is not theirs.
local function agree(got, want, what, low)
  assert.equal(want.dtype, got.dtype, what)
  assert.same(want.shape, got.shape, what)
  if devices.is_cpu then return numbers.assert_same(got, want, what) end
  local tolerance = TOLERANCE[low or want.dtype]
  numbers.assert_near(got, want, 0, tolerance * want:detach():double():abs():max():item(), what)
end

--- Calls fn(...).  Returns how often each op ran, and what fn returned.
local function counted(fn, ...)
  local counts = {}
  core.op_log(function(r) counts[r.op] = (counts[r.op] or 0) + 1 end)
  local result = table.pack(pcall(fn, ...))
  core.op_log(nil)
  if not result[1] then error(result[2], 0) end
  return counts, table.unpack(result, 2, result.n)
end

--- x, two weights and two biases (or none) of a dtype, the same each time.
local function operands(dtype, bias)
  local list = {filled({2, 3, 16}, 1), filled({24, 16}, 2), filled({8, 24}, 3)}
  if bias then list[4], list[5] = filled({24}, 4), filled({8}, 5) end
  for i, t in ipairs(list) do list[i] = t:to(dtype):requires_grad_() end
  return list
end

--- Two layers with the activation; the second's gradient goes through the first's activation.
local function two_layers(linear, list, name)
  local h = linear(list[1], list[2], list[4], name)
  return linear(h, list[3], list[5], name)
end

--- Results and gradients of two layers, by F.linear's activation and by two ops; the counts of ops of the first.
local function both(name, dtype, bias, region)
  local all, counts = {}, nil
  for i, linear in ipairs {F.linear, composed} do
    local list = operands(dtype, bias)
    local function run()
      local y
      if region then y = amp.autocast(region, two_layers, linear, list, name) else y = two_layers(linear, list, name) end
      y:to(dtype == "f64" and "f64" or "f32"):square():sum():backward()
      return y
    end
    local ran, y = counted(run)
    counts = counts or ran
    all[i] = {y}
    for _, t in ipairs(list) do table.insert(all[i], t.grad) end
  end
  return all[1], all[2], counts
end

local LONG = {f16 = "float16", bf16 = "bfloat16"}

local function assert_equal(got, want, what, low)
  assert.equal(#want, #got)
  for i, t in ipairs(want) do agree(got[i], t, ("%s, %d"):format(what, i), LONG[low]) end
end

-- ====== nn.functional ======

describe("F.linear with an activation", function()
  for name in pairs(ACTIVATIONS) do
    it("gives what two ops give, and their gradients: " .. name, function()
      for _, dtype in ipairs {"f32", "f64", "f16", "bf16"} do
        for _, bias in ipairs {true, false} do
          local got, want, counts = both(name, dtype, bias)
          assert_equal(got, want, dtype)
          assert.equal(bias and 6 or 4, #got)
          assert.equal(2, counts["linear_" .. name])
          assert.is_nil(counts.linear)
          assert.is_nil(counts[name])
        end
      end
    end)

    it("inside autocast, from float32 weights: " .. name, function()
      for _, region in ipairs {{dtype = "f16"}, {dtype = "bf16"}, {dtype = "f16", backward = "float32"},
        {dtype = "bf16", cache_enabled = false}} do
        for _, bias in ipairs {true, false} do
          local got, want, counts = both(name, "f32", bias, region)
          assert_equal(got, want, region.dtype, region.dtype)
          assert.equal(LONG[region.dtype], got[1].dtype)
          assert.equal("float32", got[2].dtype)
          assert.equal(2, counts["linear_" .. name])
        end
      end
    end)
  end

  it("takes the option in a table, alone, and as a method; none is as before", function()
    local x, w, b = filled({3, 4}, 1), filled({5, 4}, 2), filled({5}, 3)
    local want = F.linear(x, w, b):relu()
    agree(F.linear(x, w, b, {activation = "relu"}), want)
    agree(F.linear(x, w, b, "relu"), want)
    agree(x:linear(w, b, "relu"), want)
    assert.equal(0.0, want:min():item())
    for _, opts in ipairs {{}, {activation = nil}} do
      local counts, y = counted(F.linear, x, w, b, opts)
      assert.same({linear = 1}, counts)
      numbers.assert_same(y, F.linear(x, w, b))
    end
    local inf, nan = math.huge, 0 / 0
    numbers.assert_same(F.linear(hm.tensor {{inf}, {-inf}, {nan}}, hm.ones {1, 1}, nil, "relu"), {inf, 0, nan})
  end)

  it("has second derivatives, and works in a checkpoint", function()
    for name in pairs(ACTIVATIONS) do
      local found = {}
      for i, linear in ipairs {F.linear, composed} do
        local list = operands("f64", true)
        local y = two_layers(linear, list, name)
        local first = autograd.grad(y:square():sum(), {list[2], list[1]}, {create_graph = true})
        local second = autograd.grad(first[1]:square():sum() + first[2]:square():sum(), list)
        found[i] = {first[1], first[2], table.unpack(second)}
      end
      for i, t in ipairs(found[2]) do
        numbers.assert_near(found[1][i], t, 0, 1e-11 * t:detach():abs():max():item(), ("%s, %d"):format(name, i))
      end
      local plain, again = operands("f32", true), operands("f32", true)
      two_layers(F.linear, plain, name):sum():backward()
      hm.checkpoint(two_layers, F.linear, again, name):sum():backward()
      for i, t in ipairs(plain) do agree(again[i].grad, t.grad) end
    end
  end)

  it("says what does not fit in linear's name", function()
    local x = hm.ones {2, 3}
    raises({"linear: inner sizes differ: x is f32[2,3]", "weight is f32[4,5]", "3 (last dim of x) must equal 5"}, F.linear, x,
      hm.ones {4, 5}, nil, "relu")
    raises("linear: bias must be [4], one for each row of weight, came f32[3]", F.linear, x, hm.ones {4, 3}, hm.ones {3}, "gelu_tanh")
    raises("linear: weight must be a tensor, not nil", F.linear, x, nil, nil, "relu")
    local message = raises({"linear: dtypes differ", "hint: convert one with :to(\"f32\")"}, F.linear, x, hm.ones({4, 3}):half(), nil,
      "relu")
    assert.falsy(message:find("linear_relu", 1, true))
    message = raises("linear: needs a floating dtype", F.linear, x:long(), hm.ones({4, 3}):long(), nil, "gelu_tanh")
    assert.falsy(message:find("linear_gelu", 1, true))
    raises("linear: option 'activation' must be one of relu, gelu_tanh, not \"gelu\"", F.linear, x, hm.ones {4, 3}, nil, "gelu")
    raises("linear: option 'activation' must be string, not true", F.linear, x, hm.ones {4, 3}, nil, {activation = true})
    raises("linear: unknown option 'activatoin', did you mean 'activation'?", F.linear, x, hm.ones {4, 3}, nil, {activatoin = "relu"})
    raises("linear: options must be a table", F.linear, x, hm.ones {4, 3}, nil, x)
  end)
end)

-- ====== Autocast ======

describe("classes overridden", function()
  local x, w = filled({3, 4}, 1), filled({5, 4}, 2)

  --- dtypes of the two activations' results and of linear alone, of operands of a dtype.
  local function dtypes(low)
    local a, b = x:to(low), w:to(low)
    return {F.linear(a, b).dtype, F.linear(a, b, nil, "relu").dtype, F.linear(a, b, nil, "gelu_tanh").dtype}
  end
  local F32, F16 = {"float32", "float32", "float32"}, {"float16", "float16", "float16"}

  it("for linear hold for linear with an activation", function()
    for class, want in pairs {follow = {F32, F16}, f32 = {F32, F32}, promote = {F32, F16}, low = {F16, F16}} do
      amp.autocast({ops = {linear = class}}, function()
        assert.same(want[1], dtypes("f32"), class)
        assert.same(want[2], dtypes("f16"), class)
        assert.equal(1, (counted(F.linear, x, w, nil, "relu")).linear_relu, class)
        amp.autocast("f16", function() assert.same(want[1], dtypes("f32"), class .. ", inherited") end)
      end)
      for name in pairs(ACTIVATIONS) do
        local got, two = both(name, "f32", true, {dtype = "f16", ops = {linear = class}})
        assert_equal(got, two, class, "f16")
      end
    end
    amp.autocast("f16", function() assert.same(F16, dtypes("f32")) end)
  end)

  it("by the op's own name go first, in one table; a later region's count again", function()
    amp.autocast({ops = {linear_relu = "follow"}}, function()
      assert.same({"float16", "float32", "float16"}, dtypes("f32"))
      amp.autocast({ops = {exp = "low"}}, function() assert.same({"float16", "float32", "float16"}, dtypes("f32")) end)
      amp.autocast({ops = {linear = "low"}}, function() assert.same(F16, dtypes("f32")) end)
    end)
    amp.autocast({ops = {linear = "follow", linear_relu = "low"}}, function()
      assert.same({"float32", "float16", "float32"}, dtypes("f32"))
    end)
  end)

  it("for the activation keep it apart from linear", function()
    local region = {dtype = "f16", ops = {relu = "float32"}}
    local counts, y = counted(amp.autocast, region, F.linear, x, w, nil, "relu")
    assert.same({1, 1, nil}, {counts.linear, counts.relu, counts.linear_relu})
    assert.equal("float32", y.dtype)
    amp.autocast(region, function()
      assert.equal(1, counted(F.linear, x, w, nil, "gelu_tanh").linear_gelu_tanh)
      amp.autocast({enabled = false}, function() assert.equal(1, counted(F.linear, x, w, nil, "relu").linear_relu) end)
      coroutine.wrap(function() assert.equal(1, counted(F.linear, x, w, nil, "relu").linear_relu) end)()
    end)
    for name in pairs(ACTIVATIONS) do
      local got, two = both(name, "f32", true, {dtype = "bf16", ops = {[name] = "float32"}})
      assert_equal(got, two, name, "bf16")
    end
    assert.equal(1, counted(F.linear, x, w, nil, "relu").linear_relu)
  end)
end)

describe("in a region of fp8", function()
  local on_cpu = devices.cpu_cases("regions of \"fp8\" are an emulation on the cpu", it)

  for name in pairs(ACTIVATIONS) do
    on_cpu("linear and its activation are two ops: " .. name, function()
      local results = {}
      for i, linear in ipairs {F.linear, composed} do
        local recipe, list = amp.DelayedScaling {}, operands("f32", true)
        for step = 1, 3 do -- the first finds the scales
          for _, t in ipairs(list) do t.grad = nil end
          local counts, y = counted(amp.autocast, {dtype = "fp8", recipe = recipe}, two_layers, linear, list, name)
          assert.same({2, 2, nil}, {counts.linear, counts[name], counts["linear_" .. name]}, step)
          y:square():mean():backward()
          results[i] = {y}
          for _, t in ipairs(list) do table.insert(results[i], t.grad) end
        end
        local sites = recipe:sites()
        assert.same({2, "linear", "linear"}, {#sites, sites[1].op, sites[2].op})
        results[i].scales = {}
        for _, site in ipairs(sites) do
          for _, slot in ipairs(site.slots) do table.insert(results[i].scales, slot.scale) end
        end
      end
      assert_equal(results[1], results[2], name)
      assert.same(results[2].scales, results[1].scales)
      assert.is_true((results[1][1] - two_layers(F.linear, operands("f32", true), name)):abs():max():item() > 1e-3)
    end)
  end

  on_cpu("an inner region of another kind takes the one op", function()
    local x, w = filled({3, 4}, 1), filled({5, 4}, 2)
    amp.autocast("fp8", function()
      amp.autocast("bf16", function() assert.equal(1, counted(F.linear, x, w, nil, "relu").linear_relu) end)
      amp.autocast({enabled = false}, function() assert.equal(1, counted(F.linear, x, w, nil, "relu").linear_relu) end)
      assert.equal(1, counted(F.linear, x, w, nil, "relu").relu)
    end)
    amp.default_recipe():forget()
  end)
end)

-- ====== nn.Linear ======

describe("nn.Linear with an activation", function()
  it("is the layer and the activation behind it, from the same first values and state", function()
    for name, layer in pairs {relu = nn.ReLU(), gelu_tanh = nn.GELU {approximate = "tanh"}} do
      hm.manual_seed(3)
      local plain = nn.Linear(6, 4)
      hm.manual_seed(3)
      local m = nn.Linear(6, 4, {activation = name})
      assert.same(keys(plain:state_dict()), keys(m:state_dict()))
      numbers.assert_same(m.weight, plain.weight)
      numbers.assert_same(m.bias, plain.bias)
      assert.equal(name, m.activation)
      local x = filled({5, 6}, 1)
      agree(m(x), layer(plain(x)))
      local counts = counted(m, x)
      assert.same({["linear_" .. name] = 1}, counts)
      m(x):sum():backward()
      layer(plain(x)):sum():backward()
      agree(m.weight.grad, plain.weight.grad)
      agree(m.bias.grad, plain.bias.grad)
      local bare = nn.Linear(6, 4, {activation = name, bias = false, dtype = "f64"})
      assert.equal("float64", bare(x:double()).dtype)
      local report = nn.Linear(6, 4, {activation = name}):load_state_dict(plain:state_dict())
      assert.same({missing = {}, unexpected = {}}, report)
    end
  end)

  it("says so, in copies and other dtypes, too", function()
    local m = nn.Linear(3, 4, {activation = "relu"})
    assert.equal("Linear(3 -> 4, relu)", tostring(m))
    assert.equal("Linear(3 -> 4, no bias, gelu_tanh)", tostring(nn.Linear(3, 4, {activation = "gelu_tanh", bias = false})))
    assert.equal("Linear(3 -> 4)", tostring(nn.Linear(3, 4)))
    local copy = m:clone():half()
    assert.equal("Linear(3 -> 4, relu)", tostring(copy))
    assert.same({linear_relu = 1}, (counted(copy, hm.ones({2, 3}):half())))
    raises("nn.Linear: option 'activation' must be one of relu, gelu_tanh, not \"gelu\"", nn.Linear, 3, 4, {activation = "gelu"})
    raises("nn.Linear: option 'activation' must be string", nn.Linear, 3, 4, {activation = F.relu})
    raises({"linear: inner sizes differ", "in Sequential.0 (Linear 3 -> 4, relu)"}, nn.Sequential(m), hm.ones {2, 5})
  end)

  it("a subclass may keep an activation of its own under that name", function()
    local Block = nn.class("Block", nn.Linear)
    function Block:init(...)
      nn.Linear.init(self, ...)
      self.activation = nn.Tanh()
    end
    function Block:forward(x) return self.activation(nn.Linear.forward(self, x)) end
    local m, x = Block(3, 4), filled({2, 3}, 1)
    numbers.assert_same(m(x), F.linear(x, m.weight, m.bias):tanh())
    assert.truthy(tostring(m):find("Block(3 -> 4\n  (activation): Tanh()", 1, true))
  end)

  it("quantisation keeps the activation", function()
    hm.manual_seed(4)
    local x = filled({5, 6}, 1)
    local plain, m = nn.Linear(6, 4), nn.Linear(6, 4, {activation = "relu"})
    m:load_state_dict(plain:state_dict())
    plain, m = nn.quantize.prepare_qat(plain), nn.quantize.prepare_qat(m)
    assert.equal("QATLinear(6 -> 4, relu", (tostring(m):match("^[^\n]*")))
    agree(m(x), plain(x):relu())
    local counts = counted(m, x)
    assert.same({1, nil}, {counts.linear_relu, counts.relu})
    m(x):square():sum():backward()
    plain(x):relu():square():sum():backward()
    agree(m.weight.grad, plain.weight.grad)
    assert.equal("relu", nn.quantize.convert(m)[""].activation)
    assert.is_nil(nn.quantize.convert(plain)[""].activation)
    raises("expected a Linear", nn.QATLinear, m)
  end)

  it("is one layer of a layer scale, whose rule knows how steep the activation is", function()
    for name, slope in pairs {relu = 1.0, gelu_tanh = 1.13} do
      hm.manual_seed(5)
      local model = nn.Sequential(nn.Linear(6, 8, {activation = name}), nn.Linear(8, 8, {activation = name}), nn.Linear(8, 3))
      local x, heard = filled({5, 6}, 1), {}
      local want = layers.gradients(model, function() return model(x):square():sum() end)
      local ls = amp.layer_scale(model, "layerwise", {scales = {["0"] = 4, ["1"] = 32, ["2"] = 2}})
      for key, g in pairs(layers.gradients(model, function() return model(x):square():sum() end)) do agree(g, want[key], key) end
      ls:remove()
      ls = amp.layer_scale(model, {backward = function(_, event)
        heard[#heard + 1] = event.grad()
        return 1.0
      end})
      model(x):sum():backward()
      ls:remove()
      numbers.assert_near({heard[1].amax, heard[1].norm}, {1, math.sqrt(15)}, 1e-6) -- the last layer has no activation
      local g = model[3].weight:detach():sum(1) -- what comes to the layer before it
      numbers.assert_near({heard[2].amax, heard[2].norm}, {slope * g:abs():max():item(), slope * math.sqrt(5) * g:norm():item()}, 1e-5)
      assert.equal(40, heard[2].count)
    end
    -- The slope is a bound, and not far above.
    local t = hm.linspace(-6, 6, 4001, {dtype = "f64"}):requires_grad_()
    core.gelu_tanh(t):sum():backward()
    local steepest = t.grad:abs():max():item()
    assert(steepest <= 1.13 and steepest > 1.128, steepest)
  end)

  it("amp.debug names the layer where its result overflows", function()
    local model = nn.Sequential(nn.Linear(2, 2, {activation = "relu"}))
    core.no_grad(function()
      model[1].weight:fill_(300)
      model[1].bias:fill_(0)
    end)
    local report = amp.debug(function() amp.autocast("f16", model, hm.tensor {{300, 300}}) end)
    assert.same({true, "linear_relu", "Sequential.0 (Linear 2 -> 2, relu)"}, {report.made, report.op, report.module})
    -- Below zero relu leaves nothing that is not finite.
    assert.is_false(amp.debug(function() amp.autocast("f16", model, hm.tensor {{-300, -300}}) end).found)
  end)
end)

-- ====== Transformers ======

describe("the transformer's feed-forward block", function()
  local x = filled({3, 2, 8}, 1)

  --- A layer from the same first values each time.
  local function layer(activation)
    hm.manual_seed(6)
    return nn.TransformerEncoderLayer(8, 2, {dim_feedforward = 16, dropout = 0, activation = activation})
  end

  --- Result and gradients of a layer, and the ops that ran forward.
  local function run(m, region)
    m:zero_grad()
    local counts, y
    if region then counts, y = counted(amp.autocast, region, m, x) else counts, y = counted(m, x) end
    (y:float() * filled(y.shape, 2)):sum():backward()
    local all = {y}
    for _, p in m:named_parameters() do all[#all + 1] = p.grad end
    return all, counts
  end

  local tanh = nn.GELU {approximate = "tanh"}
  local cases = {
    {"relu", "relu"}, {F.relu, "relu"}, {hm.relu, "relu"}, {nn.ReLU(), "relu"}, {"gelu_tanh", "gelu_tanh"}, {hm.gelu_tanh, "gelu_tanh"},
    {tanh, "gelu_tanh"},
  }

  it("applies relu and gelu by tanh in linear1's op: the same as apart", function()
    for i, case in ipairs(cases) do
      for _, region in ipairs {false, "f16", "bf16"} do
        local m, apart = layer(case[1]), layer(case[1])
        local hook = apart.linear1:register_forward_hook(function() end)
        local got, counts = run(m, region)
        assert.same({1, nil}, {counts["linear_" .. case[2]], counts[case[2]]}, i)
        local want, two = run(apart, region)
        assert.same({nil, 1}, {two["linear_" .. case[2]], two[case[2]]}, i)
        assert_equal(got, want, ("case %d"):format(i), region)
        hook.remove()
        assert.equal(1, select(2, run(apart, region))["linear_" .. case[2]])
      end
    end
    assert.equal("TransformerEncoderLayer(8, 2 heads, gelu_tanh", (tostring(layer("gelu_tanh")):match("^[^\n]*")))
  end)

  it("leaves other activations apart", function()
    for _, activation in ipairs {"gelu", F.silu, nn.GELU(), function(h) return h:relu() end} do
      local _, counts = run(layer(activation))
      for name in pairs(ACTIVATIONS) do assert.is_nil(counts["linear_" .. name]) end
    end
  end)

  it("goes through whatever stands in linear1 and activation", function()
    local seen = 0
    local m = layer(nn.ReLU())
    m.activation:register_forward_hook(function() seen = seen + 1 end)
    assert.equal(1, select(2, run(m)).relu)
    assert.equal(1, seen)
    m = layer("relu")
    local Doubled = nn.class("Doubled", nn.Linear)
    function Doubled:forward(h) return nn.Linear.forward(self, h) * 2 end
    m.linear1 = Doubled(8, 16)
    assert.equal(1, select(2, run(m)).relu)
    m = layer("relu")
    local want = run(m)[1]
    nn.quantize.prepare_qat(m, {weight = false, activation = false})
    agree(run(m)[1], want)
    m = layer("relu")
    m.linear1 = nn.Linear(8, 16, {activation = "gelu_tanh"})
    local _, counts = run(m)
    assert.same({1, 1, nil}, {counts.linear_gelu_tanh, counts.relu, counts.linear_relu})
    m = layer("relu")
    m.activation = hm.tanh -- a field as any other
    assert.equal(1, select(2, run(m)).tanh)
    m = layer("relu")
    m.linear1 = nn.Linear(5, 16)
    raises({"linear: inner sizes differ", "in TransformerEncoderLayer.linear1 (Linear 5 -> 16)"}, m, x)
    assert.is_nil(require("halfmoon.nn.class").path())
  end)

  it("keeps them apart in a region of fp8", devices.cpu_only("regions of \"fp8\" are an emulation on the cpu", function()
    local _, counts = run(layer("relu"), {dtype = "fp8", recipe = amp.DelayedScaling {}})
    assert.same({1, nil}, {counts.relu, counts.linear_relu})
  end))
end)
