--- nn/pooling.lua -- pooling layers: the largest or mean value of windows.

local class = require "halfmoon.nn.class"
local common = require "halfmoon.nn.common"
local errors = require "halfmoon.errors"
local options = require "halfmoon.options"
local F = require "halfmoon.nn.functional"

local unless = common.unless

local layers = {}

-- ====== Windows that slide ======

--- "kernel 3x3, stride 2, padding 1"; the stride is the kernel size unless said otherwise.
local function window_text(attrs)
  local kernel, stride = attrs.kernel_size, attrs.stride
  local same = stride[1] == kernel[1] and stride[2] == kernel[2]
  return ("kernel %s%s%s%s%s"):format(common.by(kernel), same and "" or unless("stride", stride, 0),
    unless("padding", attrs.padding, 0), attrs.dilation and unless("dilation", attrs.dilation, 1) or "",
    attrs.ceil_mode and ", ceil" or "")
end

---@class MaxPool2d: Module
local MaxPool2d = class.class("MaxPool2d")

--- nn.MaxPool2d(kernel, {stride = kernel, padding = 0, dilation = 1, ceil_mode = false, return_indices = false}): the
--- largest value in each window; NaN wins.
---@param kernel integer|integer[]
---@param opts table?
function MaxPool2d:init(kernel, opts)
  local with_indices
  self.attrs, with_indices = F._pool_options("nn.MaxPool2d", kernel, opts)
  self.kernel_size = kernel
  self.options = with_indices and opts
end

--- x [N, C, H, W] -> [N, C, H', W'], and with return_indices where the values stood.
---@param x Tensor
---@return Tensor
---@return Tensor? indices
function MaxPool2d:forward(x)
  if self.options then return F.max_pool2d(x, self.kernel_size, self.options) end
  return F._max_pool2d(x, self.attrs)
end

function MaxPool2d:extra() return window_text(self.attrs) end

layers.MaxPool2d = MaxPool2d

---@class AvgPool2d: Module
local AvgPool2d = class.class("AvgPool2d")

--- nn.AvgPool2d(kernel, {stride = kernel, padding = 0, ceil_mode = false, count_include_pad = true, divisor_override =}):
--- the mean of each window.
---@param kernel integer|integer[]
---@param opts table?
function AvgPool2d:init(kernel, opts) self.attrs = F._avg_pool_options("nn.AvgPool2d", kernel, opts) end

--- x [N, C, H, W] -> [N, C, H', W'].
---@param x Tensor
---@return Tensor
function AvgPool2d:forward(x) return F._avg_pool2d(x, self.attrs) end

function AvgPool2d:extra() return window_text(self.attrs) end

layers.AvgPool2d = AvgPool2d

-- ====== The same for [N, C, L] ======

local max_pool1d_spec = {
  stride = {"integer"}, padding = {"integer", 0, options.at_least(0)}, dilation = {"integer", 1, options.at_least(1)},
  ceil_mode = {"boolean", false}, return_indices = {"boolean", false},
}
local avg_pool1d_spec = {
  stride = {"integer"}, padding = {"integer", 0, options.at_least(0)}, ceil_mode = {"boolean", false},
  count_include_pad = {"boolean", true},
}

--- A pooling layer of [N, C, L] that calls a function of (x, kernel, options).
local function pool1d(name, fn, spec)
  local new = class.class(name)
  local where = "nn." .. name
  function new:init(kernel, opts)
    if math.tointeger(opts) then opts = {stride = opts} end
    opts = options.check(where, opts, spec)
    self.kernel_size = common.want_size(where, "the kernel size", kernel)
    opts.stride = common.want_size(where, "the stride", opts.stride or self.kernel_size)
    if 2 * opts.padding > self.kernel_size then
      errors.raise("%s: padding %d is more than half of the kernel size %d", where, opts.padding, self.kernel_size)
    end
    self.options = opts
  end
  function new:forward(x) return fn(x, self.kernel_size, self.options) end
  function new:extra()
    local o = self.options
    return ("kernel %d%s%s%s%s"):format(self.kernel_size,
      o.stride ~= self.kernel_size and (", stride %d"):format(o.stride) or "",
      unless("padding", {o.padding}, 0), unless("dilation", {o.dilation or 1}, 1), o.ceil_mode and ", ceil" or "")
  end
  layers[name] = new
end

--- nn.MaxPool1d(kernel, {stride = kernel, padding = 0, dilation = 1, ceil_mode = false, return_indices = false}): the
--- largest value in each window of [N, C, L].
pool1d("MaxPool1d", F.max_pool1d, max_pool1d_spec)
--- nn.AvgPool1d(kernel, {stride = kernel, padding = 0, ceil_mode = false, count_include_pad = true}): the mean of each
--- window of [N, C, L].
pool1d("AvgPool1d", F.avg_pool1d, avg_pool1d_spec)

-- ====== Windows that divide the image ======

--- A pooling layer that calls a function of (x, size, options).
local function adaptive(name, fn, spec)
  local new = class.class(name)
  local where = "nn." .. name
  function new:init(size, opts)
    opts = options.check(where, opts, spec)
    if size == nil then errors.raise("%s: the output size is missing, e.g. %s(1)", where, where) end
    self.output_size = F._pair(where, "size", size, 1)
    self.options = opts.return_indices and opts or nil
  end
  function new:forward(x) return fn(x, self.output_size, self.options) end
  function new:extra() return "to " .. common.by(self.output_size) end
  layers[name] = new
end

--- nn.AdaptiveAvgPool2d(size): means over windows that divide [N, C, H, W] into size, a number or {height, width}.
adaptive("AdaptiveAvgPool2d", F.adaptive_avg_pool2d, {})
--- nn.AdaptiveMaxPool2d(size, {return_indices = false}): largest values over windows that divide [N, C, H, W] into size.
adaptive("AdaptiveMaxPool2d", F.adaptive_max_pool2d, {return_indices = {"boolean", false}})

return layers
