--- nn/conv.lua -- convolutions: Conv1d, Conv2d, ConvTranspose2d; and Upsample.
--
-- First values are PyTorch's: uniform within 1 / sqrt(fan in), weights and biases (He's rule with a = sqrt 5).

local class = require "halfmoon.nn.class"
local common = require "halfmoon.nn.common"
local errors = require "halfmoon.errors"
local options = require "halfmoon.options"
local F = require "halfmoon.nn.functional"

local raise = errors.raise
local want_size, unless = common.want_size, common.unless

local layers = {}

-- ====== What all have ======

local conv_spec = common.with_factory {
  stride = {"integer|table", 1}, padding = {"integer|table|string", 0}, dilation = {"integer|table", 1},
  groups = {"integer", 1, options.at_least(1)}, bias = {"boolean", true},
  padding_mode = {"string", "zeros", options.one_of("zeros", "reflect", "replicate", "circular")},
}

--- Channels and groups, checked, as fields of the layer.
local function set_channels(self, where, inputs, outputs, kernel, groups)
  self.in_channels = want_size(where, "the number of input channels", inputs)
  self.out_channels = want_size(where, "the number of output channels", outputs)
  if kernel == nil then raise("%s: the kernel size is missing, e.g. %s(%d, %d, 3)", where, where, inputs, outputs) end
  if self.in_channels % groups ~= 0 or self.out_channels % groups ~= 0 then
    raise("%s: %d input and %d output channels cannot both be split into %d groups", where, self.in_channels,
      self.out_channels, groups)
  end
  self.groups = groups
end

--- Weight of a shape and bias; fan in is what one row of the weight holds.
local function set_weights(self, shape, opts)
  local fan_in = 1
  for d = 2, #shape do fan_in = fan_in * shape[d] end
  local bound = 1 / math.sqrt(fan_in)
  self.weight = common.uniform(shape, bound, opts)
  if opts.bias then self.bias = common.uniform({self.out_channels}, bound, opts) end
end

--- The option padding as numbers: "valid" is none, "same" keeps the size where the stride is 1.  Returns padding for the
--- convolution and, where the sides differ, what F.pad is to add first.
local function read_padding(where, padding, kernel, dilation, stride)
  if type(padding) ~= "string" then return padding end
  if padding == "valid" then return 0 end
  if padding ~= "same" then
    raise("%s: option 'padding' must be a number, an array, \"same\" or \"valid\", not \"%s\"", where, padding)
  end
  local sides, even, pads = {}, true, {}
  for i = 1, #kernel do
    if stride[i] ~= 1 then raise("%s: padding = \"same\" needs a stride of 1, not %d", where, stride[i]) end
    local total = dilation[i] * (kernel[i] - 1)
    sides[i] = total // 2
    even = even and total % 2 == 0
    pads[2 * (#kernel - i) + 1], pads[2 * (#kernel - i) + 2] = total // 2, total - total // 2
  end
  if even then return sides end
  return 0, pads
end

--- {left, right} of the last dim first, as F.pad takes them, for equal padding of both sides.
local function both_sides(padding)
  local pads = {}
  for i = #padding, 1, -1 do
    pads[#pads + 1], pads[#pads + 2] = padding[i], padding[i]
  end
  return pads
end

--- The one-line form of a convolution.
local function conv_text(self, stride, padding, dilation)
  return ("%d -> %d, kernel %s%s%s%s%s%s%s"):format(
    self.in_channels, self.out_channels, common.by(self.kernel_size), unless("stride", stride, 1),
    type(padding) == "string" and (", padding " .. padding) or unless("padding", padding, 0),
    unless("dilation", dilation, 1), self.groups > 1 and (", groups %d"):format(self.groups) or "",
    self.padding_mode and self.padding_mode ~= "zeros" and ", " .. self.padding_mode or "", self.bias and "" or ", no bias")
end

-- ====== Conv2d ======

---@class Conv2d: Module
---@field weight Tensor [out, in / groups, kH, kW]
---@field bias Tensor? [out]
local Conv2d = class.class("Conv2d")

--- nn.Conv2d(in, out, kernel, {stride = 1, padding = 0, dilation = 1, groups = 1, bias = true, padding_mode = "zeros"}):
--- convolution of [N, C, H, W].  padding may be "same" or "valid"; padding_mode may be "reflect", "replicate", "circular".
---@param inputs integer
---@param outputs integer
---@param kernel integer|integer[]
---@param opts table?
function Conv2d:init(inputs, outputs, kernel, opts)
  local where = "nn.Conv2d"
  opts = options.check(where, opts, conv_spec)
  set_channels(self, where, inputs, outputs, kernel, opts.groups)
  self.kernel_size = F._pair(where, "kernel_size", kernel, 1)
  local stride, dilation = F._pair(where, "stride", opts.stride, 1), F._pair(where, "dilation", opts.dilation, 1)
  local padding, uneven = read_padding(where, opts.padding, self.kernel_size, dilation, stride)
  self.attrs = F._conv_options(where, {stride = stride, padding = padding, dilation = dilation, groups = opts.groups})
  self.padding = type(opts.padding) == "string" and opts.padding or self.attrs.padding
  self.padding_mode, self.pads = opts.padding_mode, uneven or false
  if opts.padding_mode ~= "zeros" then
    self.pads = uneven or both_sides(self.attrs.padding)
    self.attrs.padding = {0, 0}
  end
  set_weights(self, {self.out_channels, self.in_channels // opts.groups, table.unpack(self.kernel_size)}, opts)
end

--- x [N, C, H, W] -> [N, out, H', W'].
---@param x Tensor
---@return Tensor
function Conv2d:forward(x)
  if self.pads then x = F.pad(x, self.pads, {mode = self.padding_mode == "zeros" and "constant" or self.padding_mode}) end
  return F._conv2d(x, self.weight, self.bias, self.attrs)
end

function Conv2d:extra() return conv_text(self, self.attrs.stride, self.padding, self.attrs.dilation) end

layers.Conv2d = Conv2d

-- ====== Conv1d ======

---@class Conv1d: Module
---@field weight Tensor [out, in / groups, k]
---@field bias Tensor? [out]
local Conv1d = class.class("Conv1d")

--- A number or an array of one, as an array of one.
local function single(where, name, value, low)
  if type(value) == "table" then value = #value == 1 and value[1] or value end
  local n = math.tointeger(value)
  if not n or n < low then
    raise("%s: '%s' must be a whole number of at least %d, not %s", where, name, low, errors.describe(value))
  end
  return {n}
end

--- nn.Conv1d(in, out, kernel, {stride = 1, padding = 0, dilation = 1, groups = 1, bias = true, padding_mode = "zeros"}):
--- convolution of [N, C, L].
---@param inputs integer
---@param outputs integer
---@param kernel integer
---@param opts table?
function Conv1d:init(inputs, outputs, kernel, opts)
  local where = "nn.Conv1d"
  opts = options.check(where, opts, conv_spec)
  set_channels(self, where, inputs, outputs, kernel, opts.groups)
  self.kernel_size = single(where, "kernel_size", kernel, 1)
  self.stride, self.dilation = single(where, "stride", opts.stride, 1), single(where, "dilation", opts.dilation, 1)
  local padding, uneven = read_padding(where, opts.padding, self.kernel_size, self.dilation, self.stride)
  padding = single(where, "padding", padding, 0)
  self.padding = type(opts.padding) == "string" and opts.padding or padding
  self.padding_mode, self.pads = opts.padding_mode, uneven or false
  if opts.padding_mode ~= "zeros" then
    self.pads = uneven or both_sides(padding)
    padding = {0}
  end
  self.attrs = F._conv1d_options(where,
    {stride = self.stride[1], padding = padding[1], dilation = self.dilation[1], groups = opts.groups})
  set_weights(self, {self.out_channels, self.in_channels // opts.groups, self.kernel_size[1]}, opts)
end

--- x [N, C, L] -> [N, out, L'].
---@param x Tensor
---@return Tensor
function Conv1d:forward(x)
  if self.pads then x = F.pad(x, self.pads, {mode = self.padding_mode == "zeros" and "constant" or self.padding_mode}) end
  return F._conv1d(x, self.weight, self.bias, self.attrs)
end

function Conv1d:extra() return conv_text(self, self.stride, self.padding, self.dilation) end

layers.Conv1d = Conv1d

-- ====== ConvTranspose2d ======

local conv_transpose_spec = common.with_factory {
  stride = {"integer|table", 1}, padding = {"integer|table", 0}, output_padding = {"integer|table", 0},
  groups = {"integer", 1, options.at_least(1)}, bias = {"boolean", true}, dilation = {"integer|table", 1},
}

---@class ConvTranspose2d: Module
---@field weight Tensor [in, out / groups, kH, kW]
---@field bias Tensor? [out]
local ConvTranspose2d = class.class("ConvTranspose2d")

--- nn.ConvTranspose2d(in, out, kernel, {stride = 1, padding = 0, output_padding = 0, groups = 1, bias = true, dilation = 1}):
--- transposed convolution of [N, C, H, W], the gradient of a Conv2d by its input.
---@param inputs integer
---@param outputs integer
---@param kernel integer|integer[]
---@param opts table?
function ConvTranspose2d:init(inputs, outputs, kernel, opts)
  local where = "nn.ConvTranspose2d"
  opts = options.check(where, opts, conv_transpose_spec)
  set_channels(self, where, inputs, outputs, kernel, opts.groups)
  self.kernel_size = F._pair(where, "kernel_size", kernel, 1)
  self.attrs = F._conv_transpose_options(where, {
    stride = opts.stride, padding = opts.padding, output_padding = opts.output_padding, dilation = opts.dilation,
    groups = opts.groups,
  })
  set_weights(self, {self.in_channels, self.out_channels // opts.groups, table.unpack(self.kernel_size)}, opts)
end

--- x [N, C, H, W] -> [N, out, H', W'].
---@param x Tensor
---@return Tensor
function ConvTranspose2d:forward(x) return F._conv_transpose2d(x, self.weight, self.bias, self.attrs) end

function ConvTranspose2d:extra()
  local attrs = self.attrs
  return conv_text(self, attrs.stride, attrs.padding, attrs.dilation) .. unless("output padding", attrs.output_padding, 0)
end

layers.ConvTranspose2d = ConvTranspose2d

-- ====== Upsample ======

local upsample_spec = {
  size = {"integer|table"}, scale_factor = {"number|table"},
  mode = {"string", "nearest", options.one_of("nearest", "linear", "bilinear")}, align_corners = {"boolean"},
}

---@class Upsample: Module
local Upsample = class.class("Upsample")

--- nn.Upsample{size = | scale_factor =, mode = "nearest"|"bilinear"|"linear", align_corners =}: images resampled.
---@param opts {size: integer|integer[], scale_factor: number|number[], mode: string, align_corners: boolean}
function Upsample:init(opts)
  opts = options.check("nn.Upsample", opts, upsample_spec)
  if (opts.size == nil) == (opts.scale_factor == nil) then
    raise("nn.Upsample: give one of size and scale_factor%s", opts.size and ", not both" or "")
  end
  self.options = opts
end

--- x [N, C, H, W] or [N, C, L], resampled.
---@param x Tensor
---@return Tensor
function Upsample:forward(x) return F.interpolate(x, self.options) end

function Upsample:extra()
  local o = self.options
  local what = o.size or o.scale_factor
  local text = type(what) == "table" and common.by(what) or ("%g"):format(what)
  return ("%s %s, %s%s"):format(o.size and "size" or "times", text, o.mode, o.align_corners and ", corners aligned" or "")
end

layers.Upsample = Upsample

return layers
