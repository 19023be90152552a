--- amp/policies/init.lua -- hm.amp.policies: loss-scale policies by name, as tables, or from files.
--
-- A policy is a table:
--     name    string
--     needs   array of extra statistics of the unscaled finite gradients: "amax", "norm", "histogram", "per_param"
--     options names and defaults of its own options (leave it out to take any)
--     min_scale, max_scale  bounds of a scaler made with it, where none are given (1 and 2^24)
--     init    function(opts) -> state, a table of plain numbers and strings; state.scale is the first scale
--     update  function(state, event, opts) -> next scale [, {stop = "why"}]
-- event: found_inf, inf_count, nan_count, step (from 1), scale, and what `needs` asked for:
--     amax, norm  numbers
--     histogram   {[e] = how many lie in [2^e, 2^(e+1)), for each e from -126 to 127 that has any, zeros, subnormals}
--     per_param   {{name, amax, norm, inf_count, nan_count}, ...}
-- The last two take time in each step, and a scaler with async = true does not have them.
--
-- An option that was not given has the policy's default; one that was given must have the default's type.  The policy's
-- init raises for values that make no sense.
--
-- Tables run in the user's Lua state.  Files run in a state of their own with a memory cap and an instruction limit;
-- they see math, table, string.format and the base functions that load nothing; state and events are copied across.
--
-- policies.dynamic is the policy itself, to read or to copy; policies.names() lists what there is.  The scaler uses
-- resolve(), which turns any of the three forms into a runner.

local core = require "halfmoon.core"
local errors = require "halfmoon.errors"

local raise, describe = errors.raise, errors.describe

local policies = {}

local NAMES = {
  "apex", "apex_hysteresis", "auto", "deepspeed", "dynamic", "fairseq", "histogram", "keras", "logmax", "megatron",
  "metaseq", "norm_halving", "search", "static",
}
local NEEDS = {amax = true, norm = true, histogram = true, per_param = true}

-- A file policy may use this much for each call; a rule for a number needs far less.
local MEMORY = 16 * 1024 * 1024
local INSTRUCTIONS = 2 * 1000 * 1000

--- The names of the policies that come with the library.
---@return string[]
function policies.names() return table.move(NAMES, 1, #NAMES, 1, {}) end

-- ====== Checking ======

--- nil if `policy` has the form of a policy, else what is wrong.
local function complaint(policy)
  if type(policy) ~= "table" then return "a policy must be a table, not " .. describe(policy) end
  if type(policy.update) ~= "function" then
    return "a policy needs update = function(state, event, opts) ... return scale end"
  end
  if policy.init ~= nil and type(policy.init) ~= "function" then return "init must be a function" end
  if policy.name ~= nil and type(policy.name) ~= "string" then return "name must be a string" end
  if policy.options ~= nil and type(policy.options) ~= "table" then
    return "options must be a table of names and defaults"
  end
end

--- nil if all statistics are known, else what is wrong.
local function needs_complaint(needs)
  if needs == nil then return end
  if type(needs) ~= "table" then return "needs must be an array of names" end
  for _, name in ipairs(needs) do
    if not NEEDS[name] then
      return ("needs %s, which is not known; known: amax, norm, histogram, per_param"):format(describe(name))
    end
  end
end

--- nil if the bounds are numbers or left out, else what is wrong.
local function bounds_complaint(policy)
  for _, name in ipairs {"min_scale", "max_scale"} do
    if policy[name] ~= nil and type(policy[name]) ~= "number" then return name .. " must be a number" end
  end
end

--- "file.lua:12", where a function was written.
local function written_at(fn)
  local info = debug.getinfo(fn, "S")
  return ("%s:%d"):format(info.short_src, info.linedefined)
end

--- Raises unless what update returned is a scale; where: for the message.
local function checked_scale(name, where, scale)
  if type(scale) ~= "number" then
    error(("%s: policy '%s' returned %s, not a scale"):format(where, name, describe(scale)), 0)
  end
  if not (scale > 0 and scale < math.huge) then
    error(("%s: policy '%s' returned %g; a scale is positive and finite"):format(where, name, scale), 0)
  end
  return scale
end

-- ====== Runners ======

---@class PolicyRunner
---@field name string
---@field kind "table"|"file"
---@field policy table? the policy itself, of a table
---@field needs string[]
---@field options table? names and defaults of the policy's own options; nil: any
---@field min_scale number? bounds of a scaler made with it
---@field max_scale number?
---@field init fun(opts: table): table
---@field update fun(state: table, event: table, opts: table): number, string?, table  next scale, why to stop, state

--- A runner for a policy table.
local function from_table(policy)
  local name = policy.name or "custom"
  local runner = {name = name, kind = "table", policy = policy, needs = policy.needs or {}, options = policy.options}
  runner.min_scale, runner.max_scale = policy.min_scale, policy.max_scale
  function runner.init(opts)
    local state = policy.init and policy.init(opts) or {}
    if type(state) ~= "table" then
      error(("policy '%s': init returned %s, not a table"):format(name, describe(state)), 0)
    end
    return state
  end
  function runner.update(state, event, opts)
    local scale, extra = policy.update(state, event, opts)
    local where = written_at(policy.update)
    checked_scale(name, where, scale)
    if extra ~= nil and (type(extra) ~= "table" or (extra.stop ~= nil and type(extra.stop) ~= "string")) then
      error(('%s: policy \'%s\': the second result must be {stop = "why"}, not %s')
        :format(where, name, describe(extra)), 0)
    end
    return scale, extra and extra.stop, state
  end
  return runner
end

--- A message that begins with the file's name, as those with a line do.
local function located(path, message)
  if message:sub(1, #path) == path then return message end
  return path .. ": " .. message
end

--- A runner for a policy file, or nil and a message with file and line.
local function from_file(path)
  local time = core.mtime(path)
  local file, why = io.open(path, "rb")
  if not file then return nil, ("cannot read the policy file %s"):format(why) end
  local source = file:read("a")
  file:close()
  local box, message = core.sandbox(source, "@" .. path, {memory = MEMORY, instructions = INSTRUCTIONS})
  if not box then return nil, located(path, message) end
  local fields = box:fields()
  local wrong = not fields.has_update and "the file must return a policy with an update function"
    or needs_complaint(fields.needs) or bounds_complaint(fields)
    or (fields.options ~= nil and type(fields.options) ~= "table" and "options must be a table of names and defaults")
  if wrong then return nil, path .. ": " .. wrong end
  local name = fields.name or path:match("([^/]+)%.lua$") or path
  local runner = {name = name, kind = "file", path = path, mtime = time, needs = fields.needs or {}}
  runner.options, runner.min_scale, runner.max_scale = fields.options, fields.min_scale, fields.max_scale
  function runner.init(opts)
    if not fields.has_init then return {} end
    local state, failure = box:init(opts)
    if not state then error(located(path, failure), 0) end
    return state
  end
  function runner.update(state, event, opts)
    local scale, stop, new_state = box:update(state, event, opts)
    if scale == nil then error(located(path, stop or "update returned nil, not a scale"), 0) end
    return checked_scale(name, path, scale), stop, new_state or state
  end
  return runner
end

--- Turns a name, a table or a file path into a runner; raises where that cannot be done.
---@param where string for messages
---@param policy string|table
---@return PolicyRunner
function policies.resolve(where, policy)
  if type(policy) == "string" then
    for _, name in ipairs(NAMES) do
      if policy == name then return from_table(policies[name]) end
    end
    if policy:find("[./\\]") then
      local runner, message = from_file(policy)
      if not runner then raise("%s: %s", where, message) end
      return runner
    end
    local near = errors.closest(policy, NAMES)
    raise("%s: unknown policy '%s'%s\n  known: %s; a table or the path of a file will do too", where, policy,
      near and (", did you mean '%s'?"):format(near) or "", table.concat(NAMES, ", "))
  end
  local wrong = complaint(policy) or needs_complaint(policy.needs) or bounds_complaint(policy)
  if wrong then raise("%s: %s", where, wrong) end
  return from_table(policy)
end

--- Reads a policy file again if it has changed.
---@param runner PolicyRunner
---@return PolicyRunner? new nil: unchanged, or no longer loadable
---@return string? message why it does not load, with file and line
function policies.refresh(runner)
  if runner.kind ~= "file" then return nil end
  local time = core.mtime(runner.path)
  if time == runner.mtime or time == nil then return nil end -- a file that is gone for a moment is being replaced
  local new, message = from_file(runner.path)
  if not new then
    runner.mtime = time -- said once for each version of the file
    return nil, message
  end
  return new
end

return setmetatable(policies, {
  __index = function(self, name)
    for _, known in ipairs(NAMES) do
      if name == known then
        local policy = require("halfmoon.amp.policies." .. name)
        rawset(self, name, policy)
        return policy
      end
    end
  end,
})
