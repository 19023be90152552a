-- expect.lua -- errors, gradients and runs of the program, as specs look at them.

local assert = require "luassert"
local hm = require "halfmoon"

local M = {}

--- raises(parts, fn, ...): see there.
M.raises = require "spec.support.raises"

--- Runs a chunk in a fresh process of the program, on the device of this run; returns what it printed (both streams) and its exit status.
---@param chunk string
---@return string said
---@return integer status
function M.program(chunk)
  local program = os.getenv("HALFMOON_PROGRAM") or "build/halfmoon"
  local path = os.tmpname()
  local file = assert(io.open(path, "w"))
  file:write('local hm = require "halfmoon"; hm.set_default_device "', hm.get_default_device(), '"\n')
  file:write('local core = require "halfmoon.core"\n', chunk, "\n")
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
