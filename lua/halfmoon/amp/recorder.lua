--- amp/recorder.lua -- amp.record_gradients: what gradients a training had, step by step, as a file that amp.simulate
-- replays through loss-scale policies.
--
--     local rec <close> = amp.record_gradients("run.jsonl", model)
--     for x, y in loader:batches() do
--       opt:zero_grad()
--       local loss
--       do
--         local _ <close> = amp.autocast {dtype = "f16", backward = "float32"}
--         loss = nn.functional.cross_entropy(model(x), y)
--       end
--       loss:backward()
--       rec:step()
--       opt:step()
--     end
--
-- What is recorded.  Every gradient on its way through the network that float16 training would hold in float16: of the
-- results of ops that autocast computes in a half dtype, and of those that follow them; not those of float32 weights,
-- which are made in float32.  The backward must be one that loses nothing: autocast("bf16"), autocast{dtype = "f16",
-- backward = "float32"}, or no autocast at all; then the ops' classes say which gradients float16 would hold.  What the
-- backward of one op holds for itself alone is not seen.  Of the forward, the largest result of matrix products and
-- convolutions: where float16 cannot hold it, no scale helps.  Of the parameters, what policies can ask for.
--
-- The file.  Its first line is {"trace": "halfmoon gradients", "version": 1}; then a line for each step:
--     step, scale      scale: what the loss was multiplied by; everything else is divided by it
--     amax, top        the largest gradient held, and whose result it belongs to: "Net.conv1 conv2d"
--     bad_count        values held that were infinite or NaN: the recording itself overflowed
--     histogram        {zeros, subnormals, exponents = {"-12": 30, ...}} of all that is held, by float32 exponent
--     tensors          {name, count, amax, zeros, subnormals, exponents} of each, in the order of the backward
--     forward          {amax, top}
--     params           {amax, norm, inf_count, nan_count, histogram, per_param = {{name, amax, norm, ...}, ...}}

local core = require "halfmoon.core"
local errors = require "halfmoon.errors"
local json = require "halfmoon.json"
local options = require "halfmoon.options"
local report = require "halfmoon.amp.report"

local raise, describe = errors.raise, errors.describe

local recorder = {}

recorder.HEADER = {trace = "halfmoon gradients", version = 1}

---@class GradientRecorder
---@field path string
---@field steps integer recorded so far
local Recorder = {}
Recorder.__index = Recorder

local current -- the recording that is going on

-- ====== What the engine tells ======

--- "Net.conv1 conv2d", or "relu at train.lua:12" outside of modules.
local function name_of(names, op, place)
  local key = op .. "\n" .. (place or "")
  local name = names[key]
  if not name then
    local module = place and place:match("\n  in (%u[%w_.]*)")
    local line = place and place:match("^[^\n]+")
    name = module and module .. " " .. op or line and ("%s at %s"):format(op, line) or op
    names[key] = name
  end
  return name
end

--- Adds the counts of one tensor to others.
local function add_counts(to, seen)
  to.amax = math.max(to.amax, seen.amax)
  to.zeros, to.subnormals = to.zeros + seen.zeros, to.subnormals + seen.subnormals
  for e, n in pairs(seen.bins) do to.bins[e] = (to.bins[e] or 0) + n end
end

local function no_counts() return {amax = 0.0, zeros = 0, subnormals = 0, bins = {}} end

--- Gradients of a step that are held: {total, bad_count, top, list, by_name}.
local function no_gradients() return {total = no_counts(), bad_count = 0, list = {}, by_name = {}} end

local function add_gradient(held, name, seen)
  local one = held.by_name[name]
  if not one then
    one = no_counts()
    one.name, one.count = name, 0
    held.by_name[name] = one
    held.list[#held.list + 1] = one
  end
  if not held.top or seen.amax > held.total.amax then held.top = name end
  held.bad_count = held.bad_count + seen.inf_count + seen.nan_count
  one.count = one.count + seen.count
  add_counts(held.total, seen)
  add_counts(one, seen)
end

local function clear(self)
  self.held, self.foretold, self.forward = no_gradients(), no_gradients(), {amax = 0.0}
end

--- A function for core.gradient_watch.
local function listener(self)
  return function(seen)
    local name = name_of(self.names, seen.op, seen.recorded)
    if not seen.forward then
      add_gradient(seen.foretold and self.foretold or self.held, name, seen)
    elseif seen.amax >= self.forward.amax then
      self.forward.amax, self.forward.top = seen.amax, name
    end
  end
end

-- ====== Lines ======

--- Counts by exponent as a line has them: of values divided by 2^shift.
local function histogram_of(counts, shift)
  local exponents = {}
  for e, n in pairs(counts.bins) do exponents[tostring(e - shift)] = n end
  return {zeros = counts.zeros, subnormals = counts.subnormals, exponents = exponents}
end

--- What a line says of the parameters; nil if none has a gradient.
local function figures_of_params(params, scale, shift)
  local all, sum = no_counts(), 0.0
  local figures = {inf_count = 0, nan_count = 0, per_param = {}}
  for _, entry in ipairs(params) do
    local grad = entry.param.grad
    if grad then
      local census = core.census(grad)
      add_counts(all, census)
      sum = sum + (census.norm / scale) ^ 2
      figures.inf_count = figures.inf_count + census.inf_count
      figures.nan_count = figures.nan_count + census.nan_count
      figures.per_param[#figures.per_param + 1] = {
        name = entry.name, amax = census.amax / scale, norm = census.norm / scale, inf_count = census.inf_count,
        nan_count = census.nan_count,
      }
    end
  end
  if #figures.per_param == 0 then return end
  figures.amax, figures.norm, figures.histogram = all.amax / scale, math.sqrt(sum), histogram_of(all, shift)
  return figures
end

--- What a line says of each tensor.
local function figures_of_tensors(list, scale, shift)
  local all = {}
  for i, one in ipairs(list) do
    local figures = histogram_of(one, shift)
    figures.name, figures.count, figures.amax = one.name, one.count, one.amax / scale
    all[i] = figures
  end
  return all
end

--- Writes a line at once, so that a run that dies leaves all before.
local function write(self, data)
  local ok, why = self.file:write(json.encode(data), "\n")
  if ok then ok, why = self.file:flush() end
  if ok then return end
  self:close()
  raise("record_gradients: %s cannot be written: %s", self.path, why)
end

-- ====== The recording ======

--- The exponent of a power of two.
local function exponent_of(scale)
  local fraction, exponent
  if type(scale) == "number" and scale > 0 and scale < math.huge then
    exponent = math.log(scale, 2)
    exponent = math.tointeger(exponent // 1)
    fraction = scale / 2.0 ^ exponent
  end
  if fraction ~= 1 then
    raise("record_gradients: step(scale): the scale of the loss must be a power of two, not %s", describe(scale))
  end
  return exponent
end

--- Ends a step: what backward made since the last one becomes a line of the file.  Call it after backward(), and
--- before the gradients are unscaled, clipped or cleared.
---@param scale number? what the loss was multiplied by, a power of two (1)
function Recorder:step(scale)
  if current ~= self then raise("record_gradients: step(): the recording of %s has ended", self.path) end
  scale = scale or 1.0
  local shift = exponent_of(scale)
  local held = #self.held.list > 0 and self.held or self.foretold
  local params = figures_of_params(self.params, scale, shift)
  if #held.list == 0 and not params then
    raise("record_gradients: step(): no gradient was made since the last step\n"
      .. "  hint: call it after backward(), and before zero_grad()")
  end
  self.steps = self.steps + 1
  local line = {
    step = self.steps, scale = scale, amax = held.total.amax / scale, top = held.top, bad_count = held.bad_count,
    histogram = histogram_of(held.total, shift), params = params,
    forward = self.forward.top and self.forward or nil,
    tensors = self.per_tensor and figures_of_tensors(held.list, scale, shift) or nil,
  }
  clear(self)
  write(self, line)
end

--- Ends the recording and closes the file.
function Recorder:close()
  if current ~= self then return end
  current = nil
  core.gradient_watch(nil)
  local scope = self.scope
  self.scope = nil
  getmetatable(scope).__close(scope)
  self.file:close()
end

function Recorder:__close() self:close() end

local spec = {per_tensor = {"boolean", true}}

local function open(path, source, opts)
  if type(path) ~= "string" then raise("record_gradients: the path must be a string, not %s", describe(path)) end
  if not report.is_source(source) then
    raise("record_gradients: expected a model or an optimizer, not %s", describe(source))
  end
  local checked = options.check("record_gradients", opts, spec)
  if current then
    raise("record_gradients: %s is being recorded already\n  hint: close that recording first", current.path)
  end
  local file, why = io.open(path, "w")
  if not file then raise("record_gradients: %s", why) end
  local self = setmetatable({
    path = path, file = file, steps = 0, params = {}, names = {}, per_tensor = checked.per_tensor,
  }, Recorder)
  report.collect(self.params, {}, source)
  clear(self)
  self.scope = core.detect_anomaly {places = true}
  current = self
  core.gradient_watch(listener(self))
  write(self, recorder.HEADER)
  return self
end

--- Ends a recording after its function.
local function finish(self, ok, ...)
  self:close()
  if not ok then error((...), 0) end
  return ...
end

--- amp.record_gradients(path, model | optimizer [, {per_tensor = true}] [, fn, ...]): records, for amp.simulate, which
--- gradients a float16 backward would hold, while the training runs with a backward that loses nothing.  Returns the
--- recording: rec:step([scale]) after each backward() writes a line, rec:close() ends it; it is a scope for
--- `local rec <close> =`, too.  With a function: calls fn(rec, ...), ends, and returns what it returned.  One recording
--- at a time.  It looks at all values: a step of the demo's network takes 1.6 times as long.
---@param path string
---@param source Module|Optimizer whose parameters' gradients are recorded, too
---@param opts {per_tensor: boolean?}|function|nil per_tensor = false leaves out the figures of each tensor
---@param fn function?
---@param ... any further arguments of fn
---@return GradientRecorder|any ...
function recorder.record_gradients(path, source, opts, fn, ...)
  if type(opts) == "function" then return recorder.record_gradients(path, source, nil, opts, fn, ...) end
  if fn ~= nil and type(fn) ~= "function" then
    raise("record_gradients: expected a function, not %s", describe(fn))
  end
  local self = open(path, source, opts)
  if not fn then return self end
  return finish(self, pcall(fn, self, ...))
end

return recorder
