--- amp/grad_scaler.lua -- GradScaler: loss scaling for float16, with policies that can be swapped in mid-run.
--
-- The engine's scaler (C) keeps the scale, the state machine of each optimizer and the two passes over gradients; this
-- file adds policies, names of culprits, the history, and state dicts.  A policy is asked once in each update(); if it
-- fails, the scale stays, the event is "fault", and training goes on.

local core = require "halfmoon.core"
local errors = require "halfmoon.errors"
local options = require "halfmoon.options"
local policies = require "halfmoon.amp.policies"

local raise, describe = errors.raise, errors.describe

local KEPT = 4096 -- updates that record() remembers

---@class GradScaler
---@field core userdata the engine's scaler
---@field opts table options that the policy sees: growth_factor, backoff_factor, growth_interval, init_scale, ...
---@field policy PolicyRunner
---@field state table the policy's state: plain numbers and strings
local GradScaler = {}
GradScaler.__index = GradScaler

-- ====== Options ======

local function finite_above(low)
  return function(value)
    if value > low and value < math.huge then return end
    return ("must be above %g and finite"):format(low)
  end
end

local function fraction(value)
  if value > 0 and value < 1 then return end
  return "must lie between 0 and 1"
end

local spec = {
  enabled = {"boolean", true},
  init_scale = {"number", nil, finite_above(0)},
  growth_factor = {"number", 2.0, finite_above(1)},
  backoff_factor = {"number", 0.5, fraction},
  growth_interval = {"integer", 2000, options.at_least(1)},
  min_scale = {"number", nil, options.at_least(0)},
  max_scale = {"number", nil, options.above(0)},
  policy = {"string|table", "dynamic"},
  dtype = {"string", "float16"},
  allow_f16_grads = {"boolean", false},
}
local policy_options = {"growth_factor", "backoff_factor", "growth_interval"}

--- Sorts out what was given: options of the scaler (checked), and further ones for the policy.
local function split_options(given)
  local own, extra = {}, {}
  for name, value in pairs(given or {}) do
    if spec[name] then own[name] = value else extra[name] = value end
  end
  return options.check("GradScaler", own, spec), extra
end

--- Raises for an option that neither the scaler nor the policy knows.
local function check_extra(where, extra, runner)
  local known = options.names(spec)
  for name in pairs(runner.options or {}) do
    if not spec[name] then known[#known + 1] = name end
  end
  for name in pairs(extra) do
    local near, edits
    if type(name) == "string" then near, edits = errors.closest(name, known) end
    local declared = runner.options and runner.options[name] ~= nil
    if not declared and (runner.options or type(name) ~= "string" or (near and edits <= 2)) then
      options.unknown(("%s (policy '%s')"):format(where, runner.name), name, known)
    end
  end
end

-- ====== Policies ======

--- A copy of plain data.
local function copy(value)
  if type(value) ~= "table" then return value end
  local new = {}
  for k, v in pairs(value) do new[k] = copy(v) end
  return new
end

--- Takes fields of `old` over into `new` where name and type agree.
local function carry_over(old, new)
  local kept, reset = {}, {}
  for name, value in pairs(new) do
    if old[name] ~= nil and type(old[name]) == type(value) then
      new[name] = copy(old[name])
      kept[#kept + 1] = tostring(name)
    else
      reset[#reset + 1] = tostring(name)
    end
  end
  table.sort(kept)
  table.sort(reset)
  return kept, reset
end

--- Options of a policy that were not given: its own defaults.
local function fill_defaults(opts, runner)
  for name, default in pairs(runner.options or {}) do
    if opts[name] == nil then opts[name] = default end
  end
end

--- Says something once on the terminal.
local function say(self, text)
  if self.told[text] then return end
  self.told[text] = true
  io.stderr:write("halfmoon: ", text, "\n")
end

--- Puts a new runner in the place of the old one; state fields that match are kept.
local function exchange(self, runner)
  fill_defaults(self.opts, runner)
  local new = runner.init(self.opts)
  local old = copy(self.state)
  old.scale = self.core:get_scale()
  local kept, reset = carry_over(old, new)
  self.policy, self.state = runner, new
  return kept, reset
end

--- Takes up a policy file that has changed; raises if it cannot be used, and keeps the version before.
local function reread(self)
  local new, failure = policies.refresh(self.policy)
  if new then
    local ok, kept, reset = pcall(exchange, self, new)
    if ok then
      self.told = {}
      say(self, ("loss-scale policy '%s' read again from %s; reset: %s"):format(new.name, new.path,
        #reset > 0 and table.concat(reset, ", ") or "nothing"))
    else
      failure = tostring(kept)
      self.policy.mtime = new.mtime
    end
  end
  if failure then error(failure .. "\n  the version before stays in use", 0) end
end

--- What the engine calls in update(): event -> next scale [, why to stop].  An error raised here is a fault.
local function decide(self, event)
  self.heard = event
  reread(self)
  if type(self.state.scale) == "number" then self.state.scale = self.core:get_scale() end
  local told = {
    found_inf = event.found_inf, inf_count = event.inf_count, nan_count = event.nan_count, step = event.step,
    scale = event.scale,
  }
  for _, name in ipairs(self.policy.needs) do told[name] = event[name] end
  local before = copy(self.state)
  local ok, scale, stop, state = pcall(self.policy.update, self.state, told, self.opts)
  if not ok then
    self.state = before -- half an update is none
    error(scale, 0)
  end
  self.state = state
  self.stop = stop
  return scale, stop
end

--- Gives the engine a function that does not keep the scaler alive.
local function connect(self)
  local weak = setmetatable({self}, {__mode = "v"})
  self.core:set_policy(function(event)
    local scaler = weak[1]
    local ok, scale, stop = pcall(decide, scaler, event)
    if not ok then
      scaler.fault = type(scale) == "string" and scale or describe(scale)
      error(scaler.fault, 0)
    end
    return scale, stop
  end)
end

--- amp.GradScaler{policy = "dynamic", ...}: scales losses so that gradients in float16 neither vanish nor overflow.
--- Options: init_scale = 2^16, growth_factor = 2, backoff_factor = 0.5, growth_interval = 2000, min_scale = 1,
--- max_scale = 2^24 (0 and math.huge switch the bounds off), enabled = true, allow_f16_grads = false.
--- policy: a name, a table or a file; further options go to it.
--- dtype = "bfloat16" or "float32": the scale stays at 1 and gradients are only checked.
---@param given table?
---@return GradScaler
local function new(given)
  if given ~= nil and type(given) ~= "table" then
    raise("GradScaler: options must be a table, not %s", describe(given))
  end
  local own, extra = split_options(given)
  local dtype = errors.long_dtype[own.dtype]
  if dtype ~= "float16" and dtype ~= "bfloat16" and dtype ~= "float32" then
    raise("GradScaler: option 'dtype' must be float16, bfloat16 or float32, not %s", describe(own.dtype))
  end
  if dtype ~= "float16" then
    own.init_scale = own.init_scale or 1.0
    if not (given and given.policy) then own.policy = "static" end
  end
  local runner = policies.resolve("GradScaler", own.policy)
  check_extra("GradScaler", extra, runner)
  local self = setmetatable({
    policy = runner, opts = extra, told = {}, history = {}, updates = 0, skipped = 0, clean = 0,
  }, GradScaler)
  for _, name in ipairs(policy_options) do extra[name] = own[name] end
  extra.init_scale = own.init_scale
  fill_defaults(extra, runner)
  local ok, state = pcall(runner.init, extra)
  if not ok then
    raise("GradScaler: policy '%s' failed in init: %s", runner.name, describe(state):gsub('^"(.*)"$', "%1"))
  end
  self.state = state
  local scale = own.init_scale
  if not scale and type(state.scale) == "number" then
    scale = math.max(own.min_scale or 1.0, math.min(own.max_scale or 2.0 ^ 24, state.scale))
  end
  self.core = core.scaler_new {
    init_scale = scale, min_scale = own.min_scale, max_scale = own.max_scale, enabled = own.enabled,
    allow_f16_grads = own.allow_f16_grads,
  }
  extra.min_scale, extra.max_scale = self.core:bounds()
  if type(state.scale) == "number" and own.enabled then state.scale = self.core:get_scale() end
  connect(self)
  return self
end

--- Changes the policy: a name, a table, or a file that is read again whenever it changes.  The scale and every state
--- field that both policies have stay; the result names what was kept and what was reset.
---@param policy string|table
---@param opts table? further options for the policy
---@return {policy: string, kept: string[], reset: string[], message: string}
function GradScaler:set_policy(policy, opts)
  local runner = policies.resolve("set_policy", policy)
  if opts ~= nil then
    if type(opts) ~= "table" then raise("set_policy: options must be a table, not %s", describe(opts)) end
    local extra, changed = {}, copy(self.opts)
    for name, value in pairs(opts) do
      if spec[name] then value = options.value("set_policy", name, value, spec[name]) else extra[name] = value end
      changed[name] = value
    end
    check_extra("set_policy", extra, runner)
    self.opts = changed
  end
  local old = self.policy.name
  local ok, kept, reset = pcall(exchange, self, runner)
  if not ok then raise("set_policy: policy '%s' failed in init: %s", runner.name, tostring(kept)) end
  self.told = {}
  local function listed(names) return #names > 0 and table.concat(names, ", ") or "nothing" end
  local message = ("policy '%s' -> '%s'; kept: %s; reset: %s"):format(old, runner.name, listed(kept), listed(reset))
  if self.updates > 0 then io.stderr:write("halfmoon: loss-scale ", message, "\n") end
  return setmetatable({policy = runner.name, kept = kept, reset = reset, message = message},
    {__tostring = function(report) return report.message end})
end

-- ====== The four steps ======

--- The outputs times the scale, as float32: a tensor, or tables of tensors, which come back in the same form.
---@param outputs Tensor|table
---@return Tensor|table
function GradScaler:scale(outputs)
  if core.is_tensor(outputs) then return self.core:scale(outputs) end
  if type(outputs) ~= "table" then
    raise("scale: outputs must be a Tensor or an iterable of Tensors, came %s", describe(outputs))
  end
  if not self.core:is_enabled() then return outputs end
  local scaled = {}
  for key, value in pairs(outputs) do scaled[key] = self:scale(value) end
  return scaled
end

--- The engine's optimizer behind a Lua one.
local function optim_of(where, optimizer)
  local inner = type(optimizer) == "table" and optimizer.core
  if type(inner) ~= "userdata" then
    raise("%s: expected an optimizer (hm.optim), not %s", where, describe(optimizer))
  end
  return inner
end

--- Divides the gradients by the scale, in place, and checks them: for clipping, before step().
---@param optimizer Optimizer
function GradScaler:unscale_(optimizer) self.core:unscale(optim_of("unscale_", optimizer)) end

local step_spec = {max_norm = {"number", nil, options.above(0)}}

--- Unscales and checks the gradients (unless unscale_ has), then steps the optimizer, or skips it if anything is not
--- finite. {max_norm =} clips by the global norm in the same pass.
---@param optimizer Optimizer
---@param opts {max_norm: number}?
---@return boolean stepped
---@return table record {stepped, found_inf, inf_count, nan_count, scale, norm, culprits = {{name, param, ...}}}
function GradScaler:step(optimizer, opts)
  local inner = optim_of("step", optimizer)
  if type(opts) == "function" or (type(opts) == "table" and opts.closure ~= nil) then
    raise("step: Closure use is not currently supported if GradScaler is enabled.\n"
      .. "  hint: compute the loss and call backward before step")
  end
  local max_norm
  if opts ~= nil then max_norm = options.check("step", opts, step_spec).max_norm end
  local stepped, record = self.core:step(inner, max_norm)
  for _, culprit in ipairs(record.culprits or {}) do
    culprit.name = core.get_name(culprit.param) or ("parameter %d"):format(culprit.index)
  end
  if not stepped and not record.empty then
    local first = record.culprits and record.culprits[1]
    self.skipped = self.skipped + 1
    self.last_skip = {step = self.updates + 1, name = first and first.name}
    self.culprit = self.last_skip.name
  end
  return stepped, record
end

--- Keeps an update for record().
local function remember(self, entry)
  local history = self.history
  history[#history + 1] = entry
  if #history > KEPT + KEPT // 4 then
    table.move(history, #history - KEPT + 1, #history, 1)
    for i = #history, KEPT + 1, -1 do history[i] = nil end
  end
end

--- The next scale: the policy's, or new_scale (a number, or a tensor with one element).  Ends the iteration: every
--- optimizer may be unscaled and stepped again.  Raises if the policy says stop.
---@param new_scale number|Tensor?
---@return {old_scale: number, new_scale: number, event: string, message: string?}
function GradScaler:update(new_scale)
  if core.is_tensor(new_scale) then
    if new_scale.requires_grad or new_scale:numel() ~= 1 then
      raise("update: new_scale must be one number without gradient, came %s", describe(new_scale))
    end
    new_scale = new_scale:item()
  end
  if new_scale ~= nil and not (type(new_scale) == "number" and new_scale > 0 and new_scale < math.huge) then
    raise("update: new_scale must be a positive finite number, not %s", describe(new_scale))
  end
  self.fault, self.stop, self.heard = nil, nil, nil
  local old = self.core:get_scale()
  local ok, record = pcall(self.core.update, self.core, new_scale)
  if not ok then
    if not self.stop then error(record, 0) end
    record = {old_scale = old, new_scale = self.core:get_scale(), event = "stop"}
    record.message = self.stop
  elseif record.event == "fault" then
    record.message = self.fault
    say(self, ("loss-scale policy '%s' failed: %s\n  the scale stays %.14g; said once")
      :format(self.policy.name, self.fault or "?", old))
  end
  local heard = self.heard
  if heard then
    self.updates = heard.step
    self.clean = heard.found_inf and 0 or self.clean + 1
    remember(self, {
      step = heard.step, event = record.event, old_scale = record.old_scale, new_scale = record.new_scale,
      found_inf = heard.found_inf, inf_count = heard.inf_count, nan_count = heard.nan_count,
      culprit = heard.found_inf and self.culprit or nil, message = record.message,
    })
    self.culprit = nil
  end
  if type(self.state.scale) == "number" and self.core:is_enabled() then self.state.scale = self.core:get_scale() end
  if not ok then raise("update: loss-scale policy '%s' stopped the training: %s", self.policy.name, self.stop) end
  return record
end

-- ====== Reading and setting ======

--- The present scale; 1 when disabled.
---@return number
function GradScaler:get_scale() return self.core:get_scale() end

--- Sets the scale, clamped to the bounds.
---@param scale number
function GradScaler:set_scale(scale)
  if not (type(scale) == "number" and scale > 0 and scale < math.huge) then
    raise("set_scale: the scale must be a positive finite number, not %s", describe(scale))
  end
  self.core:set_scale(scale)
end

--- False for a scaler made with enabled = false, which passes everything through.
---@return boolean
function GradScaler:is_enabled() return self.core:is_enabled() end

--- The smallest and largest scale allowed.
---@return number min_scale
---@return number max_scale
function GradScaler:bounds() return self.core:bounds() end

for _, name in ipairs(policy_options) do
  GradScaler["get_" .. name] = function(self) return self.opts[name] end
  GradScaler["set_" .. name] = function(self, value)
    self.opts[name] = options.value("set_" .. name, name, value, spec[name])
  end
end

--- What happened in the last n updates (all that are kept, up to 4,096, unless n is given), oldest first: {step, event,
--- old_scale, new_scale, found_inf, inf_count, nan_count, culprit, message}.
---@param n integer?
---@return table[]
function GradScaler:record(n)
  local history = self.history
  n = math.min(n or KEPT, #history, KEPT)
  return table.move(history, #history - n + 1, #history, 1, {})
end

-- ====== State ======

--- PyTorch's five fields, the policy's name and its state.  Empty when disabled.
---@return table
function GradScaler:state_dict()
  if not self.core:is_enabled() then return {} end
  return {
    scale = self.core:get_scale(),
    growth_factor = self.opts.growth_factor,
    backoff_factor = self.opts.backoff_factor,
    growth_interval = self.opts.growth_interval,
    _growth_tracker = math.type(self.state.clean) == "integer" and self.state.clean or 0,
    policy = self.policy.name,
    policy_state = copy(self.state),
  }
end

--- Takes over a state made by state_dict(), or by PyTorch's scaler.  The policy stays the one in use; the fields of its
--- state that the file has under the same name are set.
---@param saved table
---@return {kept: string[], reset: string[]}?
function GradScaler:load_state_dict(saved)
  if not self.core:is_enabled() then return end
  if type(saved) ~= "table" then raise("load_state_dict: expected a table, not %s", describe(saved)) end
  if next(saved) == nil then
    raise("load_state_dict: The source state dict is empty, possibly because it was saved from a disabled instance "
      .. "of GradScaler.\n  hint: leave load_state_dict out to start with a fresh scale")
  end
  local tracker = saved._growth_tracker
  if saved.scale == nil then raise("load_state_dict: 'scale' is missing") end
  options.value("load_state_dict", "scale", saved.scale, {"number", nil, finite_above(0)})
  for _, name in ipairs(policy_options) do
    if saved[name] ~= nil then options.value("load_state_dict", name, saved[name], spec[name]) end
  end
  if tracker ~= nil then
    options.value("load_state_dict", "_growth_tracker", tracker, {"integer", nil, options.at_least(0)})
  end
  for _, name in ipairs(policy_options) do
    if saved[name] ~= nil then self.opts[name] = saved[name] end
  end
  self.core:set_scale(saved.scale)
  local fields = type(saved.policy_state) == "table" and saved.policy_state
    or {clean = tracker and math.tointeger(tracker)}
  local kept, reset = carry_over(fields, self.state)
  if type(self.state.scale) == "number" then self.state.scale = self.core:get_scale() end
  return {kept = kept, reset = reset}
end

--- GradScaler  scale 32768  policy dynamic  clean steps 412/2000  skipped 3 (last: step 88, fc2.weight)
function GradScaler:__tostring()
  if not self.core:is_enabled() then return "GradScaler  disabled" end
  local clean = math.type(self.state.clean) == "integer" and self.state.clean or self.clean
  local interval = self.state.clean and self.opts.growth_interval
  local last = self.last_skip
  return ("GradScaler  scale %.14g  policy %s  clean steps %d%s  skipped %d%s"):format(self.core:get_scale(),
    self.policy.name, clean,
    interval and ("/%d"):format(interval) or "", self.skipped,
    last and (" (last: step %d%s)"):format(last.step, last.name and ", " .. last.name or "") or "")
end

return {new = new, GradScaler = GradScaler}
