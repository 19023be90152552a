--- data/files.lua -- files that data come in: NumPy's arrays, tables of numbers as text, text as bytes.
--
-- Functions raise when a file is missing or damaged.  Writing arrays is hm.save's business.

local core = require "halfmoon.core"
local dataset = require "halfmoon.data.dataset"
local errors = require "halfmoon.errors"
local options = require "halfmoon.options"

local raise, describe = errors.raise, errors.describe

local files = {}

local function check_path(where, path)
  if type(path) ~= "string" then raise("%s: expected a path, not %s", where, describe(path)) end
end

--- What a reader in C returned, or its message raised.
local function got(result, message, ...)
  if result == nil then raise("%s", message) end
  return result, message, ...
end

local function long_dtype(where, name)
  local dtype = errors.long_dtype[name]
  if not dtype then raise("%s: unknown dtype '%s'", where, name) end
  return dtype
end

--- The array of an npy file, row-major.  int8, int16 and uint16 become int32, uint32 and uint64 int64.
---@param path string
---@return Tensor
function files.npy(path)
  check_path("data.npy", path)
  return (got(core.npy_load(path)))
end

--- The arrays of an npz file: name -> tensor.
---@param path string
---@return table<string, Tensor>
function files.npz(path)
  check_path("data.npz", path)
  local arrays = {}
  for _, entry in ipairs(got(core.npz_load(path))) do arrays[entry[1]] = entry[2] end
  return arrays
end

-- ====== Tables as text ======

--- The numbers of the columns that were asked for, by name or by number.
local function numbers_of(path, wanted, names, count)
  local places, columns = {}, {}
  for i, name in ipairs(names or {}) do
    if places[name] == nil then places[name] = i else places[name] = false end
  end
  for i, column in ipairs(wanted) do
    local number = math.tointeger(column)
    if type(column) == "string" then
      number = places[column]
      if number == false then raise("data.csv: %s: the name '%s' is there twice: choose by number", path, column) end
      if not number then
        local near = names and errors.closest(column, names)
        raise("data.csv: %s: there is no column '%s'%s", path, column, not names and ": the file has no header"
          or near and (", did you mean '%s'?"):format(near) or "")
      end
    elseif not number or number < 1 or number > count then
      raise("data.csv: %s: a column is a name or a number from 1 to %d, not %s", path, count, describe(column))
    end
    columns[i] = number
  end
  return columns
end

local csv_spec = {
  header = {"boolean"},
  delimiter = {"string", ",", function(value) if #value ~= 1 then return "must be one character" end end},
  dtype = {"string", "float32"},
  columns = {"table"},
}

--- A table of numbers as a tensor [rows, columns], and the columns' names where the file has them.
--- header: does the first line have names?  By default it has if one of its fields is not a number.  columns: which ones,
--- by name or number (from 1), in the order wanted.  Fields may stand in quotes; an empty one is NaN, and an error in
--- integer dtypes.
---@param path string
---@param opts {header: boolean, delimiter: string, dtype: string, columns: (string|integer)[]}?
---@return Tensor
---@return string[]? names of the columns in the tensor
function files.csv(path, opts)
  check_path("data.csv", path)
  opts = options.check("data.csv", opts, csv_spec)
  local dtype = long_dtype("data.csv", opts.dtype)
  local source <close> = got(core.csv_open(path, opts.delimiter, opts.header))
  local names, count = source:names()
  local columns = {}
  for i = 1, count do columns[i] = i end
  if opts.columns then columns = numbers_of(path, opts.columns, names, count) end
  local table_ = got(source:read(columns, dtype))
  local chosen = names and {}
  for i, column in ipairs(names and columns or {}) do chosen[i] = names[column] end
  return table_, chosen
end

-- ====== Text as bytes ======

--- The bytes of a file as a tensor: u8, or another dtype.
---@param path string
---@param opts {dtype: string}?
---@return Tensor
function files.text(path, opts)
  check_path("data.text", path)
  opts = options.check("data.text", opts, {dtype = {"string", "uint8"}})
  local dtype = long_dtype("data.text", opts.dtype)
  local bytes = got(core.bytes(path))
  return dtype == "uint8" and bytes or bytes:to(dtype)
end

local text_spec = {
  context = {"integer", nil, options.at_least(1)},
  stride = {"integer", nil, options.at_least(1)},
  dtype = {"string", "int64"},
}

--- Windows on a long row of ids: windows of `context` elements, one every `stride`, from `offset` on.
local function windows(ids, count, context, stride, offset)
  if stride == context then return ids:narrow(1, 1 + offset, count * context):view(count, context) end
  local here = {device = ids.device}
  local starts = core.arange(count, here):mul(stride):add(offset):unsqueeze(2)
  return ids:index_select(1, starts:add(core.arange(context, here)):flatten()):view(count, context)
end

--- data.Text{path or tensor of ids, context = 256}: a data set of windows on a text.  Example i is `context` ids and the
--- ids that follow each of them: x and y [n, context], for language models.  The ids of a file are its bytes, 0 to 255.
--- Options: stride = context (a smaller one lets windows overlap, which copies them), dtype = "int64".
---@param given table the source at [1], and options
---@return Dataset
function files.Text(given)
  if type(given) ~= "table" then raise("data.Text: expected a table, not %s", describe(given)) end
  local source, opts = given[1], {}
  for name, value in pairs(given) do
    if name ~= 1 then opts[name] = value end
  end
  opts = options.check("data.Text", opts, text_spec)
  local context = opts.context
  if not context then raise("data.Text: the option 'context' is missing: data.Text{path, context = 256}") end
  local dtype = long_dtype("data.Text", opts.dtype)
  local ids = source
  if type(source) == "string" then
    ids = files.text(source, {dtype = dtype})
  elseif not core.is_tensor(source) or source:dim() ~= 1 then
    raise("data.Text: expected a path or a tensor with one dim, not %s", describe(source))
  end
  ids = ids:to(dtype):contiguous()
  local stride = opts.stride or context
  local count = (ids:size(1) - 1 - context) // stride + 1
  if count < 1 then
    raise("data.Text: %d ids are too few: a window of %d and the id behind it were expected", ids:size(1), context)
  end
  return dataset.TensorDataset(windows(ids, count, context, stride, 0), windows(ids, count, context, stride, 1))
end

return files
