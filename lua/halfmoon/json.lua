--- json.lua -- plain Lua data as JSON text and back, for checkpoint metadata.
--
-- Tables with the keys 1..n become arrays, tables with string keys objects; other tables become {"$pairs": [[key,
-- value], ...]}.  Integers stay integers, floats keep their bits (%.17g); inf and nan become {"$number": "inf"}.
-- Decoding executes nothing, and refuses what is not JSON with a message.

local json = {}

local DEPTH = 100 -- of nesting

-- ====== Encoding ======

local escapes = {['"'] = '\\"', ["\\"] = "\\\\", ["\n"] = "\\n", ["\r"] = "\\r", ["\t"] = "\\t"}

local function quote(text)
  return '"' .. text:gsub('[%c"\\]', function(c) return escapes[c] or ("\\u%04x"):format(c:byte()) end) .. '"'
end

local function number(x)
  if math.type(x) == "integer" then return ("%d"):format(x) end
  if x ~= x or x == math.huge or x == -math.huge then
    return ('{"$number": "%s"}'):format(x ~= x and "nan" or x > 0 and "inf" or "-inf")
  end
  local text = ("%.17g"):format(x)
  return text:find("[.e]") and text or text .. ".0"
end

local encode

--- The kind of a table: "array", "object" or "pairs".
local function kind_of(t)
  local count, strings = 0, true
  for key in pairs(t) do
    count = count + 1
    if type(key) ~= "string" then strings = false end
  end
  if count == #t then return "array" end -- also the empty table
  return strings and "object" or "pairs"
end

local function encode_table(t, depth)
  if depth > DEPTH then error("tables are nested too deeply", 0) end
  local kind, parts = kind_of(t), {}
  if kind == "array" then
    for i, value in ipairs(t) do parts[i] = encode(value, depth) end
    return "[" .. table.concat(parts, ", ") .. "]"
  end
  local keys = {}
  for key in pairs(t) do keys[#keys + 1] = key end
  table.sort(keys, function(a, b)
    if type(a) == type(b) and type(a) ~= "boolean" then return a < b end
    return type(a) < type(b)
  end)
  for i, key in ipairs(keys) do
    if kind == "object" then
      parts[i] = quote(key) .. ": " .. encode(t[key], depth)
    else
      parts[i] = "[" .. encode(key, depth) .. ", " .. encode(t[key], depth) .. "]"
    end
  end
  if kind == "object" then return "{" .. table.concat(parts, ", ") .. "}" end
  return '{"$pairs": [' .. table.concat(parts, ", ") .. "]}"
end

encode = function(value, depth)
  local kind = type(value)
  if kind == "string" then return quote(value) end
  if kind == "number" then return number(value) end
  if kind == "boolean" then return tostring(value) end
  if kind == "table" then return encode_table(value, depth + 1) end
  error(("a %s cannot be saved"):format(kind), 0)
end

--- Plain data as text; raises for functions, userdata and the like.
---@param value any
---@return string
function json.encode(value) return encode(value, 0) end

-- ====== Decoding ======

local function fail(at, what) error(("at byte %d: %s"):format(at, what), 0) end

local function skip(text, at) return text:find("[^ \t\r\n]", at) or #text + 1 end

local unescapes = {b = "\b", f = "\f", n = "\n", r = "\r", t = "\t", ['"'] = '"', ["\\"] = "\\", ["/"] = "/"}

local function decode_string(text, at)
  local parts, i = {}, at + 1
  while true do
    local stop = text:find('["\\]', i)
    if not stop then fail(at, "a string without end") end
    parts[#parts + 1] = text:sub(i, stop - 1)
    if text:byte(stop) == 34 then return table.concat(parts), stop + 1 end
    local c = text:sub(stop + 1, stop + 1)
    if c == "u" then
      local code = text:match("^%x%x%x%x", stop + 2)
      if not code then fail(stop, "a bad \\u escape") end
      parts[#parts + 1] = utf8.char(tonumber(code, 16))
      i = stop + 6
    else
      if not unescapes[c] then fail(stop, "a bad escape") end
      parts[#parts + 1] = unescapes[c]
      i = stop + 2
    end
  end
end

local special = {inf = math.huge, ["-inf"] = -math.huge, nan = 0 / 0}

--- What the forms {"$pairs": ...} and {"$number": ...} stand for.
local function unwrap(object, at)
  if object["$number"] then return special[object["$number"]] or fail(at, "a bad number") end
  local list = object["$pairs"]
  if type(list) ~= "table" then return object end
  local t = {}
  for _, entry in ipairs(list) do
    if type(entry) ~= "table" or entry[1] == nil or entry[1] ~= entry[1] then fail(at, "a bad entry") end
    t[entry[1]] = entry[2]
  end
  return t
end

local decode

local function decode_array(text, at, depth)
  local list = {}
  local i = skip(text, at + 1)
  if text:sub(i, i) == "]" then return list, i + 1 end
  while true do
    list[#list + 1], i = decode(text, i, depth)
    i = skip(text, i)
    local c = text:sub(i, i)
    if c == "]" then return list, i + 1 end
    if c ~= "," then fail(i, "expected , or ]") end
    i = i + 1
  end
end

local function decode_object(text, at, depth)
  local object = {}
  local i = skip(text, at + 1)
  if text:sub(i, i) == "}" then return object, i + 1 end
  while true do
    i = skip(text, i)
    if text:sub(i, i) ~= '"' then fail(i, "expected a name") end
    local key
    key, i = decode_string(text, i)
    i = skip(text, i)
    if text:sub(i, i) ~= ":" then fail(i, "expected :") end
    object[key], i = decode(text, i + 1, depth)
    i = skip(text, i)
    local c = text:sub(i, i)
    if c == "}" then return unwrap(object, at), i + 1 end
    if c ~= "," then fail(i, "expected , or }") end
    i = i + 1
  end
end

decode = function(text, at, depth)
  if depth > DEPTH then fail(at, "nested too deeply") end
  local i = skip(text, at)
  local c = text:sub(i, i)
  if c == '"' then return decode_string(text, i) end
  if c == "[" then return decode_array(text, i, depth + 1) end
  if c == "{" then return decode_object(text, i, depth + 1) end
  local word = text:match("^%a+", i)
  if word == "true" then return true, i + 4 end
  if word == "false" then return false, i + 5 end
  local digits = text:match("^-?%d+%.?%d*[eE]?[+-]?%d*", i)
  local value = digits and tonumber(digits)
  if not value then fail(i, "not JSON") end
  return value, i + #digits
end

--- The data that a text stands for, or nil and a message.
---@param text string
---@return any value
---@return string? message
function json.decode(text)
  local ok, value, stop = pcall(decode, text, 1, 0)
  if not ok then return nil, value end
  if skip(text, stop) <= #text then return nil, ("at byte %d: more text than expected"):format(stop) end
  return value
end

return json
