--- data/loader.lua -- DataLoader: batches of a data set, shuffled by seed, gathered ahead by a thread in C.
--
--     local loader = data.DataLoader{dataset, batch_size = 128, shuffle = true, seed = 1, normalize = {mean = 0.286,
--     std = 0.353}} for x, y in loader:batches() do ... end
--
-- Each call of batches() is the next epoch; the order of an epoch depends on (seed, epoch) alone.  The iterator is one
-- function: `break` is safe, and the thread stops when the loader is closed or collected.

local core = require "halfmoon.core"
local errors = require "halfmoon.errors"
local options = require "halfmoon.options"

local raise, describe = errors.raise, errors.describe

---@class DataLoader
---@field epoch integer epochs begun so far
---@field batch_size integer
local DataLoader = {}
DataLoader.__index = DataLoader
DataLoader.__name = "DataLoader"

local spec = {
  dataset = {"table"},
  batch_size = {"integer", 32, options.at_least(1)},
  shuffle = {"boolean", false},
  seed = {"integer", 0},
  drop_last = {"boolean", false},
  prefetch = {"integer", 2, options.at_least(0)},
  dtype = {"string"},
  normalize = {"table"},
  transforms = {"table|function"},
}

--- The tensors of a data set: a Dataset, or an array of tensors.
local function tensors_of(source)
  if source == nil then raise("DataLoader: the data set is missing: data.DataLoader{dataset, batch_size = 32}") end
  local tensors = source.tensors or source
  if type(tensors) ~= "table" or not core.is_tensor(tensors[1]) then
    raise("DataLoader: expected a data set or an array of tensors, not %s", describe(source))
  end
  local list = {}
  for i, t in ipairs(tensors) do
    if not core.is_tensor(t) then raise("DataLoader: entry %d of the data set is %s, not a tensor", i, describe(t)) end
    if t:dim() == 0 or t:size(1) ~= tensors[1]:size(1) then
      raise("DataLoader: the number of rows differs: %s and %s", describe(tensors[1]), describe(t))
    end
    list[i] = t:detach():contiguous()
  end
  return list
end

--- dtype, scale and shift that turn the first tensor into what the options ask for: x * scale + shift.
local function conversion(first, opts)
  local dtype = opts.dtype and errors.long_dtype[opts.dtype]
  if opts.dtype and not dtype then raise("DataLoader: unknown dtype '%s'", opts.dtype) end
  local normalize = opts.normalize
  if not normalize then return dtype, nil, nil end
  normalize = options.check("DataLoader: normalize", normalize, {
    mean = {"number", 0.0}, std = {"number", 1.0, options.above(0)},
  })
  local unit = first.dtype == "uint8" and 255 or 1 -- images in bytes are read as 0 to 1
  return dtype or "float32", 1 / (unit * normalize.std), -normalize.mean / normalize.std
end

--- data.DataLoader{dataset, batch_size = 32, shuffle = false, ...}: batches of a data set, by loader:batches().
--- Options: seed = 0, drop_last = false, prefetch = 2 (batches gathered ahead), dtype, normalize, transforms.
--- normalize = {mean =, std =} makes float32 of the first tensor: bytes become 0 to 1, then (x - mean) / std.
--- transforms: a function of a batch's tensors that returns them changed, or an array of such functions.
---@param given table the data set at [1] or as `dataset`, and options; or the data set alone
---@param opts table? options, where the first argument is the data set
---@return DataLoader
local function new(given, opts)
  if type(given) ~= "table" then raise("DataLoader: expected a table, not %s", describe(given)) end
  local source = given
  if opts == nil and not given.tensors then -- one table: what stands at positions is the data, the rest options
    local positional = {}
    opts = {}
    for name, value in pairs(given) do
      if math.type(name) == "integer" then positional[name] = value else opts[name] = value end
    end
    source = positional[1]
    if core.is_tensor(source) then source = positional end
  end
  opts = options.check("DataLoader", opts, spec)
  if source == nil then source = opts.dataset end
  local tensors = tensors_of(source)
  local transforms = opts.transforms or {}
  if type(transforms) == "function" then transforms = {transforms} end
  for i, fn in ipairs(transforms) do
    if type(fn) ~= "function" then raise("DataLoader: transforms[%d] is %s, not a function", i, describe(fn)) end
  end
  local dtype, scale, shift = conversion(tensors[1], opts)
  return setmetatable({
    core = core.loader_new(tensors, {
      batch_size = opts.batch_size, drop_last = opts.drop_last, shuffle = opts.shuffle, seed = opts.seed,
      prefetch = opts.prefetch,
      dtype = dtype, scale = scale, shift = shift,
    }),
    examples = tensors[1]:size(1), batch_size = opts.batch_size, transforms = transforms, epoch = 0,
  }, DataLoader)
end

--- Passes a batch through the transforms, one after the other.
local function transformed(transforms, ...)
  if (...) == nil then return nil end
  local batch = table.pack(...)
  for _, fn in ipairs(transforms) do
    local results = table.pack(fn(table.unpack(batch, 1, batch.n)))
    for i = 1, results.n do batch[i] = results[i] end
  end
  return table.unpack(batch, 1, batch.n)
end

--- Begins the next epoch and gives its batches: for x, y in loader:batches() do.
---@return fun(): Tensor, Tensor, ...
function DataLoader:batches()
  self.epoch = self.epoch + 1
  local loader, transforms = self.core, self.transforms
  loader:start(self.epoch)
  if #transforms == 0 then
    return function() return loader:next() end
  end
  return function() return transformed(transforms, loader:next()) end
end

--- The number of batches in an epoch.
---@return integer
function DataLoader:size() return self.core:batches() end

function DataLoader:__len() return self.core:batches() end

--- Stops the thread.  Happens by itself when the loader is collected.
function DataLoader:close() self.core:close() end

DataLoader.__close = DataLoader.close

function DataLoader:__tostring()
  return ("DataLoader(%d examples in %d batches of %d, %d epochs begun)"):format(self.examples, self:size(),
    self.batch_size, self.epoch)
end

return {DataLoader = new}
