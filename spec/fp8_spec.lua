-- fp8_spec.lua -- the 8-bit floats: what they hold, what can be done with them and what is refused; and amp.autocast("fp8"), which
-- computes products on factors rounded to them, with delayed scaling.  (Every code and every tie: spec/support/conversions.lua.)

local hm = require "halfmoon"
local core = require "halfmoon.core"
local bits = require "spec.support.bits"
local devices = require "spec.support.devices"
local files = require "spec.support.files"
local numbers = require "spec.support.numbers"
local raises = require "spec.support.raises"
local reference = require "spec.reference.elementwise"

local nn, optim, amp = hm.nn, hm.optim, hm.amp
local F = nn.functional
local nan, inf = 0 / 0, math.huge
local scratch = files.folder(setup, teardown)

local FORMATS = {float8_e4m3 = {3, -6, 448.0}, float8_e5m2 = {2, -14, 57344.0}}
local function rounded(dtype, x) return reference.to_f8(x, table.unpack(FORMATS[dtype])) end

local function is_nan(x) return x ~= x end

describe("8-bit floats", function()
  it("have the names that other libraries use", function()
    for name, long in pairs {f8_e4m3 = "float8_e4m3", f8e4m3 = "float8_e4m3", float8_e4m3fn = "float8_e4m3",
      f8_e5m2 = "float8_e5m2", f8e5m2 = "float8_e5m2", float8_e5m2 = "float8_e5m2"} do
      assert.equal(long, hm.zeros({1}, {dtype = name}).dtype)
      assert.equal(long, hm.finfo(name).dtype)
    end
    assert.equal(1, hm.zeros({3}, {dtype = "f8_e4m3"}):element_size())
    assert.is_true(hm.zeros({3}, {dtype = "f8_e4m3"}):is_floating_point())
    raises({"unknown dtype", "f8_e4m4", "f8_e4m3"}, hm.zeros, {1}, {dtype = "f8_e4m4"})
  end)

  it("hold what finfo says", function()
    local e4m3, e5m2 = hm.finfo("f8_e4m3"), hm.finfo("f8_e5m2")
    assert.same({448.0, 0.125, 2.0 ^ -6, 2.0 ^ -9, 8}, {e4m3.max, e4m3.eps, e4m3.tiny, e4m3.smallest_subnormal, e4m3.bits})
    assert.same({57344.0, 0.25, 2.0 ^ -14, 2.0 ^ -16, 8}, {e5m2.max, e5m2.eps, e5m2.tiny, e5m2.smallest_subnormal, e5m2.bits})
    for dtype in pairs(FORMATS) do
      local info = hm.finfo(dtype)
      local list = {info.max, info.min, info.tiny, info.smallest_subnormal, 1 + info.eps}
      assert.same(list, hm.tensor(list, {dtype = dtype}):totable())
      assert.equal(0.0, hm.tensor({info.smallest_subnormal / 2}, {dtype = dtype}):item())
    end
  end)

  it("overflow to NaN (e4m3) or infinity (e5m2), and saturate on request", function()
    local list = {448, 464, 464.1, 480, -1e30, inf, -inf, nan}
    local x = hm.tensor(list)
    local got = x:to("f8_e4m3"):totable()
    assert.same({448.0, 448.0}, {got[1], got[2]}) -- 464 lies half way: the even neighbour
    for i = 3, 8 do assert(is_nan(got[i]), i) end
    got = x:to {dtype = "f8_e4m3", saturate = true}:totable()
    assert.same({448.0, 448.0, 448.0, 448.0, -448.0, 448.0, -448.0}, table.move(got, 1, 7, 1, {}))
    assert(is_nan(got[8]))
    x = hm.tensor({57344, 61439, 61440, -65536, inf, nan})
    got = x:to("f8_e5m2"):totable()
    assert.same({57344.0, 57344.0, inf, -inf, inf}, table.move(got, 1, 5, 1, {}))
    assert(is_nan(got[6]))
    got = x:to {dtype = "f8_e5m2", saturate = true}:totable()
    assert.same({57344.0, 57344.0, 57344.0, -57344.0, 57344.0}, table.move(got, 1, 5, 1, {}))
    assert(is_nan(got[6]))
  end)

  for dtype in pairs(FORMATS) do
    it("saturate as plain arithmetic has it, from every dtype: " .. dtype, function()
      local list = {}
      for e = -20, 18 do
        for _, m in ipairs {1, 1.0625, 1.125, 1.1875, 1.3, 1.375, 1.5, 1.625, 1.7501, 1.875, 1.9375, 1.99} do
          list[#list + 1] = m * 2.0 ^ e
          list[#list + 1] = -m * 2.0 ^ e
        end
      end
      for _, from in ipairs {"f64", "f32", "bf16", "f16"} do
        local x = hm.tensor(list, {dtype = from})
        local want, got = x:totable(), x:to {dtype = dtype, saturate = true}:totable()
        for i, v in ipairs(want) do assert.equal(rounded(dtype, v), got[i], ("%s %a"):format(from, v)) end
      end
      local x = hm.tensor({-100000, -449, 0, 17, 19, 447, 100000}, {dtype = "i64"})
      for i, v in ipairs(x:to {dtype = dtype, saturate = true}:totable()) do
        assert.equal(rounded(dtype, x[i]:item() + 0.0), v)
      end
      local other = hm.tensor({1e4, -1e4, 3}, {dtype = "f8_e5m2"}):to {dtype = dtype, saturate = true}
      for i, v in ipairs {10240.0, -10240.0, 3.0} do assert.equal(rounded(dtype, v), other[i]:item()) end
    end)

    it("are made, copied, viewed and read: " .. dtype, function()
      local o = {dtype = dtype}
      assert.same({0.0, 0.0}, hm.zeros({2}, o):totable())
      assert.same({1.0, 1.0}, hm.ones({2}, o):totable())
      assert.same({{3.5}, {3.5}}, hm.full({2, 1}, 3.5, o):totable())
      assert.same({0}, hm.empty({0}, o).shape)
      local t = hm.tensor({{1, 2, 3}, {4, 5, 6}}, o)
      assert.same({{1.0, 4.0}, {2.0, 5.0}, {3.0, 6.0}}, t:t():contiguous():totable())
      assert.same({{1.0, 4.0}, {2.0, 5.0}, {3.0, 6.0}}, t:t():totable())
      assert.equal(5.0, t[2][2]:item())
      assert.same({{2.0, 3.0}}, t[{{1, 1}, {2, 3}}]:totable())
      assert.same({2, 3, 4}, t:view(2, 3, 1):expand(2, 3, 4).shape)
      assert.same({{1.0, 1.0}}, t[{{1, 1}, {1, 1}}]:expand(1, 2):clone():totable())
      t[1] = 7
      t[{2, {1, 2}}] = hm.tensor({0.5, 0.25})
      assert.same({{7.0, 7.0, 7.0}, {0.5, 0.25, 6.0}}, t:totable())
      t:copy_(hm.tensor({10, 8, 1.0625})) -- broadcast; the last lies at or below a tie
      assert.same({{10.0, 8.0, 1.0}, {10.0, 8.0, 1.0}}, t:totable())
      assert.same({2, 6}, hm.cat({t, t}, 2).shape)
      assert.equal(dtype, hm.stack({t, t}).dtype)
      assert.equal(dtype, t:detach():reshape(3, 2):flatten().dtype)
      assert.same(t:totable(), t:to("cpu"):totable())
      assert.equal(dtype, (tostring(t):match("%[(f8_%w+)") or ""):gsub("^f8", "float8"))
      assert.truthy(tostring(t):find("10 ", 1, true))
      local channels = hm.arange(48):view(1, 3, 4, 4):to("f32"):contiguous("channels_last")
      assert.is_true(channels:to(dtype):float():eq(channels:contiguous():to(dtype):float()):all():item())
      raises({"cat", "promote to nothing"}, hm.cat, {t, t:float()})
    end)

    it("come back from a file: " .. dtype, function()
      local codes = {}
      for h = 0, 255 do codes[h + 1] = h end
      local t = bits.from_patterns(dtype, codes):view(16, 16)
      assert.is_true(hm.save(scratch.path_of("f8"), {t = t, turned = t:t(), none = hm.zeros({0, 2}, {dtype = dtype})}))
      local text = files.read(scratch.path_of("f8"))
      assert.truthy(text:find(dtype == "float8_e4m3" and '"F8_E4M3"' or '"F8_E5M2"', 1, true))
      local back = assert(hm.load(scratch.path_of("f8")))
      assert.equal(dtype, back.t.dtype)
      assert.same(codes, bits.patterns(back.t))
      assert.equal(codes[17], bits.patterns(back.turned)[2])
      raises({"the format has no " .. dtype, "hint", "safetensors"}, hm.save, scratch.path_of("f8.npy"), t)
    end)

    it("are refused by everything that computes: " .. dtype, function()
      local t = hm.ones({2, 2}, {dtype = dtype})
      local want = {"8-bit floats are for storing and converting", "hint", 'to("f32")'}
      for name, fn in pairs {
        add = function() return t + 1 end, both = function() return t + t end, mixed = function() return hm.ones({2, 2}) * t end,
        matmul = function() return t:matmul(t) end, sum = function() return t:sum() end, to_sum = function() return
          hm.ones({2}):sum {dtype = dtype} end, softmax = function() return t:softmax(1) end, relu = function() return t:relu() end,
        inplace = function() return t:add_(1) end, into = function() return hm.ones({2, 2}):add_(t) end,
        random = function() return hm.rand({2}, {dtype = dtype}) end, arange = function() return hm.arange(3, {dtype = dtype}) end,
        gather = function() return t:index_select(1, hm.tensor({0}, {dtype = "i64"})) end, sort = function() return t:sort() end,
        eq = function() return t:eq(t) end, isnan = function() return t:isnan() end, where = function() return
          hm.where(hm.tensor({true, false}), t, 0) end,
      } do
        local ok, message = pcall(fn)
        assert(not ok, name)
        for _, part in ipairs(want) do assert(message:find(part, 1, true), name .. ": " .. message) end
      end
      raises({"requires_grad", "8-bit floats"}, hm.ones, {2}, {dtype = dtype, requires_grad = true})
      raises({"requires_grad", "8-bit floats"}, function() t.requires_grad = true end)
      raises({"16 bits or more"}, optim.SGD, {t}, {lr = 1})
      raises({"saturate is for"}, function() return hm.ones({2}):to {dtype = "f16", saturate = true} end)
      assert.equal(4.0, t:float():sum():item()) -- and nothing was written
    end)

    it("pass gradients on in float32, not rounded: " .. dtype, function()
      local x = hm.tensor({1.03, -2.06, 300}):requires_grad_()
      local y = x:to(dtype)
      assert.is_true(y.requires_grad)
      local weights = hm.tensor({0.123456789, 1e-30, 70000.5})
      local z = y:view(3, 1):clone():float():flatten() * weights
      z:sum():backward()
      numbers.assert_same(x.grad, weights)
      x.grad = nil
      y = x:to(dtype)
      y:backward(weights)
      numbers.assert_same(x.grad, weights)
      local half = hm.tensor({1.03}, {dtype = "f16"}):requires_grad_()
      half:to(dtype):float():sum():backward()
      assert.equal("float16", half.grad.dtype)
      local into = hm.zeros({3}, {dtype = dtype})
      local source = hm.tensor({1.03, -2.06, 300}):requires_grad_()
      into:copy_(source):float():mul(weights):sum():backward()
      numbers.assert_same(source.grad, weights)
      local held = hm.tensor({1, 1e9}):requires_grad_()
      held:to {dtype = dtype, saturate = true}:float():sum():backward()
      assert.same({1.0, 0.0}, held.grad:totable()) -- as a clamp has it
    end)
  end

  it("are rows of a loader, as they are or converted", devices.cpu_only("batches are gathered on the cpu", function()
    local x = hm.tensor({{1, 2}, {3, 4}, {5, 6}}, {dtype = "f8_e5m2"})
    for _, case in ipairs {{nil, "float8_e5m2"}, {"f32", "float32"}} do
      local loader = hm.data.DataLoader(hm.data.TensorDataset(x), {batch_size = 2, dtype = case[1]})
      local seen = {}
      for batch in loader:batches() do
        assert.equal(case[2], batch.dtype)
        for _, row in ipairs(batch:totable()) do seen[#seen + 1] = row end
      end
      assert.same({{1.0, 2.0}, {3.0, 4.0}, {5.0, 6.0}}, seen)
    end
  end))

  it("round by hm.fp8_round as a saturating conversion does, but let infinities through", function()
    local x = hm.randn({4099}) * 300
    for dtype, format in pairs {float8_e4m3 = "e4m3", float8_e5m2 = "e5m2"} do
      for _, scale in ipairs {1, 0.37, 64, 2.0 ^ 20} do
        local want = (x * scale):to {dtype = dtype, saturate = true}:float() / scale
        numbers.assert_same(hm.fp8_round(x, scale, format), want)
      end
      local got = hm.fp8_round(hm.tensor({inf, -inf, nan, 3e38}), 3e38, format):totable()
      assert.same({inf, -inf}, {got[1], got[2]})
      assert(is_nan(got[3]) and got[4] > 0 and got[4] < inf)
    end
  end)
end)

-- ====== amp.autocast("fp8") ======

local on_cpu = devices.cpu_cases("regions of \"fp8\" are an emulation on the cpu", it)

--- Runs fn in a region with a recipe.
local function inside(recipe, fn, ...) return amp.autocast({dtype = "fp8", recipe = recipe}, fn, ...) end

--- The next step begins.
local function next_step(recipe) inside(recipe, function() end) end

local function slot(recipe, site, name)
  for _, s in ipairs(recipe:sites()[site].slots) do if s.name == name then return s end end
  error("no slot " .. name)
end

--- What a slot makes of a tensor, in float64.
local function by_slot(t, s)
  local list = numbers.flat(t)
  for i, v in ipairs(list) do
    local scaled = string.unpack("<f", string.pack("<f", v * s.scale)) -- the product is a float32
    local r = reference.to_f8(scaled, table.unpack(FORMATS["float8_" .. s.format]))
    list[i] = string.unpack("<f", string.pack("<f", r / s.scale))
  end
  return hm.tensor(list, {dtype = "f64"}):view(t.shape)
end

describe("DelayedScaling", function()
  local function scales(opts, amaxes)
    local recipe, list = amp.DelayedScaling(opts), {}
    local w = hm.ones({1, 1}):requires_grad_()
    for i, amax in ipairs(amaxes) do
      inside(recipe, F.linear, hm.tensor({{-amax}}), w)
      next_step(recipe)
      list[i] = slot(recipe, 1, "x").scale
    end
    return list
  end

  on_cpu("follows the golden trace", function()
    assert.same({224.0, 112.0, 112.0, 112.0, 448.0, 448.0}, scales({amax_history_len = 3}, {2, 4, 1, 1, 1, 1}))
  end)

  on_cpu("follows the newest step, or divides by 2^margin, on request", function()
    assert.same({224.0, 112.0, 448.0}, scales({amax_compute_algo = "most_recent"}, {2, 4, 1}))
    assert.same({56.0, 28.0, 28.0}, scales({margin = 2}, {2, 4, 1}))
    assert.same({896.0}, scales({margin = -2}, {2}))
  end)

  on_cpu("keeps a scale where amax is zero or not finite, also afterwards", function()
    assert.same({224.0, 224.0, 224.0, 224.0, 112.0}, scales({amax_history_len = 4}, {2, 0, inf, nan, 4}))
    assert.same({1.0, 448.0}, scales({}, {0, 1}))
    local largest = string.unpack("<f", string.pack("<I4", 0x7f7fffff))
    assert.same({largest}, scales({}, {1e-40})) -- 448 / 1e-40 is infinite
  end)

  on_cpu("rolls once for each outermost region, and only what was noted", function()
    local recipe = amp.DelayedScaling {amax_history_len = 2}
    local w = hm.ones({1, 1}):requires_grad_()
    inside(recipe, function()
      F.linear(hm.tensor({{8}}), w)
      inside(recipe, F.linear, hm.tensor({{16}}), w) -- the same product again: the larger counts
      amp.autocast({enabled = false}, function() inside(recipe, F.linear, hm.tensor({{2}}), w) end)
      amp.autocast("bf16", function() inside(recipe, F.linear, hm.tensor({{2}}), w) end)
    end)
    assert.equal(1.0, slot(recipe, 1, "x").scale)
    assert.equal(1, #recipe:sites())
    for _ = 1, 3 do next_step(recipe) end
    assert.equal(28.0, slot(recipe, 1, "x").scale)
    assert.same({16.0}, slot(recipe, 1, "x").history)
    hm.no_grad(inside, recipe, F.linear, hm.tensor({{100}}), w)
    next_step(recipe)
    assert.equal(28.0, slot(recipe, 1, "x").scale)
  end)

  it("refuses what it has not", function()
    raises({"DelayedScaling", "e5m2", "hint"}, amp.DelayedScaling, {format = "e5m2"})
    raises({"format must be"}, amp.DelayedScaling, {format = "e3m4"})
    raises({"amax_compute_algo must be"}, amp.DelayedScaling, {amax_compute_algo = "mean"})
    raises({"amax_history_len must be 1 to"}, amp.DelayedScaling, {amax_history_len = 0})
    raises({"margin must be"}, amp.DelayedScaling, {margin = 1000})
    raises({"unknown option", "margin"}, amp.DelayedScaling, {marign = 1})
    raises({"recipe must be an amp.DelayedScaling"}, amp.autocast, {dtype = "fp8", recipe = {}})
    raises({"a recipe is for dtype"}, amp.autocast, {dtype = "bf16", recipe = amp.DelayedScaling()})
    raises({"dtype must be float16 or bfloat16", '"fp8"'}, amp.autocast, "f8_e4m3")
  end)

  on_cpu("tells its slots by the names of parameters", function()
    local recipe, model = amp.DelayedScaling(), nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    assert.truthy(recipe:report():find("no product has come by yet", 1, true))
    local q = hm.randn({1, 1, 2, 4})
    inside(recipe, function()
      model(hm.ones({2, 3})):sum():backward()
      F.scaled_dot_product_attention(q, q, q)
    end)
    local list = recipe:slots(model)
    assert.equal(3 + 3 + 4, #list)
    assert.same({"0.weight", "x", "e4m3", 1.0}, {list[1].name, list[1].slot, list[1].format, list[1].amax})
    assert.same({"2.weight", "gradient", "e5m2", 1.0}, {list[6].name, list[6].slot, list[6].format, list[6].amax})
    assert.same({"attention #1", "q"}, {list[7].name, list[7].slot})
    local text = recipe:report(model)
    for _, part in ipairs {"0.weight", "2.weight", "attention #1", "e5m2", "history 1024"} do
      assert(text:find(part, 1, true), text)
    end
    assert.truthy(tostring(recipe):find("3 products", 1, true))
  end)

  on_cpu("lets go of weights that nobody else holds", function()
    local recipe = amp.DelayedScaling()
    do inside(recipe, F.linear, hm.ones({1, 2}), hm.ones({1, 2}):requires_grad_()) end
    assert.equal(1, #recipe:sites())
    collectgarbage()
    collectgarbage()
    next_step(recipe)
    assert.equal(0, #recipe:sites())
  end)

  on_cpu("lets go of a weight that two kinds of products had, and of none that is in use", function()
    local recipe, kept = amp.DelayedScaling(), hm.ones({2, 2}):requires_grad_()
    local function both(w) return F.linear(hm.matmul(hm.ones({1, 2}), w), w) end
    do inside(recipe, both, hm.ones({2, 2}):requires_grad_()) end
    inside(recipe, both, kept)
    collectgarbage()
    collectgarbage()
    next_step(recipe)
    assert.equal(2, #recipe:sites())
    assert.same({1, 2}, recipe:find(kept))
  end)

  on_cpu("keeps the state of products that are still to come", function()
    local recipe, again = amp.DelayedScaling(), amp.DelayedScaling()
    local a, w = hm.ones({2, 2}), hm.ones({2, 2}):requires_grad_()
    inside(recipe, function() F.linear(a:matmul(a * 3), w) end)
    next_step(recipe)
    local state = recipe:state_dict()
    again:load_state_dict(state)
    assert.same(state, again:state_dict())
    local bad = recipe:state_dict()
    bad.sites[2].op = nil
    raises("an op must be a string", again.load_state_dict, again, bad)
    assert.same(state, again:state_dict()) -- nothing of it was taken
    inside(again, F.linear, a, w) -- one of the two comes by
    assert.equal(2, #again:state_dict().sites)
    assert.equal("linear", again:state_dict().sites[1].op)
    assert.same(state.sites[1], again:state_dict().sites[2])
  end)

  on_cpu("goes on from a state dict as it would have", function()
    local function run(save_at)
      hm.manual_seed(3)
      local model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
      local recipe = amp.DelayedScaling {amax_history_len = 3}
      local opt = optim.SGD(model:parameters(), {lr = 0.5})
      local x, losses = hm.randn({16, 4}), {}
      for i = 1, 6 do
        if i == save_at then
          assert.is_true(hm.save(scratch.path_of("recipe"), {fp8 = recipe:state_dict()}))
          recipe = amp.DelayedScaling {amax_history_len = 3}
          recipe:load_state_dict(assert(hm.load(scratch.path_of("recipe"))).fp8)
        end
        opt:zero_grad()
        local loss = inside(recipe, function() return model(x):square():mean() end)
        loss:backward()
        opt:step()
        losses[i] = loss:item()
      end
      local state = recipe:state_dict()
      return losses, state
    end
    local losses, state = run()
    local again, same_state = run(4)
    assert.same(losses, again)
    assert.same(state, same_state)
    local recipe = amp.DelayedScaling()
    raises({"load_state_dict", "state_dict() gave"}, recipe.load_state_dict, recipe, {})
    raises({"load_state_dict", "format"}, recipe.load_state_dict, recipe, amp.DelayedScaling {format = "e4m3"}:state_dict())
  end)
end)

describe("autocast(\"fp8\")", function()
  --- A recipe whose scales have been found in one step of build(), which gives the tensors to differentiate a sum of.
  local function warmed(build, opts)
    local recipe = amp.DelayedScaling(opts)
    local y = inside(recipe, build)
    y:backward(hm.randn(y.shape) * 0.01)
    next_step(recipe)
    return recipe
  end

  on_cpu("gives a linear layer's result and its three gradients as products of rounded factors", function()
    hm.manual_seed(1)
    for _, format in ipairs {"hybrid", "e4m3"} do
      local x, w, b = hm.randn({5, 7}):requires_grad_(), (hm.randn({3, 7}) * 0.1):requires_grad_(), hm.randn({3}):requires_grad_()
      local recipe = warmed(function() return F.linear(x, w, b) end, {format = format})
      x.grad, w.grad, b.grad = nil, nil, nil
      local sx, sw, sg = slot(recipe, 1, "x"), slot(recipe, 1, "weight"), slot(recipe, 1, "gradient")
      assert.equal(format == "hybrid" and "e5m2" or "e4m3", sg.format)
      for _, s in ipairs {sx, sw, sg} do assert(s.scale > 1 or s == sx, s.name) end
      local y = inside(recipe, F.linear, x, w, b)
      local g = hm.randn({5, 3}) * 0.01
      y:backward(g)
      local rx, rw, rg = by_slot(x:detach(), sx), by_slot(w:detach(), sw), by_slot(g, sg)
      assert.equal("float32", y.dtype)
      numbers.assert_near(y:detach(), rx:matmul(rw:t()) + b:detach():double(), 1e-6, 1e-6)
      numbers.assert_near(x.grad, rg:matmul(rw), 1e-6, 1e-8)
      numbers.assert_near(w.grad, rg:t():matmul(rx), 1e-6, 1e-8)
      numbers.assert_near(b.grad, rg:sum(1), 1e-6, 1e-8)
      assert.is_true((y - F.linear(x, w, b)):abs():max():item() > 1e-4) -- and not those of float32
    end
  end)

  on_cpu("computes the other products likewise", function()
    hm.manual_seed(2)
    local image, kernel = hm.randn({2, 3, 6, 6}), (hm.randn({4, 3, 3, 3}) * 0.1):requires_grad_()
    local q, k, v = hm.randn({1, 2, 5, 4}):requires_grad_(), hm.randn({1, 2, 5, 4}), hm.randn({1, 2, 5, 4})
    local a, b = hm.randn({3, 4}):t():requires_grad_(), hm.randn({3, 5})
    for name, case in pairs {
      conv2d = {function(x, w) return F.conv2d(x, w) end, image, kernel},
      attention = {F.scaled_dot_product_attention, q, k, v},
      matmul = {hm.matmul, a, b},
    } do
      local fn, args = case[1], table.move(case, 2, #case, 1, {})
      local recipe = warmed(function() return fn(table.unpack(args)) end)
      local y, exact = inside(recipe, fn, table.unpack(args)), {}
      for i, t in ipairs(args) do
        exact[i] = by_slot(t:detach(), recipe:sites()[1].slots[i]):float()
      end
      local want = fn(table.unpack(exact))
      assert.equal("float32", y.dtype)
      numbers.assert_same(y:detach(), want, name)
    end
  end)

  on_cpu("leaves everything else in float32, and float64 alone", function()
    local recipe = amp.DelayedScaling()
    local x = hm.randn({4, 4})
    inside(recipe, function()
      for _, name in ipairs {"exp", "relu", "sum", "tanh", "square"} do
        numbers.assert_same(x[name](x), amp.autocast({enabled = false}, x[name], x))
      end
      local d = x:double()
      numbers.assert_same(d:matmul(d), amp.autocast({enabled = false}, d.matmul, d, d))
      assert.equal("float32", x:half():matmul(x:half()).dtype)
      assert.equal("float32", x:bfloat16():matmul(x).dtype)
      assert.equal("float16", x:half():relu().dtype)
      numbers.assert_same(hm.einsum("ij,jk->ik", x, x), x:matmul(x))
    end)
    amp.autocast({dtype = "fp8", recipe = recipe, ops = {matmul = "f32"}}, function()
      numbers.assert_same(x:matmul(x), amp.autocast({enabled = false}, x.matmul, x, x))
    end)
    numbers.assert_same(x:matmul(x), x:matmul(x))
    assert.is_false(amp.autocast_state().enabled)
    assert.same({true, "fp8"}, inside(recipe, function()
      local s = amp.autocast_state()
      return {s.enabled, s.dtype}
    end))
  end)

  on_cpu("has one recipe for all plain regions, and a mode for each coroutine", function()
    local recipe = amp.default_recipe()
    assert.equal(recipe, amp.default_recipe())
    recipe:forget()
    local w = hm.ones({1, 1}):requires_grad_()
    amp.autocast("fp8", function()
      local other = coroutine.wrap(function()
        assert.is_false(amp.autocast_state().enabled)
        return F.linear(hm.tensor({{1.03}}), w):item()
      end)
      assert.equal(hm.tensor(1.03):item(), other())
      assert.equal(1.0, F.linear(hm.tensor({{1.03}}), w):item())
    end)
    assert.equal(1, #recipe:sites())
    recipe:forget()
    local first = amp.autocast("fp8")
    local second = amp.autocast("bf16")
    first:close() -- out of order
    second:close()
    assert.is_false(amp.autocast_state().enabled)
  end)

  on_cpu("counts products without a weight from the outermost region on", function()
    local recipe = amp.DelayedScaling()
    local a = hm.ones({2, 2})
    local function step()
      inside(recipe, function()
        a:matmul(a * 2)
        inside(recipe, function() a:matmul(a * 4) end)
        amp.autocast({enabled = false}, function() a:matmul(a) end)
        a:matmul(a * 8)
      end)
    end
    for _ = 1, 3 do step() end
    local amaxes = {}
    for i in ipairs(recipe:sites()) do amaxes[i] = slot(recipe, i, "y").amax end
    assert.same({2.0, 4.0, 8.0}, amaxes)
    local inner = amp.DelayedScaling()
    inside(recipe, function()
      a:matmul(a * 2)
      inside(inner, function()
        a:matmul(a * 16)
        inside(recipe, function() a:matmul(a * 4) end)
      end)
      a:matmul(a * 8)
    end)
    assert.equal(3, #recipe:sites())
    assert.same({16.0}, {slot(inner, 1, "y").amax})
  end)

  on_cpu("lets overflow and NaN through, forward and backward", function()
    local recipe = amp.DelayedScaling()
    local w = hm.tensor({{1, 2}}):requires_grad_()
    assert.equal(inf, inside(recipe, F.linear, hm.tensor({{inf, 1}}), w):item())
    assert(is_nan(inside(recipe, F.linear, hm.tensor({{nan, 1}}), w):item()))
    local model = nn.Linear(2, 1)
    local opt, scaler = optim.SGD(model:parameters(), {lr = 0.1}), amp.GradScaler {init_scale = 2.0 ^ 20, max_scale = inf}
    local function step(factor)
      opt:zero_grad()
      local loss = inside(recipe, function() return model(hm.ones({3, 2})):sum() end)
      scaler:scale(loss * factor):backward()
      local stepped, record = scaler:step(opt)
      scaler:update()
      return stepped, record
    end
    assert.is_true((step(1)))
    local stepped, record = step(inf)
    assert.is_false(stepped)
    assert.equal(2, #record.culprits)
    assert.is_true((step(1)))
    assert.is_true((step(1)))
    for _, site in ipairs(recipe:sites()) do
      for _, s in ipairs(site.slots) do assert(s.scale > 0 and s.scale < inf) end
    end
  end)

  on_cpu("notes nothing twice under hm.checkpoint, and gives the same gradients", function()
    local function run(call)
      hm.manual_seed(5)
      local first, second = nn.Linear(6, 6), nn.Linear(6, 6)
      local recipe = amp.DelayedScaling {amax_history_len = 4}
      local x, grads = hm.randn({8, 6}), {}
      for i = 1, 3 do
        first:zero_grad()
        second:zero_grad()
        local y = inside(recipe, function()
          local h = call(function(t)
            local s = first(t):tanh()
            return s:matmul(s:t()):matmul(s) -- products without a weight
          end, x)
          h = h:matmul(h:t())
          return call(function(t) return second(t:matmul(x)) end, h)
        end)
        y:square():mean():backward()
        grads[i] = {first.weight.grad:clone(), second.weight.grad:clone()}
      end
      return grads, recipe:state_dict()
    end
    local grads, state = run(function(fn, ...) return fn(...) end)
    local again, same_state = run(hm.checkpoint)
    for i in ipairs(grads) do
      for k in ipairs(grads[i]) do numbers.assert_same(again[i][k], grads[i][k]) end
    end
    assert.same(state, same_state)
    assert.equal(2 + 4, #state.sites)
  end)

  on_cpu("counts on after hm.checkpoint computed something again, and in hooks", function()
    local recipe, a = amp.DelayedScaling(), hm.ones({2, 2})
    inside(recipe, function()
      local x = hm.ones({2, 2}):requires_grad_()
      local y = hm.checkpoint(function(t) return t:matmul(a * 2) end, x)
      a:matmul(a * 3)
      for i = 1, 2 do
        y:register_hook(function() hm.enable_grad(inside, recipe, a.matmul, a, a * (3 + i)) end)
      end
      y:sum():backward()
      a:matmul(a * 6)
    end)
    local amaxes = {}
    for i in ipairs(recipe:sites()) do amaxes[i] = slot(recipe, i, "y").amax end
    assert.same({2.0, 3.0, 4.0, 5.0, 6.0}, amaxes)
  end)

  on_cpu("is not disturbed by a call that was refused", function()
    local recipe, q = amp.DelayedScaling(), hm.ones({1, 1, 2, 4})
    for i = 1, 3 do
      inside(recipe, function()
        if i == 1 then assert.is_false(pcall(F.scaled_dot_product_attention, q, q:long(), q:long())) end
        numbers.assert_same(F.scaled_dot_product_attention(q, q, q), q)
      end)
    end
    assert.equal(1, #recipe:sites())
    assert.equal(4, #recipe:sites()[1].slots)
  end)

  on_cpu("rounds the gradient of a result in a dtype that was asked for", function()
    for _, dtype in ipairs {"float16", "float64"} do
      local recipe, w = amp.DelayedScaling(), hm.ones({2, 2}):requires_grad_()
      local y = inside(recipe, hm.matmul, hm.ones({2, 2}), w, {out_dtype = dtype})
      assert.equal(dtype, y.dtype)
      y:backward(hm.full({2, 2}, 1.05, {dtype = dtype}))
      assert.equal(hm.tensor(1.05, {dtype = dtype}):float():item(), slot(recipe, 1, "gradient").amax)
      assert.same({{2.0, 2.0}, {2.0, 2.0}}, w.grad:totable()) -- 1.05 is 1 in e5m2
    end
  end)

  on_cpu("tells the op log what a product keeps", function()
    local seen = {}
    local w = hm.ones({2, 2}):requires_grad_()
    core.op_log(function(event) if event.op == "linear" then seen[#seen + 1] = #event.saved end end)
    local ok, why = pcall(function()
      F.linear(hm.ones({2, 2}), w)
      inside(amp.DelayedScaling(), F.linear, hm.ones({2, 2}), w)
    end)
    core.op_log(nil)
    assert(ok, why)
    assert.same({1, 1}, seen)
  end)

  on_cpu("stays in a backward whose hook closes the region", function()
    local w = hm.ones({2, 2}):requires_grad_()
    local region = amp.autocast {dtype = "fp8", recipe = amp.DelayedScaling(), ops = {exp = "f32"}}
    local y = F.linear(hm.ones({2, 2}), w) * 2
    local heard = 0
    y:register_hook(function()
      region:close()
      region = nil
      collectgarbage()
      collectgarbage()
    end)
    y:register_hook(function()
      amp.autocast({enabled = false}, function() heard = heard + hm.ones({2, 2}):matmul(w:detach()):sum():item() end)
    end)
    y:sum():backward()
    assert.equal(8.0, heard)
    assert.is_false(amp.autocast_state().enabled)
  end)

  on_cpu("differentiates twice", function()
    local recipe = amp.DelayedScaling()
    local x = hm.tensor({{1.5, -2}}):requires_grad_()
    local w = hm.tensor({{0.5, 1}}):requires_grad_()
    local y = inside(recipe, F.linear, x, w):square():sum() -- (w x)^2: by x 2 (w x) w, and again 2 (w1 + w2) w
    local gx = core.grad({y}, {x}, {create_graph = true})[1]
    assert.same({{-1.25, -2.5}}, gx:totable())
    gx:sum():backward()
    assert.same({{1.5, 3.0}}, x.grad:totable())
  end)

  on_cpu("trains a small model nearly as float32 does", function()
    local function train(recipe)
      hm.manual_seed(7)
      local model = nn.Sequential(nn.Conv2d(1, 8, 3, {padding = 1}), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 32),
        nn.ReLU(), nn.Linear(32, 4))
      local opt = optim.Adam(model:parameters(), {lr = 3e-3})
      local scaler = amp.GradScaler {enabled = recipe ~= nil, init_scale = 1024}
      local x, y = hm.randn({64, 1, 8, 8}), hm.arange(64):remainder(4)
      for i = 1, 64 do x[i]:add_(hm.randn({1, 8, 8}) * 0.1 + (y[i]:item() - 1.5)) end
      local first, last
      for _ = 1, 60 do
        opt:zero_grad()
        local _ <close> = amp.autocast {dtype = "fp8", recipe = recipe, enabled = recipe ~= nil}
        local loss = F.cross_entropy(model(x), y)
        scaler:scale(loss):backward()
        assert.is_true((scaler:step(opt)))
        scaler:update()
        last = loss:item()
        first = first or last
      end
      return first, last
    end
    local first, last = train()
    local first8, last8 = train(amp.DelayedScaling {amax_history_len = 16})
    assert(last < 0.5 * first, last)
    assert(math.abs(first8 - first) < 0.05 * first, first8)
    assert(last8 < 0.6 * first and math.abs(last8 - last) < 0.15 * first, ("%g %g"):format(last, last8))
    assert(last8 ~= last)
  end)

  it("works in wrapped functions of one's own", devices.cpu_only("regions of \"fp8\" are an emulation on the cpu", function()
    local recipe, seen = amp.DelayedScaling(), nil
    local Twice = hm.autograd.Function("Twice", {
      forward = amp.custom_fwd(function(_, x)
        seen = amp.autocast_state().dtype
        return x * 2
      end),
      backward = amp.custom_bwd(function(_, g)
        assert.is_false(amp.autocast_state().enabled)
        return g * 2
      end),
    })
    local x = hm.ones({2}):requires_grad_()
    inside(recipe, function() return Twice(x):sum() end):backward()
    assert.equal("fp8", seen)
    assert.same({2.0, 2.0}, x.grad:totable())
    assert.equal("float32", inside(recipe, amp.half_function(function(t) return t.dtype end), hm.ones({1}, {dtype = "f16"})))
  end))

  it("is refused on a GPU, with the reason", function()
    if devices.is_cpu then return devices.skip("needs a device \"cuda\"") end
    raises({"linear", "emulation on the cpu", "hint", "bf16"}, amp.autocast, "fp8", nn.Linear(2, 2), hm.ones({1, 2}))
  end)
end)
