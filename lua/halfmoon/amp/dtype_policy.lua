--- amp/dtype_policy.lua -- dtype policies by Keras's names: mixed_float16, mixed_bfloat16, float32, ...
--
--     amp.set_global_policy "mixed_float16"     -- modules made from here on
--     local model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
--     amp.set_policy(model[3], "float32")       -- one layer otherwise
--
-- A policy has a compute dtype and a variable dtype.  A module with a policy keeps its parameters in the variable
-- dtype; when it is called, floating arguments (not float64 ones) are cast to the compute dtype, and its forward runs
-- under amp.autocast of that dtype, or with autocast off where it is float32 or float64.  So a mixed policy follows the
-- op table: softmax, norms and losses inside still compute in float32.  Results have the dtype that forward gave them;
-- let the last layer be float32 to have float32 at the end.
--
-- The global policy counts for modules made while it is in force, each of which keeps it; modules made before, and
-- those whose class name ends in Loss, stay without one.  A float16 policy needs a loss scale: amp.GradScaler or
-- amp.LossScaleOptimizer.

local core = require "halfmoon.core"
local class = require "halfmoon.nn.class"
local nested = require "halfmoon.amp.nested"
local errors = require "halfmoon.errors"

local raise, describe = errors.raise, errors.describe

---@class DtypePolicy
---@field name string
---@field compute_dtype string long dtype name
---@field variable_dtype string long dtype name
local Policy = {__name = "DtypePolicy"}
Policy.__index = Policy
Policy.__tostring = function(self)
  return ("DtypePolicy(%s: computes in %s, variables %s)"):format(self.name, self.compute_dtype, self.variable_dtype)
end

local MIXED = {mixed_float16 = "float16", mixed_bfloat16 = "bfloat16"}
local PLAIN = {float16 = true, bfloat16 = true, float32 = true, float64 = true}

--- amp.Policy(name): a dtype policy: mixed_float16, mixed_bfloat16, or a floating dtype for both computing and
--- variables.
---@param name string|DtypePolicy
---@return DtypePolicy
local function make(name)
  if getmetatable(name) == Policy then return name end
  local compute = MIXED[name]
  local plain = errors.long_dtype[name]
  if not compute and not PLAIN[plain] then
    raise("Policy: unknown dtype policy %s\n  known: mixed_float16, mixed_bfloat16, float16, bfloat16, float32, "
      .. "float64",
      describe(name))
  end
  return setmetatable({
    name = compute and name or plain, compute_dtype = compute or plain, variable_dtype = compute and "float32" or plain,
  }, Policy)
end

local STANDARD = make "float32"
local global = STANDARD ---@type DtypePolicy

-- ====== Modules ======

--- forward of a module with a policy, around that of its class.
local function forward(self, ...)
  local dtype = self._policy.compute_dtype
  local inner = getmetatable(self).__index.forward
  if dtype == "float16" or dtype == "bfloat16" then
    return core.autocast(dtype, inner, self, nested.cast_all(dtype, ...))
  end
  return core.autocast({enabled = false}, inner, self, nested.cast_all(dtype, ...))
end

--- Gives one module a policy: its forward and the parameters it holds itself.  made: old tensor -> new one, so that
--- shared parameters stay shared.
local function give(module, policy, made)
  for name, value, kind in module:fields() do
    local wide = kind == "buffer" and module._wide_buffers
    if kind ~= "module" and not wide and PLAIN[value.dtype] and value.dtype ~= policy.variable_dtype then
      if not made[value] then
        local new = value:detach():to(policy.variable_dtype)
        made[value] = kind == "parameter" and class.Parameter(new, value.requires_grad) or new
      end
      module[name] = made[value]
    end
  end
  rawset(module, "_policy", policy)
  rawset(module, "forward", forward)
end

--- Gives a module, and all below it, a dtype policy.  Parameters whose dtype changes are replaced, so make optimizers
--- afterwards.
---@param module Module
---@param name string|DtypePolicy
---@return Module module
local function set_policy(module, name)
  if not class.is_module(module) then raise("set_policy: expected a module, came %s", describe(module)) end
  local policy, made = make(name), {}
  for _, below in module:named_modules() do
    if not below.__class:find("Loss$") then give(below, policy, made) end
  end
  return module
end

--- The policy of a module; nil for one without.
---@param module Module
---@return DtypePolicy?
local function get_policy(module)
  if not class.is_module(module) then raise("get_policy: expected a module, came %s", describe(module)) end
  return rawget(module, "_policy")
end

--- Sets the dtype policy that modules get when they are made.  "float32", the standard, gives none.
---@param name string|DtypePolicy
local function set_global_policy(name)
  global = make(name)
  local policy = global
  class.set_on_created(policy.name ~= "float32" and function(module)
    if not module.__class:find("Loss$") and not rawget(module, "_policy") then give(module, policy, {}) end
  end or nil)
end

--- The dtype policy that modules get when they are made.
---@return DtypePolicy
local function global_policy() return global end

return {
  Policy = make, set_policy = set_policy, get_policy = get_policy, set_global_policy = set_global_policy,
  global_policy = global_policy,
}
