-- processes.lua -- for spec files whose cases run on cuda in processes of their own, each under its own settings: on the test
-- double unless HALFMOON_CUDA names another device.

local devices = require "spec.support.devices"
local process = require "spec.support.process"

local M = {}
M.__index = M

M.cuda = devices.here and os.getenv("HALFMOON_CUDA") or "emu"
M.is_double = M.cuda == "emu"

--- processes.with(defaults): processes whose environment is `defaults` (a table of variables) and what each call adds.
function M.with(defaults) return setmetatable({defaults = defaults}, M) end

function M:settings(extra)
  local env = {HALFMOON_CUDA = M.cuda, HALFMOON_THREADS = 1, HALFMOON_EMU_QUIET = 1}
  for _, more in ipairs {self.defaults, extra or {}} do
    for k, v in pairs(more) do env[k] = v end
  end
  return env
end

--- Runs a file of cases, which raises at the first that is wrong and prints a Lua table -> that table.
function M:run(file, extra)
  local said = process.file(file, self:settings(extra))
  return assert(load(said), said)()
end

--- Runs a script, hm and core at hand -> what it said, its status.
function M:script(source, extra, ...)
  local head = 'local hm = require "halfmoon"\nlocal core = require "halfmoon.core"\n'
  return process.script(head .. source, self:settings(extra), ...)
end

--- Fails unless `part` stands in what was said.
function M.contains(said, part) assert(said:find(part, 1, true), ("%q is not in:\n%s"):format(part, said)) end

--- Is there a device, or a double?  If not, a case says so.
function M.can_run(it)
  if devices.here or devices.has_double() then return true end
  it("needs the test double", function()
    pending("there is no " .. devices.plugin .. ": `make cuda-emu` builds it")
  end)
  return false
end

return M
