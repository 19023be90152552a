--- options.lua -- options tables checked against what a function knows.
--
-- Options are declared once, as a table  name -> {type, default, test}.  type is a Lua type name, "integer", "tensor"
-- or "any", or several joined with "|"; default may be nil; test is an optional function(value) -> nil, or a text that
-- says what is wanted ("must be above 1").  An unknown option is an error that names the closest known one.

local core = require "halfmoon.core"
local errors = require "halfmoon.errors"

local options = {}

---@alias OptionSpec table<string, {[1]: string, [2]: any, [3]: nil|fun(value: any): string?}>

--- The names of a declaration, sorted.
---@param spec OptionSpec
---@return string[]
function options.names(spec)
  local names = {}
  for name in pairs(spec) do names[#names + 1] = name end
  table.sort(names)
  return names
end

--- Raises "unknown option" with the closest known name.
---@param where string what the options are for
---@param name any
---@param known string[]
function options.unknown(where, name, known)
  local shown = type(name) == "string" and "'" .. name .. "'" or errors.describe(name)
  local text = ("%s: unknown option %s"):format(where, shown)
  local near = type(name) == "string" and errors.closest(name, known)
  if near then text = text .. (", did you mean '%s'?"):format(near) end
  errors.raise("%s\n  known options: %s", text, #known > 0 and table.concat(known, ", ") or "none")
end

local function is_a(value, wanted)
  if wanted == "any" then return true end
  if wanted == "integer" then
    return math.type(value) == "integer" or (math.type(value) == "float" and value % 1 == 0)
  end
  if wanted == "tensor" then return core.is_tensor(value) end
  return type(value) == wanted
end

--- Raises unless value has one of the types and passes the test.
---@param where string
---@param name string
---@param value any
---@param declared table {type, default, test}
---@return any value (integers as integers)
function options.value(where, name, value, declared)
  local matched
  for wanted in declared[1]:gmatch("[^|]+") do
    if is_a(value, wanted) then matched = wanted break end
  end
  if not matched then
    errors.raise("%s: option '%s' must be %s, not %s", where, name, declared[1]:gsub("|", " or "),
      errors.describe(value))
  end
  if matched == "integer" then value = math.tointeger(value) end
  local complaint = declared[3] and declared[3](value)
  if complaint then errors.raise("%s: option '%s' %s, not %s", where, name, complaint, errors.describe(value)) end
  return value
end

--- Checks a table of options and fills in the defaults.
---@param where string what the options are for, for messages
---@param given table?
---@param spec OptionSpec
---@return table checked a new table
function options.check(where, given, spec)
  local checked = {}
  if given ~= nil then
    if type(given) ~= "table" then
      errors.raise("%s: options must be a table, not %s", where, errors.describe(given))
    end
    for name, value in pairs(given) do
      local declared = spec[name]
      if not declared then options.unknown(where, name, options.names(spec)) end
      checked[name] = options.value(where, name, value, declared)
    end
  end
  for name, declared in pairs(spec) do
    if checked[name] == nil then checked[name] = declared[2] end
  end
  return checked
end

--- A test for options: one of the given strings.
---@param ... string
---@return fun(value: any): string?
function options.one_of(...)
  local choices = {...}
  return function(value)
    for _, choice in ipairs(choices) do
      if value == choice then return end
    end
    return "must be one of " .. table.concat(choices, ", ")
  end
end

--- A test for options: a number of at least low.
---@param low number
---@return fun(value: any): string?
function options.at_least(low)
  return function(value)
    if value >= low then return end -- written so that NaN fails
    return ("must be at least %g"):format(low)
  end
end

--- A test for options: a number above low.
---@param low number
---@return fun(value: any): string?
function options.above(low)
  return function(value)
    if value > low then return end
    return ("must be above %g"):format(low)
  end
end

return options
