-- bits.lua -- tensors as the bytes they lie in, and back, by way of a safetensors file that is put together here byte by byte.

local hm = require "halfmoon"
local read = require("spec.support.files").read

local M = {}

local NAMES = {
  float32 = "F32", float16 = "F16", bfloat16 = "BF16", float64 = "F64", int64 = "I64", int32 = "I32", uint8 = "U8", bool = "BOOL",
  float8_e4m3 = "F8_E4M3", float8_e5m2 = "F8_E5M2",
}

--- The bytes of a safetensors file: entries {name, dtype as the file has it, shape, bytes}, in order; extra: JSON to stand before them.
function M.file(entries, extra)
  local head, data, at = {}, {}, 0
  if extra then head[1] = extra end
  for _, e in ipairs(entries) do
    head[#head + 1] = ('"%s":{"dtype":"%s","shape":[%s],"data_offsets":[%d,%d]}'):format(e[1], e[2], table.concat(e[3], ","),
      at, at + #e[4])
    data[#data + 1] = e[4]
    at = at + #e[4]
  end
  local header = "{" .. table.concat(head, ",") .. "}"
  return string.pack("<I8", #header) .. header .. table.concat(data)
end

--- A tensor with the given bytes.
function M.tensor(dtype, shape, bytes)
  local path = os.tmpname()
  local f = assert(io.open(path, "wb"))
  f:write(M.file {{"t", NAMES[dtype], shape, bytes}})
  f:close()
  local state, message = hm.load(path, {device = hm.get_default_device()})
  os.remove(path)
  return assert(state, message).t
end

--- The bytes of a tensor, row-major.
function M.bytes(t)
  local path = os.tmpname()
  assert(hm.save(path, {t = t:detach()}))
  local all = read(path)
  os.remove(path)
  return all:sub(9 + string.unpack("<I8", all))
end

--- The bytes of a tensor as an array of unsigned integers.
function M.patterns(t)
  local bytes = M.bytes(t)
  local size = t:element_size()
  local format, out = "<I" .. size, {}
  for i = 1, #bytes // size do out[i] = string.unpack(format, bytes, (i - 1) * size + 1) end
  return out
end

--- A tensor from an array of unsigned integers.
function M.from_patterns(dtype, list)
  local format = "<I" .. hm.zeros({0}, {dtype = dtype}):element_size()
  local parts = {}
  for i = 1, #list do parts[i] = string.pack(format, list[i]) end
  return M.tensor(dtype, {#list}, table.concat(parts))
end

--- The same, for eight-byte integers that may be negative.
function M.from_words(dtype, list)
  local parts = {}
  for i = 1, #list do parts[i] = string.pack("<i8", list[i]) end
  return M.tensor(dtype, {#list}, table.concat(parts))
end

return M
