--- amp/debug.lua -- amp.debug: which op made the first value that is not finite, where it stands, and what it read.
--
-- Inside, the engine looks at the operands and results of every kernel call and tells of those that meet anything not
-- finite.  The first call that makes such a value from finite operands is the one reported; so is one that reads it
-- from outside (data, a weight).  What a constant brought in (masked_fill with -inf) is no fault, nor is a tensor of
-- finite values and -inf alone, as masks are; a NaN made of them is.  Once the first is found, nothing is looked at any
-- more.  Outside of amp.debug nothing is looked at at all.

local core = require "halfmoon.core"
local errors = require "halfmoon.errors"

local raise, describe = errors.raise, errors.describe

---@class DebugReport
---@field found boolean
---@field made boolean? true: from finite operands; false: it came in from outside
---@field op string? the op that ran
---@field phase "forward"|"backward"|nil
---@field backward_of string? the op whose backward it belongs to
---@field module string? "Net.fc1 (Linear 784 -> 256)"
---@field line string? "train.lua:41": where the op, or the one whose backward it is, was called
---@field inputs table[]? {name, shape, dtype, amax, nan_count, inf_count, given_name}, or {name, value} for a number
---@field outputs table[]? likewise
---@field nan_count integer?
---@field inf_count integer?
---@field calls integer kernel calls looked at
local Report = {}
Report.__index = Report

local current -- the report that is being looked for

-- ====== Judging ======

local infinite = {[math.huge] = true, [-math.huge] = true}

--- What the operands bring along.  came: the operand that brought it in from outside; nan, inf: excused ones.
local function look_at_inputs(seen, excused)
  local from = {nan = false, inf = false}
  for _, x in ipairs(seen.inputs) do
    if x.value then
      from.nan = from.nan or x.value ~= x.value
      from.inf = from.inf or infinite[x.value] or false
    else
      local mask = x.nan == 0 and x.inf == 0
      if not (mask or excused[x.storage]) then from.came = from.came or x end
      from.nan = from.nan or x.nan > 0
      from.inf = from.inf or x.inf + x.minus_inf > 0
    end
  end
  return from
end

--- How many NaN and infinities the results have.
local function count_outputs(seen)
  local nan, inf = 0, 0
  for _, y in ipairs(seen.outputs) do
    nan, inf = nan + y.nan, inf + y.inf + y.minus_inf
  end
  return nan, inf
end

--- An operand or result as a report has it.
local function plain(x)
  if x.value then return {name = x.name, value = x.value} end
  return {
    name = x.name, given_name = x.given_name, dtype = x.dtype, shape = x.shape, amax = x.amax,
    nan_count = x.nan, inf_count = x.inf and x.inf + x.minus_inf,
  }
end

--- "file:line\n  in Net.fc1 (...)" as line and module.
local function split_place(text)
  if not text then return end
  return text:match("^[^\n]+"), text:match("\n  in (%u[^\n]*)")
end

local write_only -- op -> true for fill_, copy_ and the like, which do not read their destination

--- Whether the first operand of an op is only written to.
local function overwrites(op)
  if not write_only then
    write_only = {}
    for _, row in ipairs(core.ops()) do
      write_only[row.name] = row.name:sub(-1) == "_" and (row.family == "fill" or row.family == "copy") or nil
    end
  end
  return write_only[op] == true
end

--- Writes what was seen into the report and stops looking.
local function conclude(report, seen, culprit)
  report.found, report.made = true, culprit == nil
  report.op, report.phase = seen.op, seen.backward and "backward" or "forward"
  report.backward_of = seen.backward_of
  local place = seen.place
  if seen.backward then place = seen.recorded end
  report.line, report.module = split_place(place)
  report.inputs, report.outputs = {}, {}
  for i, x in ipairs(seen.inputs) do
    if i > 1 or not overwrites(seen.op) then report.inputs[#report.inputs + 1] = plain(x) end
  end
  for i, y in ipairs(seen.outputs) do report.outputs[i] = plain(y) end
  report.nan_count, report.inf_count = count_outputs(seen)
  if culprit then
    report.operand = culprit.given_name or culprit.name
    report.nan_count, report.inf_count = culprit.nan, culprit.inf + culprit.minus_inf
  end
end

--- A function for core.op_watch.
local function judge(report)
  local excused = {} -- storages that a constant, or an excused value, went into
  return function(seen)
    if report.found then return end
    local from = look_at_inputs(seen, excused)
    local nan, inf = count_outputs(seen)
    local made = (nan > 0 and not from.nan) or (inf > 0 and not from.inf)
    if from.came then conclude(report, seen, from.came)
    elseif made then conclude(report, seen)
    elseif nan + inf > 0 then
      for _, y in ipairs(seen.outputs) do excused[y.storage] = true end
    end
    if report.found then report.calls = core.op_watch(nil) end
  end
end

-- ====== Scopes ======

--- Ends the scope: nothing is looked at any more.  What was found stays in the report.
function Report:close()
  if current ~= self then return end
  current = nil
  local calls = core.op_watch(nil)
  if not self.found then self.calls = calls end
  local scope = self.scope
  self.scope = nil
  getmetatable(scope).__close(scope)
end

function Report:__close() self:close() end

local function open()
  if current then raise("amp.debug: it is looking already; close that scope first") end
  local report = setmetatable({found = false, calls = 0}, Report)
  report.scope = core.detect_anomaly {places = true}
  current = report
  core.op_watch(judge(report))
  return report
end

--- Ends a scope after its function: adds what was found to the error that went through.
local function finish(report, ok, ...)
  report:close()
  if ok then return report, ... end
  local message = ...
  if report.found and type(message) == "string" then message = message .. "\n" .. tostring(report) end
  error(message, 0)
end

--- amp.debug([fn, ...]): finds the first op, forward or backward, that made a value that is not finite.  With a function:
--- runs it and returns the report, then what it returned.  Without one: a scope, `local report <close> = amp.debug()`,
--- which report:close() ends, too.  print(report) tells op, line, module, and what the op read; the fields are found,
--- made (false: the value came in with an operand), op, phase, backward_of, module, line, inputs, outputs, nan_count,
--- inf_count.  Slow: the values of every op are looked through until the first is found; nothing is when it is not used.
---@param fn function?
---@param ... any arguments of fn
---@return DebugReport report
---@return any ... what fn returned
local function debug_amp(fn, ...)
  if fn == nil then return open() end
  local meta = getmetatable(fn)
  if type(fn) ~= "function" and not (type(meta) == "table" and meta.__call) then
    raise("amp.debug: expected a function, not %s", describe(fn))
  end
  local report = open()
  return finish(report, pcall(fn, ...))
end

-- ====== Text ======

local function counts_text(nan, inf)
  local parts = {}
  if inf > 0 then parts[#parts + 1] = ("%d inf"):format(inf) end
  if nan > 0 then parts[#parts + 1] = ("%d nan"):format(nan) end
  return table.concat(parts, " and ")
end

local function operand_line(mark, x)
  if x.value then return ("  %s%s = %.6g"):format(mark, x.name, x.value) end
  local text = ("  %s%s  %s[%s]"):format(mark, x.name, errors.short_dtype[x.dtype] or x.dtype,
    table.concat(x.shape, ","))
  if x.given_name then text = text .. "  " .. x.given_name end
  if errors.short_dtype[x.dtype] and x.dtype:find("float") then text = text .. ("  amax %.6g"):format(x.amax) end
  if x.nan_count + x.inf_count > 0 then text = text .. "  " .. counts_text(x.nan_count, x.inf_count) end
  return text
end

--- The report as text: what happened, where, and each operand and result.
function Report:__tostring()
  if not self.found then
    return ("amp.debug: %s made a value that is not finite (%s looked at)"):format(
      current == self and "so far no op" or "no op",
      current == self and "still looking; calls are" or ("%d calls"):format(self.calls))
  end
  local op = self.op
  if self.phase == "backward" and self.backward_of then
    op = ("the backward of %s%s"):format(self.backward_of, self.op ~= self.backward_of and " (" .. op .. ")" or "")
  end
  local counts = counts_text(self.nan_count, self.inf_count)
  local lines = {
    self.made and ("amp.debug: %s made %s"):format(op, counts)
      or ("amp.debug: %s read %s in %s, which no op made in here"):format(op, counts, self.operand),
  }
  lines[#lines + 1] = ("  %s%s"):format(self.phase == "backward" and "recorded at " or "at ",
    self.line or "a place not known: the forward ran outside amp.debug")
  if self.module then lines[#lines + 1] = "  in " .. self.module end
  for _, x in ipairs(self.inputs) do lines[#lines + 1] = operand_line("", x) end
  for _, y in ipairs(self.outputs) do lines[#lines + 1] = operand_line("-> ", y) end
  return table.concat(lines, "\n")
end

return debug_amp
