--- amp/grad_scaler.lua -- GradScaler: loss scaling for float16, with policies that can be swapped in mid-run.
--
-- The engine's scaler (C) keeps the scale, the state machine of each optimizer and the two passes over gradients; this
-- file adds policies, names of culprits, the history, and state dicts.  A policy is asked once in each update(); if it
-- fails, the scale stays, the event is "fault", and training goes on.
--
-- async = true: on a GPU no step waits for the device.  step() returns nil and a record whose fields wait when they are
-- read; the same for the record of update().  The policies "dynamic" and "static" run on the device.  Any other policy
-- runs here and hears of each update up to 4 updates late (update() waits for the oldest event beyond that); until it
-- has heard of an overflow, the device backs off by itself, by backoff_factor, and the policy's word then counts,
-- backed off once more for every overflow that it has not heard of yet.  get_scale(), record(), state_dict(),
-- load_state_dict(), set_policy() and tostring() wait, and so do set_scale() and update(new_scale) beside a policy of
-- one's own.  A policy that stops the training is obeyed by the update() that hears of it, or the next one.
-- On the CPU all is known at once and the policy runs in update(); step() returns nil and the record there, too.

local core = require "halfmoon.core"
local errors = require "halfmoon.errors"
local options = require "halfmoon.options"
local policies = require "halfmoon.amp.policies"
local chosen = require "halfmoon.amp.scaler_options"

local raise, describe = errors.raise, errors.describe

local KEPT = 4096 -- updates that record() remembers

---@class GradScaler
---@field core userdata the engine's scaler
---@field opts table options that the policy sees: growth_factor, backoff_factor, growth_interval, init_scale, ...
---@field given table those of them that somebody gave; the rest are the policy's defaults
---@field bound {min_scale: number, max_scale: number}
---@field policy PolicyRunner
---@field state table the policy's state: plain numbers and strings
---@field dtype string what the losses are computed in: "float16", "bfloat16" or "float32"
---@field warned boolean? whether it was said that bfloat16 needs no scale
---@field async boolean whether step() answers nil
---@field replayed table? statistics of a step that was recorded elsewhere, for the policy; see replay()
---@field awaiting table<integer, table> records of updates that the device has not told of yet, by ticket
local GradScaler = {}
GradScaler.__index = GradScaler

local spec, policy_options, finite_above = chosen.spec, chosen.policy_options, chosen.finite_above
local split_options, check_extra, check_needs = chosen.split, chosen.check_extra, chosen.check_needs
local options_of, copy, carry_over = chosen.of, chosen.copy, chosen.carry_over

local FOR_POLICIES = {} -- the options among them that policies read
for _, name in ipairs(policy_options) do FOR_POLICIES[name] = true end

-- ====== Policies ======

--- Tells the engine what the policy needs; nothing is measured that nobody wants.
local function want(self)
  local wanted = {}
  for _, name in ipairs(self.policy.needs) do wanted[name] = true end
  if self.tracer then self.tracer:want(wanted) end
  self.core:want(wanted.histogram == true, wanted.per_param == true)
end

--- Says something once on the terminal.
local function say(self, text)
  if self.told[text] then return end
  self.told[text] = true
  io.stderr:write("halfmoon: ", text, "\n")
end

--- Puts a new runner in the place of the old one; state fields that match are kept.  given: options that were given.
local function exchange(self, runner, given)
  check_needs("policy", runner, self.async)
  local opts = options_of(given, runner, self.bound)
  local new = runner.init(opts)
  if type(new) ~= "table" then error("init returned " .. describe(new) .. ", not a table", 0) end
  local old = copy(self.state)
  old.scale = self.core:get_scale()
  local kept, reset = carry_over(old, new)
  self.policy, self.state, self.opts, self.given = runner, new, opts, given
  want(self)
  return kept, reset
end

--- Takes up a policy file that has changed; raises if it cannot be used, and keeps the version before.
local function reread(self)
  local new, failure = policies.refresh(self.policy)
  if new then
    local ok, kept, reset = pcall(exchange, self, new, self.given)
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
  for _, name in ipairs(self.policy.needs) do
    told[name] = self.replayed and self.replayed[name] or event[name]
    -- a policy that came in between the check and update() was not there to say what it needs
    if told[name] == nil then
      return self.core:get_scale() * (event.found_inf and self.opts.backoff_factor or 1)
    end
  end
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

-- ====== Without waits ======

--- Does the scaler work without waits now?  From the first tensor on a GPU on, with async = true.
local function late(self) return self.async and self.core:late() end

--- Does the device run the policy?
local function alone(self)
  local policy = self.policy.policy
  return policy ~= nil and (policy == policies.dynamic or policy == policies.static)
end

--- Tells the engine how the device moves the scale.
local function give_rule(self)
  local o, policy = self.opts, self.policy.policy
  if policy and policy == policies.static then return self.core:set_rule(true, 1, 1, 0) end
  self.core:set_rule(alone(self), o.growth_factor, o.backoff_factor, alone(self) and o.growth_interval or 0)
end

--- A record whose fields are filled in when one of them is read.
---@param resolve fun(record: table) fills it in
local function lazy(resolve)
  local meta
  local function known(record)
    setmetatable(record, nil)
    local ok, why = pcall(resolve, record)
    if ok then return end
    setmetatable(record, meta) -- so that it does not pass for an empty one
    error(why, 0)
  end
  meta = {
    __index = function(record, name)
      known(record)
      return record[name]
    end,
    __pairs = function(record)
      known(record)
      return next, record, nil
    end,
  }
  return setmetatable({}, meta)
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

--- Keeps an update that the policy has just heard of.
local function note(self, heard, record)
  self.updates = heard.step
  self.clean = heard.found_inf and 0 or self.clean + 1
  remember(self, {
    step = heard.step, event = record.event, old_scale = record.old_scale, new_scale = record.new_scale,
    found_inf = heard.found_inf, inf_count = heard.inf_count, nan_count = heard.nan_count,
    culprit = heard.found_inf and self.culprit or nil, message = record.message,
  })
  if self.tracer then self.tracer:write(self, heard, record) end
  self.culprit = nil
end

--- Says once that the policy failed.
local function say_fault(self, scale, message)
  say(self, ("loss-scale policy '%s' failed: %s\n  the scale stays %.14g; said once")
    :format(self.policy.name, message, scale))
end

--- The engine told the policy of a skipped step before update(), in step() or unscale_().
local function note_early(self, old)
  local heard = self.heard
  self.heard = nil
  if not heard then return end
  local now = self.core:get_scale()
  local event = self.stop and "stop" or self.fault and "fault" or now < old and "backoff" or now > old and "grow"
    or "hold"
  if event == "fault" then say_fault(self, old, self.fault) end
  note(self, heard, {event = event, old_scale = old, new_scale = now, message = self.stop or self.fault})
  self.early_stop, self.early_fault = self.early_stop or self.stop, self.early_fault or self.fault -- for update()
  self.stop, self.fault = nil, nil
end

--- An update that the device has told of.
local function settle(self, told)
  local message = told.event == "stop" and self.stop or told.event == "fault" and (self.fault or told.message) or nil
  if told.event == "stop" then self.stopped = self.stopped or message end
  if told.event == "fault" then say_fault(self, told.old_scale, message) end
  local record = self.awaiting[told.ticket]
  self.awaiting[told.ticket] = nil
  if record then
    setmetatable(record, nil)
    record.old_scale, record.new_scale = told.old_scale, told.new_scale
    record.event, record.message = told.event, message
  end
  if not alone(self) and type(self.state.scale) == "number" then self.state.scale = self.core:get_scale() end
  if not told.told then return end
  self.updates = told.step
  self.clean = told.found_inf and 0 or self.clean + 1
  if told.found_inf then
    self.skipped = self.skipped + 1
    self.last_skip = {step = told.step}
  end
  remember(self, {
    step = told.step, event = told.event, old_scale = told.old_scale, new_scale = told.new_scale,
    found_inf = told.found_inf, inf_count = told.inf_count, nan_count = told.nan_count, message = message,
  })
  if self.tracer then self.tracer:write(self, told, told) end
end

--- Hears of the updates that the device has done: those that have come, or all of them.
local function listen(self, all)
  while true do
    self.fault, self.stop = nil, nil
    local told = self.core:hear(all)
    if not told then return end
    settle(self, told)
  end
end

--- Brings the policy's state up to date; waits.
local function pull(self)
  if not late(self) then return end
  listen(self, true)
  if not alone(self) then return end
  local scale, clean = self.core:read()
  if type(self.state.scale) == "number" then self.state.scale = scale end
  if type(self.state.clean) == "number" then self.state.clean = clean end
end

--- Raises what a policy said when it stopped the training.
local function raise_stop(self)
  local why = self.stopped
  self.stopped = nil
  if why then raise("update: loss-scale policy '%s' stopped the training: %s", self.policy.name, why) end
end

--- update() without a wait.
local function late_update(self, new_scale)
  if new_scale and not alone(self) then listen(self, true) end
  give_rule(self)
  local ticket = self.core:update(new_scale)
  local record = lazy(function() listen(self, true) end)
  self.awaiting[ticket] = record
  listen(self, false)
  if new_scale and not alone(self) and type(self.state.scale) == "number" then
    self.state.scale = self.core:get_scale()
  end
  raise_stop(self)
  return record
end

-- ====== Construction ======

--- Without float16 there is nothing to scale: the scale is 1 and stays there.
local function fix_scale(own, dtype)
  if own.init_scale ~= 1 then
    raise("GradScaler: with dtype %s the scale is fixed at 1, init_scale %g came\n"
      .. "  hint: leave init_scale out; or name a policy, and the scale moves as with float16", dtype, own.init_scale)
  end
  own.policy = "static"
  own.min_scale, own.max_scale = own.min_scale or 1.0, own.max_scale or 1.0
end

--- The bounds of a new scaler: those given, else the policy's, else 1 and 2^24, both widened to hold the first scale.
local function first_bounds(own, runner)
  local init = own.init_scale
  local low, high = own.min_scale, own.max_scale
  if not low then
    low = runner.min_scale or 1.0
    if init and init < low then low = init end
  end
  if not high then
    high = runner.max_scale or 2.0 ^ 24
    if init and init > high then high = init end
  end
  return low, high
end

--- amp.GradScaler{policy = "dynamic", ...}: scales losses so that gradients in float16 neither vanish nor overflow.
--- Options: init_scale = 2^16, growth_factor = 2, backoff_factor = 0.5, growth_interval = 2000, min_scale = 1,
--- max_scale = 2^24 (0 and math.huge switch the bounds off), enabled = true, allow_f16_grads = false, async = false.
--- async: on a GPU no step waits for the device; step() returns nil and a record that waits when it is read.
--- policy: a name, a table or a file; further options go to it.
--- dtype = "bfloat16" or "float32": the scale stays at 1 and gradients are only checked and counted.
--- trace = "run.jsonl": each update as a line of JSON, see amp.trace.
--- groups = {name = options, ...}: a scale for each loss or part of the model; see amp/scaler_groups.lua.
---@param given table?
---@return GradScaler
local function new(given)
  if given ~= nil and type(given) ~= "table" then
    raise("GradScaler: options must be a table, not %s", describe(given))
  end
  if given and given.groups ~= nil and given.trace ~= nil then
    raise("GradScaler: 'trace' is for one scaler\n  hint: give each group a trace of its own, in its options")
  end
  if given and given.groups ~= nil then return require("halfmoon.amp.scaler_groups").new(new, given) end
  local own, extra = split_options(given)
  local dtype = errors.long_dtype[own.dtype]
  if dtype ~= "float16" and dtype ~= "bfloat16" and dtype ~= "float32" then
    raise("GradScaler: option 'dtype' must be float16, bfloat16 or float32, not %s", describe(own.dtype))
  end
  if dtype ~= "float16" then
    own.init_scale = own.init_scale or 1.0
    if not (given and given.policy) then fix_scale(own, dtype) end
  end
  local runner = policies.resolve("GradScaler", own.policy)
  check_extra("GradScaler", extra, runner)
  check_needs("GradScaler", runner, own.async)
  for _, name in ipairs(policy_options) do
    if given and given[name] ~= nil then extra[name] = own[name] end
  end
  extra.init_scale = own.init_scale
  local low, high = first_bounds(own, runner)
  local self = setmetatable({
    policy = runner, given = extra, bound = {min_scale = low, max_scale = high}, told = {}, history = {}, updates = 0,
    skipped = 0, clean = 0, async = own.async, awaiting = {}, dtype = dtype,
    optimizers = setmetatable({}, {__mode = "k"}),
  }, GradScaler)
  self.opts = options_of(extra, runner, self.bound)
  local ok, state = pcall(runner.init, self.opts)
  if not ok then
    raise("GradScaler: policy '%s' failed in init: %s", runner.name, describe(state):gsub('^"(.*)"$', "%1"))
  end
  self.state = state
  local scale = own.init_scale
  if not scale and type(state.scale) == "number" then
    scale = math.max(low, math.min(high, state.scale))
  end
  self.core = core.scaler_new {
    init_scale = scale, min_scale = low, max_scale = high, enabled = own.enabled,
    allow_f16_grads = own.allow_f16_grads, async = own.async,
  }
  want(self)
  if type(state.scale) == "number" and own.enabled then state.scale = self.core:get_scale() end
  connect(self)
  if own.trace ~= nil then require("halfmoon.amp.trace").begin(self, own.trace) end
  return self
end

--- Changes the policy: a name, a table, or a file that is read again whenever it changes.  The scale and every state
--- field that both policies have stay; the result names what was kept and what was reset.
---@param policy string|table
---@param opts table? growth_factor, backoff_factor, growth_interval, and the policy's own options
---@return {policy: string, kept: string[], reset: string[], message: string}
function GradScaler:set_policy(policy, opts)
  local runner = policies.resolve("set_policy", policy)
  local given = copy(self.given)
  if opts ~= nil then
    if type(opts) ~= "table" then raise("set_policy: options must be a table, not %s", describe(opts)) end
    local extra = {}
    for name, value in pairs(opts) do
      if spec[name] and not FOR_POLICIES[name] then
        raise("set_policy: option '%s' belongs to the scaler, which is made with it\n  hint: %s", name,
          name == "init_scale" and "set_scale() sets the scale" or "amp.GradScaler{...} takes it")
      end
      if spec[name] then value = options.value("set_policy", name, value, spec[name]) else extra[name] = value end
      given[name] = value
    end
    check_extra("set_policy", extra, runner)
  end
  check_needs("set_policy", runner, self.async)
  pull(self)
  local scale
  if late(self) then
    scale = self.core:read()
    self.core:restart(scale, 0)
  end
  local old = self.policy.name
  local ok, kept, reset = pcall(exchange, self, runner, given)
  if scale then self.core:restart(scale, math.tointeger(self.state.clean) or 0) end
  if not ok then raise("set_policy: policy '%s' failed in init: %s", runner.name, tostring(kept)) end
  self.told = {}
  local function listed(names) return #names > 0 and table.concat(names, ", ") or "nothing" end
  local message = ("policy '%s' -> '%s'; kept: %s; reset: %s"):format(old, runner.name, listed(kept), listed(reset))
  if self.updates > 0 then io.stderr:write("halfmoon: loss-scale ", message, "\n") end
  return setmetatable({policy = runner.name, kept = kept, reset = reset, message = message},
    {__tostring = function(report) return report.message end})
end

-- ====== The four steps ======

--- Says once that a loss made in bfloat16 needs no scale.
local function warn_bfloat16(self, loss)
  if not self.core:is_enabled() or not core.graph_has_dtype(loss, "bfloat16") then return end
  self.warned = true
  io.stderr:write("halfmoon: this GradScaler scales a loss computed in bfloat16, which has the range of float32; the "
    .. "scale stays in use\n  hint: amp.GradScaler{dtype = \"bf16\"} keeps it at 1 and only checks gradients; "
    .. "said once\n")
end

--- The outputs times the scale, as float32: a tensor, or tables of tensors, which come back in the same form.
---@param outputs Tensor|table
---@return Tensor|table
function GradScaler:scale(outputs)
  if core.is_tensor(outputs) then
    if not self.warned and self.dtype == "float16" then warn_bfloat16(self, outputs) end
    return self.core:scale(outputs)
  end
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
function GradScaler:unscale_(optimizer)
  local inner, old = optim_of("unscale_", optimizer), self.core:get_scale()
  self.heard = nil
  self.core:unscale(inner)
  note_early(self, old)
end

local step_spec = {max_norm = {"number", nil, options.above(0)}}

--- The names of a record's culprits.
local function name_culprits(record)
  for _, culprit in ipairs(record.culprits or {}) do
    culprit.name = core.get_name(culprit.param) or ("parameter %d"):format(culprit.index)
  end
end

--- The record of a step that nobody waited for.
local function promised(promise)
  return lazy(function(record)
    for name, value in pairs(promise:read()) do record[name] = value end
    name_culprits(record)
  end)
end

--- Takes note of a step that was skipped, or will be.
local function note_skip(self, record)
  local first = record.culprits and record.culprits[1]
  self.skipped = self.skipped + 1
  self.last_culprits = {}
  for i, culprit in ipairs(record.culprits or {}) do
    self.last_culprits[i] = {name = culprit.name, inf_count = culprit.inf_count, nan_count = culprit.nan_count}
  end
  self.last_skip = {step = self.updates + 1, name = first and first.name}
  self.culprit = self.last_skip.name
end

--- What the last check of an optimizer's gradients found, by unscale_() or step(); nil if there was none since
--- update(), or if the scaler works without waits.
---@param optimizer Optimizer
---@return table? record as step()'s
function GradScaler:checked(optimizer)
  local record = self.core:checked(optim_of("checked", optimizer))
  if record then name_culprits(record) end
  return record
end

--- Unscales and checks the gradients (unless unscale_ has), then steps the optimizer, or skips it if anything is not
--- finite. {max_norm =} clips by the global norm in the same pass.
--- With async = true the first result is nil; on a GPU the record's fields wait when one of them is read.
---@param optimizer Optimizer
---@param opts {max_norm: number}?
---@return boolean? stepped
---@return table record {stepped, found_inf, inf_count, nan_count, scale, norm, amax, culprits = {{name, param, ...}}}
function GradScaler:step(optimizer, opts)
  local inner = optim_of("step", optimizer)
  if type(opts) == "function" or (type(opts) == "table" and opts.closure ~= nil) then
    raise("step: Closure use is not currently supported if GradScaler is enabled.\n"
      .. "  hint: compute the loss and call backward before step")
  end
  local max_norm
  if opts ~= nil then max_norm = options.check("step", opts, step_spec).max_norm end
  local old = self.core:get_scale()
  self.heard = nil
  self.optimizers[optimizer] = true
  local stepped, record = self.core:step(inner, max_norm)
  note_early(self, old)
  if stepped == nil then return nil, promised(record) end
  name_culprits(record)
  if not stepped and not record.empty then note_skip(self, record) end
  if self.async then stepped = nil end
  return stepped, record
end

--- The next scale: the policy's, or new_scale (a number, or a tensor with one element).  Ends the iteration: every
--- optimizer may be unscaled and stepped again.  Raises if the policy says stop.  With async = true on a GPU the fields
--- of the record wait when one of them is read.
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
  if late(self) then return late_update(self, new_scale) end
  local old = self.core:get_scale()
  local ok, record = pcall(self.core.update, self.core, new_scale)
  self.stop, self.fault = self.early_stop or self.stop, self.fault or self.early_fault
  self.early_stop, self.early_fault = nil, nil
  if not ok then
    if not self.stop then error(record, 0) end
    record = {old_scale = old, new_scale = self.core:get_scale(), event = "stop"}
    record.message = self.stop
  elseif record.event == "fault" then
    record.message = self.fault or record.message -- without a fault of the policy's: no memory for its event
    say_fault(self, old, record.message)
  end
  if self.heard then note(self, self.heard, record) end
  local stop = self.stop
  self.fault, self.stop, self.heard = nil, nil, nil
  if type(self.state.scale) == "number" and self.core:is_enabled() then self.state.scale = self.core:get_scale() end
  if not ok then raise("update: loss-scale policy '%s' stopped the training: %s", self.policy.name, stop) end
  return record
end

--- update() after a step that was recorded elsewhere, as if step() had checked its gradients: for the simulator.
--- found: {inf_count, nan_count, amax, norm [, histogram, per_param]} of the unscaled gradients; they overflowed if one
--- of the counts is not 0.  A policy that stops raises, as in update().
---@param self GradScaler
---@param found table
---@return {old_scale: number, new_scale: number, event: string, message: string?}
local function replay(self, found)
  self.replayed = found
  self.core:tell(found.inf_count, found.nan_count, found.amax, found.norm)
  if found.inf_count + found.nan_count > 0 then note_skip(self, {}) end
  return self:update()
end

-- ====== Reading and setting ======

--- The present scale; 1 when disabled.  With async = true on a GPU it waits for the device.
---@return number
function GradScaler:get_scale()
  if not late(self) then return self.core:get_scale() end
  listen(self, true)
  return (self.core:read())
end

--- Sets the scale, clamped to the bounds.
---@param scale number
function GradScaler:set_scale(scale)
  if not (type(scale) == "number" and scale > 0 and scale < math.huge) then
    raise("set_scale: the scale must be a positive finite number, not %s", describe(scale))
  end
  local asked = late(self) and not alone(self)
  if asked then listen(self, true) end
  self.core:set_scale(scale)
  if asked and type(self.state.scale) == "number" then self.state.scale = self.core:get_scale() end
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
    self.given[name] = self.opts[name]
  end
end

--- What happened in the last n updates (all that are kept, up to 4,096, unless n is given), oldest first: {step, event,
--- old_scale, new_scale, found_inf, inf_count, nan_count, culprit, message}.
---@param n integer?
---@return table[]
function GradScaler:record(n)
  if late(self) then listen(self, true) end
  local history = self.history
  n = math.min(n or KEPT, #history, KEPT)
  return table.move(history, #history - n + 1, #history, 1, {})
end

-- ====== State ======

--- PyTorch's five fields, the policy's name and its state, and the counters of updates.  Empty when disabled.
---@return table
function GradScaler:state_dict()
  if not self.core:is_enabled() then return {} end
  pull(self)
  return {
    scale = self:get_scale(),
    growth_factor = self.opts.growth_factor,
    backoff_factor = self.opts.backoff_factor,
    growth_interval = self.opts.growth_interval,
    _growth_tracker = math.type(self.state.clean) == "integer" and self.state.clean or 0,
    policy = self.policy.name,
    policy_state = copy(self.state),
    counters = {
      step = self.core:step_count(), updates = self.updates, skipped = self.skipped, clean = self.clean,
      last_skip = copy(self.last_skip),
    },
  }
end

--- Takes over the counters of a state; one that PyTorch made has none, and leaves them.
local function load_counters(self, counters)
  if type(counters) ~= "table" then return end
  for _, name in ipairs {"step", "updates", "skipped", "clean"} do
    options.value("load_state_dict", "counters." .. name, counters[name], {"integer", nil, options.at_least(0)})
  end
  self.core:set_step_count(math.tointeger(counters.step))
  for _, name in ipairs {"updates", "skipped", "clean"} do self[name] = math.tointeger(counters[name]) end
  local last = counters.last_skip
  self.last_skip = type(last) == "table" and math.type(last.step) == "integer" and copy(last) or nil
end

--- Takes over a state made by state_dict(), or by PyTorch's scaler.  The policy stays the one in use; the fields of its
--- state that the file has under the same name are set, and if that policy made it, all of them.
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
  pull(self)
  for _, name in ipairs(policy_options) do
    if saved[name] ~= nil then self.opts[name], self.given[name] = saved[name], saved[name] end
  end
  local fields = type(saved.policy_state) == "table" and saved.policy_state
    or {clean = tracker and math.tointeger(tracker)}
  load_counters(self, saved.counters)
  local kept, reset = carry_over(fields, self.state)
  if saved.policy == self.policy.name then -- what the policy has put into its state since init
    for name, value in pairs(fields) do
      if self.state[name] == nil then
        self.state[name] = copy(value)
        kept[#kept + 1] = tostring(name)
      end
    end
    table.sort(kept)
  end
  self.core:restart(saved.scale, math.tointeger(self.state.clean) or 0)
  if type(self.state.scale) == "number" then self.state.scale = self.core:get_scale() end
  return {kept = kept, reset = reset}
end

--- GradScaler  scale 32768  policy dynamic  clean steps 412/2000  skipped 3 (last: step 88, fc2.weight)
function GradScaler:__tostring()
  if not self.core:is_enabled() then return "GradScaler  disabled" end
  pull(self)
  local clean = math.type(self.state.clean) == "integer" and self.state.clean or self.clean
  local counts = self.state.clean and self.policy.options and self.policy.options.growth_interval
  local interval = counts and self.opts.growth_interval
  local last = self.last_skip
  return ("GradScaler  scale %.14g  policy %s  clean steps %d%s  skipped %d%s"):format(self:get_scale(),
    self.policy.name, clean,
    interval and ("/%d"):format(interval) or "", self.skipped,
    last and (" (last: step %d%s)"):format(last.step, last.name and ", " .. last.name or "") or "")
end

return {new = new, GradScaler = GradScaler, note_skip = note_skip, want = want, replay = replay}
