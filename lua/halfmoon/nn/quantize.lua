--- nn/quantize.lua -- quantisation-aware training: FakeQuantize, QATLinear, QATConv2d, and nn.quantize, which puts them
--- into a model and takes the integers out of it.
--
--     nn.quantize.prepare_qat(model, {except = {"fc2"}})    -- then train as before, with autocast and scaler if wanted
--     local int8 = nn.quantize.convert(model)               -- name -> {weight = uint8, scale, zero_point, ...}
--
-- What an int8 kernel would read is rounded to what int8 can hold, in floating point, and gradients pass straight
-- through the rounding: of each Linear and Conv2d the input (one scale, affine) and the weight (one scale for each
-- output channel, symmetric).  Biases, sums and outputs stay floating.  Parameters are the model's own, under their
-- own names.
--
-- Under autocast the rounding is computed in float32, and its result cast for the matrix product like any operand.  An
-- activation that overflowed to infinity is limited to the end of its grid; it does not move the range (observers.lua).
-- A module that is called several times inside one hm.checkpoint region, or in several before backward, is run again
-- with the range it had seen last.

local core = require "halfmoon.core"
local class = require "halfmoon.nn.class"
local common = require "halfmoon.nn.common"
local conv = require "halfmoon.nn.conv"
local errors = require "halfmoon.errors"
local linear = require "halfmoon.nn.linear"
local observers = require "halfmoon.nn.observers"
local options = require "halfmoon.options"
local F = require "halfmoon.nn.functional"

local raise, describe = errors.raise, errors.describe

local layers = {}

-- ====== FakeQuantize ======

local KINDS = {
  moving_average = {observers.MovingAverageMinMaxObserver, observers.MovingAveragePerChannelMinMaxObserver},
  min_max = {observers.MinMaxObserver, observers.PerChannelMinMaxObserver},
}

local fake_spec = {
  observer = {"string|table", "moving_average"}, channels = {"integer"}, axis = {"integer"}, quant_min = {"integer"},
  quant_max = {"integer"}, symmetric = {"boolean"}, eps = {"number"}, averaging_constant = {"number"},
  device = {"string"},
}

--- The observer that the options ask for.
local function make_observer(where, opts)
  local given = opts.observer
  opts.observer = nil
  if class.is_module(given) then
    local name = next(opts)
    if name then raise("%s: option '%s' belongs to the observer, which is given", where, name) end
    if not given.calculate_qparams then raise("%s: %s is no observer", where, describe(given)) end
    return given
  end
  local kinds = KINDS[given]
  if not kinds then
    raise("%s: option 'observer' must be \"moving_average\", \"min_max\" or an observer, not %s", where,
      describe(given))
  end
  local channels = opts.channels
  opts.channels = nil
  if channels then return kinds[2](channels, opts) end
  return kinds[1](opts)
end

---@class FakeQuantize: Module
---@field scale Tensor float32, [] or [channels]
---@field zero_point Tensor int32, [] or [channels]
---@field observer Observer
---@field observer_enabled boolean
---@field fake_quant_enabled boolean
local FakeQuantize = class.class("FakeQuantize")

FakeQuantize._wide_buffers = true

--- nn.FakeQuantize{observer = "moving_average"|"min_max"|module, channels =, axis = 1, quant_min = -128, quant_max =
--- 127, symmetric = false, averaging_constant = 0.01, eps = 2^-23, device =}: watches the range of what passes in
--- training, and rounds it to integers of that range.  With channels, one range for each entry of dim axis.
---@param opts table?
function FakeQuantize:init(opts)
  local where = "nn.FakeQuantize"
  opts = options.check(where, opts, fake_spec)
  self.observer = make_observer(where, opts)
  self.quant_min, self.quant_max = self.observer.quant_min, self.observer.quant_max
  self.observer_enabled, self.fake_quant_enabled = true, true
  local scale, zero_point = self.observer:calculate_qparams()
  self:register_buffer("scale", scale)
  self:register_buffer("zero_point", zero_point)
end

--- x rounded to the grid; in training mode the range moves first.
---@param x Tensor
---@return Tensor
function FakeQuantize:forward(x)
  if self.observer_enabled and self.training and not core.is_recomputing() then
    self.observer(x)
    -- New tensors: a graph may hold the old ones.
    self.scale, self.zero_point = self.observer:calculate_qparams()
  end
  if not self.fake_quant_enabled then return x end
  return F.fake_quantize(x, {
    scale = self.scale, zero_point = self.zero_point, quant_min = self.quant_min, quant_max = self.quant_max,
    axis = self.observer.axis or nil,
  })
end

--- Watches the range from here on, or not.
---@param on boolean? default true
---@return FakeQuantize self
function FakeQuantize:enable_observer(on)
  self.observer_enabled = on ~= false
  return self
end

--- Keeps the range as it is.
---@return FakeQuantize self
function FakeQuantize:disable_observer() return self:enable_observer(false) end

--- Rounds from here on, or not.
---@param on boolean? default true
---@return FakeQuantize self
function FakeQuantize:enable_fake_quant(on)
  self.fake_quant_enabled = on ~= false
  return self
end

--- Lets numbers pass as they are.
---@return FakeQuantize self
function FakeQuantize:disable_fake_quant() return self:enable_fake_quant(false) end

function FakeQuantize:extra()
  return ("%d to %d%s%s"):format(self.quant_min, self.quant_max, self.observer_enabled and "" or ", not watching",
    self.fake_quant_enabled and "" or ", not rounding")
end

layers.FakeQuantize = FakeQuantize

-- ====== Layers ======

-- The grid of weights leaves -128 out, so that the largest weight of a channel lies on it, of either sign.
local WEIGHT = {quant_min = -127, quant_max = 127, symmetric = true, averaging_constant = 1}

--- A FakeQuantize of the defaults and what the user asks for; false where it is switched off.
local function quantizer(where, given, defaults, place)
  if given == false then return false end
  if given == true then given = nil end
  local opts = {device = place.device}
  local kind = given and given.observer
  for name, value in pairs(defaults) do
    local fits = name ~= "averaging_constant" or kind == nil or kind == "moving_average"
    if fits and not class.is_module(kind) then opts[name] = value end
  end
  if class.is_module(kind) then
    raise("%s: one observer cannot serve all layers\n  hint: give its name, or set layer.weight_fake_quant", where)
  end
  for name, value in pairs(given or {}) do opts[name] = value end
  return FakeQuantize(opts)
end

local layer_spec = {weight = {"table|boolean"}, activation = {"table|boolean"}}

--- Makes a layer what another is, with the same parameters, hooks and mode, and gives it quantizers.
local function take_over(self, where, layer, kind, opts)
  if not class.is_module(layer) or getmetatable(layer) ~= kind.__instance then
    raise("%s: expected a %s, not %s", where, kind.__class, describe(layer))
  end
  opts = options.check(where, opts, layer_spec)
  for name, value in next, layer do rawset(self, name, value) end
  rawset(self, "_names", table.move(layer._names, 1, #layer._names, 1, {}))
  rawset(self, "_buffers", {})
  for name, kept in pairs(layer._buffers) do self._buffers[name] = kept end
  local weight = self.weight
  local by_channel = {channels = weight:size(1), axis = 1}
  for name, value in pairs(WEIGHT) do by_channel[name] = value end
  self.weight_fake_quant = quantizer(where, opts.weight, by_channel, weight)
  self.input_fake_quant = quantizer(where, opts.activation, {}, weight)
  self:train(layer.training)
  if self.weight_fake_quant then -- the weight is known already
    self.weight_fake_quant:train(true)(weight:detach())
    self.weight_fake_quant:train(layer.training)
  end
end

--- What the layer computes with: its weight and x, rounded.
local function rounded(self, x)
  local weight = self.weight
  if self.weight_fake_quant then weight = self.weight_fake_quant(weight) end
  if self.input_fake_quant then x = self.input_fake_quant(x) end
  return x, weight
end

---@class QATLinear: Linear
---@field weight_fake_quant FakeQuantize|false
---@field input_fake_quant FakeQuantize|false
local QATLinear = class.class("QATLinear", linear.Linear)

--- nn.QATLinear(linear, {weight = {...}|false, activation = {...}|false}): a Linear with the same parameters whose
--- input and weight are rounded to int8, and with its activation.  The options are those of nn.FakeQuantize.
---@param layer Linear
---@param opts {weight: table|false, activation: table|false}?
function QATLinear:init(layer, opts) take_over(self, "nn.QATLinear", layer, linear.Linear, opts) end

--- x [..., in] -> [..., out].
---@param x Tensor
---@return Tensor
function QATLinear:forward(x)
  local weight
  x, weight = rounded(self, x)
  return F.linear(x, weight, self.bias, common.activation_of(self))
end

layers.QATLinear = QATLinear

---@class QATConv2d: Conv2d
---@field weight_fake_quant FakeQuantize|false
---@field input_fake_quant FakeQuantize|false
local QATConv2d = class.class("QATConv2d", conv.Conv2d)

--- nn.QATConv2d(conv, {weight = {...}|false, activation = {...}|false}): a Conv2d with the same parameters whose
--- input and weight are rounded to int8.  The options are those of nn.FakeQuantize.
---@param layer Conv2d
---@param opts {weight: table|false, activation: table|false}?
function QATConv2d:init(layer, opts) take_over(self, "nn.QATConv2d", layer, conv.Conv2d, opts) end

--- x [N, C, H, W] -> [N, out, H', W'].
---@param x Tensor
---@return Tensor
function QATConv2d:forward(x)
  local weight
  x, weight = rounded(self, x)
  if self.pads then
    x = F.pad(x, self.pads, {mode = self.padding_mode == "zeros" and "constant" or self.padding_mode})
  end
  return F._conv2d(x, weight, self.bias, self.attrs)
end

layers.QATConv2d = QATConv2d

-- ====== nn.quantize ======

---@class halfmoon.quantize
local quantize = {}
layers.quantize = quantize

local QAT = {[linear.Linear.__instance] = QATLinear, [conv.Conv2d.__instance] = QATConv2d}

local function want_module(where, model)
  if not class.is_module(model) then raise("%s: expected a module, not %s", where, describe(model)) end
end

--- A test of names: whether one is in the list or below a name of it.  Raises for names that the model has not.
local function excluder(where, model, list)
  local known, set = {}, {}
  for name in model:named_modules() do known[#known + 1], known[name] = name, true end
  for _, name in ipairs(list) do
    if not known[name] then
      local near = type(name) == "string" and errors.closest(name, known)
      raise("%s: option 'except' names %s, which the model has not%s", where, describe(name),
        near and (", did you mean '%s'?"):format(near) or "")
    end
    set[name] = true
  end
  return function(name)
    while name do
      if set[name] then return true end
      name = name:match("^(.*)%.[^.]*$")
    end
    return false
  end
end

local prepare_spec = {
  weight = {"table|boolean"}, activation = {"table|boolean"}, except = {"string|table", nil},
}

--- Puts QAT layers in the place of every Linear and Conv2d of a model, in place; those under the names in except
--- (with all below them) stay.  Parameters stay the same tensors under the same names, so optimizers go on and float
--- state dicts load with strict = false.  weight and activation: options of nn.FakeQuantize, or false to leave that
--- floating; by default weights are symmetric int8 for each output channel, inputs affine int8.  Layers that other
--- code reads the weights of (MultiheadAttention's projections in, LSTM, GRU) are left floating.
---@param model Module
---@param opts {weight: table|false, activation: table|false, except: string|string[]}?
---@return Module model, or what replaces it if it is such a layer itself
function quantize.prepare_qat(model, opts)
  local where = "prepare_qat"
  want_module(where, model)
  opts = options.check(where, opts, prepare_spec)
  local except = opts.except or {}
  local excluded = excluder(where, model, type(except) == "table" and except or {except})
  local made, modules, count = {}, {}, 0
  for name, module in model:named_modules() do
    modules[#modules + 1] = module
    local new = QAT[getmetatable(module)]
    local own = rawget(module, "forward") and not rawget(module, "_policy") -- a forward that was put on this one alone
    if new and not own and not excluded(name) then
      made[module] = new(module, {weight = opts.weight, activation = opts.activation})
      count = count + 1
    end
  end
  if count == 0 then raise("prepare_qat: %s has no Linear or Conv2d to replace", model.__class) end
  for _, module in ipairs(modules) do
    for name, value in module:fields() do
      if made[value] then module[name] = made[value] end
    end
  end
  return made[model] or model
end

--- Calls a method of every FakeQuantize of a model.
local function each(where, model, method)
  want_module(where, model)
  for _, module in model:named_modules() do
    if module.fake_quant_enabled ~= nil then module[method](module) end
  end
  return model
end

--- All FakeQuantize modules of a model watch ranges from here on.
---@param model Module
---@return Module model
function quantize.enable_observer(model) return each("enable_observer", model, "enable_observer") end

--- All FakeQuantize modules of a model keep their ranges: what is usual for the last part of a training.
---@param model Module
---@return Module model
function quantize.disable_observer(model) return each("disable_observer", model, "disable_observer") end

--- All FakeQuantize modules of a model round from here on.
---@param model Module
---@return Module model
function quantize.enable_fake_quant(model) return each("enable_fake_quant", model, "enable_fake_quant") end

--- All FakeQuantize modules of a model let numbers pass as they are.
---@param model Module
---@return Module model
function quantize.disable_fake_quant(model) return each("disable_fake_quant", model, "disable_fake_quant") end

--- Runs fn(model) with the model in evaluation mode and nothing rounded, while all ranges are watched: what
--- post-training quantisation needs.  Modes and switches are put back afterwards, on an error too.
---@param model Module
---@param fn fun(model: Module) a few batches through the model
---@return Module model
function quantize.calibrate(model, fn)
  want_module("calibrate", model)
  if type(fn) ~= "function" then raise("calibrate: expected a function, not %s", describe(fn)) end
  local before = {}
  for _, module in model:named_modules() do
    before[module] = {module.training, module.observer_enabled, module.fake_quant_enabled}
  end
  local _ <close> = setmetatable({}, {__close = function()
    for module, state in pairs(before) do
      module.training = state[1]
      if state[2] ~= nil then module.observer_enabled, module.fake_quant_enabled = state[2], state[3] end
    end
  end})
  model:eval()
  for _, module in model:named_modules() do
    if module.fake_quant_enabled ~= nil then module:train():enable_observer():disable_fake_quant() end
  end
  local _ <close> = core.no_grad()
  fn(model)
  return model
end

-- ====== Integers ======

--- The integers of a tensor by a FakeQuantize, by the arithmetic of fake_quantize: uint8 counted from quant_min where
--- the grid has at most 256 points, else int32 as they are; and the zero point that goes with them.
local function integers(t, fake)
  local scale, zero_point, axis = fake.scale, fake.zero_point, fake.observer.axis
  if axis then
    local shape = {}
    for d = 1, t:dim() do shape[d] = d == axis and t:size(d) or 1 end
    scale, zero_point = scale:reshape(shape), zero_point:reshape(shape)
  end
  local wide = t.dtype == "float64" and "float64" or "float32"
  local q = (t:detach():to(wide) * (1 / scale:to(wide))):round() + zero_point:to(wide)
  q = q:clamp(fake.quant_min, fake.quant_max)
  if fake.quant_max - fake.quant_min > 255 then return q:to("int32"), fake.zero_point:clone() end
  return (q - fake.quant_min):to("uint8"), fake.zero_point - fake.quant_min
end

--- Scale, zero point and limits of a layer's input.
local function input_entry(fake)
  return {
    scale = fake.scale:clone(), zero_point = fake.zero_point:clone(), quant_min = fake.quant_min,
    quant_max = fake.quant_max,
  }
end

--- Freezes the ranges of a model that prepare_qat made, and gives its weights as integers: a table name of layer ->
--- entry. An entry has weight (uint8: int8 values are counted from quant_min, so that 0 of a weight is zero_point;
--- int32 for grids of more than 256 points), scale [out] (float32), zero_point [out] (int32), axis = 1, dtype of the
--- float weight, bias (a copy, or nil), activation (of a Linear that has one, by name), and input = {scale, zero_point,
--- quant_min, quant_max}, or nil where inputs stay floating. (weight - zero_point) * scale is, to the bit, what the
--- model computes with in evaluation mode: nn.quantize.dequantize.
---@param model Module
---@return table<string, table>
function quantize.convert(model)
  want_module("convert", model)
  local out, count = {}, 0
  local _ <close> = core.no_grad()
  for name, module in model:named_modules() do
    local fake = module.weight_fake_quant
    if class.is_module(fake) then
      local weight, zero_point = integers(module.weight, fake)
      out[name] = {
        weight = weight, scale = fake.scale:clone(), zero_point = zero_point, axis = fake.observer.axis or nil,
        dtype = module.weight.dtype, bias = module.bias and module.bias:detach():clone(),
        activation = common.activation_of(module),
        input = module.input_fake_quant and input_entry(module.input_fake_quant) or nil,
      }
      count = count + 1
    end
  end
  if count == 0 then
    raise("convert: %s has no layer with quantised weights\n  hint: nn.quantize.prepare_qat(model) first",
      model.__class)
  end
  quantize.disable_observer(model)
  return out
end

--- The weight of an entry of nn.quantize.convert as numbers: (weight - zero_point) * scale.
---@param entry table
---@return Tensor
function quantize.dequantize(entry)
  if type(entry) ~= "table" or not core.is_tensor(entry.weight) or not core.is_tensor(entry.scale) then
    raise("dequantize: expected an entry of nn.quantize.convert, not %s", describe(entry))
  end
  local _ <close> = core.no_grad()
  local wide = entry.dtype == "float64" and "float64" or "float32"
  local scale, zero_point = entry.scale:to(wide), entry.zero_point:to(wide)
  if entry.axis then
    local shape = {}
    for d = 1, entry.weight:dim() do shape[d] = d == entry.axis and entry.weight:size(d) or 1 end
    scale, zero_point = scale:reshape(shape), zero_point:reshape(shape)
  end
  return ((entry.weight:to(wide) - zero_point) * scale):to(entry.dtype or wide)
end

return layers
