--- indexing.lua -- reading and writing by ids and masks: index_put index_copy masked_select nonzero argsort one_hot,
--- and the in-place forms of scatter, scatter_add, index_add, tril, triu.
--
-- Ids count from 0, dims from 1.  An in-place form computes the result and copies it into its tensor.

local core = require "halfmoon.core"
local arguments = require "halfmoon.arguments"
local errors = require "halfmoon.errors"
local options = require "halfmoon.options"

local raise, describe = errors.raise, errors.describe
local want_tensor, dim_of = arguments.want_tensor, arguments.dim

---@class halfmoon
local M = {}

-- ====== By ids ======

--- Shape that tensors broadcast to, or nil.
local function broadcast(list)
  local shape = {}
  for _, t in ipairs(list) do
    local own = t.shape
    for i = 1, math.max(#own, #shape) do -- from the end
      local a, b = shape[i] or 1, own[#own - i + 1] or 1
      if a ~= b and a ~= 1 and b ~= 1 then return nil end
      shape[i] = a == 1 and b or a
    end
  end
  local turned = {}
  for i = 1, #shape do turned[i] = shape[#shape - i + 1] end
  return turned
end

--- Raises for ids that are not within [0, size).
local function check_ids(x, index, dim)
  if index:numel() == 0 then return end
  local low, high = index:min():item(), index:max():item()
  if low < 0 or high >= x:size(dim) then
    raise("index_put: index %d is outside of [0, %d) (dim %d of %s)\n  hint: ids count from 0", low < 0 and low or high,
      x:size(dim), dim, describe(x))
  end
end

--- The index tensors of index_put as one list of places in the flattened first dims; also the shape they have together.
local function flat_places(x, indices)
  if core.is_tensor(indices) then indices = {indices} end
  if type(indices) ~= "table" or #indices == 0 then
    raise("index_put: the indices must be an array of integer tensors, not %s", describe(indices))
  end
  if #indices > x:dim() then raise("index_put: %d indices for the dims of %s", #indices, describe(x)) end
  for i, index in ipairs(indices) do
    want_tensor("index_put", "index " .. i, index)
    if index.dtype == "bool" then
      raise("index_put: index %d must hold ids as integers, came a mask, %s\n"
        .. "  hint: masked_fill and where take masks, mask:nonzero() gives ids", i, describe(index))
    elseif index:is_floating_point() then
      raise("index_put: index %d must hold ids as integers, came %s\n  hint: index:long()", i, describe(index))
    end
    if index.device == "cpu" then check_ids(x, index, i) end
  end
  local shape = broadcast(indices)
  if not shape then
    local texts = {}
    for i, index in ipairs(indices) do texts[i] = describe(index) end
    raise("index_put: the indices do not broadcast together: %s", table.concat(texts, ", "))
  end
  local places = indices[1]:long()
  for i = 2, #indices do places = places * x:size(i) + indices[i]:long() end
  if places.device ~= "cpu" then -- nobody waits for the ids: a wrong one becomes a place that the op refuses
    for i, index in ipairs(indices) do
      places = places:masked_fill(index:lt(0):logical_or(index:ge(x:size(i))), -1)
    end
  end
  return places:expand(shape):reshape(-1), shape, #indices
end

local put_spec = {accumulate = {"boolean", false}}

--- x with values written at ids: x[indices[1]][indices[2]]... = values, with accumulate added.  The indices broadcast
--- together, values to what they select; of several values for one place the last stays.
---@param x Tensor
---@param indices Tensor[] ids from 0, for the first dims of x
---@param values Tensor|number
---@param accumulate boolean|table? default false; {accumulate =} too
---@return Tensor
function M.index_put(x, indices, values, accumulate)
  want_tensor("index_put", "x", x)
  if type(accumulate) == "table" then accumulate = options.check("index_put", accumulate, put_spec).accumulate end
  local places, picked, used = flat_places(x, indices)
  local rows, rest = 1, 1
  for d = 1, used do rows = rows * x:size(d) end
  for d = used + 1, x:dim() do
    rest = rest * x:size(d)
    picked[#picked + 1] = x:size(d)
  end
  if not core.is_tensor(values) then
    if type(values) ~= "number" then
      raise("index_put: values must be a tensor or a number, not %s", describe(values))
    end
    values = core.full({}, values, {dtype = x.dtype, device = x.device})
  end
  if not pcall(values.expand, values, picked) then
    raise("index_put: values must broadcast to %s, what the indices select of %s, came %s",
      arguments.shape_text(picked),
      describe(x), describe(values))
  end
  local shape = x.shape
  local source = values:expand(picked):reshape(places:numel(), rest)
  local flat = x:reshape(rows, rest)
  if accumulate then return flat:index_add(1, places, source):reshape(shape) end
  return flat:scatter(1, places:unsqueeze(2):expand(places:numel(), rest), source):reshape(shape)
end

--- x with the entries of src along a dim written at index [n].
---@param x Tensor
---@param dim integer
---@param index Tensor ids from 0
---@param src Tensor
---@return Tensor
function M.index_copy(x, dim, index, src)
  local op = "index_copy"
  want_tensor(op, "x", x)
  arguments.want_dims(op, "index", index, 1, "a list of ids [n]")
  want_tensor(op, "src", src)
  local d = dim_of(op, x, dim)
  local shape, wide = x.shape, {}
  shape[d] = index:size(1)
  if not arguments.same_shape(src, {shape = shape}) then
    raise("index_copy: src must be %s: one entry along dim %d for each id, came %s", arguments.shape_text(shape), d,
      describe(src))
  end
  for i = 1, #shape do wide[i] = i == d and shape[d] or 1 end
  return x:scatter(d, index:reshape(wide):expand(shape), src)
end

--- x with a number written at index [n] along a dim.
---@param x Tensor
---@param dim integer
---@param index Tensor ids from 0
---@param value number
---@return Tensor
function M.index_fill(x, dim, index, value)
  local op = "index_fill"
  want_tensor(op, "x", x)
  arguments.want_dims(op, "index", index, 1, "a list of ids [n]")
  local d = dim_of(op, x, dim)
  local shape, wide = x.shape, {}
  shape[d] = index:size(1)
  for i = 1, #shape do wide[i] = i == d and shape[d] or 1 end
  return x:scatter(d, index:reshape(wide):expand(shape), value)
end

--- 1 at each id and 0 elsewhere, in a new last dim of num_classes (the largest id + 1 when left out); int64.
---@param index Tensor integers
---@param num_classes integer?
---@return Tensor
function M.one_hot(index, num_classes)
  want_tensor("one_hot", "index", index)
  if num_classes == nil or num_classes == -1 then
    if index:numel() == 0 then raise("one_hot: an empty index needs the number of classes, e.g. one_hot(index, 10)") end
    if index:is_floating_point() then raise("one_hot: index must hold ids as integers, came %s", describe(index)) end
    num_classes = math.tointeger(index:long():max():item()) + 1
  end
  return (core.call("one_hot", index, {num_classes = num_classes}))
end

--- 0-based places of the entries in their order along a dim; equal ones keep their order.
---@param x Tensor
---@param dim integer? default -1
---@param descending boolean? default false
---@return Tensor
function M.argsort(x, dim, descending)
  local _, index = core.sort(x, dim, descending)
  return index
end

-- ====== By masks ======

--- Flat places of the true entries of a mask.
local function places_of(mask)
  local flat = mask:reshape(-1)
  local n, count = flat:numel(), 0
  if n > 0 then count = flat:sum():item() end
  local counting = core.arange(n, {device = mask.device})
  if count == n then return counting end
  -- Each true entry writes its place at its number; the others write behind the last one.
  local number = core.where(flat, flat:cumsum(1) - 1, count)
  return core.zeros({count + 1}, {dtype = "int64", device = mask.device}):scatter(1, number, counting):narrow(1, 1,
    count)
end

--- The entries where a mask holds, as a vector.
---@param x Tensor
---@param mask Tensor bool; broadcasts with x
---@return Tensor
function M.masked_select(x, mask)
  want_tensor("masked_select", "x", x)
  want_tensor("masked_select", "mask", mask)
  if mask.dtype ~= "bool" then
    raise("masked_select: the mask must be bool, came %s\n  hint: x:gt(0)", describe(mask))
  end
  local shape = broadcast {x, mask}
  if not shape then
    raise("masked_select: x and mask do not broadcast together: %s, %s", describe(x), describe(mask))
  end
  return x:expand(shape):reshape(-1):index_select(1, places_of(mask:expand(shape)))
end

--- Places of the entries that are not zero: [n, dims], ids from 0.
---@param x Tensor
---@return Tensor
function M.nonzero(x)
  want_tensor("nonzero", "x", x)
  local places = places_of(x.dtype == "bool" and x or x:ne(0))
  local columns = {}
  for d = x:dim(), 1, -1 do
    local size = x:size(d)
    table.insert(columns, 1, size > 0 and places % size or places)
    places = size > 0 and places // size or places
  end
  if #columns == 0 then return core.zeros({places:numel(), 0}, {dtype = "int64", device = x.device}) end
  return core.stack(columns, 2)
end

-- ====== In place ======

--- x:index_put(indices, values, accumulate), written into x.
---@param x Tensor
---@param indices Tensor[] ids from 0, for the first dims of x
---@param values Tensor|number
---@param accumulate boolean|table? default false; {accumulate =} too
---@return Tensor x
function M.index_put_(x, indices, values, accumulate) return x:copy_(M.index_put(x, indices, values, accumulate)) end

--- x:index_copy(dim, index, src), written into x.
---@param x Tensor
---@param dim integer
---@param index Tensor
---@param src Tensor
---@return Tensor x
function M.index_copy_(x, dim, index, src) return x:copy_(M.index_copy(x, dim, index, src)) end

--- x:index_fill(dim, index, value), written into x.
---@param x Tensor
---@param dim integer
---@param index Tensor
---@param value number
---@return Tensor x
function M.index_fill_(x, dim, index, value) return x:copy_(M.index_fill(x, dim, index, value)) end

--- x:index_add(dim, index, src), written into x.
---@param x Tensor
---@param dim integer
---@param index Tensor
---@param src Tensor
---@return Tensor x
function M.index_add_(x, dim, index, src) return x:copy_(core.index_add(x, dim, index, src)) end

--- x:scatter(dim, index, src), written into x.
---@param x Tensor
---@param dim integer
---@param index Tensor
---@param src Tensor|number
---@return Tensor x
function M.scatter_(x, dim, index, src) return x:copy_(core.scatter(x, dim, index, src)) end

--- x:scatter_add(dim, index, src), written into x.
---@param x Tensor
---@param dim integer
---@param index Tensor
---@param src Tensor
---@return Tensor x
function M.scatter_add_(x, dim, index, src) return x:copy_(core.scatter_add(x, dim, index, src)) end

--- x:tril(diagonal), written into x.
---@param x Tensor
---@param diagonal integer? default 0
---@return Tensor x
function M.tril_(x, diagonal) return x:copy_(core.tril(x, diagonal)) end

--- x:triu(diagonal), written into x.
---@param x Tensor
---@param diagonal integer? default 0
---@return Tensor x
function M.triu_(x, diagonal) return x:copy_(core.triu(x, diagonal)) end

for name, fn in pairs(M) do core.Tensor[name] = fn end

return M
