--- amp/region.lua -- amp.autocast, and what the last region entered was.
--
-- The scope itself is the engine's.  This file notes the dtype of the last region that was entered, so that a scaler
-- can tell that a float32 loss came out of bfloat16.

local core = require "halfmoon.core"
local errors = require "halfmoon.errors"

local autocast = core.autocast

---@class AutocastRegion
---@field low string? long dtype of the last enabled region that was entered, in any coroutine; nil before the first
local region = {}

--- amp.autocast([dtype | {dtype, enabled, cache_enabled, backward, ops}][, fn, ...]): a scope that computes in low
--- precision.
---@param what string|table|function|nil dtype ("f16" by default) or options, or at once the function
---@param ... any a function and its arguments; without one the scope is a guard: local _ <close> = amp.autocast("f16")
---@return any ... what the function returns, or the guard
function region.autocast(what, ...)
  local low = what
  if type(what) == "table" then
    if what.enabled == false then return autocast(what, ...) end
    low = what.dtype
  end
  region.low = errors.long_dtype[low] or "float16"
  return autocast(what, ...)
end

return region
