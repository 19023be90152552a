--- amp/nested.lua -- casts that reach tensors inside tables: arguments and results of functions.
--
-- Arrays and fields are gone into, also nested ones.  Tables of another kind (modules, say), float64 and integer
-- tensors, strings and numbers pass as they are.  Private to amp.

local core = require "halfmoon.core"

local nested = {}

--- Dtypes that casts touch.
nested.dtypes = {float16 = true, bfloat16 = true, float32 = true}

--- Is it a floating tensor, but not a float64 one?
---@param value any
---@return boolean
function nested.eligible(value) return core.is_tensor(value) and nested.dtypes[value.dtype] == true end

--- The value with fn put to every eligible tensor in it.
---@param value any
---@param fn fun(t: Tensor): Tensor
---@return any
function nested.map(value, fn)
  if nested.eligible(value) then return fn(value) end
  if type(value) ~= "table" or getmetatable(value) ~= nil then return value end
  local new = {}
  for k, v in pairs(value) do new[k] = nested.map(v, fn) end
  return new
end

--- The arguments with fn put to every eligible tensor in them.
---@param fn fun(t: Tensor): Tensor
---@return any ...
function nested.map_all(fn, ...)
  local list = table.pack(...)
  for i = 1, list.n do list[i] = nested.map(list[i], fn) end
  return table.unpack(list, 1, list.n)
end

--- The value with every eligible tensor in it in another dtype.
---@param value any
---@param dtype string
---@return any
function nested.cast(value, dtype)
  return nested.map(value, function(t) return t:to(dtype) end)
end

--- The arguments with every eligible tensor in them in another dtype.
---@param dtype string
---@return any ...
function nested.cast_all(dtype, ...)
  return nested.map_all(function(t) return t:to(dtype) end, ...)
end

return nested
