--- amp/gradient_trace.lua -- reads what amp.record_gradients wrote, and what float16 would make of a step at a scale.
--
-- A trace is an array of steps as the lines of the file have them (amp/recorder.lua).  One that is made by hand needs
-- {amax = 0.5, histogram = {exponents = {["-2"] = 30}}} of each step, and params where a policy reads figures;
-- exponents may be integers, too.  Private to amp, but for amp.read_gradients.

local errors = require "halfmoon.errors"
local json = require "halfmoon.json"
local recorder = require "halfmoon.amp.recorder"

local raise, describe = errors.raise, errors.describe

local trace = {}

local OVERFLOW = 65520.0             -- from here on, values round to infinity in float16
local FLUSH = 2.0 ^ -25              -- up to here, to zero: half of the smallest subnormal
local F32_OVERFLOW = 2.0 ^ 128 - 2.0 ^ 103

-- ====== Checking ======

local function is_size(x) return type(x) == "number" and x >= 0 and x < math.huge end
local function is_count(x) return math.type(x) == "integer" and x >= 0 end

--- Raises about a field; where: "run.jsonl: line 3".
local function wrong(where, field, wanted, value)
  raise("%s: '%s' must be %s, not %s", where, field, wanted, describe(value))
end

--- A value of a field that may be left out.
local function checked(where, field, value, test, wanted, default)
  if value == nil and default ~= nil then return default end
  if not test(value) then wrong(where, field, wanted, value) end
  return value
end

--- A histogram as policies have it: {[e] = n, zeros, subnormals}.
local function histogram_of(where, field, value)
  if type(value) ~= "table" then wrong(where, field, "an object with exponents", value) end
  local bins = {
    zeros = checked(where, field .. ".zeros", value.zeros, is_count, "a count", 0),
    subnormals = checked(where, field .. ".subnormals", value.subnormals, is_count, "a count", 0),
  }
  if type(value.exponents) ~= "table" then wrong(where, field .. ".exponents", "an object", value.exponents) end
  for key, n in pairs(value.exponents) do
    local e = math.tointeger(key)
    if not e or e < -400 or e > 400 then
      raise("%s: '%s.exponents' has the key %s, which is no exponent", where, field, describe(key))
    end
    bins[e] = checked(where, ("%s.exponents[%d]"):format(field, e), n, is_count, "a count")
  end
  return bins
end

--- The figures of the parameters, with what policies ask for under their names.
local function params_of(where, value)
  if value == nil then return {} end
  if type(value) ~= "table" then wrong(where, "params", "an object", value) end
  local list = checked(where, "params.per_param", value.per_param, function(x) return type(x) == "table" end,
    "an array", {})
  local per_param = {}
  for i, p in ipairs(list) do
    local at = ("params.per_param[%d]"):format(i)
    if type(p) ~= "table" then wrong(where, at, "an object", p) end
    if type(p.name) ~= "string" then wrong(where, at .. ".name", "text", p.name) end
    per_param[i] = {
      name = p.name, amax = checked(where, at .. ".amax", p.amax, is_size, "a size"),
      norm = checked(where, at .. ".norm", p.norm, is_size, "a size"),
      inf_count = checked(where, at .. ".inf_count", p.inf_count, is_count, "a count", 0),
      nan_count = checked(where, at .. ".nan_count", p.nan_count, is_count, "a count", 0),
    }
  end
  return {
    amax = checked(where, "params.amax", value.amax, is_size, "a size"),
    norm = checked(where, "params.norm", value.norm, is_size, "a size"),
    inf_count = checked(where, "params.inf_count", value.inf_count, is_count, "a count", 0),
    nan_count = checked(where, "params.nan_count", value.nan_count, is_count, "a count", 0),
    histogram = value.histogram and histogram_of(where, "params.histogram", value.histogram),
    per_param = value.per_param and per_param,
  }
end

--- The exponents of a histogram that have any, in order, and how many values are not zero.
local function in_order(bins)
  local exponents, nonzero = {}, bins.subnormals
  for e, n in pairs(bins) do
    if math.type(e) == "integer" then
      exponents[#exponents + 1] = e
      nonzero = nonzero + n
    end
  end
  table.sort(exponents)
  return exponents, nonzero
end

---@class GradientStep
---@field step integer
---@field amax number
---@field top string? whose gradient is the largest
---@field bins table counts by exponent, zeros, subnormals
---@field exponents integer[] of bins, in order
---@field nonzero integer
---@field bad_count integer values that were not finite in the recording
---@field forward number largest result of a matrix product or convolution
---@field forward_top string? whose
---@field params table amax, norm, inf_count, nan_count, histogram, per_param of the parameters; {} if unknown

--- A step, checked.
local function step_of(where, line, index)
  if type(line) ~= "table" then raise("%s: expected an object, came %s", where, describe(line)) end
  if line.amax == nil and line.new_scale ~= nil or line.histogram == nil and line.policy ~= nil then
    raise("%s: this is an update of a scaler (amp.trace), whose own skips hide what the gradients were\n"
      .. "  hint: record a run with amp.record_gradients", where)
  end
  local forward = line.forward == nil and {} or line.forward
  if type(forward) ~= "table" then wrong(where, "forward", "an object", forward) end
  local step = {
    step = checked(where, "step", line.step, is_count, "a count", index),
    amax = checked(where, "amax", line.amax, is_size, "a finite number that is not negative"),
    bins = histogram_of(where, "histogram", line.histogram),
    bad_count = checked(where, "bad_count", line.bad_count, is_count, "a count", 0),
    forward = checked(where, "forward.amax", forward.amax, is_size, "a size", 0),
    params = params_of(where, line.params),
    top = line.top, forward_top = forward.top,
  }
  step.exponents, step.nonzero = in_order(step.bins)
  return step
end

-- ====== Files ======

--- The lines of a file, decoded; raises with the number of a line that is damaged.
local function lines_of(path)
  local file, why = io.open(path, "r")
  if not file then raise("read_gradients: %s", why) end
  local lines, number = {}, 0
  local text, fault = file:read("l")
  while text do
    number = number + 1
    local line, message = json.decode(text)
    if line == nil then
      file:close()
      raise("%s: line %d: no JSON: %s\n  hint: a line that was cut short ends like this", path, number, message)
    end
    lines[number] = line
    text, fault = file:read("l")
  end
  file:close()
  if fault then raise("read_gradients: %s cannot be read: %s", path, fault) end
  return lines
end

local function check_header(path, line)
  local where = path .. ": line 1"
  if type(line) ~= "table" or line.trace ~= recorder.HEADER.trace then
    local scaler = type(line) == "table" and line.new_scale ~= nil
    raise("%s: not a recording of gradients%s\n  hint: amp.record_gradients makes one; it begins with %s", where,
      scaler and ", but the trace of a scaler (amp.trace), whose own skips hide what the gradients were" or "",
      json.encode(recorder.HEADER))
  end
  if line.version ~= recorder.HEADER.version then
    raise("%s: version %s is not known; this library reads version %d", where, describe(line.version),
      recorder.HEADER.version)
  end
end

--- amp.read_gradients(path): the steps of a recording by amp.record_gradients, as its lines have them, without the
--- first line.  Raises with the number of the line where the file is damaged, or is something else.
---@param path string
---@return table[] steps
function trace.read(path)
  if type(path) ~= "string" then raise("read_gradients: the path must be a string, not %s", describe(path)) end
  local lines = lines_of(path)
  if #lines == 0 then raise("%s: the file is empty", path) end
  check_header(path, lines[1])
  local steps = {}
  for i = 2, #lines do
    step_of(("%s: line %d"):format(path, i), lines[i], i - 1)
    steps[i - 1] = lines[i]
  end
  return steps
end

--- The checked steps of a trace: a path, or a table of steps.
---@param where string for messages
---@param source string|table
---@return GradientStep[]
function trace.steps(where, source)
  local lines, place = source, where .. ": step"
  if type(source) == "string" then
    lines = lines_of(source)
    if #lines == 0 then raise("%s: the file is empty", source) end
    check_header(source, lines[1])
    place = source .. ": line"
  elseif type(source) ~= "table" then
    raise("%s: the trace must be a path or an array of steps, not %s", where, describe(source))
  end
  local from, steps = lines == source and 1 or 2, {}
  for i = from, #lines do
    steps[#steps + 1] = step_of(("%s %d"):format(place, i), lines[i], #steps + 1)
  end
  if #steps == 0 then raise("%s: the trace has no steps", where) end
  return steps
end

-- ====== What float16 would make of it ======

--- Why a step overflows at a scale: "gradient", "forward", "parameter" (beyond float32), "recording" (it was not finite
--- when it was recorded), or nil.
---@param step GradientStep
---@param scale number
---@return string?
function trace.overflow(step, scale)
  if step.bad_count > 0 or (step.params.inf_count or 0) + (step.params.nan_count or 0) > 0 then return "recording" end
  if step.forward >= OVERFLOW then return "forward" end
  if step.amax * scale >= OVERFLOW then return "gradient" end
  if (step.params.amax or 0) * scale >= F32_OVERFLOW then return "parameter" end
end

--- How many values of a step are too large at a scale: whole powers of two, and the part of the one between.
---@param step GradientStep
---@param scale number
---@return integer
function trace.count_overflow(step, scale)
  local count = 0.0
  for _, e in ipairs(step.exponents) do
    local from = 2.0 ^ e * scale
    local below = math.max(0.0, math.min(1.0, OVERFLOW / from - 1))
    count = count + step.bins[e] * (1 - below)
  end
  return math.max(1, math.tointeger((count + 0.5) // 1))
end

--- How many values of a step, of those that are not zero, become zero in float16 at a scale.  Where the edge falls
--- into a power of two, its values are taken to be spread evenly.
---@param step GradientStep
---@param scale number
---@return number
function trace.count_flushed(step, scale)
  local count = 2.0 ^ -126 * scale <= FLUSH and step.bins.subnormals or 0
  for _, e in ipairs(step.exponents) do
    local from = 2.0 ^ e * scale
    if from >= FLUSH then break end
    count = count + step.bins[e] * math.min(1.0, FLUSH / from - 1)
  end
  return count
end

--- The largest scale that does not overflow, for pictures; nil where there is none.
---@param step GradientStep
---@return number?
function trace.ceiling(step)
  if step.amax == 0 or trace.overflow(step, 2.0 ^ -149) then return nil end
  return 65504.0 / step.amax
end

return trace
