-- schedulers_spec.lua -- optim.lr_scheduler: every schedule against PyTorch's numbers, groups, holding back after a
-- skipped step, resuming, several as one, refusals.

local hm = require "halfmoon"
local numbers = require "spec.support.numbers"
local expect = require "spec.support.expect"

local optim, amp = hm.optim, hm.amp
local schedule = optim.lr_scheduler
local near, raises = numbers.assert_near, expect.raises

local function optimizer(lr, momentum)
  return optim.SGD({hm.zeros({1}, {requires_grad = true})}, {lr = lr or 0.8, momentum = momentum or 0.5})
end

--- Rates and momenta from step 0 to n.
local function run(s, opt, n)
  local rates, momenta = {opt.param_groups[1].lr}, {opt.param_groups[1].momentum}
  for i = 1, n do
    s:step()
    rates[i + 1], momenta[i + 1] = opt.param_groups[1].lr, opt.param_groups[1].momentum
  end
  return rates, momenta
end

-- Made by PyTorch 2.15, from SGD with lr 0.8, momentum 0.5:
--   s = getattr(torch.optim.lr_scheduler, name)(opt, **options)
--   for t in range(n): print(opt.param_groups[0]["lr"], opt.param_groups[0]["momentum"]); opt.step(); s.step()
local GOLDEN = {
  {"MultiStepLR", {milestones = {2, 5, 5}, gamma = 0.5},
    {0.8, 0.8, 0.4, 0.4, 0.4, 0.1, 0.1, 0.1}},
  {"ExponentialLR", {gamma = 0.9},
    {0.8, 0.72, 0.648, 0.5832, 0.52488, 0.472392}},
  {"CosineAnnealingLR", {T_max = 5, eta_min = 0.1},
    {0.8, 0.733155948031232, 0.558155948031232, 0.341844051968768, 0.166844051968768, 0.1}},
  {"CosineAnnealingLR", {T_max = 2, eta_min = 0.2}, -- past T_max: the documented formula at every t
    {0.8, 0.5, 0.2, 0.5, 0.8, 0.5, 0.2, 0.5, 0.8}},
  {"CosineAnnealingWarmRestarts", {T_0 = 3, eta_min = 0.05},
    {0.8, 0.6125, 0.2375, 0.8, 0.6125, 0.2375, 0.8, 0.6125, 0.2375}},
  {"CosineAnnealingWarmRestarts", {T_0 = 2, T_mult = 2},
    {0.8, 0.4, 0.8, 0.682842712474619, 0.4, 0.117157287525381, 0.8, 0.769551813004515, 0.682842712474619, 0.553073372946036}},
  {"PolynomialLR", {total_iters = 4, power = 1.5},
    {0.8, 0.519615242270663, 0.282842712474619, 0.1, 0, 0, 0}},
  {"LinearLR", {start_factor = 0.25, total_iters = 4},
    {0.2, 0.35, 0.5, 0.65, 0.8, 0.8, 0.8}},
  {"LinearLR", {},
    {0.266666666666667, 0.373333333333333, 0.48, 0.586666666666667, 0.693333333333333, 0.8, 0.8}},
  {"ConstantLR", {factor = 0.5, total_iters = 3},
    {0.4, 0.4, 0.4, 0.8, 0.8, 0.8}},
  {"OneCycleLR", {max_lr = 2, total_steps = 10},
    {0.0800000000000001, 1.04, 2, 1.90096926402695, 1.62349130789953, 1.22252404387258, 0.777483956127421, 0.376516692100474,
      0.0990387359730526, 8e-06, 0.0990387359730525},
    {0.95, 0.9, 0.85, 0.854951556604879, 0.868825509907063, 0.888873953302184, 0.911126046697816, 0.931174490092937,
      0.945048443395121, 0.95, 0.945048443395121}},
  {"OneCycleLR", {max_lr = 2, epochs = 3, steps_per_epoch = 4, pct_start = 0.25, anneal_strategy = "linear", three_phase = true,
      div_factor = 10, final_div_factor = 100, base_momentum = 0.7, max_momentum = 0.9},
    {0.2, 1.1, 2, 1.1, 0.2, 0.171714285714286, 0.143428571428571, 0.115142857142857, 0.0868571428571429, 0.0585714285714286,
      0.0302857142857143, 0.002},
    {0.9, 0.8, 0.7, 0.8, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9}},
}

describe("lr_scheduler", function()
  for i, entry in ipairs(GOLDEN) do
    it(("%s %d: PyTorch's rates"):format(entry[1], i), function()
      local opt = optimizer()
      local rates, momenta = run(schedule[entry[1]](opt, entry[2]), opt, #entry[3] - 1)
      near(rates, entry[3], 2e-13, 1e-15)
      if entry[4] then near(momenta, entry[4], 1e-13) else assert.equal(0.5, momenta[#momenta]) end
    end)
  end

  it("rates do not drift: step 100,000 is what the formula says", function()
    local opt = optimizer()
    local s = schedule.CosineAnnealingWarmRestarts(opt, {T_0 = 10})
    for _ = 1, 100005 do s:step() end
    near({opt.param_groups[1].lr}, {0.4}, 1e-12)
  end)

  it("each group has its own base rate; LambdaLR a function of its own, MultiStep the same factor", function()
    local a, b = hm.zeros({1}, {requires_grad = true}), hm.zeros({1}, {requires_grad = true})
    local opt = optim.SGD({{params = {a}}, {params = {b}, lr = 10.0}}, {lr = 1.0})
    local s = schedule.MultiStepLR(opt, {milestones = {1}, gamma = 0.5})
    s:step()
    assert.same({0.5, 5.0}, s:get_last_lr())
    s = schedule.LambdaLR(opt, {lr_lambda = {function(t) return t end, function(t) return 1 + t end}})
    s:step()
    s:step()
    assert.same({2.0, 30.0}, s:get_last_lr()) -- of the rates before any scheduler
    s = schedule.OneCycleLR(opt, {max_lr = {1, 2}, total_steps = 4, pct_start = 0.5})
    s:step()
    near(s:get_last_lr(), {1, 2}, 1e-12)
  end)

  it("a rate that was set by hand is the base of the next scheduler", function()
    local opt = optimizer(1.0)
    schedule.ExponentialLR(opt, {gamma = 0.5}):step()
    opt.param_groups[1].lr = 3.0
    local s = schedule.ExponentialLR(opt, {gamma = 0.5})
    s:step()
    assert.equal(1.5, opt.param_groups[1].lr)
  end)

  it("OneCycleLR moves the first beta of optimizers with betas, and no momentum where that is not wanted", function()
    local p = hm.zeros({1}, {requires_grad = true})
    local opt = optim.AdamW({p}, {lr = 1})
    local s = schedule.OneCycleLR(opt, {max_lr = 1, total_steps = 10})
    near(opt.param_groups[1].betas, {0.95, 0.999}, 1e-15)
    s:step()
    near(opt.param_groups[1].betas, {0.9, 0.999}, 1e-12)
    opt = optimizer()
    schedule.OneCycleLR(opt, {max_lr = 1, total_steps = 10, cycle_momentum = false}):step()
    assert.equal(0.5, opt.param_groups[1].momentum)
    raises("cycle_momentum needs an optimizer with momentum or betas", schedule.OneCycleLR, optim.Adagrad({p}),
      {max_lr = 1, total_steps = 3})
  end)

  it("OneCycleLR ends: a step beyond is refused and changes nothing", function()
    local opt = optimizer()
    local s = schedule.OneCycleLR(opt, {max_lr = 1, total_steps = 2})
    s:step()
    s:step()
    local last = opt.param_groups[1].lr
    raises({"OneCycleLR: step 3", "2 steps"}, function() s:step() end)
    assert.equal(2, s.t)
    assert.equal(last, opt.param_groups[1].lr)
  end)
end)

-- ====== Several as one ======

describe("several schedulers as one", function()
  it("SequentialLR: PyTorch's rates", function()
    local opt = optimizer()
    local s = schedule.SequentialLR(opt, {milestones = {2, 5}, schedulers = {
      schedule.ConstantLR(opt, {factor = 0.1, total_iters = 2}), schedule.ExponentialLR(opt, {gamma = 0.9}),
      schedule.CosineAnnealingLR(opt, {T_max = 3})}})
    near(run(s, opt, 8), {0.08, 0.08, 0.8, 0.72, 0.648, 0.8, 0.6, 0.2, 0}, 1e-13, 1e-16)
  end)

  it("ChainedScheduler: PyTorch's rates", function()
    local opt = optimizer()
    local s = schedule.ChainedScheduler {schedule.ConstantLR(opt, {factor = 0.1, total_iters = 3}),
      schedule.ExponentialLR(opt, {gamma = 0.9}), schedule.MultiStepLR(opt, {milestones = {4}, gamma = 0.5})}
    near(run(s, opt, 6), {0.08, 0.072, 0.0648, 0.5832, 0.26244, 0.236196, 0.2125764}, 1e-13)
  end)

  it("within each other, with momentum", function()
    local opt = optimizer(1.0)
    local cycle = schedule.OneCycleLR(opt, {max_lr = 2, total_steps = 10})
    local chained = schedule.ChainedScheduler({schedule.ExponentialLR(opt, {gamma = 0.5}),
      schedule.ConstantLR(opt, {factor = 0.5, total_iters = 1})}, opt)
    local s = schedule.SequentialLR(opt, {schedulers = {chained, cycle}, milestones = {2}})
    local rates, momenta = run(s, opt, 3)
    near(rates, {0.5, 0.5, 0.08, 1.04}, 1e-12)
    near({momenta[3], momenta[4]}, {0.95, 0.9}, 1e-12)
    local warm = schedule.LinearWarmup(opt, {steps = 2, start_factor = 0.5, after = s})
    near(run(warm, opt, 3), {0.5, 0.75, 0.5, 0.5}, 1e-12)
  end)

  it("an optimizer obeys one: an older scheduler's step is refused, with a hint", function()
    local opt = optimizer(1.0)
    local a = schedule.StepLR(opt, {step_size = 1})
    local b = schedule.ExponentialLR(opt, {gamma = 0.5})
    raises({"StepLR:step: another scheduler was made for this optimizer since", "SequentialLR or ChainedScheduler"},
      function() a:step() end)
    b:step()
    assert.equal(0.5, opt.param_groups[1].lr)
    local plateau = schedule.ReduceLROnPlateau(opt)
    raises("ExponentialLR:step: another scheduler", function() b:step() end)
    plateau:step(1)
  end)

  it("refuse what is none, other optimizers, the wrong number of milestones", function()
    local opt, other = optimizer(), optimizer()
    local s = schedule.StepLR(opt, {step_size = 1})
    raises("the list of schedulers is empty", schedule.ChainedScheduler, {})
    raises("must be an array of schedulers", schedule.ChainedScheduler, opt)
    raises("entry 2 must be a scheduler", schedule.ChainedScheduler, {s, 3})
    raises("entry 1 must be a scheduler that goes by the step, not ReduceLROnPlateau", schedule.ChainedScheduler,
      {schedule.ReduceLROnPlateau(opt)})
    raises("entry 2 belongs to another optimizer", schedule.ChainedScheduler, {s, schedule.StepLR(other, {step_size = 1})})
    raises("2 schedulers need 1 milestones, not 2", schedule.SequentialLR, opt, {schedulers = {s, s}, milestones = {1, 2}})
    raises("integers in rising order", schedule.SequentialLR, opt, {schedulers = {s, s}, milestones = {0.5}})
    raises("integers in rising order", schedule.MultiStepLR, opt, {milestones = {3, 2}})
  end)
end)

-- ====== By a metric ======

describe("ReduceLROnPlateau", function()
  local function follow(metrics, opts)
    local opt = optimizer()
    local s, rates = schedule.ReduceLROnPlateau(opt, opts), {}
    for i, m in ipairs(metrics) do
      s:step(m)
      rates[i] = opt.param_groups[1].lr
    end
    return rates
  end

  -- Made by PyTorch 2.15: s = ReduceLROnPlateau(opt, **options); for m in metrics: s.step(m); print(lr)
  it("PyTorch's rates, with patience, cooldown, a floor, NaN", function()
    local nan = 0 / 0
    near(follow({1, 0.9, 0.9, 0.89999, 0.91, 0.9, 0.8, 0.8, 0.8, 0.8, 0.8, nan, nan},
      {patience = 1, factor = 0.5, cooldown = 1, min_lr = 0.05}),
      {0.8, 0.8, 0.8, 0.4, 0.4, 0.4, 0.4, 0.4, 0.2, 0.2, 0.2, 0.1, 0.1}, 1e-14)
  end)

  it("PyTorch's rates, upward, by an absolute threshold, changes below eps not made", function()
    near(follow({1, 1.05, 1.2, 1.25, 1.2, 1.1, 1.4, 1.4},
      {mode = "max", patience = 0, threshold = 0.1, threshold_mode = "abs", factor = 0.1, eps = 0.01}),
      {0.8, 0.08, 0.08, 0.008, 0.008, 0.008, 0.008, 0.008}, 1e-14)
  end)

  it("takes tensors, holds back after a skipped step, has a floor for each group", function()
    local a, b = hm.zeros({1}, {requires_grad = true}), hm.zeros({1}, {requires_grad = true})
    local opt = optim.SGD({{params = {a}}, {params = {b}}}, {lr = 1.0})
    local s = schedule.ReduceLROnPlateau(opt, {patience = 0, min_lr = {0.5, 0.0}})
    s:step(hm.tensor(2.0))
    s:step(hm.tensor(3.0), false)
    s:step(3, {stepped = false})
    assert.equal(1, s.t)
    assert.same({1.0, 1.0}, s:get_last_lr())
    s:step(hm.tensor(3.0), true)
    assert.same({0.5, 0.1}, s:get_last_lr())
    raises("expected the metric's value", function() s:step() end)
    raises("option 'factor' must be from 0 to below 1", schedule.ReduceLROnPlateau, opt, {factor = 1})
    raises("must have a number for each group", schedule.ReduceLROnPlateau, opt, {min_lr = {1}})
  end)
end)

-- ====== Skipped steps ======

describe("after a skipped step", function()
  it("every schedule holds back", function()
    for _, entry in ipairs(GOLDEN) do
      local opt = optimizer()
      local s = schedule[entry[1]](opt, entry[2])
      s:step(false)
      s:step({stepped = false})
      near(s:get_last_lr(), {entry[3][1]}, 1e-12)
      s:step(true)
      s:step({stepped = true})
      near(s:get_last_lr(), {entry[3][3]}, 1e-12)
    end
  end)

  it("by what the scaler returns, with and without async", function()
    for _, async in ipairs {false, true} do
      local p = hm.zeros({2}, {requires_grad = true})
      local opt, scaler = optim.Lion({p}, {lr = 1}), amp.GradScaler {init_scale = 4, async = async}
      local s = schedule.ExponentialLR(opt, {gamma = 0.5})
      for _, factor in ipairs {1, math.huge, 1} do
        opt:zero_grad()
        scaler:scale((p * factor):sum()):backward()
        local stepped, record = scaler:step(opt)
        scaler:update()
        if async then s:step(record) else s:step(stepped) end
      end
      assert.equal(0.25, opt.param_groups[1].lr)
    end
  end)
end)

-- ====== Resuming ======

describe("a schedule that is resumed from a file", function()
  local function joined(opt)
    return schedule.SequentialLR(opt, {milestones = {3}, schedulers = {
      schedule.LinearLR(opt, {total_iters = 3}), schedule.CosineAnnealingWarmRestarts(opt, {T_0 = 2, T_mult = 3})}})
  end

  it("goes on with the same rates, whatever kind", function()
    local makers = {joined}
    for _, entry in ipairs(GOLDEN) do
      makers[#makers + 1] = function(opt) return schedule[entry[1]](opt, entry[2]) end
    end
    for _, make in ipairs(makers) do
      local opt, other = optimizer(), optimizer()
      local s, path = make(opt), os.tmpname()
      for _ = 1, 4 do s:step() end
      assert(hm.save(path, {opt = opt, schedule = s}))
      local loaded = assert(hm.load(path))
      os.remove(path)
      other:load_state_dict(loaded.opt)
      local again = make(other)
      again:load_state_dict(loaded.schedule)
      assert.equal(4, again.t)
      assert.same(s:get_last_lr(), again:get_last_lr())
      s:step()
      again:step()
      assert.same(s:get_last_lr(), again:get_last_lr())
      assert.equal(opt.param_groups[1].momentum, other.param_groups[1].momentum)
    end
  end)

  it("a plateau: also its best, its patience and its cooldown; before the first metric too", function()
    for begin = 0, 6 do
      local metrics = {1, 0.5, 0.6, 0.7, 0.7, 0.4, 0.5, 0.6, 0.7, 0.8}
      local o = {patience = 1, cooldown = 1}
      local opt, other = optimizer(), optimizer()
      local s, path = schedule.ReduceLROnPlateau(opt, o), os.tmpname()
      for i = 1, begin do s:step(metrics[i]) end
      assert(hm.save(path, {schedule = s}))
      local again = schedule.ReduceLROnPlateau(other, o)
      again:load_state_dict(assert(hm.load(path)).schedule)
      os.remove(path)
      for i = begin + 1, #metrics do
        s:step(metrics[i])
        again:step(metrics[i])
        assert.same(s:get_last_lr(), again:get_last_lr())
      end
    end
  end)

  it("refuses what is no state", function()
    local opt = optimizer()
    local s = schedule.StepLR(opt, {step_size = 1})
    raises("StepLR:load_state_dict: expected a table made by state_dict()", function() s:load_state_dict({t = 1}) end)
    local plateau = schedule.ReduceLROnPlateau(opt)
    raises("ReduceLROnPlateau:load_state_dict", function() plateau:load_state_dict(s:state_dict()) end)
  end)
end)

describe("a scheduler's options", function()
  it("are checked: missing, misspelt, out of range", function()
    local opt = optimizer()
    raises("ExponentialLR: the option 'gamma' is missing", schedule.ExponentialLR, opt)
    raises("MultiStepLR: the option 'milestones' is missing", schedule.MultiStepLR, opt, {gamma = 1})
    raises("the option 'max_lr' is missing", schedule.OneCycleLR, opt, {total_steps = 3})
    raises("'total_steps' is missing, or 'epochs' and 'steps_per_epoch'", schedule.OneCycleLR, opt, {max_lr = 1, epochs = 2})
    raises("did you mean 'total_iters'", schedule.PolynomialLR, opt, {total_iter = 3})
    raises("option 'T_mult' must be at least 1", schedule.CosineAnnealingWarmRestarts, opt, {T_0 = 2, T_mult = 0})
    raises("option 'start_factor' must be above 0, at most 1", schedule.LinearLR, opt, {start_factor = 0})
    raises("option 'anneal_strategy' must be one of cos, linear", schedule.OneCycleLR, opt,
      {max_lr = 1, total_steps = 3, anneal_strategy = "cosine"})
    raises("must be an optimizer", schedule.LinearLR, {})
    raises("expected a function of the step", schedule.LambdaLR, opt, 3)
    raises("there is no function for group 1", schedule.LambdaLR, opt, {lr_lambda = {}})
    raises("the function must return a number, not", schedule.LambdaLR, opt, function() return "x" end)
  end)
end)
