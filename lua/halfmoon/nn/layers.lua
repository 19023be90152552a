--- nn/layers.lua -- layers with parameters: Linear, Conv2d; and those that only move data: MaxPool2d, Flatten.
--
-- Default first values are PyTorch's: weights uniform within 1 / sqrt(fan in) (He's rule with a = sqrt 5), biases too.

local core = require "halfmoon.core"
local class = require "halfmoon.nn.class"
local errors = require "halfmoon.errors"
local options = require "halfmoon.options"
local F = require "halfmoon.nn.functional"

local raise = errors.raise

local layers = {}

--- A size given to a constructor.
local function want_size(where, name, value)
  local size = math.tointeger(value)
  if not size or size < 1 then
    raise("%s: %s must be a whole number from 1, not %s", where, name, errors.describe(value))
  end
  return size
end

--- A parameter with uniform numbers in [-bound, bound).
local function uniform(shape, bound, opts)
  local _ <close> = core.no_grad()
  return class.Parameter(core.empty(shape, {dtype = opts.dtype, device = opts.device}):uniform_(-bound, bound))
end

-- ====== Linear ======

local linear_spec = {bias = {"boolean", true}, dtype = {"string", "float32"}, device = {"string", "cpu"}}

---@class Linear: Module
---@field weight Tensor [out, in]
---@field bias Tensor? [out]
local Linear = class.class("Linear")

--- nn.Linear(in, out, {bias = true, dtype =, device =}): x times the transpose of weight, plus bias.
function Linear:init(inputs, outputs, opts)
  opts = options.check("nn.Linear", opts, linear_spec)
  self.in_features = want_size("nn.Linear", "the number of inputs", inputs)
  self.out_features = want_size("nn.Linear", "the number of outputs", outputs)
  local bound = 1 / math.sqrt(self.in_features)
  self.weight = uniform({self.out_features, self.in_features}, bound, opts)
  if opts.bias then self.bias = uniform({self.out_features}, bound, opts) end
end

function Linear:forward(x) return F.linear(x, self.weight, self.bias) end

function Linear:extra()
  return ("%d -> %d%s"):format(self.in_features, self.out_features, self.bias and "" or ", no bias")
end

layers.Linear = Linear

-- ====== Conv2d ======

local conv_spec = {
  stride = {"integer|table", 1}, padding = {"integer|table", 0}, dilation = {"integer|table", 1},
  groups = {"integer", 1},
  bias = {"boolean", true}, dtype = {"string", "float32"}, device = {"string", "cpu"},
}

---@class Conv2d: Module
---@field weight Tensor [out, in / groups, kH, kW]
---@field bias Tensor? [out]
local Conv2d = class.class("Conv2d")

--- nn.Conv2d(in, out, kernel, {stride = 1, padding = 0, dilation = 1, groups = 1, bias = true}): convolution of [N, C,
--- H, W].
function Conv2d:init(inputs, outputs, kernel, opts)
  opts = options.check("nn.Conv2d", opts, conv_spec)
  self.in_channels = want_size("nn.Conv2d", "the number of input channels", inputs)
  self.out_channels = want_size("nn.Conv2d", "the number of output channels", outputs)
  if kernel == nil then raise("nn.Conv2d: the kernel size is missing, e.g. nn.Conv2d(%d, %d, 3)", inputs, outputs) end
  self.kernel_size = F._pair("nn.Conv2d", "kernel_size", kernel, 1)
  self.attrs = F._conv_options("nn.Conv2d",
    {stride = opts.stride, padding = opts.padding, dilation = opts.dilation, groups = opts.groups})
  local groups = self.attrs.groups
  if self.in_channels % groups ~= 0 or self.out_channels % groups ~= 0 then
    raise("nn.Conv2d: %d input and %d output channels cannot both be split into %d groups", self.in_channels,
      self.out_channels, groups)
  end
  local fan_in = self.in_channels // groups * self.kernel_size[1] * self.kernel_size[2]
  local bound = 1 / math.sqrt(fan_in)
  self.weight = uniform({self.out_channels, self.in_channels // groups, self.kernel_size[1], self.kernel_size[2]},
    bound, opts)
  if opts.bias then self.bias = uniform({self.out_channels}, bound, opts) end
end

function Conv2d:forward(x) return F._conv2d(x, self.weight, self.bias, self.attrs) end

--- ", stride 2x2" unless the pair is the default.
local function unless(name, pair, default)
  if pair[1] == default and pair[2] == default then return "" end
  return pair[1] == pair[2] and (", %s %d"):format(name, pair[1]) or (", %s %dx%d"):format(name, pair[1], pair[2])
end

function Conv2d:extra()
  local attrs = self.attrs
  return ("%d -> %d, kernel %dx%d%s%s%s%s%s"):format(
    self.in_channels, self.out_channels, self.kernel_size[1], self.kernel_size[2],
    unless("stride", attrs.stride, 1), unless("padding", attrs.padding, 0), unless("dilation", attrs.dilation, 1),
    attrs.groups > 1 and (", groups %d"):format(attrs.groups) or "", self.bias and "" or ", no bias")
end

layers.Conv2d = Conv2d

-- ====== Layers without parameters ======

---@class MaxPool2d: Module
local MaxPool2d = class.class("MaxPool2d")

--- nn.MaxPool2d(kernel, {stride = kernel, padding = 0}): the largest value in each window.
function MaxPool2d:init(kernel, opts) self.attrs = F._pool_options("nn.MaxPool2d", kernel, opts) end

function MaxPool2d:forward(x) return F._max_pool2d(x, self.attrs) end

function MaxPool2d:extra()
  local attrs = self.attrs
  local same = attrs.stride[1] == attrs.kernel_size[1] and attrs.stride[2] == attrs.kernel_size[2]
  return ("kernel %dx%d%s%s"):format(attrs.kernel_size[1], attrs.kernel_size[2],
    same and "" or unless("stride", attrs.stride, 0), unless("padding", attrs.padding, 0))
end

layers.MaxPool2d = MaxPool2d

---@class Flatten: Module
local Flatten = class.class("Flatten")

--- nn.Flatten([first = 2 [, last = -1]]): joins dims.
function Flatten:init(first, last) self.first, self.last = first or 2, last or -1 end

function Flatten:forward(x) return x:flatten(self.first, self.last) end

layers.Flatten = Flatten

return layers
