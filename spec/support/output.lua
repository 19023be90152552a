-- output.lua -- how busted reports here: one line for each spec file, each failure with the command that runs it alone, the
-- slowest tests, how many were skipped and why, and `N passed, N failed` at the end.
--
-- Appends "passed failed skipped" to the file named by HALFMOON_COUNTS, from which scripts/test makes the sum of all runs; beside it,
-- in a file with ".now" at the end, stands the test that runs, so that a crash can be told where it happened.

local busted = require "busted"
local devices = require "spec.support.devices"
local pretty = require "pl.pretty"

local MANY_FAILURES = 30 -- from here on only the names are printed
local colours = os.getenv("NO_COLOR") == nil and require("halfmoon.core").isatty(1)

local function paint(code, text) return colours and ("\27[%dm%s\27[0m"):format(code, text) or text end

-- A Lua pattern that matches a test's name: marks with a meaning become ".".
local function as_filter(name) return (name:gsub("[^%w ]", ".")) end

-- The file in which a test stands.
local function file_of(element)
  local trace = element.trace or {}
  return (trace.source or trace.short_src or "?"):gsub("^@", ""):gsub("^%./", "")
end

return function()
  local handler = require "busted.outputHandlers.base"()
  local file -- {name, passed, failed, skipped, start} of the file that runs
  local times = {}
  local counts = os.getenv("HALFMOON_COUNTS")

  local function report(failure)
    local at = file_of(failure.element)
    print(("  %s %s  (%s:%d)"):format(paint(31, "✗"), failure.name, at, (failure.element.trace or {}).currentline or 0))
    if handler.failuresCount + handler.errorsCount > MANY_FAILURES then return end
    local message = failure.message
    if type(message) ~= "string" then message = message == nil and "no message" or pretty.write(message) end
    if failure.isError and failure.trace and failure.trace.traceback then
      message = message .. failure.trace.traceback:gsub("\n[^\n]*busted/[^\n]*", ""):gsub("\n%s*%[C%]: in %?%s*$", "")
    end
    message = message:gsub("%s+$", "")
    print("      " .. message:gsub("\n", "\n      "))
    if failure.element.descriptor ~= "it" then return end
    print(paint(2, ("      alone: make test SPEC=%s FILTER='%s'"):format(at, as_filter(failure.name))))
  end

  local function finish_file()
    if not file then return end
    local mark = file.failed > 0 and paint(31, "✗") or paint(32, "✓")
    local skipped = file.skipped > 0 and (", %d skipped"):format(file.skipped) or ""
    local seconds = os.clock() - file.start
    print(("  %s %-44s %4d passed%s%s%s"):format(mark, file.name, file.passed,
      file.failed > 0 and (", %d failed"):format(file.failed) or "", skipped,
      seconds > 1 and paint(2, ("  %.1f s"):format(seconds)) or ""))
    file = nil
  end

  function handler.fileStart(element)
    finish_file()
    if devices.collector then collectgarbage(devices.collector) end
    file = {name = element.name:gsub("^%./", ""), passed = 0, failed = 0, skipped = 0, start = os.clock()}
    return nil, true
  end

  function handler.fileEnd()
    finish_file()
    return nil, true
  end

  function handler.testStart(element)
    devices.skip = element.env and element.env.pending
    local f = counts and io.open(counts .. ".now", "w")
    if f then
      f:write(handler.getFullName(element), "  (", file_of(element), ")\n")
      f:close()
    end
    return nil, true
  end

  function handler.testEnd(element, _, status)
    times[#times + 1] = {element.duration or 0, handler.getFullName(element)}
    if file then
      local field = status == "success" and "passed" or status == "pending" and "skipped" or "failed"
      file[field] = file[field] + 1
    end
    if status == "failure" then report(handler.failures[#handler.failures]) end
    if status == "error" then report(handler.errors[#handler.errors]) end
    io.stdout:flush()
    return nil, true
  end

  -- An error outside a test: a file that does not load, a setup that raises.
  function handler.outside(element)
    if element.descriptor ~= "it" then
      if file then file.failed = file.failed + 1 end
      report(handler.errors[#handler.errors])
    end
    return nil, true
  end

  -- How many cases were skipped for each reason.
  local function print_reasons()
    local counted, reasons = {}, {}
    for _, skipped in ipairs(handler.pendings) do
      local why = type(skipped.message) == "string" and skipped.message:gsub("^%S+:%d+: ", "") or skipped.name
      if not counted[why] then reasons[#reasons + 1] = why end
      counted[why] = (counted[why] or 0) + 1
    end
    table.sort(reasons)
    for _, why in ipairs(reasons) do print(("  skipped: %4d  %s"):format(counted[why], why)) end
  end

  function handler.suiteEnd()
    finish_file()
    print_reasons()
    local passed, failed = handler.successesCount, handler.failuresCount + handler.errorsCount
    local skipped = handler.pendingsCount
    table.sort(times, function(a, b) return a[1] > b[1] end)
    for i = 1, math.min(3, #times) do
      if times[i][1] > 2 then print(paint(2, ("  slow: %.1f s  %s"):format(times[i][1], times[i][2]))) end
    end
    if counts then
      local f = assert(io.open(counts, "a"))
      f:write(("%d %d %d\n"):format(passed, failed, skipped))
      f:close()
    end
    print(("%d passed, %d failed%s"):format(passed, failed, skipped > 0 and (", %d skipped"):format(skipped) or ""))
    return nil, true
  end

  busted.subscribe({"file", "start"}, handler.fileStart)
  busted.subscribe({"file", "end"}, handler.fileEnd)
  busted.subscribe({"test", "start"}, handler.testStart)
  busted.subscribe({"test", "end"}, handler.testEnd, {predicate = handler.cancelOnPending})
  busted.subscribe({"failure"}, handler.outside)
  busted.subscribe({"error"}, handler.outside)
  busted.subscribe({"suite", "end"}, handler.suiteEnd)
  return handler
end
