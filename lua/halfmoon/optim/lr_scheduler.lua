--- optim/lr_scheduler.lua -- learning rates as functions of the step.
--
-- A scheduler sets the rates of all groups when it is made and after each step().  step(stepped) takes what scaler:step
-- returned: after a skipped optimizer step the schedule holds back too.
--     local stepped = scaler:step(opt)
--     scaler:update()
--     schedule:step(stepped)

local errors = require "halfmoon.errors"
local options = require "halfmoon.options"

local raise = errors.raise

---@class Scheduler
---@field optimizer Optimizer
---@field base_lrs number[] rates of the groups when the scheduler was made
---@field t integer steps taken
local Scheduler = {}
Scheduler.__index = Scheduler

--- Sets every group's rate for step t.
local function apply(self)
  for i, group in ipairs(self.optimizer.param_groups) do
    group.lr = self.rate(self.base_lrs[i] or group.lr, self.t, i)
  end
end

--- Goes on by one step, unless the optimizer's step was skipped.
---@param stepped boolean? false: hold back
function Scheduler:step(stepped)
  if stepped == false then return end
  self.t = self.t + 1
  apply(self)
end

--- The present rates of all groups.
---@return number[]
function Scheduler:get_last_lr()
  local rates = {}
  for i, group in ipairs(self.optimizer.param_groups) do rates[i] = group.lr end
  return rates
end

--- What a checkpoint needs: {t =, base_lrs =}.
---@return table
function Scheduler:state_dict() return {t = self.t, base_lrs = table.move(self.base_lrs, 1, #self.base_lrs, 1, {})} end

--- Takes over a state made by state_dict() and sets the rates.
---@param state table
function Scheduler:load_state_dict(state)
  if type(state) ~= "table" or math.type(state.t) ~= "integer" or type(state.base_lrs) ~= "table" then
    raise("%s:load_state_dict: expected a table made by state_dict()", self.name)
  end
  self.t = state.t
  self.base_lrs = table.move(state.base_lrs, 1, #state.base_lrs, 1, {})
  apply(self)
end

function Scheduler:__tostring()
  return ("%s(step %d, lr %g)"):format(self.name, self.t, self.optimizer.param_groups[1].lr)
end

--- A scheduler from a function (base rate, t, group) -> rate.
local function new(name, optimizer, rate)
  if type(optimizer) ~= "table" or type(optimizer.param_groups) ~= "table" then
    raise("lr_scheduler.%s: the first argument must be an optimizer, not %s", name, errors.describe(optimizer))
  end
  local self = setmetatable({name = name, optimizer = optimizer, rate = rate, base_lrs = {}, t = 0}, Scheduler)
  for i, group in ipairs(optimizer.param_groups) do self.base_lrs[i] = group.lr end
  apply(self)
  return self
end

local schedulers = {Scheduler = Scheduler}

--- Multiplies the rate by gamma every step_size steps.
---@param optimizer Optimizer
---@param opts {step_size: integer, gamma: number}
---@return Scheduler
function schedulers.StepLR(optimizer, opts)
  opts = options.check("lr_scheduler.StepLR", opts, {
    step_size = {"integer", nil, options.at_least(1)}, gamma = {"number", 0.1},
  })
  if not opts.step_size then raise("lr_scheduler.StepLR: the option 'step_size' is missing") end
  return new("StepLR", optimizer, function(base, t) return base * opts.gamma ^ (t // opts.step_size) end)
end

--- Half a cosine from the base rate down to eta_min over T_max steps; eta_min afterwards.
---@param optimizer Optimizer
---@param opts {T_max: integer, eta_min: number}
---@return Scheduler
function schedulers.CosineAnnealingLR(optimizer, opts)
  opts = options.check("lr_scheduler.CosineAnnealingLR", opts, {
    T_max = {"integer", nil, options.at_least(1)}, eta_min = {"number", 0.0},
  })
  if not opts.T_max then raise("lr_scheduler.CosineAnnealingLR: the option 'T_max' is missing") end
  return new("CosineAnnealingLR", optimizer, function(base, t)
    local share = math.min(t / opts.T_max, 1)
    return opts.eta_min + (base - opts.eta_min) * 0.5 * (1 + math.cos(math.pi * share))
  end)
end

--- The base rate times fn(t); one function, or an array of them, one for each group.
---@param optimizer Optimizer
---@param fn (fun(t: integer): number)|(fun(t: integer): number)[]
---@return Scheduler
function schedulers.LambdaLR(optimizer, fn)
  if type(fn) ~= "function" and type(fn) ~= "table" then
    raise("lr_scheduler.LambdaLR: expected a function of the step, not %s", errors.describe(fn))
  end
  return new("LambdaLR", optimizer, function(base, t, group)
    local f = fn
    if type(fn) == "table" then f = fn[group] end
    if type(f) ~= "function" then raise("lr_scheduler.LambdaLR: there is no function for group %d", group) end
    return base * f(t)
  end)
end

--- A straight line from start_factor times the base rate up to the base rate over `steps` steps; then what `after`
--- says: another scheduler, made on the same optimizer, whose clock starts when the warm-up ends.
---@param optimizer Optimizer
---@param opts {steps: integer, start_factor: number, after: Scheduler}
---@return Scheduler
function schedulers.LinearWarmup(optimizer, opts)
  opts = options.check("lr_scheduler.LinearWarmup", opts, {
    steps = {"integer", nil, options.at_least(1)}, start_factor = {"number", 0.01, options.at_least(0)},
    after = {"table"},
  })
  if not opts.steps then raise("lr_scheduler.LinearWarmup: the option 'steps' is missing") end
  local after = opts.after
  if after and getmetatable(after) ~= Scheduler then raise("lr_scheduler.LinearWarmup: 'after' must be a scheduler") end
  -- the other scheduler has already set rates at its step 0: start from the rates it started from
  if after then
    for i, group in ipairs(optimizer.param_groups) do group.lr = after.base_lrs[i] or group.lr end
  end
  return new("LinearWarmup", optimizer, function(base, t, group)
    if t < opts.steps then return base * (opts.start_factor + (1 - opts.start_factor) * t / opts.steps) end
    return after and after.rate(base, t - opts.steps, group) or base
  end)
end

return schedulers
