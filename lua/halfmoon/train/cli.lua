--- train/cli.lua -- command lines of training scripts.  Options are declared once; --help, defaults and checks come
--- from that.
--
--     local opt = cli.parse("fashion_cnn.lua: trains a CNN", {
--       {"epochs", 3, "passes over the training images"},
--       {"dtype", "f16", "what to compute in: f32, bf16, f16"},
--       {"quiet", false, "no progress bar"},
--     }, arg)
-- A default's type is the option's type; a default of "" means text that may be left out.  `--name value`,
-- `--name=value`, and for booleans --name.

local errors = require "halfmoon.errors"

local cli = {}

--- Prints the declared options.
local function help(title, declared, out)
  local width = #"help"
  for _, row in ipairs(declared) do width = math.max(width, #row[1]) end
  local function line(name, doc) out:write("  --", name, (" "):rep(width - #name + 2), doc, "\n") end
  out:write(title, "\n\n")
  for _, row in ipairs(declared) do
    local default = row[2]
    line(row[1], row[3] .. ((default == "" or default == false) and "" or ("  [%s]"):format(tostring(default))))
  end
  line("help", "this text")
end

--- Ends the script with a message; a wrong command line is no place for a traceback.
local function refuse(text)
  io.stderr:write(text, "\n  --help lists the options\n")
  os.exit(1, true)
end

--- The values of the declared options.  Prints and exits on --help and on a wrong command line.
---@param title string
---@param declared table[] {name, default, doc, test: value -> what is wrong with it, or nil}
---@param given string[] the script's arguments
---@return table<string, any> values
function cli.parse(title, declared, given)
  local values, defaults, names = {}, {}, {"help"}
  for _, row in ipairs(declared) do
    values[row[1]], defaults[row[1]] = row[2], row[2]
    names[#names + 1] = row[1]
  end
  local i = 1
  while i <= #given do
    local word = given[i]
    local name, text = word:match("^%-%-([%w_-]+)=(.*)$")
    name = name or word:match("^%-%-([%w_-]+)$")
    if name == "help" or word == "-h" then
      help(title, declared, io.stdout)
      os.exit(0, true)
    end
    local default = defaults[name]
    if default == nil then
      local near = name and errors.closest(name, names)
      refuse(("unknown argument %s%s"):format(word, near and (", did you mean --%s?"):format(near) or ""))
    end
    if type(default) == "boolean" then
      if text ~= nil then refuse(("--%s takes no value"):format(name)) end
      values[name] = true
    else
      if text == nil then
        i = i + 1
        text = given[i]
        if text == nil then refuse(("--%s needs a value"):format(name)) end
      end
      if type(default) == "number" then
        local number = tonumber(text)
        if not number or (math.type(default) == "integer" and not math.tointeger(number)) then
          refuse(("--%s must be a %snumber, not '%s'"):format(name, math.type(default) == "integer" and "whole " or "",
            text))
        end
        values[name] = math.type(default) == "integer" and math.tointeger(number) or number
      else
        values[name] = text
      end
    end
    i = i + 1
  end
  for _, row in ipairs(declared) do
    local complaint = row[4] and row[4](values[row[1]])
    if complaint then refuse(("--%s %s"):format(row[1], complaint)) end
  end
  return values
end

--- A check for an option: its words, separated by commas, must be among `list`.
---@param list string[]
---@return fun(text: string): string? why not
function cli.among(list)
  return function(text)
    for word in text:gmatch("[^,%s]+") do
      local found = false
      for _, name in ipairs(list) do found = found or name == word end
      if not found then return ("'%s' is not one of %s"):format(word, table.concat(list, ", ")) end
    end
  end
end

return cli
