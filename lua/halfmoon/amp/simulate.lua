--- amp/simulate.lua -- amp.simulate: what loss-scale policies would have done with a run that was recorded.
--
--     local result = amp.simulate("run.jsonl", {"dynamic", {"dynamic", growth_interval = 50}, "auto", "mine.lua"})
--     print(result)                 -- a table: steps skipped, overflow rate, mean log2 scale, flushed share, recovery
--     result:svg("scales.svg")      -- all scales over time, with a mark at each overflow
--
-- Each policy runs in a GradScaler of its own, so options, bounds, faults and stops are the scaler's.  At each recorded
-- step it is told an overflow where the largest gradient times its scale is 65520 or more, where float32 could not hold
-- a parameter's gradient, or where the forward had a value that float16 cannot hold (which no scale mends); otherwise
-- the recorded figures of the parameters.
--
-- What a replay cannot know.  The recorded run took every step.  A real run does not take those that overflow, and so
-- has other weights, and other gradients, from its first skipped step on; few skips change little, a policy that skips
-- for long leaves the recorded run behind.  Gradients near the edge are rounded differently in float16 than in the
-- recording, and what float16 flushes is missing further down the network; the parameters' figures that policies read
-- are those without that loss.  Sums inside one op are not seen.  So a prediction is good to a step or two for each
-- climb to the edge, and compares policies better than it foretells one.

local errors = require "halfmoon.errors"
local options = require "halfmoon.options"
local gradient_trace = require "halfmoon.amp.gradient_trace"
local grad_scaler = require "halfmoon.amp.grad_scaler"
local policies = require "halfmoon.amp.policies"

local raise, describe = errors.raise, errors.describe

-- ====== The policies asked for ======

--- 1024 as "2^10", other numbers as they are.
local function short(value)
  if type(value) == "number" and value > 0 and value < math.huge then
    local e = math.log(value, 2)
    if value >= 64 and e % 1 == 0 then return ("2^%d"):format(e) end
    return ("%.6g"):format(value)
  end
  return type(value) == "table" and "table" or tostring(value)
end

local function name_of(policy)
  if type(policy) == "table" then return policy.name or "custom" end
  return policy:match("([^/\\]+)%.lua$") or policy
end

--- "dynamic growth_interval=50"
local function label_of(policy, opts)
  local names, parts = {}, {name_of(policy)}
  for name in pairs(opts) do names[#names + 1] = tostring(name) end
  table.sort(names)
  for _, name in ipairs(names) do
    local value = short(opts[name])
    parts[#parts + 1] = name == "init_scale" and value or name .. "=" .. value
  end
  return table.concat(parts, " ")
end

local REFUSED = {
  groups = "a trace is of one loss", async = "a replay has nothing to wait for",
  enabled = "a scaler that is off has no policy",
}

--- One entry of the list: policy, options of its scaler, label.
local function entry_of(i, given)
  local policy, opts, label = given, {}, nil
  if type(given) == "table" and given.update == nil then
    policy, label = given.policy or given[1], given.label
    for name, value in pairs(given) do
      if name ~= 1 and name ~= "policy" and name ~= "label" then opts[name] = value end
    end
  end
  if type(policy) ~= "string" and type(policy) ~= "table" then
    raise('amp.simulate: policy %d must be a name, a table, a file, or {name, growth_interval = 50, label = "..."}, '
      .. "not %s", i, describe(given))
  end
  if label ~= nil and type(label) ~= "string" then
    raise("amp.simulate: policy %d: label must be a string, not %s", i, describe(label))
  end
  for name, why in pairs(REFUSED) do
    if opts[name] ~= nil then raise("amp.simulate: policy %d: option '%s' does not fit: %s", i, name, why) end
  end
  return {policy = policy, opts = opts, label = label or label_of(policy, opts)}
end

--- The list of entries; all policies that come with the library if none is given.
local function entries_of(given)
  if given == nil then given = policies.names() end
  if type(given) == "string" or (type(given) == "table" and given.update ~= nil) then given = {given} end
  if type(given) ~= "table" then
    raise("amp.simulate: the policies must be an array of names, tables or files, not %s", describe(given))
  end
  if #given == 0 then raise("amp.simulate: no policy was given") end
  for key in pairs(given) do
    if math.type(key) ~= "integer" then
      raise("amp.simulate: the array of policies has the key '%s'\n"
        .. '  hint: a policy with options is a table in the array: {{"dynamic", growth_interval = 50}}', tostring(key))
    end
  end
  local entries, seen = {}, {}
  for i, one in ipairs(given) do
    local entry = entry_of(i, one)
    seen[entry.label] = (seen[entry.label] or 0) + 1
    if seen[entry.label] > 1 then entry.label = ("%s (%d)"):format(entry.label, seen[entry.label]) end
    entries[i] = entry
  end
  return entries
end

-- ====== One policy ======

---@class SimulatedPolicy
---@field label string
---@field policy string its name
---@field skipped integer steps that overflowed
---@field skipped_steps integer[] which
---@field overflow_rate number
---@field mean_log2 number mean of log2 of the scale, over the steps
---@field flushed number share of the held values that are not zero which float16 would make zero, in the steps taken
---@field recovery number? mean steps from the first backoff of an overflow until the scale is what it was before it
---@field recovered integer such spikes that were recovered from
---@field unrecovered integer and those that were not when the trace ended
---@field scales number[] of each step
---@field causes table<integer, string> why a step overflowed: "gradient", "forward", "parameter" or "recording"
---@field faults integer updates in which the policy failed
---@field fault string? what it said first
---@field stopped integer? the step at which the policy stopped the training; the trace ends there for it
---@field message string? why

--- Raises if the trace does not have what a policy reads.
local function check_needs(scaler, label, steps)
  for _, name in ipairs(scaler.policy.needs) do
    for i, step in ipairs(steps) do
      if step.params[name] == nil then
        raise("amp.simulate: policy '%s' needs '%s' of the parameters' gradients, which step %d of the trace does not "
          .. "have (params.%s)", label, name, i, name)
      end
    end
  end
end

--- What the scaler is told of a step, and why it overflows, if it does.
local function finding(step, scale)
  local cause = gradient_trace.overflow(step, scale)
  local params = step.params
  return {
    inf_count = cause and gradient_trace.count_overflow(step, scale) or 0, nan_count = 0,
    amax = params.amax or step.amax, norm = params.norm or 0.0, histogram = params.histogram,
    per_param = params.per_param,
  }, cause
end

--- Takes note of how the scale moved after step i: a spike begins with the first backoff at an overflow, and ends when
--- the scale is what it was.
local function follow_spike(spike, i, overflowed, old, new)
  if overflowed and not spike.level and new < old then
    spike.level, spike.from = old, i
  elseif spike.level and new >= spike.level then
    spike.sum, spike.n = spike.sum + (i - spike.from), spike.n + 1
    spike.level = nil
  end
end

--- Asks the policy of the next scale; true if it stopped the training.
local function update(run, scaler, found, i)
  local ok, record = pcall(grad_scaler.replay, scaler, found)
  if not ok then
    run.stopped, run.message = i, tostring(record):match("stopped the training: (.*)") or tostring(record)
    return true
  end
  if record.event == "fault" then
    run.faults, run.fault = run.faults + 1, run.fault or record.message
  end
end

--- Replays the steps through one policy.
local function replay(entry, steps)
  local opts = {policy = entry.policy}
  for name, value in pairs(entry.opts) do opts[name] = value end
  local scaler = grad_scaler.new(opts)
  check_needs(scaler, entry.label, steps)
  local run = {
    label = entry.label, policy = scaler.policy.name, scales = {}, skipped_steps = {}, causes = {}, faults = 0,
  }
  local spike, logs, flushed, nonzero = {sum = 0, n = 0}, 0.0, 0.0, 0
  for i, step in ipairs(steps) do
    local scale = scaler:get_scale()
    local found, cause = finding(step, scale)
    run.scales[i] = scale
    logs = logs + math.log(scale, 2)
    if cause then
      run.skipped_steps[#run.skipped_steps + 1], run.causes[i] = step.step, cause
    else
      flushed, nonzero = flushed + gradient_trace.count_flushed(step, scale), nonzero + step.nonzero
    end
    local stop = update(run, scaler, found, i)
    follow_spike(spike, i, cause ~= nil, scale, scaler:get_scale())
    if stop then break end
  end
  run.skipped = #run.skipped_steps
  run.overflow_rate, run.mean_log2 = run.skipped / #run.scales, logs / #run.scales
  run.flushed = nonzero > 0 and flushed / nonzero or 0.0
  run.recovered, run.unrecovered = spike.n, spike.level and 1 or 0
  run.recovery = spike.n > 0 and spike.sum / spike.n or nil
  return run
end

-- ====== The result ======

---@class Simulation
---@field steps integer of the trace
---@field trace GradientStep[]
---@field [integer] SimulatedPolicy in the order of the policies
local Simulation = {}
Simulation.__index = Simulation

--- Three digits, however small: flushed shares of 1e-5 and 1e-7 are what policies differ in.
local function percent(share) return share == 0 and "0" or ("%.3g%%"):format(100 * share) end

--- What the table adds to a row.
local function remark(run)
  if run.stopped then return ("  stopped at step %d: %s"):format(run.stopped, run.message) end
  if run.faults > 0 then
    return ("  %d faults: %s"):format(run.faults, tostring(run.fault):match("^[^\n]*"))
  end
  return ""
end

--- A table with a row for each policy.
function Simulation:__tostring()
  local width = #"policy"
  for _, run in ipairs(self) do width = math.max(width, #run.label) end
  local form = "%-" .. math.min(width, 99) .. "s  %7s  %8s  %10s  %9s  %s"
  local lines = {
    ("%d recorded steps"):format(self.steps),
    form:format("policy", "skipped", "overflow", "mean scale", "flushed", "recovery"),
  }
  for _, run in ipairs(self) do
    local recovery = run.recovery and ("%.1f steps"):format(run.recovery) or "-"
    if run.unrecovered > 0 then recovery = recovery .. " (1 open)" end
    lines[#lines + 1] = (form:format(run.label, ("%d"):format(run.skipped), percent(run.overflow_rate),
      ("2^%.2f"):format(run.mean_log2), percent(run.flushed), recovery) .. remark(run)):gsub("%s+$", "")
  end
  return table.concat(lines, "\n")
end

--- Writes a picture of all scales over time: log2 of the scale upwards, a mark at each overflow, and a light line where
--- the largest gradient would just fit into float16.
---@param path string
---@param opts {title: string?, width: integer?, height: integer?}?
---@return boolean? ok nil and a message where the file cannot be written
---@return string? message
function Simulation:svg(path, opts)
  return require("halfmoon.amp.simulate_svg").write(self, path, opts)
end

--- The same picture as text.
---@param opts {title: string?, width: integer?, height: integer?}?
---@return string
function Simulation:to_svg(opts) return require("halfmoon.amp.simulate_svg").text(self, opts) end

local spec = {first = {"integer", 1, options.at_least(1)}, last = {"integer", nil, options.at_least(1)}}

--- amp.simulate(trace [, policies [, {first, last}]]): replays a run that amp.record_gradients recorded through
--- loss-scale policies and tells of each what it would have skipped and lost.  trace: a path, or an array of steps.
--- policies: an array of names, tables, files, or {name, growth_interval = 50, init_scale = 2^10, label = "..."} with
--- options as GradScaler has them; all that come with the library if left out.  first, last: only these steps.  The
--- result prints as a table; result[i] has skipped, skipped_steps, overflow_rate, mean_log2, flushed, recovery, scales
--- and more, and result:svg(path) writes a picture.  It tells what would have happened to the gradients of the recorded
--- run; a real run goes another way after a step that it skips.
---@param trace string|table[]
---@param given (string|table)[]|string|nil
---@param opts {first: integer?, last: integer?}?
---@return Simulation
local function simulate(trace, given, opts)
  local checked = options.check("amp.simulate", opts, spec)
  if checked.last and checked.last < checked.first then
    raise("amp.simulate: last (%d) must not be below first (%d)", checked.last, checked.first)
  end
  local entries = entries_of(given)
  local steps = gradient_trace.steps("amp.simulate", trace)
  steps = table.move(steps, checked.first, math.min(checked.last or #steps, #steps), 1, {})
  if #steps == 0 then raise("amp.simulate: the trace ends before step %d", checked.first) end
  local result = {steps = #steps, trace = steps}
  for i, entry in ipairs(entries) do result[i] = replay(entry, steps) end
  return setmetatable(result, Simulation)
end

return {simulate = simulate}
