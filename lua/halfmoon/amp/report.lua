--- amp/report.lua -- amp.histogram and amp.report: what gradients look like, and what float16 would make of them.

local core = require "halfmoon.core"
local errors = require "halfmoon.errors"
local options = require "halfmoon.options"

local raise, describe = errors.raise, errors.describe

-- ====== Parameters ======

--- Adds the parameters of a model or an optimizer to a list, each once: {name, param}.
local function collect(list, seen, source)
  local function add(name, param)
    if seen[param] then return end
    seen[param] = true
    list[#list + 1] = {name = name or core.get_name(param) or ("parameter %d"):format(#list + 1), param = param}
  end
  if source.__is_module then
    for name, param in source:named_parameters() do add(name, param) end
    return
  end
  for _, group in ipairs(source.param_groups) do
    for _, param in ipairs(group.params) do add(nil, param) end
  end
end

local function is_source(x)
  if type(x) ~= "table" then return false end
  return x.__is_module == true or rawget(x, "param_groups") ~= nil
end

-- ====== amp.histogram ======

---@class GradHistogram
---@field scale number
---@field [integer] table {name, count, zeros, subnormals, inf_count, nan_count, amax, norm, bins, flushed, f16_subnormal, overflow}
---@field total table the same of all together
local Histogram = {}

local SUMS = {"count", "zeros", "subnormals", "inf_count", "nan_count", "flushed", "f16_subnormal", "overflow"}
local SHARES = {"flushed", "f16_subnormal", "overflow"}

--- Adds a census to the total; amax and norm, too.
local function add_to(total, census)
  for _, name in ipairs(SUMS) do total[name] = (total[name] or 0) + census[name] end
  total.amax = math.max(total.amax or 0, census.amax)
  total.norm = math.sqrt((total.norm or 0) ^ 2 + census.norm ^ 2)
  total.bins = total.bins or {}
  for e, n in pairs(census.bins) do total.bins[e] = (total.bins[e] or 0) + n end
end

--- Counts become shares of the values that are finite and not zero.
local function to_shares(census)
  local among = census.count - census.zeros - census.inf_count - census.nan_count
  for _, name in ipairs(SHARES) do census[name] = among > 0 and census[name] / among or 0 end
end

local function measure(list, scale)
  local total = {count = 0}
  local result = {scale = scale, total = total}
  for _, name in ipairs(SUMS) do total[name] = 0 end
  total.amax, total.norm, total.bins = 0, 0, {}
  for _, entry in ipairs(list) do
    local grad = entry.param.grad
    if grad then
      local census = core.census(grad, scale)
      census.name = entry.name
      add_to(total, census)
      to_shares(census)
      result[#result + 1] = census
    end
  end
  to_shares(total)
  return setmetatable(result, Histogram)
end

local histogram_spec = {scale = {"number", 1.0, options.above(0)}}

--- amp.histogram(model | optimizer [, {scale = 1}]): the gradients of each parameter, as .grad has them, counted by the
--- exponent of float32: bins[e] values from 2^e to 2^(e+1), zeros, subnormals, inf_count, nan_count, amax, norm; and of
--- the values that are neither zero nor infinite nor NaN the share that float16 would flush to zero (flushed), hold
--- with fewer bits (f16_subnormal) or turn into infinity (overflow) when multiplied by scale.  An array in the order of
--- the parameters, with `total`; it prints as a picture.  Parameters without a gradient are left out.
---@param source Module|Optimizer
---@param opts {scale: number?}?
---@return GradHistogram
local function histogram(source, opts)
  if not is_source(source) then raise("amp.histogram: expected a model or an optimizer, not %s", describe(source)) end
  local list = {}
  collect(list, {}, source)
  return measure(list, options.check("amp.histogram", opts, histogram_spec).scale)
end

-- ====== Text ======

local function percent(share)
  if share == 0 then return "0" end
  if share < 0.0001 then return "<0.01%" end
  return ("%.2f%%"):format(100 * share)
end

local function append(lines, more) table.move(more, 1, #more, #lines + 1, lines) end

--- Rows of texts as lines with columns; the first column to the left, the others to the right.
local function columns(rows)
  local width, lines = {}, {}
  for _, row in ipairs(rows) do
    for i, text in ipairs(row) do width[i] = math.max(width[i] or 0, #text) end
  end
  for r, row in ipairs(rows) do
    local parts = {}
    for i, text in ipairs(row) do
      local pad = (" "):rep(width[i] - #text)
      parts[i] = i == 1 and text .. pad or pad .. text
    end
    lines[r] = table.concat(parts, "  "):gsub("%s+$", "")
  end
  return lines
end

--- The table of parameters, as lines.
local function parameter_lines(measured)
  local rows = {{"parameter", "values", "amax", "norm", "inf", "nan", "flushed", "subnormal", "overflow"}}
  local function row(name, c)
    rows[#rows + 1] = {
      name, ("%d"):format(c.count), ("%.3g"):format(c.amax), ("%.3g"):format(c.norm), ("%d"):format(c.inf_count),
      ("%d"):format(c.nan_count), percent(c.flushed), percent(c.f16_subnormal), percent(c.overflow),
    }
  end
  for _, census in ipairs(measured) do row(census.name, census) end
  row("all", measured.total)
  return columns(rows)
end

--- The total's bins as bars: # where float16 has it in full, + as a subnormal, - lost, ! too large.
local function bars(measured)
  local total, low, high, most = measured.total, nil, nil, 0
  for e, n in pairs(total.bins) do
    low, high, most = math.min(low or e, e), math.max(high or e, e), math.max(most, n)
  end
  local lines = {}
  if not low then return lines end
  local shift = math.log(measured.scale, 2)
  for e = high, low, -1 do
    local n, at = total.bins[e] or 0, e + shift
    local mark = at >= 16 and "!" or at >= -14 and "#" or at >= -25 and "+" or "-"
    lines[#lines + 1] = (("2^%-5d %8d  %s"):format(e, n, mark:rep(math.ceil(50 * n / most)))):gsub("%s+$", "")
  end
  return lines
end

--- The histogram of all parameters as bars, and a line for each parameter.
function Histogram.__tostring(self)
  local lines = {("gradients by exponent; marks: as float16 at scale %.14g (# held, + subnormal, - flushed, ! overflow)")
    :format(self.scale)}
  append(lines, bars(self))
  append(lines, parameter_lines(self))
  return table.concat(lines, "\n")
end

-- ====== amp.report ======

---@class AmpReport
---@field scale number?
---@field policy string?
---@field steps integer? updates that the policy heard of
---@field skipped integer? steps
---@field overflow_rate number? share of the updates that record() has in which something was not finite
---@field culprits table[]? of the last skipped step: {name, inf_count, nan_count}
---@field parameters GradHistogram?
local Report = {}

--- The figures of a scaler.
local function scaler_figures(scaler, result)
  result.scale, result.policy, result.enabled = scaler:get_scale(), scaler.policy.name, scaler:is_enabled()
  local history = scaler:record()
  local found = 0
  for _, entry in ipairs(history) do
    if entry.found_inf then found = found + 1 end
  end
  result.steps, result.skipped = scaler.updates, scaler.skipped
  result.recent = #history
  result.overflow_rate = #history > 0 and found / #history or 0
  result.last_skip = scaler.last_skip and scaler.last_skip.step
  result.culprits = scaler.last_culprits
end

--- amp.report(scaler | model | optimizer, ...): what is known, as text when printed: of a scaler its scale, policy, steps,
--- skipped steps, overflow rate and the last culprits by name; of the parameters of models and optimizers, or else of the
--- optimizers that the scaler has stepped, largest gradient, norm, counts, and the shares that float16 would lose at the
--- scaler's scale (without one: at 1).  Gradients are taken as .grad has them: unscaled, after step() or unscale_().
---@param ... GradScaler|Module|Optimizer
---@return AmpReport
local function report(...)
  local grad_scaler = require "halfmoon.amp.grad_scaler"
  local result, list, seen, scaler, sources = {}, {}, {}, nil, 0
  if select("#", ...) == 0 then raise("amp.report: expected a scaler, a model or an optimizer") end
  for i = 1, select("#", ...) do
    local x = select(i, ...)
    if getmetatable(x) == grad_scaler.GradScaler and not scaler then
      scaler = x
    elseif is_source(x) then
      collect(list, seen, x)
      sources = sources + 1
    else
      raise("amp.report: argument %d must be a model, an optimizer or the only scaler, not %s", i, describe(x))
    end
  end
  if scaler then scaler_figures(scaler, result) end
  if scaler and sources == 0 then
    for optimizer in pairs(scaler.optimizers) do collect(list, seen, optimizer) end
  end
  result.parameters = measure(list, result.scale or 1)
  return setmetatable(result, Report)
end

local function scaler_lines(self)
  if not self.enabled then return {"scaler disabled"} end
  local lines = {
    ("scale %.14g (2^%.4g)  policy %s  steps %d  skipped %d"):format(self.scale, math.log(self.scale, 2), self.policy,
      self.steps, self.skipped),
    ("overflow rate %s in the last %d updates"):format(percent(self.overflow_rate), self.recent),
  }
  if self.last_skip then
    lines[3] = ("last skipped: step %d"):format(self.last_skip)
    local names = {}
    for i, culprit in ipairs(self.culprits or {}) do
      if i > 5 then break end
      names[i] = ("%s (%d inf, %d nan)"):format(culprit.name, culprit.inf_count, culprit.nan_count)
    end
    if #names > 0 then lines[3] = lines[3] .. "; culprits: " .. table.concat(names, ", ") end
    if self.culprits and #self.culprits > 5 then
      lines[3] = lines[3] .. (" and %d more"):format(#self.culprits - 5)
    end
  end
  return lines
end

--- The report as text.
function Report.__tostring(self)
  local lines = self.policy and scaler_lines(self) or {}
  if #self.parameters > 0 then
    lines[#lines + 1] = ("gradients, and their shares as float16 at scale %.14g:"):format(self.parameters.scale)
    append(lines, parameter_lines(self.parameters))
  else
    lines[#lines + 1] = "no parameter has a gradient"
  end
  return table.concat(lines, "\n")
end

return {histogram = histogram, report = report, collect = collect, is_source = is_source}
