-- layer_rules_spec.lua -- rules of amp.layer_scale: layerwise and adaptive do what their sources say, and rules of one's
-- own are asked, and stopped where they fail.

local hm = require "halfmoon"
local core = require "halfmoon.core"
local devices = require "spec.support.devices"
local expect = require "spec.support.expect"
local layers = require "spec.support.layers"
local numbers = require "spec.support.numbers"
local erf = require "halfmoon.amp.layer_rules.erf"

local nn, optim, amp = hm.nn, hm.optim, hm.amp
local same, near, raises = numbers.assert_same, numbers.assert_near, expect.raises
local model_of, chain, gradients, assert_equal_grads = layers.model_of, layers.chain, layers.gradients,
  layers.assert_equal_grads
local inf = math.huge

-- ====== layerwise ======

describe("layer_scale: the rule layerwise", function()
  --- Three layers; hooks[i] may spoil the gradient of layer i's weight.
  local function three(options)
    local model = chain(3, 2)
    local ls = amp.layer_scale(model, "layerwise", options)
    local opt = optim.SGD(model:parameters(), {lr = 0.1})
    local bad = {}
    for i = 1, 3 do
      model[i].weight:register_hook(function(g)
        if bad[i] then return g * inf end
      end)
    end
    local x = hm.ones {1, 2}
    local function step(...)
      for i = 1, 3 do bad[i] = false end
      for _, i in ipairs {...} do bad[i] = true end
      opt:zero_grad()
      ls:scale(model(x):pow(2):sum()):backward()
      local stepped, record = ls:step(opt)
      return stepped, record, ls:update()
    end
    return model, ls, step
  end

  local function scales(ls) return {ls:get_scale "0", ls:get_scale "1", ls:get_scale "2"} end

  it("each layer moves alone: a trace by hand", function()
    local _, ls, step = three {scales = {["0"] = 64, ["1"] = 16, ["2"] = 4}, growth_interval = 3}
    local trace = { -- layers that overflow, scales after the update
      {{}, {64, 16, 4}},
      {{2}, {64, 8, 4}},
      {{}, {128, 8, 8}},
      {{1, 3}, {64, 8, 4}},
      {{}, {64, 16, 4}},
      {{}, {64, 16, 4}},
      {{}, {128, 16, 8}},
      {{1, 2, 3}, {64, 8, 4}},
    }
    for i, line in ipairs(trace) do
      local stepped, _, record = step(table.unpack(line[1]))
      assert.equal(#line[1] == 0, stepped, "step " .. i)
      assert.equal(#line[1] > 0, record.skipped)
      assert.same({line[2][1] + 0.0, line[2][2] + 0.0, line[2][3] + 0.0}, scales(ls), "step " .. i)
    end
    assert.equal(3, ls.skipped)
    assert.equal(8, ls.steps)
  end)

  it("the step is skipped, and the record names layers and parameters", function()
    local model, _, step = three()
    local before = model[1].weight:detach():clone()
    local stepped, record, update = step(2)
    assert.is_false(stepped)
    assert.same({"1"}, record.layers)
    assert.equal("1.weight", record.culprits[1].name)
    assert.equal("1", record.culprits[1].layer)
    assert.equal("backoff", update.layers["1"].event)
    assert.equal(1.0, update.layers["1"].old_scale)
    assert.equal(0.5, update.layers["1"].new_scale)
    assert.equal("hold", update.layers["0"].event)
    same(model[1].weight, before)
    stepped = step()
    assert.is_true(stepped)
    assert.is_false(hm.all(model[1].weight:eq(before)):item())
  end)

  it("an overflow for each layer k in turn backs off layer k alone", function()
    for k = 1, 3 do
      local _, ls, step = three {init_scale = 8}
      step(k)
      for i = 1, 3 do assert.equal(i == k and 4.0 or 8.0, ls:get_scale(tostring(i - 1))) end
    end
  end)

  it("defaults and bounds are fairscale's", function()
    local o = amp.layer_rules.layerwise.options
    assert.same({2.0, 0.5, 10000, 1.0}, {o.growth_factor, o.backoff_factor, o.growth_interval, o.init_scale})
    assert.equal(2.0 ^ -126, o.min_scale)
    assert.equal(3.4028234663852886e38, o.max_scale)
    local _, ls, step = three {min_scale = 4, max_scale = 10, init_scale = 8, growth_interval = 1}
    step()
    assert.equal(10.0, ls:get_scale "0")
    for _ = 1, 3 do step(1) end
    assert.equal(4.0, ls:get_scale "0")
    assert.equal(10.0, ls:get_scale "1")
  end)

  it("a layer inside of a layer is blamed for its own parameters", function()
    local model = model_of({{"body", chain(2, 2)}}, function(self, x) return self.body(x) end)
    local ls = amp.layer_scale(model, "layerwise", {layers = {"body", "body.1"}, init_scale = 4})
    local opt = optim.SGD(model:parameters(), {lr = 0.1})
    model.body[2].weight:register_hook(function(g) return g * inf end)
    model(hm.ones {1, 2}):sum():backward()
    local _, record = ls:step(opt)
    assert.same({"body.1"}, record.layers)
    ls:update()
    assert.same({body = 4.0, ["body.1"] = 2.0}, ls:get_scales())
    ls:remove()
  end)

  it("several optimizers in one iteration", function()
    local model = chain(2, 2)
    local ls = amp.layer_scale(model, "layerwise", {init_scale = 4})
    local a = optim.SGD(model[1]:parameters(), {lr = 0.1})
    local b = optim.SGD(model[2]:parameters(), {lr = 0.1})
    model[1].weight:register_hook(function(g) return g * inf end)
    model(hm.ones {1, 2}):sum():backward()
    assert.is_true((ls:step(b)))
    assert.is_false((ls:step(a)))
    assert.is_true(ls:update().skipped)
    assert.same({["0"] = 2.0, ["1"] = 4.0}, ls:get_scales())
    assert.equal("hold", ls:update().layers["0"] and "moved" or "hold") -- nothing was checked since
    ls:remove()
  end)
end)

-- ====== adaptive ======

describe("layer_scale: the rule adaptive", function()
  local rule = amp.layer_rules.adaptive

  it("erf and its inverse", function()
    for _, x in ipairs {-2.5, -0.3, 0, 1e-3, 0.7, 2, 3.2} do
      assert.is_true(math.abs(erf.erf(x) - hm.tensor({x}, {dtype = "float64", device = "cpu"}):erf():item()) < 1e-12)
    end
    for _, y in ipairs {-0.9, -1e-3, 1e-6, 1e-3, 0.3, 0.99} do
      assert.is_true(math.abs(erf.erf(erf.inverse(y)) - y) < 1e-13)
    end
    assert.equal(0.0, erf.inverse(0))
    assert.is_true(math.abs(erf.inverse(1e-3) - 8.862271574665522e-4) < 1e-15)
  end)

  --- What the rule says for statistics {count, mean square, amax} of gradient and weight.
  local function scale_for(g, w, terms, incoming, given)
    local opts = {}
    for k, v in pairs(rule.options) do opts[k] = v end
    for k, v in pairs(given or {}) do opts[k] = v end
    local function stats(s)
      return {count = s[1], norm = math.sqrt(s[2] * s[1]), amax = s[3], finite = s[4] ~= 1}
    end
    return rule.backward(rule.init({}, opts), {
      incoming = incoming or 1, terms = terms, grad = function() return stats(g) end,
      weight = function() return stats(w) end,
    }, opts)
  end

  it("its formula, by hand", function()
    local function by_hand(mean_g, mean_w, terms)
      local sigma = math.sqrt(mean_g * mean_w) * math.sqrt(0.5 * terms)
      return 6e-8 / (math.sqrt(2) * 8.862271574665522e-4 * sigma)
    end
    local free = {power_of_two = false, scale_upper_bound = 1e30, accum_upper_bound = 1e30}
    local got = scale_for({100, 1e-12, 4e-6}, {100, 1e-4, 4e-2}, 50, 1, free)
    assert.is_true(math.abs(got / by_hand(1e-12, 1e-4, 50) - 1) < 1e-9)
    assert.is_true(got > 900 and got < 1000) -- 957.4...
    assert.equal(512.0, scale_for({100, 1e-12, 4e-6}, {100, 1e-4, 4e-2}, 50, 1,
      {scale_upper_bound = 1e30, accum_upper_bound = 1e30}))
    assert.equal(16.0, scale_for({100, 1e-12, 4e-6}, {100, 1e-4, 4e-2}, 50))
    assert.equal(8.0, scale_for({100, 1e-12, 4e-6}, {100, 1e-4, 4e-2}, 50, 128))
    assert.equal(1.0, scale_for({100, 1e-12, 4e-6}, {100, 1e-4, 4e-2}, 50, 1024))
    assert.equal(1.0, scale_for({100, 1, 4}, {100, 1e-4, 4e-2}, 50)) -- the floor
    -- the cap: 65504 / 100 / (600 * 4) is 0.2729..., so a quarter
    assert.equal(0.25, scale_for({100, 1, 600}, {100, 1, 4}, 100))
    assert.equal(4.0, scale_for({1000, 1e-20, 16000}, {100, 1e-20, 1e-5}, 1)) -- g itself would overflow
    assert.equal(1.0, scale_for({100, 0, 0}, {100, 1, 4}, 10))
    assert.equal(1.0, scale_for({100, 1e-12, 1}, {100, 0, 0}, 10))
    assert.equal(1.0, scale_for({0, 0, 0}, {100, 1, 4}, 10))
    assert.equal(1.0, scale_for({100, 1e-20, 1, 1}, {100, 1e-12, 1}, 10)) -- not finite
    for e = -3, 4 do -- powers of two stay what they are, what lies below goes down
      local o = {scale_upper_bound = 2.0 ^ e}
      assert.equal(2.0 ^ e, scale_for({100, 1e-20, 1e-9}, {100, 1e-4, 1e-4}, 50, 1, o))
      o.scale_upper_bound = 2.0 ^ e * 0.999999
      assert.equal(2.0 ^ (e - 1), scale_for({100, 1e-20, 1e-9}, {100, 1e-4, 1e-4}, 50, 1, o))
    end
  end)

  it("the share of sums below float16's range is the threshold, or less", function()
    hm.manual_seed(7)
    local terms, rows = 64, devices.pick(4000, 400)
    local sigma_g, sigma_w = 2e-6, 0.01
    -- a ReLU sets half of the gradients to zero
    local g = hm.randn {rows, terms} * sigma_g
    local kept = g * hm.rand({rows, terms}):gt(0.5):float()
    local w = hm.randn {terms, 32} * sigma_w
    local function small_share(scale)
      local product = (kept * scale):matmul(w)
      return product:abs():lt(6e-8):float():mean():item()
    end
    local function stats(t) return {count = t:numel(), norm = t:norm():item(), amax = t:abs():max():item(), finite = true} end
    local opts = {}
    for k, v in pairs(rule.options) do opts[k] = v end
    opts.power_of_two, opts.scale_upper_bound, opts.accum_upper_bound = false, 1e30, 1e30
    local s = rule.backward(rule.init({}, opts), {
      incoming = 1, terms = terms, grad = function() return stats(g) end, weight = function() return stats(w) end,
    }, opts)
    assert.is_true(s > 100)
    assert.is_true(small_share(1) > 0.2)
    local share = small_share(s)
    assert.is_true(share > 2e-4 and share < 3e-3, tostring(share)) -- 1e-3 asked for
  end)

  it("terms: products added for one element of the input's gradient", function()
    local model = model_of({{"l", nn.Linear(3, 7)}, {"c", nn.Conv2d(4, 6, 3, {groups = 2})},
      {"t", nn.ConvTranspose2d(4, 6, 2)}, {"n", nn.LayerNorm(4)}, {"e", nn.Embedding(4, 4)}}, function(_, x) return x end)
    local ls = amp.layer_scale(model, "adaptive")
    local got = {}
    for i, layer in ipairs(ls.layers) do got[i] = layer.terms or false end
    assert.same({7, 27, 24, false, false}, got)
    ls:remove()
  end)

  it("scales accumulate on the way back, up to the bound; true gradients all the same", function()
    hm.manual_seed(9)
    local model, x = chain(6, 8), hm.randn {4, 8}
    core.no_grad(function()
      for i = 1, 6 do model[i].weight:mul_(1e-3) end
    end)
    local function loss() return model(x):sum() * 1e-3 end
    local want = gradients(model, loss)
    local ls = amp.layer_scale(model, "adaptive")
    assert_equal_grads(gradients(model, loss), want)
    local carried, before = ls:carried(), 1
    for i = 6, 1, -1 do
      local here = carried[tostring(i - 1)]
      assert.equal(here, before * ls:get_scale(tostring(i - 1)))
      assert.is_true(here <= 1024 and ls:get_scale(tostring(i - 1)) <= 16)
      before = here
    end
    assert.equal(1024.0, before)
    assert.is_true(ls:check(loss).equal)
    ls:remove()
  end)

  it("where two branches meet, the second is converted to what the first brought", function()
    hm.manual_seed(9)
    local seen
    local model = model_of({{"first", nn.Linear(8, 8)}, {"small", nn.Linear(8, 8)}, {"large", nn.Linear(8, 8)}},
      function(self, x)
        local h = self.first(x)
        h:register_hook(function(g) seen = g:clone() end)
        return self.large(h):sum() + self.small(h):sum() * 1e-6
      end)
    local x = hm.randn {4, 8}
    local function loss() return model(x) end
    local want = gradients(model, loss)
    local true_h = seen
    local ls = amp.layer_scale(model, "adaptive")
    assert_equal_grads(gradients(model, loss), want)
    assert.equal(16.0, ls:get_scale "small")
    assert.equal(1.0, ls:get_scale "large")
    same(seen, true_h * 16)
    ls:remove()
  end)

  it("a skipped step halves what may be carried, clean ones bring it back", function()
    hm.manual_seed(9)
    local model, x = chain(3, 8), hm.randn {4, 8}
    local ls = amp.layer_scale(model, "adaptive", {accum_upper_bound = 64.0, recovery_interval = 2})
    local opt = optim.SGD(model:parameters(), {lr = 0})
    local bad = true
    model[2].weight:register_hook(function(g) if bad then return g * inf end end)
    local function step()
      opt:zero_grad()
      local loss = model(x):sum() * 1e-9
      loss:backward()
      ls:step(opt)
      ls:update()
      return ls:carried()["0"]
    end
    assert.equal(64.0, step())
    assert.equal(32.0, step())
    bad = false
    assert.equal(16.0, step())
    assert.equal(16.0, step())
    assert.equal(32.0, step())
    ls:remove()
  end)

  it("interval: statistics are taken in each k-th step", function()
    hm.manual_seed(9)
    local model, x = chain(1, 8), hm.randn {4, 8}
    local y = hm.randn({4, 8}, {requires_grad = true})
    local ls = amp.layer_scale(model, "adaptive", {interval = 2, scale_upper_bound = 1e6, accum_upper_bound = 1e6})
    local opt = optim.SGD(model:parameters(), {lr = 0})
    local function step(size)
      (model(x):sum() * size + (y * 0):sum()):backward()
      ls:step(opt)
      ls:update()
      return ls:get_scale "0"
    end
    local first = step(1e-8)
    assert.equal(first, step(1e-6))
    assert.is_true(step(1e-6) < first)
    ls:remove()
  end)
end)

-- ====== Rules of one's own ======

describe("layer_scale: rules of one's own", function()
  local model, x, opt
  before_each(function()
    hm.manual_seed(2)
    model, x = chain(2, 4), hm.randn {3, 4}
    opt = optim.SGD(model:parameters(), {lr = 0})
  end)

  local function step(ls)
    opt:zero_grad()
    model(x):sum():backward()
    ls:step(opt)
    return ls:update()
  end

  it("init hears of the layer, update of the step", function()
    local told, events = {}, {}
    local ls = amp.layer_scale(model, {
      name = "mine", options = {start = 2},
      init = function(layer, o)
        told[layer.index] = layer
        return {scale = o.start * layer.index}
      end,
      update = function(state, event)
        events[#events + 1] = event
        return state.scale * 2
      end,
    }, {start = 8})
    assert.same({["0"] = 8.0, ["1"] = 16.0}, ls:get_scales())
    assert.same({name = "0", kind = "Linear", index = 1, terms = 4}, told[1])
    assert.equal("grow", step(ls).layers["1"].event)
    assert.same({["0"] = 16.0, ["1"] = 32.0}, ls:get_scales())
    assert.same({found_inf = false, skipped = false, inf_count = 0, nan_count = 0, step = 1, scale = 8.0}, events[1])
    ls:remove()
  end)

  it("backward hears of the gradient and the weight, measured when asked", function()
    local heard = {}
    local want = gradients(model, function() return model(x):sum() end)
    local ls = amp.layer_scale(model, {
      backward = function(_, event)
        heard[#heard + 1] = event
        event.g, event.w = event.grad(), event.weight()
        return 3
      end,
    })
    local got = gradients(model, function() return model(x):sum() end)
    for name, g in pairs(want) do near(got[name], g, 1e-6, 1e-6) end
    assert.equal(2, #heard)
    assert.equal(1.0, heard[1].incoming)
    assert.equal(3.0, heard[2].incoming)
    assert.same({12, 16}, {heard[1].g.count, heard[1].w.count})
    assert.equal(1.0, heard[1].g.amax)
    assert.equal("float32", heard[1].dtype)
    assert.same({["0"] = 9.0, ["1"] = 3.0}, ls:carried())
    step(ls)
    ls:remove()
  end)

  it("a rule that fails stops nothing: the scale stays, and it is said once", function()
    local fail
    local ls = amp.layer_scale(model, {
      name = "faulty",
      init = function() return {scale = 4.0, count = 0} end,
      update = function(state)
        state.count = state.count + 1
        if fail == "error" then error "broken" end
        return fail
      end,
    })
    for _, what in ipairs {"error", -1, 0 / 0, inf, "text"} do
      fail = what
      local said, record = expect.stderr(step, ls)
      assert.matches("layer%-scale rule 'faulty' failed for layer 0", said)
      assert.equal("fault", record.layers["0"].event)
      assert.same({["0"] = 4.0, ["1"] = 4.0}, ls:get_scales())
      assert.equal("", (expect.stderr(step, ls)))
    end
    assert.equal(0, ls.layers[1].state.count) -- half an update is none
    ls:remove()
    ls = amp.layer_scale(model, {backward = function() error "no factor" end})
    local said = expect.stderr(step, ls)
    assert.matches("no factor", said)
    assert.matches("pass as they are", said)
    assert.same({["0"] = 1.0, ["1"] = 1.0}, ls:carried())
    ls:remove()
  end)

  it("set_rule in mid-run keeps the scales where both rules have them", function()
    local ls = amp.layer_scale(model, "layerwise", {scales = {["0"] = 32}, growth_interval = 1})
    step(ls)
    ls:set_rule("layerwise", {growth_interval = 5, scales = {["1"] = 8}})
    assert.same({["0"] = 64.0, ["1"] = 8.0}, ls:get_scales())
    assert.is_true(ls:check(function() return model(x):sum() end).equal)
    raises("unknown rule 'layerwse', did you mean 'layerwise'", ls.set_rule, ls, "layerwse")
    raises("failed in init: backoff_factor", ls.set_rule, ls, "layerwise", {backoff_factor = 2})
    for name, value in pairs {growth_factor = 0 / 0, growth_interval = 0, min_scale = inf} do
      raises("failed in init: " .. name, ls.set_rule, ls, "layerwise", {[name] = value})
    end
    for name, value in pairs {interval = 2.5, recovery_interval = 0, u_min = -1.0, accum_upper_bound = 0 / 0} do
      raises("failed in init: " .. name, ls.set_rule, ls, "adaptive", {[name] = value})
    end
    assert.same({["0"] = 64.0, ["1"] = 8.0}, ls:get_scales())
    ls:set_rule("adaptive")
    assert.same({["0"] = 1.0, ["1"] = 1.0}, ls:get_scales())
    raises("finds its scales in each backward", ls.set_scale, ls, "0", 2)
    ls:remove()
  end)
end)
