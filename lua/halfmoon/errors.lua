--- errors.lua -- raising errors that point at the user's line and name the module they happened in.
--
-- A message has: what was asked ("conv2d: ..."), what was expected, what came, the module path, and where it helps a
-- hint.  Every file of the library raises programmer mistakes through raise(); the world's refusals (a missing file,
-- say) are returned as nil, message, code instead.

local core = require "halfmoon.core"

local errors = {}

-- Every chunk of the library has a source name that begins like this one's.
local library = debug.getinfo(1, "S").source:match("^(.+)errors") or "\0"

-- Set by nn.class: () -> "Net.fc (Linear 256 -> 10)" or nil.
local path_provider

--- Says where the module path comes from; the C side uses the same function for errors that ops raise.
---@param provider fun(): string?
function errors.set_path_provider(provider)
  path_provider = provider
  core.set_path_provider(provider)
end

--- The level (as seen by the caller of this function) of the first Lua function outside the library.
---@return integer
local function user_level()
  local level = 3
  while true do
    local info = debug.getinfo(level, "S")
    if not info then return 2 end
    if info.what ~= "C" and info.source:sub(1, #library) ~= library then return level - 1 end
    level = level + 1
  end
end

--- Raises a message at the first line outside the library that led here.
---@param message string may contain %-directives for the further arguments
---@param ... any
function errors.raise(message, ...)
  if select("#", ...) > 0 then message = message:format(...) end
  local path = path_provider and path_provider()
  if path then message = message .. "\n  in " .. path end
  error(message, user_level())
end

--- "f16[32,784] on cpu" for a tensor, a type name or short value for anything else.
---@param x any
---@return string
function errors.describe(x)
  if core.is_tensor(x) then
    return string.format("%s[%s] on %s", errors.short_dtype[x.dtype] or x.dtype, table.concat(x.shape, ","), x.device)
  end
  if type(x) == "string" then return string.format("%q", x) end
  if type(x) == "number" or type(x) == "boolean" or x == nil then return tostring(x) end
  local meta = getmetatable(x)
  return type(meta) == "table" and type(meta.__name) == "string" and meta.__name or "a " .. type(x)
end

--- Long dtype name -> short one.
errors.short_dtype = {
  float32 = "f32", float16 = "f16", bfloat16 = "bf16", float64 = "f64",
  int64 = "i64", int32 = "i32", uint8 = "u8", bool = "bool", float8_e4m3 = "f8_e4m3", float8_e5m2 = "f8_e5m2",
}

--- Any dtype name -> the long one.
errors.long_dtype = {}
for long, short in pairs(errors.short_dtype) do
  errors.long_dtype[long], errors.long_dtype[short] = long, long
end
errors.long_dtype.float8_e4m3fn, errors.long_dtype.f8e4m3, errors.long_dtype.f8e5m2 =
  "float8_e4m3", "float8_e4m3", "float8_e5m2"

--- Number of single-letter edits between two words.
---@param a string
---@param b string
---@return integer
function errors.distance(a, b)
  local row = {}
  for j = 0, #b do row[j] = j end
  for i = 1, #a do
    local diagonal = row[0]
    row[0] = i
    for j = 1, #b do
      local substituted = diagonal + (a:byte(i) == b:byte(j) and 0 or 1)
      diagonal = row[j]
      row[j] = math.min(row[j] + 1, row[j - 1] + 1, substituted)
    end
  end
  return row[#b]
end

--- The name closest to a word, or nil when none is near.
---@param word string
---@param names string[]
---@return string? name
---@return integer? edits
function errors.closest(word, names)
  local best, edits
  local lower = word:lower()
  for _, name in ipairs(names) do
    local d = errors.distance(lower, name:lower())
    if name:lower():find(lower, 1, true) or lower:find(name:lower(), 1, true) then d = math.min(d, 2) end
    if not edits or d < edits then best, edits = name, d end
  end
  if best and edits <= math.max(2, #word // 2) then return best, edits end
end

return errors
