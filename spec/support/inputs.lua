-- inputs.lua -- tensors without a pattern, the same in every run, for the specs of layers.

local hm = require "halfmoon"

local M = {}

--- Elements of a tensor of a shape.
---@param shape integer[]
---@return integer
local function count(shape)
  local n = 1
  for _, s in ipairs(shape) do n = n * s end
  return n
end
M.count = count

local function shaped(list, shape, opts)
  if #list == 0 then return hm.zeros(shape, opts) end
  return hm.tensor(list, opts):view(shape)
end

--- A tensor of sines: element i (from 1) is sin(i * 12.9898 + seed * 78.233).
---@param shape integer[]
---@param seed number
---@param opts table? dtype and device
---@return Tensor
function M.filled(shape, seed, opts)
  local list = {}
  for i = 1, count(shape) do list[i] = math.sin(i * 12.9898 + seed * 78.233) end
  return shaped(list, shape, opts)
end

--- Numbers from `from` to below `to`, evenly spread, by a generator of its own.
---@param n integer
---@param seed integer
---@param from number
---@param to number
---@return number[]
function M.spread(n, seed, from, to)
  local list, state = {}, seed * 7919 + 13
  for i = 1, n do
    state = (state * 1103515245 + 12345) % 2147483648
    list[i] = from + state / 2147483648 * (to - from)
  end
  return list
end

--- A tensor of such numbers.
---@param shape integer[]
---@param seed integer
---@param dtype string? float64 unless given
---@param from number
---@param to number
---@return Tensor
function M.sample(shape, seed, dtype, from, to)
  return shaped(M.spread(count(shape), seed, from, to), shape, {dtype = dtype or "f64"})
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
