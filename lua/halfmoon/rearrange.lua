--- rearrange.lua -- the same entries in another order or shape: movedim swapaxes unflatten unbind roll tile
--- repeat_interleave meshgrid expand_as view_as.

local core = require "halfmoon.core"
local arguments = require "halfmoon.arguments"
local errors = require "halfmoon.errors"
local options = require "halfmoon.options"

local raise, describe = errors.raise, errors.describe
local want_tensor, dim_of, dims_of, whole = arguments.want_tensor, arguments.dim, arguments.dims, arguments.whole

---@class halfmoon
local M = {}

-- ====== Dims ======

--- Dims moved to other places, the rest in their order: a view.
---@param x Tensor
---@param source integer|integer[]
---@param target integer|integer[] where they go
---@return Tensor
function M.movedim(x, source, target)
  want_tensor("movedim", "x", x)
  local from, to = dims_of("movedim", x, source), dims_of("movedim", x, target)
  if #from ~= #to then raise("movedim: %d dims cannot go to %d places", #from, #to) end
  local order, moved = {}, {}
  for i, d in ipairs(from) do order[to[i]], moved[d] = d, true end
  local place = 1
  for d = 1, x:dim() do
    if not moved[d] then
      while order[place] do place = place + 1 end
      order[place] = d
    end
  end
  return #order > 0 and x:permute(order) or x
end

--- Two dims exchanged, as transpose: a view.
---@param x Tensor
---@param dim0 integer
---@param dim1 integer
---@return Tensor
function M.swapaxes(x, dim0, dim1) return core.transpose(x, dim0, dim1) end

--- A dim split into several: a view.  One size may be -1.
---@param x Tensor
---@param dim integer
---@param sizes integer[]
---@return Tensor
function M.unflatten(x, dim, sizes)
  want_tensor("unflatten", "x", x)
  local d = dim_of("unflatten", x, dim)
  if type(sizes) ~= "table" or #sizes == 0 then
    raise("unflatten: the sizes must be an array of numbers, not %s", describe(sizes))
  end
  local known, open = 1, nil
  for i, size in ipairs(sizes) do
    if size == -1 and not open then open = i else known = known * whole("unflatten", "a size", size, 0) end
  end
  local total = x:size(d)
  if open and (known == 0 or total % known ~= 0) or not open and known ~= total then
    raise("unflatten: dim %d of %s has %d entries, which are no %s", d, describe(x), total, arguments.shape_text(sizes))
  end
  local shape = {}
  for i = 1, d - 1 do shape[i] = x:size(i) end
  for i, size in ipairs(sizes) do shape[#shape + 1] = i == open and total // known or size end
  for i = d + 1, x:dim() do shape[#shape + 1] = x:size(i) end
  return x:view(shape)
end

--- The entries along a dim as an array of views, without that dim.
---@param x Tensor
---@param dim integer? default 1
---@return Tensor[]
function M.unbind(x, dim)
  want_tensor("unbind", "x", x)
  local d, list = dim_of("unbind", x, dim or 1), {}
  for i = 1, x:size(d) do list[i] = x:select(d, i) end
  return list
end

--- x expanded to the shape of y.
---@param x Tensor
---@param y Tensor
---@return Tensor
function M.expand_as(x, y)
  want_tensor("expand_as", "y", y)
  return x:expand(y.shape)
end

--- x viewed in the shape of y.
---@param x Tensor
---@param y Tensor
---@return Tensor
function M.view_as(x, y)
  want_tensor("view_as", "y", y)
  return x:view(y.shape)
end

-- ====== Entries ======

--- Numbers given as an array or one after the other.
local function numbers_of(op, name, first, ...)
  local list = type(first) == "table" and first or {first, ...}
  if #list == 0 then raise("%s: %s are missing", op, name) end
  local checked = {}
  for i, value in ipairs(list) do checked[i] = whole(op, name, value) end
  return checked
end

--- Entries moved along dims, those that fall off the end come in at the front.  Without dims x counts as flat.
---@param x Tensor
---@param shifts integer|integer[]
---@param dims integer|integer[]?
---@return Tensor
function M.roll(x, shifts, dims)
  want_tensor("roll", "x", x)
  shifts = numbers_of("roll", "the shifts", shifts)
  if dims == nil then
    if #shifts ~= 1 then raise("roll: %d shifts need as many dims", #shifts) end
    return M.roll(x:reshape(-1), shifts, 1):reshape(x.shape)
  end
  dims = type(dims) == "table" and dims or {dims}
  if #dims ~= #shifts then raise("roll: %d shifts for %d dims", #shifts, #dims) end
  for i, dim in ipairs(dims) do
    local d = dim_of("roll", x, dim)
    local size = x:size(d)
    local shift = size > 0 and shifts[i] % size or 0
    if shift ~= 0 then
      x = core.cat({x:narrow(d, size - shift + 1, shift), x:narrow(d, 1, size - shift)}, d)
    end
  end
  return x
end

--- x repeated along its dims, as often as the numbers say (PyTorch's tile and repeat).  Missing dims count in front.
---@param x Tensor
---@param times integer|integer[]
---@param ... integer
---@return Tensor
function M.tile(x, times, ...)
  want_tensor("tile", "x", x)
  times = numbers_of("tile", "the numbers of repeats", times, ...)
  local dims = math.max(#times, x:dim())
  for _, n in ipairs(times) do
    if n < 0 then raise("tile: a number of repeats must not be negative, came %d", n) end
  end
  if dims > 4 then -- the dims of one tensor are limited: one dim after the other
    for d = 1, dims - x:dim() do x = x:unsqueeze(d) end
    for i, n in ipairs(times) do
      local d, list = dims - #times + i, {}
      for k = 1, n do list[k] = x end
      x = n == 0 and x:narrow(d, 1, 0) or (n > 1 and core.cat(list, d) or x)
    end
    return x
  end
  local split, wide, shape = {}, {}, {}
  for d = 1, dims do
    local own, n = d - dims + x:dim(), times[d - dims + #times] or 1
    local size = own > 0 and x:size(own) or 1
    split[2 * d - 1], split[2 * d] = 1, size
    wide[2 * d - 1], wide[2 * d] = n, size
    shape[d] = n * size
  end
  return x:reshape(split):expand(wide):reshape(shape)
end

--- Each entry along a dim repeated in place; without a dim x counts as flat.
---@param x Tensor
---@param repeats integer|integer[]|Tensor for all entries, or one number for each
---@param dim integer?
---@return Tensor
function M.repeat_interleave(x, repeats, dim)
  local op = "repeat_interleave"
  want_tensor(op, "x", x)
  if dim == nil then x, dim = x:reshape(-1), 1 end
  local d = dim_of(op, x, dim)
  if core.is_tensor(repeats) then
    if repeats:is_floating_point() or repeats:dim() > 1 then
      raise("repeat_interleave: the repeats must be integers [%d], came %s", x:size(d), describe(repeats))
    end
    repeats = repeats:reshape(-1):totable()
  end
  if type(repeats) == "table" and #repeats ~= 1 then
    if #repeats ~= x:size(d) then
      raise("repeat_interleave: %d repeats for the %d entries of dim %d of %s", #repeats, x:size(d), d, describe(x))
    end
    local index = {}
    for i, n in ipairs(repeats) do
      for _ = 1, whole(op, "a number of repeats", n, 0) do index[#index + 1] = i - 1 end
    end
    return x:index_select(d, core.tensor(index, {dtype = "int64", device = x.device}))
  end
  local n = whole(op, "the number of repeats", type(repeats) == "table" and repeats[1] or repeats, 0)
  local shape, wide = x.shape, x.shape
  table.insert(wide, d + 1, n)
  shape[d] = shape[d] * n
  return x:unsqueeze(d + 1):expand(wide):reshape(shape)
end

local meshgrid_spec = {indexing = {"string", "ij", options.one_of("ij", "xy")}}

--- Vectors as grids: the i-th result holds the i-th vector along dim i and repeats it along the others.
---     local rows, columns = table.unpack(hm.meshgrid(hm.arange(3), hm.arange(4)))
---@param ... Tensor the vectors, or an array of them; then {indexing = "ij"|"xy"}, where "xy" exchanges dims 1 and 2
---@return Tensor[]
function M.meshgrid(...)
  local list, opts = {...}, nil
  if #list > 1 and type(list[#list]) == "table" then opts = table.remove(list) end
  if #list == 1 and type(list[1]) == "table" then list = list[1] end
  opts = options.check("meshgrid", opts, meshgrid_spec)
  if #list == 0 then raise("meshgrid: needs vectors, came none") end
  local shape, grids = {}, {}
  for i, t in ipairs(list) do
    want_tensor("meshgrid", "argument " .. i, t)
    if t:dim() > 1 then raise("meshgrid: argument %d must be a vector, came %s", i, describe(t)) end
    shape[i] = t:numel()
  end
  for i, t in ipairs(list) do
    local own = {}
    for d = 1, #list do own[d] = d == i and shape[d] or 1 end
    grids[i] = t:reshape(own):expand(shape)
    if opts.indexing == "xy" and #list > 1 then grids[i] = grids[i]:transpose(1, 2) end
  end
  return grids
end

for name, fn in pairs(M) do
  if name ~= "meshgrid" then core.Tensor[name] = fn end
end

return M
