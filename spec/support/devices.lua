-- devices.lua -- the device that the specs run on, cases that are about the CPU alone, and cases that need "cuda".
--
-- `spec/run.lua --device=cuda` makes cuda the default device, so that every spec runs there.  What is about the CPU alone
-- says so by cpu_only or cpu_cases and is skipped there; the end of the run counts the skipped cases by reason.
--
-- Cases that need a device "cuda" beside the CPU (cuda_spec, cuda_parity_spec) take the CPU for the default device, and are
-- skipped where another one is.  HALFMOON_CUDA is read once by a process.  With it set, they run here, on that device.
-- Without it they run in one child process on the test double (HALFMOON_CUDA=emu), started when the first of them is
-- asked for, and each reports here what became of it there.  Where the plug-in of the test double is not built, one
-- pending test says so.

local hm = require "halfmoon"
local process = require "spec.support.process"

local M = {}

-- ====== The device of this run ======

--- Where this run's tensors are made: "cpu" or "cuda:0".
M.name = hm.get_default_device()

--- Whether that is the CPU.
M.is_cpu = M.name == "cpu"

--- One of two values: for the CPU, for other devices.  Sizes, where the test double is too slow for the CPU's.
function M.pick(cpu, other)
  if M.is_cpu then return cpu end
  return other
end

--- Waits until the device has done all that was asked; raises what went wrong in it.  On the CPU nothing is left to wait for.
function M.wait()
  if not M.is_cpu then hm.cuda.synchronize(M.name) end
end

--- hm.cpu or hm.cuda: memory_stats, reset_peak and trim of this run's device.
M.memory = M.is_cpu and hm.cpu or hm.cuda

--- The mode of Lua's collector that each file begins with, put here by run.lua.  The engine changes it where tensor memory runs short
--- (lua/bind/pressure.c).
---@type "incremental"|"generational"|nil
M.collector = nil

--- Ends the case that runs as skipped; busted's, put here by output.lua when a case begins.
---@type fun(reason: string)
M.skip = nil

--- The body of a case that is about the CPU alone: fn, or on other devices a function that skips.
---   it("name", devices.cpu_only("reads the processor's flags", function() ... end))
---@param reason string what it looks at; the skipped cases are counted by it
---@param fn function
---@return function
function M.cpu_only(reason, fn)
  if M.is_cpu then return fn end
  return function() M.skip(reason) end
end

--- The function `it` for a file or block that is about the CPU alone:
---   local it = devices.cpu_cases("the processor's instruction sets", it)
---@param reason string
---@param it function
---@return function
function M.cpu_cases(reason, it)
  return function(name, fn) return it(name, M.cpu_only(reason, fn)) end
end

-- ====== Cases that need cuda ======

--- The plug-in of the test double, beside the program.
M.plugin = (process.program:match("^(.*/)") or "") .. "halfmoon-cuda-emu.so"

local SET = os.getenv("HALFMOON_CUDA")
local REPORT = os.getenv("HALFMOON_SPEC_REPORT") -- where a child writes what became of each case

--- Whether the cases run in this process.
M.here = SET ~= nil and SET ~= "" and SET ~= "off"

local function exists(path)
  local f = io.open(path, "rb")
  if f then f:close() end
  return f ~= nil
end

--- Whether the plug-in of the test double is built.
---@return boolean
function M.has_double() return exists(M.plugin) end

-- The filters that this run was given: the child needs to run no more.
local function filters()
  local words = {}
  for _, word in ipairs(arg or {}) do
    if word:find("^%-%-filter=") or word:find("^%-%-gc=") then words[#words + 1] = process.quote(word) end
  end
  return table.concat(words, " ")
end

--- Runs the whole file in a child.  Returns name -> {ok, message} and what the child said.
local function child(file)
  local path = os.tmpname()
  local command = "unset HALFMOON_COUNTS; HALFMOON_CUDA=emu HALFMOON_THREADS=1 HALFMOON_SPEC_REPORT=%s %s spec/run.lua %s %s"
  local said, status = process.shell(command:format(path, process.program, filters(), file))
  local results = {}
  local load_report = assert(loadfile(path, "t",
    {case = function(name, ok, message) results[name] = {ok, message} end}))
  load_report()
  os.remove(path)
  return results, said, status
end

local function report(name, ok, message)
  local f = assert(io.open(REPORT, "a"))
  f:write(("case(%q, %s, %q)\n"):format(name, tostring(ok), message))
  f:close()
end

--- What to type to run a case alone on the test double, with everything it prints.
local function alone(file, name)
  local pattern = name:gsub("[%^%$%(%)%%%.%[%]%*%+%-%?]", "%%%0"):gsub("'", ".")
  return ("HALFMOON_CUDA=emu %s spec/run.lua --filter='%s' %s"):format(process.program, pattern, file)
end

---@class DeviceCases
---@field file string
local Cases = {}
Cases.__index = Cases

-- In a child: runs a case and writes down what became of it.
local function run_and_report(name, fn)
  local ok, message = xpcall(fn, function(e)
    return type(e) == "table" and tostring(e.message or e) or debug.traceback(tostring(e), 2)
  end)
  report(name, ok, tostring(message))
  if not ok then error(message, 0) end
end

--- Runs a case, here or by way of the child; raises what it raised.
---@param name string unique in the file
---@param fn function
function Cases:run(name, fn)
  if not M.is_cpu then return M.skip("compares cuda with the CPU itself") end
  if M.here and not REPORT then return fn() end
  if M.here then return run_and_report(name, fn) end
  if not self.results then self.results, self.said, self.status = child(self.file) end
  local result = self.results[name]
  local again = "\nby itself: " .. alone(self.file, name)
  if not result then
    error(("not run on the test double; the child ended with %s:\n%s%s"):format(self.status, self.said:sub(-2000),
      again), 0)
  end
  if not result[1] then error("on the test double: " .. result[2] .. again, 0) end
end

--- The cases of a spec file; nil and a reason where there is no device and no test double.  In the file:
---   local cases, why = devices.cases("spec/x_spec.lua")
---   local function case(name, fn) it(name, function() cases:run(name, fn) end) end
---@param file string
---@return DeviceCases?
---@return string? why
function M.cases(file)
  if M.here or exists(M.plugin) then return setmetatable({file = file}, Cases) end
  return nil, ("there is no %s: `make cuda-emu` builds it"):format(M.plugin)
end

return M
