-- amp_groups_spec.lua -- scales for each loss and each part of a model, optimizers without gradients, float16 parameters, bfloat16 with and
-- without a scale, and backward in float32.

local hm = require "halfmoon"
local numbers = require "spec.support.numbers"
local expect = require "spec.support.expect"

local nn, optim, amp = hm.nn, hm.optim, hm.amp
local same, near, raises = numbers.assert_same, numbers.assert_near, expect.raises
local inf, nan = math.huge, 0 / 0

local function leaf(values, dtype) return hm.tensor(values, {dtype = dtype, requires_grad = true}) end

-- ====== Groups ======

describe("GradScaler{groups}", function()
  local function two(options)
    options = options or {}
    options.groups = options.groups or {generator = {init_scale = 8}, critic = {init_scale = 32}}
    return amp.GradScaler(options)
  end

  it("scales each group by its own scale, and options beside them are for all", function()
    local s = two {growth_interval = 1}
    same(s:scale(hm.tensor {1.0}, "generator"), {8})
    same(s:scale({a = hm.tensor {1.0}}, "critic").a, {32})
    assert.equal(8, s:get_scale "generator")
    assert.equal(1, s:group "critic":get_growth_interval())
    assert.matches("critic: scale 32", tostring(s), 1, true)
  end)

  it("one optimizer each: one group overflows, the other grows", function()
    local a, b = leaf {1.0}, leaf {1.0}
    local oa, ob = optim.SGD({a}, {lr = 1}), optim.SGD({b}, {lr = 1})
    local s = two {growth_interval = 1}
    s:scale(a:sum(), "generator"):backward()
    s:scale(b:sum() * inf, "critic"):backward()
    s:unscale_(oa, "generator")
    same(a.grad, {1})
    assert.is_true((s:step(oa)))
    assert.is_false((s:step(ob, {group = "critic"})))
    local records = s:update()
    assert.equal("grow", records.generator.event)
    assert.equal("backoff", records.critic.event)
    assert.same({16.0, 16.0}, {s:get_scale "generator", s:get_scale "critic"})
    same(a, {0})
    same(b, {1})
  end)

  it("several losses on the same parameters: gradients are the sum of true ones", function()
    local function grads(scaled)
      local w = leaf {1.0, 2.0}
      local opt = optim.SGD({w}, {lr = 1})
      local main, extra = (w * w):sum(), (w * 3):sum()
      if scaled then
        local s = two()
        s:backward(main, "generator", opt)
        s:backward(extra, "critic", opt)
        return w.grad, s, opt, w
      end
      main:backward()
      extra:backward()
      return w.grad
    end
    local got, s, opt, w = grads(true)
    same(got, grads(false))
    local stepped, record = s:step(opt, {max_norm = 1000})
    assert.is_true(stepped)
    assert.same({}, record.groups)
    same(w, {-4, -5})
    raises("step() has already been called since the last update()", s.step, s, opt)
    raises("step() has already been called", s.backward, s, w:sum(), "critic", opt)
    assert.equal("hold", s:update().generator.event)
  end)

  it("one loss overflows: its scale falls, the step is skipped, the record names loss and parameter", function()
    local model = nn.Linear(2, 2)
    local opt = optim.SGD(model:parameters(), {lr = 1})
    local s = two {growth_interval = 1}
    local before = model.weight:detach():clone()
    s:backward(model(hm.ones({1, 2})):sum(), "generator", opt)
    s:backward(model(hm.ones({1, 2})):sum() * nan, "critic", opt)
    local stepped, record = s:step(opt)
    assert.is_false(stepped)
    assert.same({"critic"}, record.groups)
    assert(record.nan_count > 0)
    assert.equal("critic", record.culprits[1].group)
    assert(record.culprits[1].name == "weight" or record.culprits[1].name == "bias")
    same(model.weight, before)
    local records = s:update()
    assert.same({16.0, 16.0}, {records.generator.new_scale, records.critic.new_scale})
    assert.matches("skipped 1", tostring(s:group "critic"), 1, true)
    opt:zero_grad()
    s:backward(model(hm.ones({1, 2})):sum(), "critic", opt)
    assert.is_true((s:step(opt)))
    s:update()
  end)

  it("gradients may be accumulated over calls", function()
    local w = leaf {1.0}
    local opt, s = optim.SGD({w}, {lr = 1}), two()
    for _ = 1, 4 do s:backward(w:sum() / 4, "critic", opt) end
    same(w.grad, {1})
    s:step(opt)
    s:update()
    same(w, {0})
  end)

  it("retain_graph and several optimizers", function()
    local a, b = leaf {1.0}, leaf {2.0}
    local oa, ob = optim.SGD({a}, {lr = 1}), optim.SGD({b}, {lr = 1})
    local s = two()
    local y = (a * b):sum()
    s:backward(y, "generator", {oa, ob}, {retain_graph = true})
    s:backward(y * 2, "critic", {oa, ob})
    same(a.grad, {6})
    same(b.grad, {3})
    s:step(oa)
    s:step(ob)
    s:update()
  end)

  it("an error in backward leaves gradients as they were", function()
    local w = leaf {1.0}
    local opt, s = optim.SGD({w}, {lr = 1}), two()
    s:backward(w:sum(), "critic", opt)
    local y = w:sum()
    y:register_hook(function() error "boom" end)
    raises("boom", s.backward, s, y, "critic", opt)
    same(w.grad, {1})
    assert.is_true((s:step(opt)))
  end)

  it("an optimizer that a loss does not reach is a clean no-op", function()
    local w, other = leaf {1.0}, leaf {1.0}
    local opt, away, s = optim.SGD({w}, {lr = 1}), optim.SGD({other}, {lr = 1}), two()
    s:backward(w:sum(), "critic", {opt, away})
    local stepped, record = s:step(away)
    assert.is_false(stepped)
    assert.is_true(record.empty)
    assert.is_true((s:step(opt)))
  end)

  it("state dicts", function()
    local s = two {growth_interval = 7}
    s:group "critic":set_scale(4)
    local t = two()
    t:load_state_dict(s:state_dict())
    assert.equal(4, t:get_scale "critic")
    assert.equal(7, t:group "generator":get_growth_interval())
    raises("there is no group \"a\"", t.load_state_dict, t, {groups = {a = {}}})
    raises("has no group", t.load_state_dict, t, {groups = {critic = s:state_dict().groups.critic}})
    raises("expected a table", t.load_state_dict, t, {scale = 3})
  end)

  it("refuses unknown groups and options, and names the closest", function()
    local s = two()
    raises({"no group \"critc\"", "did you mean 'critic'", "critic, generator"}, s.scale, s, hm.ones({1}), "critc")
    raises("no group nil", s.scale, s, hm.ones({1}))
    raises("which group's scale", s.step, s, optim.SGD({leaf {1}}, {lr = 1}))
    raises("groups must be a table", amp.GradScaler, {groups = {}})
    raises("names of groups must be strings", amp.GradScaler, {groups = {{}}})
    raises("growth_factr", amp.GradScaler, {groups = {a = {growth_factr = 2}}})
    raises("async", amp.GradScaler, {groups = {a = {}}, async = true})
    raises("expected an optimizer", s.backward, s, hm.ones({1}), "critic", {1})
  end)

  it("each group may have a policy of its own", function()
    local s = amp.GradScaler {groups = {fixed = {policy = "static", init_scale = 3}, moving = {growth_interval = 1, init_scale = 2}}}
    local w = leaf {1.0}
    local opt = optim.SGD({w}, {lr = 0})
    for _ = 1, 3 do
      s:backward(w:sum(), "fixed", opt)
      s:backward(w:sum(), "moving", opt)
      s:step(opt)
      s:update()
    end
    assert.same({3.0, 16.0}, {s:get_scale "fixed", s:get_scale "moving"})
  end)
end)

-- ====== Empty and frozen optimizers ======

describe("an optimizer without gradients", function()
  it("is a clean no-op: frozen, unused, or cleared", function()
    local scaler = amp.GradScaler {init_scale = 4, growth_interval = 2}
    local frozen = nn.Linear(2, 2):requires_grad_(false)
    local unused, used = leaf {1}, leaf {1}
    local list = {optim.SGD(frozen:parameters(), {lr = 1}), optim.Adam({unused}, {lr = 1})}
    local opt = optim.SGD({used}, {lr = 1})
    for _ = 1, 2 do
      opt:zero_grad()
      scaler:scale(used:sum()):backward()
      for _, o in ipairs(list) do
        scaler:unscale_(o)
        local stepped, record = scaler:step(o)
        assert.is_false(stepped)
        assert.is_true(record.empty)
        assert.is_false(record.found_inf)
      end
      assert.is_true((scaler:step(opt)))
      scaler:update()
    end
    assert.equal(8, scaler:get_scale())
    assert.is_nil(list[2]:state_dict().state[1])
    scaler:step(list[1])
    assert.equal("hold", scaler:update().event)
    assert.equal(8, scaler:get_scale())
    assert.matches("skipped 0", tostring(scaler), 1, true)
  end)
end)

-- ====== Float16 parameters ======

describe("float16 parameters, on request", function()
  it("are refused by default, with a way out", function()
    local p = leaf({1, 1}, "f16")
    p.grad = hm.ones({2}, {dtype = "f16"})
    local scaler, opt = amp.GradScaler(), optim.SGD({p}, {lr = 1})
    raises({"Attempting to unscale FP16 gradients.", "allow_f16_grads"}, scaler.step, scaler, opt)
  end)

  it("step() unscales in float32: what float16 would flush reaches the moments", function()
    local p = leaf({1, 1}, "f16")
    local opt = optim.Adam({p}, {lr = 2 ^ -4, eps = 1e-20})
    local scaler = amp.GradScaler {init_scale = 2 ^ 20, allow_f16_grads = true}
    p.grad = hm.tensor({2 ^ -10, -2 ^ -10}, {dtype = "f16"}) -- true gradients: 2^-30, below float16's least
    assert.is_true((scaler:step(opt)))
    near(opt:state_dict().state[1].exp_avg, {0.1 * 2 ^ -30, -0.1 * 2 ^ -30}, 1e-6)
    near(p, {1 - 2 ^ -4, 1 + 2 ^ -4}, 1e-2)
    scaler:update()
    p.grad = hm.tensor({inf, 1}, {dtype = "f16"})
    assert.is_false((scaler:step(opt)))
  end)

  it("O2's masters keep float32 gradients where clipping comes between", function()
    local model = nn.Linear(2, 1, {bias = false})
    local opt = optim.SGD(model:parameters(), {lr = 1})
    amp.initialize(model, opt, {opt_level = "O2", loss_scale = 2 ^ 20, verbosity = 0})
    amp.scale_loss(model(hm.full({1, 2}, 2 ^ -15)):sum() * 2 ^ -12, opt, function(s) s:backward() end)
    near(amp.master_params(opt)[1].grad, {2 ^ -27, 2 ^ -27}, 1e-3)
    nn.utils.clip_grad_norm_(amp.master_params(opt), 2 ^ -28)
    assert(amp.master_params(opt)[1].grad:gt(0):all():item())
  end)
end)

-- ====== bfloat16 ======

describe("bfloat16", function()
  it("dtype = \"bf16\" fixes the scale at 1; checks are on and counted", function()
    local scaler = amp.GradScaler {dtype = "bf16"}
    local p = leaf {1, 1}
    local opt = optim.SGD({p}, {lr = 1})
    local loss = hm.tensor(3.0)
    same(scaler:scale(loss), {3})
    for k, bad in ipairs {1, inf, nan, 1} do
      p.grad = hm.tensor {bad, bad}
      local stepped, record = scaler:step(opt)
      assert.equal(bad == 1, stepped)
      assert.same({bad == inf and 2 or 0, bad ~= bad and 2 or 0}, {record.inf_count, record.nan_count})
      local update = scaler:update()
      assert.equal("hold", update.event)
      assert.equal(1, scaler:get_scale())
      assert.equal(k, #scaler:record())
    end
    same(p, {-1, -1})
    assert.matches("skipped 2", tostring(scaler), 1, true)
    scaler:update(1024)
    scaler:set_scale(64)
    assert.equal(1, scaler:get_scale())
  end)

  it("another init_scale with it is an error, unless a policy is named", function()
    raises({"the scale is fixed at 1", "65536", "hint"}, amp.GradScaler, {dtype = "bf16", init_scale = 65536})
    assert.equal(8, amp.GradScaler {dtype = "bf16", init_scale = 8, policy = "dynamic"}:get_scale())
    assert.equal(1, amp.GradScaler {dtype = "bf16", init_scale = 1}:get_scale())
  end)

  it("gradients in bfloat16 are checked and unscaled like others", function()
    local p = leaf({1, 1}, "bf16")
    p.grad = hm.tensor({4, 8}, {dtype = "bf16"})
    local opt, scaler = optim.SGD({p}, {lr = 1}), amp.GradScaler {init_scale = 4}
    scaler:unscale_(opt)
    same(p.grad, {1, 2})
    assert.is_true((scaler:step(opt)))
    same(p, {0, -1})
  end)

  it("a plain scaler keeps its scale and warns once", function()
    local w = leaf {{1.0, 2.0}, {3.0, 4.0}}
    local scaler, opt = amp.GradScaler {init_scale = 256}, optim.SGD({w}, {lr = 0})
    local said = expect.stderr(function()
      for _ = 1, 3 do
        opt:zero_grad()
        local loss = amp.autocast("bf16", function() return w:matmul(w):sum() end)
        same(scaler:scale(loss), {loss:item() * 256})
        scaler:scale(loss):backward()
        assert.is_true((scaler:step(opt)))
        scaler:update()
      end
    end)
    assert.equal(1, select(2, said:gsub("bfloat16, which has the range of float32", "")))
    assert.matches("dtype = \"bf16\"", said, 1, true)
    assert.equal(256, scaler:get_scale())
    said = expect.stderr(function()
      local other = amp.GradScaler {dtype = "bf16"}
      other:scale(amp.autocast("bf16", function() return w:matmul(w):sum() end))
      amp.GradScaler {enabled = false}:scale(hm.ones({1}, {dtype = "bf16"}))
      other = amp.GradScaler()
      other:scale(amp.autocast("f16", function() return w:matmul(w):sum() end))
      other:scale({hm.ones({1})})
    end)
    assert.equal("", said)
    said = expect.stderr(function() amp.GradScaler():scale({hm.ones({1}, {dtype = "bf16"})}) end)
    assert.matches("computed in bfloat16", said, 1, true)
  end)

  it("the warning goes by the graph of the loss, not by what ran before", function()
    local net, x, y = nn.Linear(3, 2), hm.randn({4, 3}), hm.randn({4, 2})
    local function loss(dtype) return amp.autocast(dtype, function() return nn.functional.mse_loss(net(x), y) end) end
    local function said_of(...)
      local list = {...}
      return expect.stderr(function()
        local scaler = amp.GradScaler()
        for _, l in ipairs(list) do scaler:scale(l) end
      end)
    end
    assert.equal("float32", loss("bf16").dtype)
    assert.matches("computed in bfloat16", said_of(loss("bf16")), 1, true)
    local f16, plain = loss("f16"), nn.functional.mse_loss(net(x), y)
    hm.no_grad(loss, "bf16") -- an evaluation between the loss and scale()
    assert.equal("", said_of(f16, plain, nn.functional.mse_loss(net(x), y)))
    -- a part of the graph is enough; through a checkpoint, a Function, gradients in float32 and f16 on top, too
    assert.matches("computed in bfloat16", said_of(f16 + loss("bf16")), 1, true)
    assert.matches("computed in bfloat16", said_of(amp.autocast("bf16", hm.checkpoint, net, x):float():sum()), 1, true)
    assert.matches("computed in bfloat16", said_of(loss {dtype = "bf16", backward = "float32"}), 1, true)
    local id = hm.autograd.Function("Id", {forward = function(_, t) return t * 1 end, backward = function(_, g) return g end})
    assert.matches("computed in bfloat16", said_of(id(loss("bf16"))), 1, true)
    -- a bfloat16 input that wants no gradient is no reason
    assert.equal("", said_of(nn.functional.mse_loss(net(x:to("bf16"):float()), y)))
  end)
end)

-- ====== backward = "float32" ======

describe("autocast{backward = \"float32\"}", function()
  for _, low in ipairs {"f16", "bf16"} do
    it("keeps small gradients that a backward in " .. low .. " loses or rounds, without a scale", function()
      local function grad(backward)
        hm.manual_seed(6)
        local model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 1))
        local x = hm.rand({4, 4})
        local loss = amp.autocast({dtype = low, backward = backward}, function() -- the loss belongs into the region
          local y = model(x)
          assert.equal(low == "f16" and "float16" or "bfloat16", y.dtype)
          return y:sum() * 2 ^ -26
        end)
        loss:backward()
        return model[1].weight.grad, model, x
      end
      local precise, model, x = grad("float32")
      assert.equal("float32", precise.dtype)
      -- what it should be: the same operands, rounded forward, gradients in float64
      local weights = {}
      for i = 1, 3 do weights[i] = model[i].weight:detach():to(low):double() end
      local above = weights[3]:matmul(weights[2]):expand(4, 8) * 2 ^ -26
      near(precise, numbers.flat(above:t():matmul(x:to(low):double())), 1e-5)
      local plain = grad(nil)
      if low == "f16" then assert(plain:eq(0):any():item(), "some are flushed without it") end
      assert.is_false(plain:equal(precise))
    end)
  end
end)
