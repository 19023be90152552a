--- amp/trace.lua -- a scaler's life as a file: each update a line of JSON.
--
--     scaler = amp.GradScaler{trace = "run.jsonl"}
--     amp.trace(scaler, "run.jsonl", {histogram = true})
--     amp.trace(scaler, nil)                              -- ends it
--
-- A line has: step, policy, scale (the gradients were made with), new_scale, event, found_inf, inf_count, nan_count, and
-- unless the scaler is asynchronous on a GPU: norm and amax of the unscaled finite gradients, and culprits, {name,
-- inf_count, nan_count} each, nearest the loss first.  A policy that failed or stopped adds message.  With histogram:
-- {zeros, subnormals, exponents = {"-12": 30, ...}}, counts by the exponent of float32.  With per_param: {name, amax, norm,
-- inf_count, nan_count} of each parameter.  Each line is written out at once, so a run that dies leaves them all.

local errors = require "halfmoon.errors"
local json = require "halfmoon.json"
local options = require "halfmoon.options"

local raise, describe = errors.raise, errors.describe

---@class ScaleTracer
---@field file file*
---@field path string
---@field opts {histogram: boolean, per_param: boolean}
local Tracer = {}
Tracer.__index = Tracer

local spec = {histogram = {"boolean", false}, per_param = {"boolean", false}, append = {"boolean", false}}

--- Adds to what the engine is to measure.
function Tracer:want(wanted)
  wanted.histogram = wanted.histogram or self.opts.histogram
  wanted.per_param = wanted.per_param or self.opts.per_param
end

--- {[-12] = 30, zeros = 2, ...} with strings as keys, as JSON objects have them.
local function histogram_of(bins)
  if not bins then return end
  local exponents = {}
  for e, count in pairs(bins) do
    if math.type(e) == "integer" then exponents[tostring(e)] = count end
  end
  return {zeros = bins.zeros, subnormals = bins.subnormals, exponents = exponents}
end

--- Ends the trace and closes the file.
function Tracer:close(scaler)
  self.file:close()
  scaler.tracer = nil
end

--- Writes one update.  heard: what the policy heard; record: what update() returns.
function Tracer:write(scaler, heard, record)
  local line = {
    step = heard.step, policy = scaler.policy.name, event = record.event, scale = heard.scale or record.old_scale,
    new_scale = record.new_scale, found_inf = heard.found_inf, inf_count = heard.inf_count,
    nan_count = heard.nan_count, norm = heard.norm, amax = heard.amax, message = record.message,
    culprits = scaler.culprit and scaler.last_culprits or nil,
    histogram = self.opts.histogram and histogram_of(heard.histogram) or nil,
    per_param = self.opts.per_param and heard.per_param or nil,
  }
  local ok, why = self.file:write(json.encode(line), "\n")
  if ok then ok, why = self.file:flush() end
  if ok then return end
  io.stderr:write(("halfmoon: the trace %s ends at step %d: %s\n"):format(self.path, heard.step, why))
  self:close(scaler)
  require("halfmoon.amp.grad_scaler").want(scaler)
end

local trace = {}

--- amp.trace(scaler, path [, {histogram, per_param, append}]): writes each further update of the scaler to a file, as a
--- line of JSON: step, scale, new_scale, event, found_inf, inf_count, nan_count, norm, amax, culprits, and if asked for
--- the histogram of exponents and the figures of each parameter.  path = nil ends it and closes the file.
--- append = true keeps the lines that the file has.
---@param scaler GradScaler
---@param path string?
---@param opts {histogram: boolean?, per_param: boolean?, append: boolean?}?
---@return boolean? ok nil, a message and a code where the file cannot be opened
---@return string? message
---@return integer? code
function trace.trace(scaler, path, opts)
  local grad_scaler = require "halfmoon.amp.grad_scaler"
  if getmetatable(scaler) ~= grad_scaler.GradScaler then
    raise("amp.trace: expected a GradScaler, not %s", describe(scaler))
  end
  if path ~= nil and type(path) ~= "string" then
    raise("amp.trace: the path must be a string or nil, not %s", describe(path))
  end
  local checked = options.check("amp.trace", opts, spec)
  if scaler.async and (checked.histogram or checked.per_param) then
    raise("amp.trace: a scaler with async = true has neither histogram nor per_param\n  hint: make it without async")
  end
  local file, message, code
  if path then
    file, message, code = io.open(path, checked.append and "a" or "w")
    if not file then return nil, message, code end
  end
  if scaler.tracer then scaler.tracer:close(scaler) end
  if file then scaler.tracer = setmetatable({file = file, path = path, opts = checked}, Tracer) end
  grad_scaler.want(scaler)
  return true
end

--- For GradScaler{trace = path or {path, histogram = ...}}: raises if the file cannot be opened.
---@param scaler GradScaler
---@param given string|table
function trace.begin(scaler, given)
  local path, opts = given, {}
  if type(given) == "table" then
    path = given[1]
    for name, value in pairs(given) do
      if name ~= 1 then opts[name] = value end
    end
    if type(path) ~= "string" then raise("GradScaler: option 'trace' must be a path, or {path, histogram = true}") end
  end
  local ok, message = trace.trace(scaler, path, opts)
  if not ok then raise("GradScaler: trace: %s", message) end
end

return trace
