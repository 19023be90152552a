--- amp/loss_scale_optimizer.lua -- amp.LossScaleOptimizer: the optimizer around an optimizer of TensorFlow and Keras.
--
--     local opt = amp.LossScaleOptimizer(optim.Adam(params), {dynamic_growth_steps = 2000})
--
-- As in tf.keras.mixed_precision:                         As in Keras 3:
--     local scaled = opt:get_scaled_loss(loss)                local scaled = opt:scale_loss(loss)
--     local grads = hm.autograd.grad(scaled, vars)            local grads = hm.autograd.grad(scaled, vars)
--     grads = opt:get_unscaled_gradients(grads)               opt:apply(grads, vars)
--     opt:apply_gradients{{grads[1], vars[1]}, ...}
--
-- As everywhere in this library:  opt:scale_loss(loss):backward(); opt:step().
--
-- apply_gradients takes what its generation gives it: gradients are unscaled there after scale_loss, and taken as they
-- are after get_unscaled_gradients (or unscale).  After get_scaled_loss without get_unscaled_gradients, or without
-- either, it takes them as they are and says so once.  Gradients that are not finite leave the step out and lower the
-- scale; `iterations` counts the steps that were made.
--
-- Options: dynamic = true, initial_scale = 2^15, dynamic_growth_steps = 2000, min_scale = 1 (0: none, as in Keras 3),
-- max_scale = 2^24, policy; {dynamic = false, initial_scale = 128} for a fixed scale.  In the place of options the
-- older form: "dynamic", or a number.  Whatever else is asked of it (param_groups, zero_grad, ...) the optimizer inside
-- answers.

local core = require "halfmoon.core"
local errors = require "halfmoon.errors"
local grad_scaler = require "halfmoon.amp.grad_scaler"
local loss_grads = require "halfmoon.amp.loss_grads"
local options = require "halfmoon.options"

local raise, describe = errors.raise, errors.describe

---@class LossScaleOptimizer
---@field inner_optimizer Optimizer
---@field scaler GradScaler which holds the scale and moves it
---@field iterations integer steps made
---@field attempts integer steps made or left out
---@field loss_scale number the present scale (read only)
---@field initial_scale number
---@field dynamic boolean
---@field dynamic_growth_steps integer?
---@field dynamic_counter integer? clean steps since the scale moved (read only)
local LossScaleOptimizer = {}

-- Fields that are worked out when they are read.
local computed = {
  loss_scale = function(self) return self.scaler:get_scale() end,
  dynamic_counter = function(self) return self.dynamic and self.scaler:state_dict()._growth_tracker or nil end,
}

--- A field of this object, or of the optimizer inside.
local function look_up(self, name)
  local own = LossScaleOptimizer[name]
  if own ~= nil then return own end
  if computed[name] then return computed[name](self) end
  local inner = rawget(self, "inner_optimizer")
  local value = inner and inner[name]
  if type(value) ~= "function" then return value end
  return function(receiver, ...) return value(rawequal(receiver, self) and inner or receiver, ...) end
end

local meta = {
  __index = look_up,
  __name = "LossScaleOptimizer",
  __newindex = function(self, name, value)
    if computed[name] then
      raise("LossScaleOptimizer: %s can only be read; opt.scaler:set_scale(x) sets the scale", name)
    end
    rawset(self, name, value)
  end,
}

-- ====== Construction ======

local spec = {
  dynamic = {"boolean"},
  initial_scale = {"number", nil, options.above(0)},
  dynamic_growth_steps = {"integer", nil, options.at_least(1)},
  loss_scale = {"number|string"},
  min_scale = {"number", nil, options.at_least(0)},
  max_scale = {"number", nil, options.above(0)},
  policy = {"string|table"},
}

local wrapped = setmetatable({}, {__mode = "k"}) -- optimizers that are inside another

local function is_wrapper(x) return type(x) == "table" and getmetatable(x) == meta end

local function check_inner(optimizer)
  if is_wrapper(optimizer) then
    raise("LossScaleOptimizer: a LossScaleOptimizer cannot wrap another one, came %s", describe(optimizer))
  end
  if type(optimizer) ~= "table" or type(optimizer.core) ~= "userdata" then
    raise("LossScaleOptimizer: expected an optimizer (hm.optim), came %s", describe(optimizer))
  end
  if wrapped[optimizer] then
    raise("LossScaleOptimizer: this optimizer is inside another LossScaleOptimizer already; its gradients would be "
      .. "unscaled twice")
  end
end

--- The options in one form, whichever generation they were written for.
local function settle_options(given)
  if type(given) == "string" or type(given) == "number" then given = {loss_scale = given} end
  local o = options.check("LossScaleOptimizer", given, spec)
  if o.loss_scale ~= nil then
    if o.dynamic ~= nil or o.initial_scale then
      raise("LossScaleOptimizer: loss_scale is the older form of dynamic and initial_scale: give one or the other")
    end
    if type(o.loss_scale) == "number" then
      o.dynamic, o.initial_scale = false, o.loss_scale
    elseif o.loss_scale ~= "dynamic" then
      raise("LossScaleOptimizer: loss_scale must be \"dynamic\" or a number, not %s", describe(o.loss_scale))
    end
  end
  if o.dynamic == nil then o.dynamic = true end
  if o.dynamic then
    o.initial_scale = o.initial_scale or 2.0 ^ 15
    o.dynamic_growth_steps = o.dynamic_growth_steps or 2000
  else
    if not o.initial_scale then raise("LossScaleOptimizer: initial_scale must be given if dynamic is false") end
    for _, name in ipairs {"dynamic_growth_steps", "policy"} do
      if o[name] ~= nil then
        raise("LossScaleOptimizer: %s must be left out if dynamic is false, came %s", name, describe(o[name]))
      end
    end
  end
  return o
end

--- amp.LossScaleOptimizer(optimizer [, {dynamic, initial_scale, dynamic_growth_steps, min_scale, max_scale, policy}]):
--- an optimizer around another that scales losses, unscales gradients, and leaves steps with non-finite ones out.
---@param optimizer Optimizer
---@param opts table|"dynamic"|number|nil
---@return LossScaleOptimizer
local function new(optimizer, opts)
  check_inner(optimizer)
  local o = settle_options(opts)
  local scaler = grad_scaler.new {
    init_scale = o.initial_scale, policy = o.dynamic and (o.policy or "dynamic") or "static",
    growth_interval = o.dynamic_growth_steps, min_scale = o.min_scale, max_scale = o.max_scale, allow_f16_grads = true,
  }
  local self = setmetatable({
    inner_optimizer = optimizer, scaler = scaler, dynamic = o.dynamic, initial_scale = o.initial_scale,
    dynamic_growth_steps = o.dynamic_growth_steps or false, iterations = 0, attempts = 0, state = {}, said = {},
  }, meta)
  wrapped[optimizer] = true
  return self
end

-- ====== Scaling ======

--- The loss times the scale, as float32.
local function scaled(self, loss, how)
  if type(loss) == "function" then -- a loss as a function, as Keras optimizers take it
    return function(...) return scaled(self, loss(...), how) end
  end
  if not core.is_tensor(loss) then raise("%s: expected a loss, came %s", how, describe(loss)) end
  self.state = {scaled_by = how}
  return self.scaler:scale(loss)
end

--- The loss times the scale (Keras 3): step(), apply() and apply_gradients() unscale what comes of it.
---@param loss Tensor|function a function that returns the loss gives a function
---@return Tensor|function
function LossScaleOptimizer:scale_loss(loss) return scaled(self, loss, "scale_loss") end

--- The loss times the scale (tf.keras): unscale its gradients with get_unscaled_gradients.
---@param loss Tensor|function a function that returns the loss gives a function
---@return Tensor|function
function LossScaleOptimizer:get_scaled_loss(loss) return scaled(self, loss, "get_scaled_loss") end

--- The gradients divided by the scale, in float32; nils stay where they are.
---@param grads table<any, Tensor>
---@return table<any, Tensor>
function LossScaleOptimizer:get_unscaled_gradients(grads)
  if type(grads) ~= "table" then
    raise("get_unscaled_gradients: expected an array of gradients, came %s", describe(grads))
  end
  local inverse, list = 1 / self.scaler:get_scale(), {}
  core.no_grad(function()
    for key, grad in pairs(grads) do
      if not core.is_tensor(grad) then
        raise("get_unscaled_gradients: entry %s is %s, not a tensor", tostring(key), describe(grad))
      end
      list[key] = (grad.dtype == "float64" and grad or grad:float()) * inverse
    end
  end)
  self.state.unscaled = true
  return list
end

--- The gradients divided by the scale: get_unscaled_gradients under a shorter name.  Without an argument: those in
--- .grad of the optimizer's parameters, in place, for clipping before step().
---@param grads table<any, Tensor>?
---@return table<any, Tensor>?
function LossScaleOptimizer:unscale(grads)
  if grads ~= nil then return self:get_unscaled_gradients(grads) end
  self.scaler:unscale_(self.inner_optimizer)
end

-- ====== Applying ======

--- Checks .grad of the parameters, steps or not, moves the scale.
local function step(self, max_norm)
  local stepped, record = self.scaler:step(self.inner_optimizer, max_norm and {max_norm = max_norm})
  self.state = {}
  if not record.empty then
    self.attempts = self.attempts + 1
    if stepped then self.iterations = self.iterations + 1 end
  end
  record.update = self.scaler:update()
  return stepped, record
end

--- Steps with the gradients in .grad, which came of a loss through scale_loss: unscales and checks them, steps or
--- leaves the step out, and moves the scale.
---@param opts {max_norm: number}? clips by the global norm in the same pass
---@return boolean stepped
---@return table record as GradScaler's, with `update`: what became of the scale
function LossScaleOptimizer:step(opts)
  opts = options.check("step", opts, {max_norm = {"number", nil, options.above(0)}})
  return step(self, opts.max_norm)
end

--- Pairs of gradient and variable; raises for others.
local function check_pairs(self, where, list)
  local mine = {}
  loss_grads.each(self.inner_optimizer, function(p) mine[p] = true end)
  for i, pair in ipairs(list) do
    local grad, variable = pair[1], pair[2]
    if not core.is_tensor(variable) or not mine[variable] then
      raise("%s: entry %d: expected a parameter of the optimizer, came %s", where, i, describe(variable))
    end
    if grad ~= nil and not core.is_tensor(grad) then
      raise("%s: entry %d: expected a gradient, came %s", where, i, describe(grad))
    end
  end
end

--- Steps with gradients for some of the parameters; the others stay as they are.
local function apply_pairs(self, list)
  local aside = loss_grads.take {self.inner_optimizer}
  local given = {}
  local ok, stepped, record = pcall(function()
    for _, pair in ipairs(list) do
      local grad, variable = pair[1], pair[2]
      if grad then variable.grad = grad:detach():to(variable.dtype) end
      given[variable] = true
    end
    return step(self)
  end)
  for variable, grad in pairs(aside) do
    if not given[variable] then variable.grad = grad end
  end
  if not ok then error(stepped, 0) end
  return stepped, record
end

--- Says something once.
local function say(self, text)
  if self.said[text] then return end
  self.said[text] = true
  io.stderr:write("halfmoon: LossScaleOptimizer: ", text, "\n")
end

--- Tells the scaler that gradients are unscaled, if they are; says what was forgotten.
local function settle_gradients(self)
  local state = self.state
  if state.scaled_by == "scale_loss" and not state.unscaled then return end
  if not state.scaled_by then
    say(self, "apply_gradients() without get_scaled_loss() or scale_loss() before it: the gradients are taken as they "
      .. "are")
  elseif not state.unscaled then
    say(self, "apply_gradients() after get_scaled_loss(), but without get_unscaled_gradients(): the gradients are "
      .. "taken as they are")
  end
  self.scaler.core:assume(1)
end

--- Applies gradients to variables: {{gradient, variable}, ...}.  Gradients may be nil.  They are unscaled here after
--- scale_loss, else they must be unscaled.  Steps unless one is not finite, and moves the scale.
---@param grads_and_vars {[1]: Tensor?, [2]: Tensor}[]
---@return boolean stepped
---@return table record as step()'s
function LossScaleOptimizer:apply_gradients(grads_and_vars)
  if type(grads_and_vars) ~= "table" then
    raise("apply_gradients: expected an array of {gradient, variable}, came %s", describe(grads_and_vars))
  end
  for i, pair in ipairs(grads_and_vars) do
    if type(pair) ~= "table" then
      raise("apply_gradients: entry %d: expected {gradient, variable}, came %s", i, describe(pair))
    end
  end
  check_pairs(self, "apply_gradients", grads_and_vars)
  settle_gradients(self)
  return apply_pairs(self, grads_and_vars)
end

--- Applies gradients that are still scaled (Keras 3): unscales, checks, steps or leaves the step out, moves the scale.
--- After get_unscaled_gradients they are taken as they are.
---@param grads table<integer, Tensor> one for each variable, nil where there is none
---@param variables Tensor[]? default: the optimizer's parameters in order
---@return boolean stepped
---@return table record as step()'s
function LossScaleOptimizer:apply(grads, variables)
  if type(grads) ~= "table" then raise("apply: expected an array of gradients, came %s", describe(grads)) end
  if not variables then
    variables = {}
    loss_grads.each(self.inner_optimizer, function(p) variables[#variables + 1] = p end)
  end
  local list = {}
  for i, variable in ipairs(variables) do list[i] = {grads[i], variable} end
  check_pairs(self, "apply", list)
  if self.state.unscaled then self.scaler.core:assume(1) end
  return apply_pairs(self, list)
end

-- ====== State ======

--- The inner optimizer's state and the scaler's.
---@return {inner: table, scaler: table, iterations: integer, attempts: integer}
function LossScaleOptimizer:state_dict()
  return {
    inner = self.inner_optimizer:state_dict(), scaler = self.scaler:state_dict(), iterations = self.iterations,
    attempts = self.attempts,
  }
end

--- Takes over a state made by state_dict().
---@param saved table
function LossScaleOptimizer:load_state_dict(saved)
  if type(saved) ~= "table" or type(saved.inner) ~= "table" or type(saved.scaler) ~= "table" then
    raise("LossScaleOptimizer:load_state_dict: expected a table made by state_dict(), came %s", describe(saved))
  end
  self.inner_optimizer:load_state_dict(saved.inner)
  self.scaler:load_state_dict(saved.scaler)
  self.iterations = math.tointeger(saved.iterations) or 0
  self.attempts = math.tointeger(saved.attempts) or self.iterations
end

--- The configuration, as Keras has it: initial_scale, dynamic, dynamic_growth_steps.
---@return table
function LossScaleOptimizer:get_config()
  return {
    name = "LossScaleOptimizer", inner_optimizer = self.inner_optimizer.name, initial_scale = self.initial_scale,
    dynamic = self.dynamic, dynamic_growth_steps = self.dynamic_growth_steps or nil,
  }
end

--- LossScaleOptimizer(Adam(...); scale 32768)
meta.__tostring = function(self)
  return ("LossScaleOptimizer(%s; scale %.14g)"):format(tostring(self.inner_optimizer), self.scaler:get_scale())
end

return {new = new, LossScaleOptimizer = LossScaleOptimizer}
