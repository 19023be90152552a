-- expect.lua -- errors, gradients and runs of the program, as specs look at them.

local assert = require "luassert"

local M = {}

--- Runs fn(...), which must raise a message that holds every one of the patterns (plain text).  Returns the message.
---@param wanted string|string[]
---@return string
function M.raises(wanted, fn, ...)
  local ok, message = pcall(fn, ...)
  if ok then error(("no error was raised; expected %s"):format(type(wanted) == "table" and wanted[1] or wanted), 2) end
  message = tostring(message)
  for _, text in ipairs(type(wanted) == "table" and wanted or {wanted}) do
    if not message:find(text, 1, true) then error(("the error does not say %q:\n%s"):format(text, message), 2) end
  end
  return message
end

--- Runs a chunk in a fresh process of the program; returns what it printed (both streams) and its exit status.
---@param chunk string
---@return string said
---@return integer status
function M.program(chunk)
  local program = os.getenv("HALFMOON_PROGRAM") or "build/halfmoon"
  local path = os.tmpname()
  local file = assert(io.open(path, "w"))
  file:write('local hm = require "halfmoon"\nlocal core = require "halfmoon.core"\n', chunk, "\n")
  file:close()
  local pipe = assert(io.popen(("HALFMOON_HISTORY= %s %s 2>&1; echo \"status=$?\""):format(program, path)))
  local text = pipe:read("a")
  pipe:close()
  os.remove(path)
  local said, status = text:match("^(.*)status=(%d+)\n$")
  assert.is_string(said)
  return said, math.tointeger(status)
end

--- Runs fn with what the library says on stderr caught; returns the text, then what fn returned.
function M.stderr(fn, ...)
  local real, said = io.stderr, {}
  -- the library writes through io.stderr:write, so a table with that method can stand in
  io.stderr = {write = function(self, ...) -- luacheck: ignore 122
    for _, text in ipairs {...} do said[#said + 1] = tostring(text) end
    return self
  end}
  local result = table.pack(pcall(fn, ...))
  io.stderr = real -- luacheck: ignore 122
  if not result[1] then error(result[2], 0) end
  return table.concat(said), table.unpack(result, 2, result.n)
end

return M
