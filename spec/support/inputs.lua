-- inputs.lua -- tensors without a pattern, the same in every run, for the specs of layers.

local hm = require "halfmoon"

local M = {}

--- A tensor of a shape, with numbers between -1 and 1.
---@param shape integer[]
---@param seed number
---@param opts table? dtype and device
---@return Tensor
function M.filled(shape, seed, opts)
  local n = 1
  for _, s in ipairs(shape) do n = n * s end
  local list = {}
  for i = 1, n do list[i] = math.sin(i * 12.9898 + seed * 78.233) end
  return hm.tensor(list, opts):view(shape)
end

--- Names that an iterator of (name, value) gives, in order.
---@return string[]
function M.names_of(iterator)
  local list = {}
  for name in iterator do list[#list + 1] = name end
  return list
end

--- The keys of a table, sorted.
---@param t table
---@return string[]
function M.keys(t)
  local list = {}
  for name in pairs(t) do list[#list + 1] = name end
  table.sort(list)
  return list
end

return M
