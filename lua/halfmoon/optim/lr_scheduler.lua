--- optim/lr_scheduler.lua -- learning rates as functions of the step, under PyTorch's names.
--
-- A scheduler sets the rates of all groups when it is made and after each step().  step(stepped) takes what scaler:step
-- returned: after a skipped optimizer step the schedule holds back too.
--     local stepped = scaler:step(opt)
--     scaler:update()
--     schedule:step(stepped)
-- With an asynchronous scaler `stepped` is nil, which counts as a step; schedule:step(record) holds back after a skipped
-- one, and waits for the device to know.
--
-- Rates are computed from the rates that the groups began with and the number of steps, in closed form: nothing drifts,
-- and a loaded state is all there is.  So an optimizer obeys one scheduler, the newest; SequentialLR and ChainedScheduler
-- make one of several.  ReduceLROnPlateau goes by a metric instead.

local core = require "halfmoon.core"
local errors = require "halfmoon.errors"
local options = require "halfmoon.options"

local raise = errors.raise

---@class Scheduler
---@field optimizer Optimizer
---@field base_lrs number[] rates that the groups began with
---@field t integer steps taken
local Scheduler = {}
Scheduler.__index = Scheduler

-- ====== Optimizers and who sets their rates ======

-- optimizer -> {by = scheduler, initial = rates before any scheduler, set = rates as the last one left them}
local records = setmetatable({}, {__mode = "k"})

--- The record of an optimizer; groups whose rate was changed by hand begin anew with that.
local function record_of(optimizer)
  local record = records[optimizer] or {initial = {}, set = {}}
  records[optimizer] = record
  for i, group in ipairs(optimizer.param_groups) do
    if group.lr ~= record.set[i] then record.initial[i] = group.lr end
  end
  return record
end

local function note(self)
  local record = records[self.optimizer]
  for i, group in ipairs(self.optimizer.param_groups) do record.set[i] = group.lr end
end

--- Goes to step t: sets every group's rate, and momentum where the schedule has one.  Nothing changes if that fails.
local function apply(self, t)
  local rates = {}
  for i, group in ipairs(self.optimizer.param_groups) do
    self.base_lrs[i] = self.base_lrs[i] or group.lr
    rates[i] = self.rate(self.base_lrs[i], t, i)
    if type(rates[i]) ~= "number" then
      raise("lr_scheduler.%s: the rate of group %d must be a number, not %s", self.name, i, errors.describe(rates[i]))
    end
  end
  self.t = t
  for i, group in ipairs(self.optimizer.param_groups) do
    group.lr = rates[i]
    local momentum = self.momentum and self.momentum(t, i)
    if momentum and group.betas then group.betas = {momentum, group.betas[2]}
    elseif momentum then group.momentum = momentum end
  end
  note(self)
end

--- Whether a step is to be counted, from what scaler:step returned.
local function counts(stepped)
  if type(stepped) == "table" then stepped = stepped.stepped end
  return stepped ~= false
end

local function check_newest(self)
  if records[self.optimizer].by ~= self then
    raise("%s:step: another scheduler was made for this optimizer since\n"
      .. "  hint: make one of both: lr_scheduler.SequentialLR or ChainedScheduler", self.name)
  end
end

--- Goes on by one step, unless the optimizer's step was skipped.
---@param stepped boolean|table? false: hold back; scaler:step's record: hold back if it was skipped
function Scheduler:step(stepped)
  check_newest(self)
  if not counts(stepped) then return end
  apply(self, self.t + 1)
end

--- The present rates of all groups.
---@return number[]
function Scheduler:get_last_lr()
  local rates = {}
  for i, group in ipairs(self.optimizer.param_groups) do rates[i] = group.lr end
  return rates
end

local function copy(list) return table.move(list, 1, #list, 1, {}) end

--- What a checkpoint needs: {t =, base_lrs =}; functions are not part of it.
---@return table
function Scheduler:state_dict() return {t = self.t, base_lrs = copy(self.base_lrs)} end

local function check_state(self, state, names)
  local ok = type(state) == "table"
  for name, kind in pairs(names) do
    ok = ok and (kind == "integer" and math.type(state[name]) == kind or type(state[name]) == kind)
  end
  if not ok then raise("%s:load_state_dict: expected a table made by state_dict()", self.name) end
end

--- Takes over a state made by state_dict() and sets the rates.
---@param state table
function Scheduler:load_state_dict(state)
  check_state(self, state, {t = "integer", base_lrs = "table"})
  self.base_lrs = copy(state.base_lrs)
  records[self.optimizer].initial = copy(self.base_lrs)
  apply(self, state.t)
end

function Scheduler:__tostring()
  return ("%s(step %d, lr %g)"):format(self.name, self.t, self.optimizer.param_groups[1].lr)
end

local function check_optimizer(name, optimizer)
  if type(optimizer) ~= "table" or type(optimizer.param_groups) ~= "table" then
    raise("lr_scheduler.%s: the first argument must be an optimizer, not %s", name, errors.describe(optimizer))
  end
end

--- A scheduler from a function (base rate, t, group) -> rate, and one (t, group) -> momentum.
local function new(name, optimizer, rate, momentum)
  check_optimizer(name, optimizer)
  local record = record_of(optimizer)
  local self = setmetatable({name = name, optimizer = optimizer, rate = rate, momentum = momentum, t = 0,
    base_lrs = copy(record.initial)}, Scheduler)
  record.by = self
  apply(self, 0)
  return self
end

local schedulers = {Scheduler = Scheduler}

-- ====== Options ======

local at_least, above = options.at_least, options.above
local REQUIRED = {} -- stands for a default

--- Checks options as options.check does; those whose default is REQUIRED must be given.
local function read(name, opts, spec)
  local where = "lr_scheduler." .. name
  opts = options.check(where, opts, spec)
  for key in pairs(spec) do
    if opts[key] == REQUIRED then raise("%s: the option '%s' is missing", where, key) end
  end
  return opts
end

local function milestones_of(list)
  for i, m in ipairs(list) do
    if math.type(m) ~= "integer" or m < 0 or (i > 1 and m < list[i - 1]) then
      return "must be an array of integers in rising order"
    end
  end
end

--- How many of a rising list are at most t.
local function passed(list, t)
  local n = 0
  while list[n + 1] and list[n + 1] <= t do n = n + 1 end
  return n
end

--- The entry for a group of an option that is one value or an array of them.
local function of_group(value, group) return type(value) == "table" and value[group] or value end

--- A test for options: numbers, one or an array of one for each group.
local function numbers_for(optimizer)
  return function(value)
    if type(value) ~= "table" then return end
    for i = 1, math.max(#value, #optimizer.param_groups) do
      if type(value[i]) ~= "number" or i > #optimizer.param_groups then return "must have a number for each group" end
    end
  end
end

-- ====== Schedules of one formula ======

--- Multiplies the rate by gamma every step_size steps.
---@param optimizer Optimizer
---@param opts {step_size: integer, gamma: number?} gamma 0.1
---@return Scheduler
function schedulers.StepLR(optimizer, opts)
  opts = read("StepLR", opts, {step_size = {"integer", REQUIRED, at_least(1)}, gamma = {"number", 0.1}})
  return new("StepLR", optimizer, function(base, t) return base * opts.gamma ^ (t // opts.step_size) end)
end

--- Multiplies the rate by gamma at each of the milestones.
---@param optimizer Optimizer
---@param opts {milestones: integer[], gamma: number?} gamma 0.1
---@return Scheduler
function schedulers.MultiStepLR(optimizer, opts)
  opts = read("MultiStepLR", opts, {milestones = {"table", REQUIRED, milestones_of}, gamma = {"number", 0.1}})
  return new("MultiStepLR", optimizer, function(base, t) return base * opts.gamma ^ passed(opts.milestones, t) end)
end

--- Multiplies the rate by gamma at each step.
---@param optimizer Optimizer
---@param opts {gamma: number}
---@return Scheduler
function schedulers.ExponentialLR(optimizer, opts)
  opts = read("ExponentialLR", opts, {gamma = {"number", REQUIRED}})
  return new("ExponentialLR", optimizer, function(base, t) return base * opts.gamma ^ t end)
end

--- From base down to low along half a cosine, for a share from 0 to 1, and up again from 1 to 2.
local function cosine(base, low, share) return low + (base - low) * (1 + math.cos(math.pi * share)) / 2 end

--- Half a cosine from the base rate down to eta_min over T_max steps.  Steps past T_max go up again along the same
--- cosine, as PyTorch's do.  SequentialLR with LambdaLR(optimizer, function() return low end) behind it stays down, at
--- that share of the base rate.
---@param optimizer Optimizer
---@param opts {T_max: integer, eta_min: number?} eta_min 0
---@return Scheduler
function schedulers.CosineAnnealingLR(optimizer, opts)
  opts = read("CosineAnnealingLR", opts, {T_max = {"integer", REQUIRED, at_least(1)}, eta_min = {"number", 0.0}})
  return new("CosineAnnealingLR", optimizer, function(base, t)
    return cosine(base, opts.eta_min, t % (2 * opts.T_max) / opts.T_max)
  end)
end

--- Half cosines from the base rate down to eta_min, again and again: the first takes T_0 steps, each further one T_mult
--- times as many.
---@param optimizer Optimizer
---@param opts {T_0: integer, T_mult: integer?, eta_min: number?} T_mult 1, eta_min 0
---@return Scheduler
function schedulers.CosineAnnealingWarmRestarts(optimizer, opts)
  opts = read("CosineAnnealingWarmRestarts", opts, {
    T_0 = {"integer", REQUIRED, at_least(1)}, T_mult = {"integer", 1, at_least(1)}, eta_min = {"number", 0.0},
  })
  return new("CosineAnnealingWarmRestarts", optimizer, function(base, t)
    local length = opts.T_0
    if opts.T_mult == 1 then t = t % length end
    while t >= length do t, length = t - length, length * opts.T_mult end
    return cosine(base, opts.eta_min, t / length)
  end)
end

--- From the base rate down to 0 over total_iters steps, as a power of the share that is left.
---@param optimizer Optimizer
---@param opts {total_iters: integer?, power: number?} 5 steps, power 1
---@return Scheduler
function schedulers.PolynomialLR(optimizer, opts)
  opts = read("PolynomialLR", opts, {total_iters = {"integer", 5, at_least(1)}, power = {"number", 1.0}})
  return new("PolynomialLR", optimizer, function(base, t)
    return base * (1 - math.min(t, opts.total_iters) / opts.total_iters) ^ opts.power
  end)
end

--- A straight line from start_factor to end_factor times the base rate over total_iters steps: a warm-up.
---@param optimizer Optimizer
---@param opts {start_factor: number?, end_factor: number?, total_iters: integer?} 1/3, 1, 5 steps
---@return Scheduler
function schedulers.LinearLR(optimizer, opts)
  opts = read("LinearLR", opts, {
    start_factor = {"number", 1 / 3, function(x) if not (x > 0 and x <= 1) then return "must be above 0, at most 1" end end},
    end_factor = {"number", 1.0, function(x) if not (x >= 0 and x <= 1) then return "must be from 0 to 1" end end},
    total_iters = {"integer", 5, at_least(1)},
  })
  return new("LinearLR", optimizer, function(base, t)
    local share = math.min(t, opts.total_iters) / opts.total_iters
    return base * (opts.start_factor + (opts.end_factor - opts.start_factor) * share)
  end)
end

--- factor times the base rate for total_iters steps, the base rate afterwards.
---@param optimizer Optimizer
---@param opts {factor: number?, total_iters: integer?} 1/3, 5 steps
---@return Scheduler
function schedulers.ConstantLR(optimizer, opts)
  opts = read("ConstantLR", opts, {
    factor = {"number", 1 / 3, function(x) if not (x >= 0 and x <= 1) then return "must be from 0 to 1" end end},
    total_iters = {"integer", 5, at_least(0)},
  })
  return new("ConstantLR", optimizer, function(base, t) return t < opts.total_iters and base * opts.factor or base end)
end

--- The base rate times fn(t); one function, or an array of them, one for each group.
---@param optimizer Optimizer
---@param fn (fun(t: integer): number)|(fun(t: integer): number)[]|{lr_lambda: function|function[]}
---@return Scheduler
function schedulers.LambdaLR(optimizer, fn)
  if type(fn) == "table" and #fn == 0 then
    fn = read("LambdaLR", fn, {lr_lambda = {"function|table", REQUIRED}}).lr_lambda
  end
  if type(fn) ~= "function" and type(fn) ~= "table" then
    raise("lr_scheduler.LambdaLR: expected a function of the step, not %s", errors.describe(fn))
  end
  return new("LambdaLR", optimizer, function(base, t, group)
    local f = of_group(fn, group)
    if type(f) ~= "function" then raise("lr_scheduler.LambdaLR: there is no function for group %d", group) end
    local factor = f(t)
    if type(factor) ~= "number" then
      raise("lr_scheduler.LambdaLR: the function must return a number, not %s", errors.describe(factor))
    end
    return base * factor
  end)
end

-- ====== One cycle ======

--- The phases of a cycle: {end step, rate and momentum at the beginning, at the end}, rates by name.
local function cycle_phases(o, total)
  local turn = o.pct_start * total
  if o.three_phase then
    return {{turn - 1, "low", "high", "max", "base"}, {2 * turn - 2, "high", "low", "base", "max"},
      {total - 1, "low", "least", "max", "max"}}
  end
  return {{turn - 1, "low", "high", "max", "base"}, {total - 1, "high", "least", "base", "max"}}
end

--- The phase of step t, and how far it is in it.
local function cycle_phase(phases, t)
  local begin = 0
  for i, phase in ipairs(phases) do
    local length = phase[1] - begin
    if t <= phase[1] or i == #phases then return phase, length ~= 0 and (t - begin) / length or 1 end
    begin = phase[1]
  end
end

--- Checks what depends on several options of OneCycleLR; returns the number of steps.
local function cycle_steps(optimizer, o)
  local total = o.total_steps or (o.epochs and o.steps_per_epoch and o.epochs * o.steps_per_epoch)
  if not total then
    raise("lr_scheduler.OneCycleLR: the option 'total_steps' is missing, or 'epochs' and 'steps_per_epoch'")
  end
  local group = optimizer.param_groups[1]
  if o.cycle_momentum and not (group.momentum or group.betas) then
    raise("lr_scheduler.OneCycleLR: cycle_momentum needs an optimizer with momentum or betas\n"
      .. "  hint: cycle_momentum = false")
  end
  return total
end

---@class OneCycleOptions
---@field max_lr number|number[]
---@field total_steps integer? or epochs and steps_per_epoch
---@field epochs integer?
---@field steps_per_epoch integer?
---@field pct_start number? 0.3
---@field anneal_strategy "cos"|"linear"|nil "cos"
---@field cycle_momentum boolean? true
---@field base_momentum number|number[]|nil 0.85
---@field max_momentum number|number[]|nil 0.95
---@field div_factor number? 25
---@field final_div_factor number? 1e4
---@field three_phase boolean? false: back to the first rate before the last phase

--- One cycle (arXiv 1708.07120): from max_lr / div_factor up to max_lr over the share pct_start of all steps, then down
--- to a final_div_factor-th of the first rate; momentum (or the first beta) goes the other way.
---@param optimizer Optimizer
---@param opts OneCycleOptions
---@return Scheduler
function schedulers.OneCycleLR(optimizer, opts)
  check_optimizer("OneCycleLR", optimizer)
  local numbers = numbers_for(optimizer)
  local o = read("OneCycleLR", opts, {
    max_lr = {"number|table", REQUIRED, numbers}, total_steps = {"integer", nil, at_least(1)},
    epochs = {"integer", nil, at_least(1)}, steps_per_epoch = {"integer", nil, at_least(1)},
    pct_start = {"number", 0.3, function(x) if not (x >= 0 and x <= 1) then return "must be from 0 to 1" end end},
    anneal_strategy = {"string", "cos", options.one_of("cos", "linear")}, cycle_momentum = {"boolean", true},
    base_momentum = {"number|table", 0.85, numbers}, max_momentum = {"number|table", 0.95, numbers},
    div_factor = {"number", 25.0, above(0)}, final_div_factor = {"number", 1e4, above(0)},
    three_phase = {"boolean", false},
  })
  local total = cycle_steps(optimizer, o)
  local phases = cycle_phases(o, total)
  local function between(from, to, share)
    if o.anneal_strategy == "linear" then return (to - from) * share + from end
    return cosine(from, to, share)
  end
  return new("OneCycleLR", optimizer, function(_, t, group)
    if t > total then
      raise("lr_scheduler.OneCycleLR: step %d, but the cycle has %d steps (total_steps)", t, total)
    end
    local high = of_group(o.max_lr, group)
    local low = high / o.div_factor
    local rates = {high = high, low = low, least = low / o.final_div_factor}
    local phase, share = cycle_phase(phases, t)
    return between(rates[phase[2]], rates[phase[3]], share)
  end, o.cycle_momentum and function(t, group)
    local momenta = {base = of_group(o.base_momentum, group), max = of_group(o.max_momentum, group)}
    local phase, share = cycle_phase(phases, t)
    return between(momenta[phase[4]], momenta[phase[5]], share)
  end or nil)
end

-- ====== Several as one ======

--- Checks a list of schedulers on one optimizer; returns that.
local function joined(name, list, optimizer)
  if #list == 0 then raise("lr_scheduler.%s: the list of schedulers is empty", name) end
  for i, s in ipairs(list) do
    if getmetatable(s) ~= Scheduler then
      raise("lr_scheduler.%s: entry %d must be a scheduler that goes by the step, not %s", name, i,
        type(s) == "table" and s.name or errors.describe(s))
    end
    optimizer = optimizer or s.optimizer
    if s.optimizer ~= optimizer then raise("lr_scheduler.%s: entry %d belongs to another optimizer", name, i) end
  end
  return optimizer
end

--- One scheduler after the other: the next takes over at each milestone, with a clock of its own.
---@param optimizer Optimizer
---@param opts {schedulers: Scheduler[], milestones: integer[]}
---@return Scheduler
function schedulers.SequentialLR(optimizer, opts)
  check_optimizer("SequentialLR", optimizer)
  opts = read("SequentialLR", opts, {schedulers = {"table", REQUIRED}, milestones = {"table", REQUIRED, milestones_of}})
  local list, milestones = opts.schedulers, opts.milestones
  joined("SequentialLR", list, optimizer)
  if #milestones ~= #list - 1 then
    raise("lr_scheduler.SequentialLR: %d schedulers need %d milestones, not %d", #list, #list - 1, #milestones)
  end
  local function active(t)
    local n = passed(milestones, t)
    return list[n + 1], t - (milestones[n] or 0)
  end
  return new("SequentialLR", optimizer, function(base, t, group)
    local s, own = active(t)
    return s.rate(base, own, group)
  end, function(t, group)
    local s, own = active(t)
    return s.momentum and s.momentum(own, group)
  end)
end

--- All at once: each takes the rate that the one before it gives for its base rate.
---@param list Scheduler[]
---@param optimizer Optimizer? theirs, if given
---@return Scheduler
function schedulers.ChainedScheduler(list, optimizer)
  if type(list) ~= "table" or list.param_groups then
    raise("lr_scheduler.ChainedScheduler: the first argument must be an array of schedulers, not %s",
      errors.describe(list))
  end
  optimizer = joined("ChainedScheduler", list, optimizer)
  return new("ChainedScheduler", optimizer, function(rate, t, group)
    for _, s in ipairs(list) do rate = s.rate(rate, t, group) end
    return rate
  end, function(t, group)
    local momentum
    for _, s in ipairs(list) do momentum = s.momentum and s.momentum(t, group) or momentum end
    return momentum
  end)
end

--- A straight line from start_factor times the base rate up to the base rate over `steps` steps; then what `after`
--- says: another scheduler, made on the same optimizer, whose clock starts when the warm-up ends.
---@param optimizer Optimizer
---@param opts {steps: integer, start_factor: number?, after: Scheduler?} start_factor 0.01
---@return Scheduler
function schedulers.LinearWarmup(optimizer, opts)
  opts = read("LinearWarmup", opts, {
    steps = {"integer", REQUIRED, at_least(1)}, start_factor = {"number", 0.01, at_least(0)}, after = {"table"},
  })
  local after = opts.after
  if after then joined("LinearWarmup", {after}, optimizer) end
  return new("LinearWarmup", optimizer, function(base, t, group)
    if t < opts.steps then return base * (opts.start_factor + (1 - opts.start_factor) * t / opts.steps) end
    return after and after.rate(base, t - opts.steps, group) or base
  end, function(t, group)
    return after and after.momentum and after.momentum(math.max(t - opts.steps, 0), group)
  end)
end

-- ====== By a metric ======

---@class PlateauOptions
---@field mode "min"|"max"|nil "min": smaller metrics are better
---@field factor number? 0.1
---@field patience integer? 10
---@field threshold number? 1e-4: what counts as better
---@field threshold_mode "rel"|"abs"|nil "rel": as a share of the best
---@field cooldown integer? 0: epochs after a fall in which nothing is counted
---@field min_lr number|number[]|nil 0
---@field eps number? 1e-8: smaller changes of a rate are not made

---@class ReduceLROnPlateau
---@field optimizer Optimizer
---@field best number
---@field num_bad_epochs integer
---@field cooldown_counter integer
---@field t integer
local Plateau = {}
Plateau.__index = Plateau
Plateau.get_last_lr = Scheduler.get_last_lr
Plateau.__tostring = Scheduler.__tostring

--- Whether a value is better than the best so far by more than the threshold.
local function is_better(self, value)
  local o, best = self.opts, self.best
  local margin = o.threshold_mode == "abs" and o.threshold or nil
  if o.mode == "min" then return value < (margin and best - margin or best * (1 - o.threshold)) end
  return value > (margin and best + margin or best * (1 + o.threshold))
end

--- A metric's value after an epoch; the rates fall where it has not become better for more than `patience` of them.
---@param metric number|Tensor
---@param stepped boolean|table? false, or the record of a skipped step: nothing is counted
function Plateau:step(metric, stepped)
  if core.is_tensor(metric) then metric = metric:item() end
  if type(metric) ~= "number" then
    raise("ReduceLROnPlateau:step: expected the metric's value, not %s", errors.describe(metric))
  end
  check_newest(self)
  if not counts(stepped) then return end
  self.t = self.t + 1
  if is_better(self, metric) then
    self.best, self.num_bad_epochs = metric, 0
  else
    self.num_bad_epochs = self.num_bad_epochs + 1
  end
  if self.cooldown_counter > 0 then
    self.cooldown_counter = self.cooldown_counter - 1
    self.num_bad_epochs = 0
  end
  if self.num_bad_epochs <= self.opts.patience then return end
  for i, group in ipairs(self.optimizer.param_groups) do
    local rate = math.max(group.lr * self.opts.factor, of_group(self.opts.min_lr, i))
    if group.lr - rate > self.opts.eps then group.lr = rate end
  end
  note(self)
  self.cooldown_counter, self.num_bad_epochs = self.opts.cooldown, 0
end

--- What a checkpoint needs.
---@return table
function Plateau:state_dict()
  local best = self.best
  if best == math.huge or best == -math.huge then best = nil end -- nothing was seen; no file can hold it
  return {t = self.t, best = best, num_bad_epochs = self.num_bad_epochs, cooldown_counter = self.cooldown_counter,
    last_lrs = self:get_last_lr()}
end

--- Takes over a state made by state_dict() and sets the rates.
---@param state table
function Plateau:load_state_dict(state)
  check_state(self, state,
    {t = "integer", num_bad_epochs = "integer", cooldown_counter = "integer", last_lrs = "table"})
  self.t, self.best = state.t, state.best or (self.opts.mode == "min" and math.huge or -math.huge)
  self.num_bad_epochs, self.cooldown_counter = state.num_bad_epochs, state.cooldown_counter
  for i, group in ipairs(self.optimizer.param_groups) do group.lr = state.last_lrs[i] or group.lr end
  note(self)
end

--- Multiplies the rates by factor where a metric has not become better for more than patience epochs: step(metric).
---@param optimizer Optimizer
---@param opts PlateauOptions?
---@return ReduceLROnPlateau
function schedulers.ReduceLROnPlateau(optimizer, opts)
  check_optimizer("ReduceLROnPlateau", optimizer)
  opts = read("ReduceLROnPlateau", opts, {
    mode = {"string", "min", options.one_of("min", "max")},
    factor = {"number", 0.1, function(x) if not (x >= 0 and x < 1) then return "must be from 0 to below 1" end end},
    patience = {"integer", 10, at_least(0)}, threshold = {"number", 1e-4},
    threshold_mode = {"string", "rel", options.one_of("rel", "abs")}, cooldown = {"integer", 0, at_least(0)},
    min_lr = {"number|table", 0.0, numbers_for(optimizer)}, eps = {"number", 1e-8},
  })
  local record = record_of(optimizer)
  local self = setmetatable({name = "ReduceLROnPlateau", optimizer = optimizer, opts = opts, t = 0,
    best = opts.mode == "min" and math.huge or -math.huge, num_bad_epochs = 0, cooldown_counter = 0}, Plateau)
  record.by = self
  note(self)
  return self
end

return schedulers
