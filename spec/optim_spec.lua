-- optim_spec.lua -- SGD, Adam and AdamW against the published rules in doubles, groups, state dicts, refusals, schedules,
-- low-precision shadows.

local hm = require "halfmoon"
local core = require "halfmoon.core"
local numbers = require "spec.support.numbers"
local expect = require "spec.support.expect"
local optimizers = require "spec.support.optimizers"
local reference = require "spec.reference.optim"

local nn, optim, amp = hm.nn, hm.optim, hm.amp
local same, near, raises = numbers.assert_same, numbers.assert_near, expect.raises
local filled, parameter, name_of = optimizers.filled, optimizers.parameter, optimizers.name_of

local CASES = {
  {"SGD", {lr = 0.05}},
  {"SGD", {lr = 0.05, weight_decay = 0.1}},
  {"SGD", {lr = 0.05, momentum = 0.9}},
  {"SGD", {lr = 0.05, momentum = 0.9, dampening = 0.3, weight_decay = 0.01}},
  {"SGD", {lr = 0.05, momentum = 0.8, nesterov = true, weight_decay = 0.02}},
  {"SGD", {lr = 0.05, momentum = 0.9, maximize = true}},
  {"Adam", {lr = 0.01}},
  {"Adam", {lr = 0.02, betas = {0.8, 0.95}, eps = 1e-6, weight_decay = 0.1}},
  {"Adam", {lr = 0.01, maximize = true}},
  {"AdamW", {lr = 0.01}},
  {"AdamW", {lr = 0.02, betas = {0.7, 0.9}, eps = 1e-3, weight_decay = 0.3}},
  {"AdamW", {lr = 0.01, maximize = true, weight_decay = 0.1}},
}
-- ====== The rules ======

describe("optimizer", function()
  for _, case in ipairs(CASES) do
    for dtype, tolerance in pairs {f32 = 2e-6, f64 = 1e-12} do
      it(("%s: 20 steps in %s"):format(name_of(case), dtype), function() optimizers.check_steps(case, dtype, tolerance) end)
    end
    for _, dtype in ipairs {"f16", "bf16"} do
      it(("%s: %s parameters are rounded once a step, state is float32"):format(name_of(case), dtype), function()
        optimizers.check_half_steps(case, dtype)
      end)
    end
  end

  it("sizes around a vector, large ones, several at once, in any memory order", function()
    local sizes = {1, 7, 8, 9, 15, 16, 17, 33, 20000}
    for _, kind in ipairs {"SGD", "AdamW"} do
      local params, want, states, key = {}, {}, {}, kind:lower()
      for k, n in ipairs(sizes) do
        params[k] = parameter(n, "f32", k)
        want[k], states[k] = numbers.flat(params[k]), {}
      end
      local turned = hm.tensor(filled(12, 0), {dtype = "f32"}):view(3, 4):t():detach():requires_grad_()
      local o = {lr = 0.01, momentum = kind == "SGD" and 0.9 or nil}
      local full = {lr = 0.01, momentum = 0.9, betas = {0.9, 0.999}, eps = 1e-8, weight_decay = kind == "SGD" and 0 or 0.01}
      local opt = optim[kind]({table.unpack(params)}, o)
      opt:add_param_group {params = {turned}}
      local want_turned, state_turned = numbers.flat(turned), {}
      for step = 1, 3 do
        for k, n in ipairs(sizes) do
          params[k].grad = hm.tensor(filled(n, step, k))
          reference[key](want[k], filled(n, step, k), states[k], full)
        end
        turned.grad = hm.tensor(filled(12, step)):view(4, 3) -- row-major for a parameter that is not
        reference[key](want_turned, filled(12, step), state_turned, full)
        opt:step()
      end
      for k in ipairs(sizes) do near(params[k], want[k], 3e-6, 3e-6, kind .. " " .. sizes[k]) end
      near(turned, want_turned, 3e-6, 3e-6)
    end
  end)
end)

-- ====== Groups ======

describe("parameter groups", function()
  it("have options of their own, the rest from the constructor", function()
    local a, b = parameter(3, "f64", 1), parameter(3, "f64", 2)
    local opt = optim.SGD({{params = {a}}, {params = b, lr = 0.5, momentum = 0.9}}, {lr = 0.1})
    assert.equal(2, #opt.param_groups)
    assert.equal(0.1, opt.param_groups[1].lr)
    assert.equal(0.5, opt.param_groups[2].lr)
    assert.equal(0.9, opt.param_groups[2].momentum)
    assert.equal(0.0, opt.param_groups[1].momentum)
    local wa, wb, sa, sb = numbers.flat(a), numbers.flat(b), {}, {}
    for step = 1, 3 do
      a.grad, b.grad = hm.tensor(filled(3, step), {dtype = "f64"}), hm.tensor(filled(3, step, 9), {dtype = "f64"})
      reference.sgd(wa, filled(3, step), sa, {lr = 0.1})
      reference.sgd(wb, filled(3, step, 9), sb, {lr = 0.5, momentum = 0.9})
      opt:step()
    end
    near(a, wa, 1e-13)
    near(b, wb, 1e-13)
  end)

  it("may be added later and changed between steps", function()
    local a, b = parameter(2, "f64", 1), parameter(2, "f64", 2)
    local opt = optim.AdamW({a}, {lr = 0.1})
    local wa, wb, sa, sb = numbers.flat(a), numbers.flat(b), {}, {}
    local o = {lr = 0.1, betas = {0.9, 0.999}, eps = 1e-8, weight_decay = 0.01}
    local function go(step)
      a.grad, b.grad = hm.tensor(filled(2, step), {dtype = "f64"}), hm.tensor(filled(2, step, 9), {dtype = "f64"})
      opt:step()
    end
    go(1)
    reference.adamw(wa, filled(2, 1), sa, o)
    opt:add_param_group {params = {b}, weight_decay = 0.0}
    opt.param_groups[1].lr = 0.02
    opt.param_groups[1].betas = {0.5, 0.6}
    go(2) -- a is at its second step, b at its first
    reference.adamw(wa, filled(2, 2), sa, {lr = 0.02, betas = {0.5, 0.6}, eps = 1e-8, weight_decay = 0.01})
    reference.adamw(wb, filled(2, 2, 9), sb, {lr = 0.1, betas = {0.9, 0.999}, eps = 1e-8, weight_decay = 0})
    near(a, wa, 1e-13)
    near(b, wb, 1e-13)
    assert.same({0.5, 0.6}, opt.param_groups[1].betas)
    assert.equal(a, opt.param_groups[1].params[1])
  end)

  it("refuse options that do not exist or make no sense, and name the closest", function()
    local p = parameter(1, "f32")
    raises({"optim.SGD: unknown option 'momentun', did you mean 'momentum'"}, optim.SGD, {p}, {momentun = 0.9})
    raises({"optim.AdamW: option 'lr' must be at least 0"}, optim.AdamW, {p}, {lr = -1})
    raises("option 'lr'", optim.AdamW, {p}, {lr = 0 / 0})
    raises("option 'lr' must be number", optim.AdamW, {p}, {lr = "fast"})
    raises("option 'betas'", optim.Adam, {p}, {betas = {0.9, 1}})
    raises("nesterov needs a momentum", optim.SGD, {p}, {nesterov = true})
    raises("nesterov needs a momentum", optim.SGD, {p}, {nesterov = true, momentum = 0.9, dampening = 0.1})
    local opt = optim.SGD({p}, {lr = 1})
    raises("option 'lr'", function() opt.param_groups[1].lr = -1 end)
    raises({"unknown option 'rate'"}, function() opt.param_groups[1].rate = 1 end)
    raises("the parameters of a group are fixed", function() opt.param_groups[1].params = {} end)
  end)

  it("refuse duplicates, results of ops, things that are no tensors, modules, nothing", function()
    local p, q = parameter(2, "f32", 1), parameter(2, "f32", 2)
    raises("is already in the optimizer", optim.SGD, {p, q, p}, {lr = 1})
    local opt = optim.SGD({p}, {lr = 1})
    raises("is already in the optimizer", function() opt:add_param_group {params = {p}} end)
    assert.equal(1, #opt.param_groups)
    raises({"is the result of an op", "hint"}, optim.SGD, {p * 2}, {lr = 1})
    raises("not a tensor", optim.SGD, {p, 3}, {lr = 1})
    raises({"is empty"}, optim.SGD, {}, {lr = 1})
    raises({"not a module", "model:parameters()"}, optim.SGD, nn.Linear(2, 2), {lr = 1})
    raises("expected an array of parameters", optim.SGD, 3)
    local gaps = hm.ones({5, 8}):narrow(2, 1, 4):detach():requires_grad_()
    raises({"is a view with gaps or repeats", "contiguous()"}, optim.SGD, {gaps}, {lr = 1})
    raises("floating", optim.SGD, {hm.zeros({2}, {dtype = "i64"})}, {lr = 1})
  end)
end)

-- ====== What is left alone ======

describe("a step", function()
  it("leaves parameters without a gradient alone, also their step count", function()
    local a, b = parameter(3, "f32", 1), parameter(3, "f32", 2)
    local opt = optim.AdamW({a, b}, {lr = 0.1})
    local before = b:detach():clone()
    a.grad = hm.ones({3})
    opt:step()
    opt:step()
    same(b, before)
    assert.is_nil(opt:state_dict().state[2])
    assert.equal(2, opt:state_dict().state[1].step)
    b.grad = hm.ones({3})
    opt:step()
    assert.equal(1, opt:state_dict().state[2].step)
  end)

  it("leaves frozen parameters alone", function()
    local a = parameter(3, "f32")
    local opt = optim.SGD({a}, {lr = 0.1, weight_decay = 1})
    a.grad = hm.ones({3})
    a.requires_grad = false
    local before = a:clone()
    opt:step()
    same(a, before)
  end)

  it("does not record a graph, works inside no_grad and autocast, and is seen by the graph as a change", function()
    local a = parameter(3, "f32")
    local opt = optim.SGD({a}, {lr = 0.5})
    local y = (a * a):sum()
    a.grad = hm.ones({3})
    hm.no_grad(function() amp.autocast("f16", function() opt:step() end) end)
    assert.is_true(a.is_leaf)
    raises("was changed in place", function() y:backward() end)
  end)

  it("with a gradient of another shape cannot happen; an optimizer of empty tensors is fine", function()
    local a = hm.zeros({0, 3}, {requires_grad = true})
    local opt = optim.AdamW({a}, {lr = 0.1})
    a.grad = hm.zeros({0, 3})
    opt:step()
    assert.same({0, 3}, a.shape)
  end)

  it("refuses closures", function()
    raises("closures are not supported", function() optim.SGD({parameter(1, "f32")}):step(function() end) end)
  end)

  it("takes NaN and infinity as they come", function()
    local a = parameter(3, "f32")
    local opt = optim.SGD({a}, {lr = 1})
    a.grad = hm.tensor {0 / 0, math.huge, 0}
    local last = a[3]:item()
    opt:step()
    local v = a:totable()
    assert(v[1] ~= v[1] and v[2] == -math.huge and v[3] == last)
  end)
end)

describe("zero_grad", function()
  it("sets gradients to nil", function()
    local a = parameter(2, "f32")
    local opt = optim.SGD({a}, {lr = 1})
    a:sum():backward()
    local kept = a.grad
    opt:zero_grad()
    assert.is_nil(a.grad)
    same(kept, {1, 1})
    opt:zero_grad()
  end)
end)

-- ====== State ======

describe("state_dict", function()
  for _, kind in ipairs {"SGD", "Adam", "AdamW"} do
    it(kind .. ": a second optimizer goes on exactly", function()
      local function train(params, opt, from, to)
        for step = from, to do
          for k, p in ipairs(params) do
            if k < 3 or step % 2 == 0 then p.grad = hm.tensor(filled(5, step, k)) else p.grad = nil end
          end
          opt:step()
        end
      end
      local o = kind == "SGD" and {lr = 0.1, momentum = 0.9, weight_decay = 0.1} or {lr = 0.1, weight_decay = 0.1}
      local function make()
        local params = {parameter(5, "f32", 1), parameter(5, "f32", 2), parameter(5, "f32", 3)}
        return params, optim[kind]({{params = {params[1], params[2]}}, {params = {params[3]}, lr = 0.2}}, o)
      end
      local a, first = make()
      train(a, first, 1, 3)
      first.param_groups[2].lr = 0.05
      local path = os.tmpname()
      assert(hm.save(path, {opt = first:state_dict()}))
      local b, second = make()
      for k = 1, 3 do hm.no_grad(function() b[k]:copy_(a[k]) end) end
      second:load_state_dict(assert(hm.load(path)).opt)
      os.remove(path)
      assert.equal(0.05, second.param_groups[2].lr)
      train(a, first, 4, 8)
      train(b, second, 4, 8)
      for k = 1, 3 do same(b[k], a[k]) end
    end)
  end

  it("that does not fit is refused and changes nothing", function()
    local a, b = parameter(2, "f32", 1), parameter(3, "f32", 1)
    local opt, other = optim.AdamW({a}, {lr = 0.1}), optim.AdamW({b}, {lr = 0.7})
    a.grad, b.grad = hm.ones({2}), hm.ones({3})
    opt:step()
    other:step()
    local before = opt:state_dict().state[1].exp_avg:clone()
    raises("AdamW:load_state_dict", function() opt:load_state_dict(other:state_dict()) end)
    assert.equal(0.1, opt.param_groups[1].lr)
    same(opt:state_dict().state[1].exp_avg, before)
    raises("expected a table made by state_dict()", function() opt:load_state_dict(3) end)
    local two = optim.AdamW({parameter(2, "f32", 3), parameter(2, "f32", 4)}, {lr = 0.1})
    raises({"group 1 has 1 parameters, the state has 2"}, function() opt:load_state_dict(two:state_dict()) end)
    local foreign = optim.SGD({parameter(2, "f32", 3)}, {momentum = 0.5}):state_dict()
    raises("AdamW:load_state_dict: unknown option", function() opt:load_state_dict(foreign) end)
  end)

  it("frees what it holds: memory is back after the optimizer", function()
    local a = hm.zeros({1000}, {requires_grad = true})
    a.grad = hm.ones({1000})
    collectgarbage()
    collectgarbage()
    local before = core.memory_stats().live
    do
      local opt = optim.AdamW({a}, {lr = 0.1})
      opt:step()
      assert(core.memory_stats().live >= before + 8000)
      assert.equal(8000, opt.core:state_bytes())
    end
    collectgarbage()
    collectgarbage()
    assert.equal(before, core.memory_stats().live)
  end)
end)

-- ====== Schedules ======

describe("lr_scheduler", function()
  local schedule = optim.lr_scheduler
  local function rates(make, n)
    local opt = optim.SGD({parameter(1, "f32")}, {lr = 1})
    local s, list = make(opt), {opt.param_groups[1].lr}
    for i = 1, n do
      s:step()
      list[i + 1] = opt.param_groups[1].lr
    end
    return list
  end

  it("StepLR, CosineAnnealingLR, LambdaLR, LinearWarmup", function()
    near(rates(function(o) return schedule.StepLR(o, {step_size = 2, gamma = 0.5}) end, 5), {1, 1, 0.5, 0.5, 0.25, 0.25}, 1e-15)
    near(rates(function(o) return schedule.CosineAnnealingLR(o, {T_max = 4, eta_min = 0.2}) end, 5),
      {1, 0.2 + 0.4 * (1 + math.sqrt(0.5)), 0.6, 0.2 + 0.4 * (1 - math.sqrt(0.5)), 0.2, 0.2 + 0.4 * (1 - math.sqrt(0.5))}, 1e-12)
    near(rates(function(o) return schedule.LambdaLR(o, function(t) return 1 / (1 + t) end) end, 2), {1, 0.5, 1 / 3}, 1e-15)
    near(rates(function(o) return schedule.LinearWarmup(o, {steps = 4, start_factor = 0.2}) end, 5), {0.2, 0.4, 0.6, 0.8, 1, 1}, 1e-12)
    near(rates(function(o)
      return schedule.LinearWarmup(o, {steps = 2, start_factor = 0.5, after = schedule.StepLR(o, {step_size = 1, gamma = 0.1})})
    end, 4), {0.5, 0.75, 1, 0.1, 0.01}, 1e-12)
  end)

  it("holds back after a skipped step", function()
    local opt = optim.SGD({parameter(1, "f32")}, {lr = 1})
    local s = schedule.StepLR(opt, {step_size = 1, gamma = 0.5})
    s:step(false)
    assert.equal(1.0, opt.param_groups[1].lr)
    s:step(true)
    assert.equal(0.5, opt.param_groups[1].lr)
    s:step(nil)
    assert.equal(0.25, opt.param_groups[1].lr)
  end)

  it("holds back by what the scaler says", function()
    local p = parameter(2, "f32")
    local opt, scaler = optim.SGD({p}, {lr = 1}), amp.GradScaler {init_scale = 4}
    local s = schedule.StepLR(opt, {step_size = 1, gamma = 0.5})
    for _, factor in ipairs {math.huge, 1} do
      opt:zero_grad()
      scaler:scale((p * factor):sum()):backward()
      local stepped = scaler:step(opt)
      scaler:update()
      s:step(stepped)
    end
    assert.equal(0.5, opt.param_groups[1].lr)
  end)

  it("resumes", function()
    local opt = optim.SGD({parameter(1, "f32")}, {lr = 1})
    local s = schedule.StepLR(opt, {step_size = 2, gamma = 0.5})
    for _ = 1, 3 do s:step() end
    local opt2 = optim.SGD({parameter(1, "f32")}, {lr = 1})
    local s2 = schedule.StepLR(opt2, {step_size = 2, gamma = 0.5})
    s2:load_state_dict(s:state_dict())
    assert.same(s:get_last_lr(), s2:get_last_lr())
    s:step()
    s2:step()
    assert.equal(0.25, opt2.param_groups[1].lr)
    assert.same(s:get_last_lr(), s2:get_last_lr())
  end)

  it("refuses what makes no sense", function()
    local opt = optim.SGD({parameter(1, "f32")}, {lr = 1})
    raises("'step_size' is missing", schedule.StepLR, opt, {})
    raises({"unknown option", "step_size"}, schedule.StepLR, opt, {step_sise = 1})
    raises("must be an optimizer", schedule.StepLR, {}, {step_size = 1})
  end)
end)

-- ====== Shadows ======

describe("the low-precision shadow of a weight", function()
  for _, low in ipairs {"f16", "bf16"} do
    for _, kind in ipairs {"SGD", "AdamW"} do
      it(("after %s is what a fresh cast gives, in %s"):format(kind, low), function()
        local function train(drop)
          hm.manual_seed(4)
          local model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
          local opt = optim[kind](model:parameters(), {lr = 0.05})
          local scaler = amp.GradScaler(low == "f16" and {init_scale = 1024} or {dtype = low})
          local x, y = hm.randn({16, 20}), hm.randint(0, 10, {16})
          for _ = 1, 3 do
            if drop then
              for _, p in ipairs(model:parameters()) do hm.no_grad(function() p:add_(0) end) end -- a write: shadows are out of date
            end
            local loss = amp.autocast(low, function() return nn.functional.cross_entropy(model(x), y) end)
            opt:zero_grad()
            scaler:scale(loss):backward()
            assert.is_true((scaler:step(opt)))
            scaler:update()
          end
          return model:state_dict()
        end
        local with, without = train(false), train(true)
        for name, t in pairs(with) do same(t, without[name], name) end
      end)
    end
  end

  it("serves the step after without another cast", function()
    local model = nn.Linear(8, 8)
    local opt = optim.SGD(model:parameters(), {lr = 0.1})
    local x = hm.randn({4, 8})
    local function go()
      local loss = amp.autocast("f16", function() return model(x):float():sum() end)
      opt:zero_grad()
      loss:backward()
      opt:step()
    end
    go()
    local before = core.cast_stats()
    go()
    local after = core.cast_stats()
    assert.equal(before.misses, after.misses)
    assert.equal(before.hits + 2, after.hits)
    local w = model.weight:detach()
    local fresh = w:half()
    local shadow = amp.autocast("f16", function() return core.call("linear", hm.eye(8), model.weight) end)
    same(shadow:t(), fresh)
  end)
end)
