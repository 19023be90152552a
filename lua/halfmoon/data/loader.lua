--- data/loader.lua -- DataLoader: batches of a data set, shuffled by seed, gathered ahead by a thread in C.
--
--     local loader = data.DataLoader{dataset, batch_size = 128, shuffle = true, seed = 1, device = "cuda",
--                                    normalize = {mean = 0.286, std = 0.353}}
--     for x, y in loader:batches() do ... end
--
-- Each call of batches() is the next epoch; the order of an epoch depends on (seed, epoch) alone.  The iterator is one
-- function: `break` is safe, and the thread stops when the loader is closed or collected.
--
-- state_dict() tells the place in the data: finished epochs, and batches of the present one that were handed out.  After
-- load_state_dict() the next batches() goes on behind those.  So the same loop serves a fresh run and one that goes on:
--     for epoch = loader.epoch + 1, 10 do
--       for x, y in loader:batches() do ... hm.save(path, run) end
--     end
-- A loop that is left by `break` has not finished its epoch; loader:end_epoch() says that it shall count as finished.
--
-- With device = "cuda" the thread gathers into pinned memory, and each batch is copied to the GPU while the GPU works
-- on the one before: the loop does not wait for the copies.  It waits only when the GPU is more than `prefetch` batches
-- behind.  The same seed gives the same batches on every device.

local core = require "halfmoon.core"
local errors = require "halfmoon.errors"
local options = require "halfmoon.options"

local raise, describe = errors.raise, errors.describe

---@class DataLoader
---@field epoch integer epochs begun so far; after load_state_dict, until the next batches(), those finished
---@field batch_size integer
---@field device string where batches are delivered
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
  device = {"string", "cpu"},
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
    if t.device ~= "cpu" then
      raise("DataLoader: entry %d of the data set must be on the cpu, where batches are gathered, it is %s\n"
        .. "  hint: give it :cpu(), and say with device = \"%s\" where batches go", i, describe(t), t.device)
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
--- Options: seed = 0, drop_last = false, prefetch = 2 (batches gathered ahead), dtype, device, normalize, transforms.
--- device = "cuda" or "cuda:0": batches arrive there, through pinned memory, without the loop waiting for them.
--- normalize = {mean =, std =} makes float32 of the first tensor: bytes become 0 to 1, then (x - mean) / std.
--- transforms: a function of a batch's tensors (on the device) that returns them changed, or an array of such
--- functions.
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
  local device = opts.device == "cuda" and "cuda:0" or opts.device
  return setmetatable({
    core = core.loader_new(tensors, {
      batch_size = opts.batch_size, drop_last = opts.drop_last, shuffle = opts.shuffle, seed = opts.seed,
      prefetch = opts.prefetch,
      dtype = dtype, scale = scale, shift = shift, device = device,
    }),
    examples = tensors[1]:size(1), batch_size = opts.batch_size, device = device, transforms = transforms,
    shuffle = opts.shuffle, seed = opts.seed, drop_last = opts.drop_last,
    epoch = 0,
    skip = 0,   -- batches that the next batches() passes over
    done = nil, -- batches handed out of the present epoch; nil between epochs
  }, DataLoader)
end

--- Passes a batch through the transforms, one after the other.
local function transformed(transforms, ...)
  if #transforms == 0 then return ... end
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
  local first = self.skip
  self.core:start(self.epoch + 1, first)
  self.epoch, self.skip, self.done = self.epoch + 1, 0, first
  local epoch = self.epoch
  local function count(batch, ...)
    if self.epoch == epoch then self.done = batch ~= nil and self.done and self.done + 1 or nil end
    if batch == nil then return nil end
    return transformed(self.transforms, batch, ...)
  end
  return function() return count(self.core:next()) end
end

--- Counts the present epoch as finished, for loops that were left by break.
function DataLoader:end_epoch() self.done, self.skip = nil, 0 end

--- The place in the data, for checkpoints: {epoch = epochs finished, batch = batches handed out of the one after them,
--- and what decides the order}.
---@return table
function DataLoader:state_dict()
  local inside = self.done ~= nil
  return {
    epoch = inside and self.epoch - 1 or self.epoch, batch = inside and self.done or self.skip,
    examples = self.examples, batch_size = self.batch_size, shuffle = self.shuffle, seed = self.seed,
    drop_last = self.drop_last,
  }
end

--- Goes to a place that state_dict() told: the next batches() goes on there.  The loader must have the same examples,
--- batch_size and order, unless the place is the beginning of an epoch.
---@param state table
function DataLoader:load_state_dict(state)
  local where = "DataLoader:load_state_dict"
  if type(state) ~= "table" or math.type(state.epoch) ~= "integer" or math.type(state.batch) ~= "integer"
    or state.epoch < 0 or state.batch < 0 then
    raise("%s: expected a table made by state_dict()", where)
  end
  for _, name in ipairs(state.batch > 0 and {"examples", "batch_size", "shuffle", "seed", "drop_last"} or {}) do
    if state[name] ~= self[name] then
      raise("%s: the place is in the middle of an epoch, where %s must be as it was: it was %s, the loader has %s", where,
        name, tostring(state[name]), tostring(self[name]))
    end
  end
  if state.batch > self:size() then
    raise("%s: an epoch has %d batches, the place is behind %d", where, self:size(), state.batch)
  end
  self.epoch, self.skip, self.done = state.epoch, state.batch, nil
end

--- The number of batches in an epoch.
---@return integer
function DataLoader:size() return self.core:batches() end

function DataLoader:__len() return self.core:batches() end

--- Stops the thread and gives pinned memory back.  Happens by itself when the loader is collected.
function DataLoader:close() self.core:close() end

DataLoader.__close = DataLoader.close

function DataLoader:__tostring()
  return ("DataLoader(%d examples in %d batches of %d, %d epochs begun)"):format(self.examples, self:size(),
    self.batch_size, self.epoch)
end

return {DataLoader = new}
