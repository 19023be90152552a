--- amp/scaler_groups.lua -- amp.GradScaler{groups = ...}: a scale for each loss, or for each part of a model with an
--- optimizer of its own.
--
--     local scaler = amp.GradScaler{groups = {generator = {}, critic = {init_scale = 2^10}}, growth_interval = 500}
--
-- An optimizer for each group: the four steps with the group's name.
--
--     scaler:scale(loss, "critic"):backward()
--     scaler:step(opt_critic, {group = "critic"})
--     scaler:update()                               -- every group that was checked moves its scale
--
-- Several losses on the same parameters: backward() through the scaler, which unscales and checks each loss's gradients
-- apart and adds them up.  .grad then holds true gradients, ready for clipping.
--
--     scaler:backward(loss, "main", opt)
--     scaler:backward(penalty, "penalty", opt)
--     local stepped, record = scaler:step(opt)      -- skipped if the gradients of any loss were not finite
--     scaler:update()
--
-- backward() moves the scale of its group at once (each call is one check for its policy), so gradients may be
-- accumulated over several calls; update() tells what came of it.  Options beside `groups` hold for all of them.

local core = require "halfmoon.core"
local errors = require "halfmoon.errors"
local loss_grads = require "halfmoon.amp.loss_grads"
local options = require "halfmoon.options"

local raise, describe = errors.raise, errors.describe

---@class GroupedGradScaler
---@field groups table<string, GradScaler> the scaler of each group
---@field names string[] of the groups, sorted
local GroupedGradScaler = {}
GroupedGradScaler.__index = GroupedGradScaler

-- Set by new(): GradScaler's own.
local note_skip

local function new(make, given)
  note_skip = require("halfmoon.amp.grad_scaler").note_skip
  if type(given.groups) ~= "table" or next(given.groups) == nil then
    raise("GradScaler: groups must be a table of names and options, came %s\n"
      .. "  hint: groups = {main = {}, aux = {init_scale = 1024}}",
      describe(given.groups))
  end
  if given.async then
    raise("GradScaler: groups and async = true exclude each other: gradients of several losses are checked one by one")
  end
  local self = setmetatable({groups = {}, names = {}, home = setmetatable({}, {__mode = "k"})}, GroupedGradScaler)
  for name, opts in pairs(given.groups) do
    if type(name) ~= "string" then raise("GradScaler: names of groups must be strings, came %s", describe(name)) end
    if type(opts) ~= "table" then
      raise("GradScaler: the options of group '%s' must be a table, came %s", name, describe(opts))
    end
    local merged = {}
    for key, value in pairs(given) do
      if key ~= "groups" then merged[key] = value end
    end
    for key, value in pairs(opts) do merged[key] = value end
    self.groups[name] = make(merged)
    self.names[#self.names + 1] = name
  end
  table.sort(self.names)
  self:reset()
  return self
end

--- Forgets what was checked since update().
function GroupedGradScaler:reset()
  self.checks = setmetatable({}, {__mode = "k"}) -- optimizer -> what backward() found for it
  self.stepped = setmetatable({}, {__mode = "k"})
  self.moved = {}
end

--- The scaler of a group, with all that a GradScaler can do.
---@param name string
---@return GradScaler
function GroupedGradScaler:group(name)
  local found = type(name) == "string" and self.groups[name]
  if found then return found end
  local near = type(name) == "string" and errors.closest(name, self.names)
  raise("GradScaler: there is no group %s%s\n  groups: %s", describe(name),
    near and (", did you mean '%s'?"):format(near) or "", table.concat(self.names, ", "))
end

--- The outputs times the scale of a group, as float32.
---@param outputs Tensor|table
---@param name string the group
---@return Tensor|table
function GroupedGradScaler:scale(outputs, name) return self:group(name):scale(outputs) end

-- ====== Losses that share parameters ======

--- Adds a check to what is known of an optimizer.
local function add_check(self, name, optimizer, record)
  local sum = self.checks[optimizer] or {inf_count = 0, nan_count = 0, culprits = {}, groups = {}}
  self.checks[optimizer] = sum
  if not record then return end
  sum.checked = true
  sum.inf_count, sum.nan_count = sum.inf_count + record.inf_count, sum.nan_count + record.nan_count
  for _, culprit in ipairs(record.culprits) do
    culprit.group = name
    table.insert(sum.culprits, culprit)
  end
  if record.found_inf then table.insert(sum.groups, name) end
end

local backward_spec = {retain_graph = {"boolean"}, create_graph = {"boolean"}}

--- Runs backward with the scale of a group and adds the unscaled gradients to those that are there.
---@param loss Tensor
---@param name string the group
---@param optimizers Optimizer|Optimizer[] whose parameters the loss reaches
---@param opts {retain_graph: boolean?, create_graph: boolean?}?
function GroupedGradScaler:backward(loss, name, optimizers, opts)
  local scaler = self:group(name)
  opts = options.check("backward", opts, backward_spec)
  if not core.is_tensor(loss) then raise("backward: expected a loss, came %s", describe(loss)) end
  local list = loss_grads.list(optimizers)
  for _, optimizer in ipairs(list) do
    if type(optimizer) ~= "table" or not optimizer.core then
      raise("backward: expected an optimizer (hm.optim) or several, came %s", describe(optimizer))
    end
    if self.stepped[optimizer] then
      raise("backward: step() has already been called since the last update()\n  hint: call update() after the steps")
    end
  end
  local aside = loss_grads.take(list)
  local ok, why = pcall(function()
    scaler:scale(loss):backward(nil, opts)
    for _, optimizer in ipairs(list) do scaler:unscale_(optimizer) end
  end)
  if not ok then
    loss_grads.restore(list, aside)
    scaler.core:update()
    error(why, 0)
  end
  for _, optimizer in ipairs(list) do
    local record = scaler:checked(optimizer)
    add_check(self, name, optimizer, record)
    if record and record.found_inf then note_skip(scaler, record) end
  end
  loss_grads.put(aside)
  self.moved[name] = scaler:update()
end

-- ====== The steps ======

--- The group that an optimizer's gradients were scaled by.
local function home_of(self, where, optimizer, name)
  if name then
    self:group(name)
    self.home[optimizer] = name
  elseif not self.home[optimizer] then
    raise("%s: which group's scale do these gradients have?\n  hint: scaler:%s, or use "
      .. "scaler:backward(loss, group, opt)",
      where, where == "step" and "step(opt, {group = \"name\"})" or "unscale_(opt, \"name\")")
  end
  return self.groups[self.home[optimizer]]
end

--- Divides the gradients by the scale of a group and checks them; not needed after backward().
---@param optimizer Optimizer
---@param name string the group
function GroupedGradScaler:unscale_(optimizer, name)
  if self.checks[optimizer] then
    raise("unscale_: gradients that scaler:backward() made are unscaled already")
  end
  home_of(self, "unscale_", optimizer, name):unscale_(optimizer)
end

local step_spec = {max_norm = {"number", nil, options.above(0)}, group = {"string"}}

--- step() on gradients that backward() has unscaled and checked.
local function step_checked(self, optimizer, max_norm)
  local found = self.checks[optimizer]
  if self.stepped[optimizer] then
    raise("step: step() has already been called since the last update().\n"
      .. "  hint: call update() at the end of each step")
  end
  local bad = #found.groups > 0
  local record = {
    stepped = not bad and found.checked == true, found_inf = bad, inf_count = found.inf_count,
    nan_count = found.nan_count, scale = 1.0, culprits = found.culprits, groups = found.groups,
    empty = not found.checked or nil,
  }
  self.checks[optimizer] = nil
  if not record.stepped then return false, record end
  if max_norm then
    local params = {}
    loss_grads.each(optimizer, function(p) params[#params + 1] = p end)
    require("halfmoon.nn.utils").clip_grad_norm_(params, max_norm)
  end
  optimizer:step()
  self.stepped[optimizer] = true
  return true, record
end

--- Steps the optimizer, or skips it if a gradient is not finite.  After backward() it needs no group; else options name
--- it once for each optimizer.
---@param optimizer Optimizer
---@param opts {group: string?, max_norm: number?}?
---@return boolean stepped
---@return table record as GradScaler's; after backward() also `groups`, the losses whose gradients were not finite
function GroupedGradScaler:step(optimizer, opts)
  opts = options.check("step", opts, step_spec)
  if self.checks[optimizer] or (self.stepped[optimizer] and not opts.group) then
    if not self.checks[optimizer] then add_check(self, nil, optimizer, nil) end
    return step_checked(self, optimizer, opts.max_norm)
  end
  return home_of(self, "step", optimizer, opts.group):step(optimizer, opts.max_norm and {max_norm = opts.max_norm})
end

--- Ends the iteration: each group that was checked moves its scale, unless backward() has done so.
---@return table<string, table> records {old_scale, new_scale, event} by group
function GroupedGradScaler:update()
  local records, stop = {}, nil
  for _, name in ipairs(self.names) do
    local ok, record = pcall(self.groups[name].update, self.groups[name])
    if not ok then stop = stop or record end
    records[name] = self.moved[name] or (ok and record or nil)
  end
  self:reset()
  if stop then error(stop, 0) end
  return records
end

--- The present scale of a group.
---@param name string
---@return number
function GroupedGradScaler:get_scale(name) return self:group(name):get_scale() end

-- ====== State ======

--- The state dicts of the groups, by name.
---@return {groups: table<string, table>}
function GroupedGradScaler:state_dict()
  local saved = {}
  for name, scaler in pairs(self.groups) do saved[name] = scaler:state_dict() end
  return {groups = saved}
end

--- Takes over a state made by state_dict(); the groups must have the same names.
---@param saved {groups: table<string, table>}
function GroupedGradScaler:load_state_dict(saved)
  if type(saved) ~= "table" or type(saved.groups) ~= "table" then
    raise("load_state_dict: expected a table made by state_dict() of a GradScaler with groups, came %s",
      describe(saved))
  end
  for name in pairs(saved.groups) do self:group(name) end
  for _, name in ipairs(self.names) do
    if not saved.groups[name] then raise("load_state_dict: the state has no group '%s'", name) end
  end
  for name, scaler in pairs(self.groups) do scaler:load_state_dict(saved.groups[name]) end
end

--- One line for each group.
function GroupedGradScaler:__tostring()
  local lines = {}
  for i, name in ipairs(self.names) do
    lines[i] = ("  %s: %s"):format(name, (tostring(self.groups[name]):gsub("^GradScaler%s+", "")))
  end
  return "GradScaler  groups\n" .. table.concat(lines, "\n")
end

return {new = new, GroupedGradScaler = GroupedGradScaler}
