--- nn/functional/window.lua -- what slides windows over images: convolution, pooling; and interpolate.
--
-- Functions of [N, C, L] (conv1d, max_pool1d ...) run as images of height 1.

local core = require "halfmoon.core"
local arguments = require "halfmoon.arguments"
local errors = require "halfmoon.errors"
local options = require "halfmoon.options"

local raise, describe = errors.raise, errors.describe
local want_tensor, attempt, pair, single = arguments.want_tensor, arguments.attempt, arguments.pair, arguments.single
local positional = arguments.positional

---@class halfmoon.functional
local F = {}

F._pair = pair

--- [N, C, L] as [N, C, 1, L].
local function raised(op, name, x)
  want_tensor(op, name, x)
  if x:dim() ~= 3 then
    raise("%s: %s must be [N, C, L], came %s%s", op, name, describe(x),
      x:dim() == 2 and "\n  hint: x:unsqueeze(1) makes a batch of one of [C, L]" or "")
  end
  return x:unsqueeze(3)
end

-- ====== Convolution ======

---@class ConvOptions
---@field stride integer|integer[]|nil default 1
---@field padding integer|integer[]|"same"|"valid"|nil default 0
---@field dilation integer|integer[]|nil default 1
---@field groups integer? default 1

local conv_spec = {
  stride = {"integer|table", 1}, padding = {"integer|table", 0}, dilation = {"integer|table", 1},
  groups = {"integer", 1, options.at_least(1)},
}

--- Checks the options of a convolution; the result may be passed to F._conv2d again and again.
local function conv_options(op, opts)
  opts = options.check(op, positional(opts, "stride"), conv_spec)
  return {
    stride = pair(op, "stride", opts.stride, 1), padding = pair(op, "padding", opts.padding, 0),
    dilation = pair(op, "dilation", opts.dilation, 1), groups = opts.groups,
  }
end
F._conv_options = conv_options

local function explain_conv_bias(op, bias, channels)
  if bias == nil then return end
  want_tensor(op, "bias", bias)
  if bias:dim() ~= 1 or bias:size(1) ~= channels then
    raise("%s: bias must be [%d], one for each output channel, came %s", op, channels, describe(bias))
  end
end

local function explain_conv2d(x, weight, bias, attrs)
  want_tensor("conv2d", "input", x)
  want_tensor("conv2d", "weight", weight)
  if weight:dim() ~= 4 then raise("conv2d: weight must be [out, in, height, width], came %s", describe(weight)) end
  local dims = x:dim()
  if dims ~= 4 then
    raise("conv2d: input must be [N, C, H, W], came %s%s", describe(x),
      dims == 3 and "\n  hint: x:unsqueeze(2) adds the channel dim to [N, H, W]" or "")
  end
  local groups = attrs.groups
  local channels, wanted = x:size(2), weight:size(2) * groups
  if channels ~= wanted then
    local text = ("conv2d: channels differ: input is %s, weight is %s%s\n"
      .. "  %d (dim 2 of input) must equal %d (dim 2 of weight%s)")
      :format(describe(x), describe(weight), groups > 1 and (" in %d groups"):format(groups) or "", channels, wanted,
        groups > 1 and (" times %d groups"):format(groups) or "")
    if x:size(4) == wanted then
      text = text .. "\n  hint: images are [N, C, H, W]; x:permute(1, 4, 2, 3) turns [N, H, W, C] into that"
    end
    raise("%s", text)
  end
  if weight:size(1) % groups ~= 0 then
    raise("conv2d: %d output channels cannot be split into %d groups (weight is %s)", weight:size(1), groups,
      describe(weight))
  end
  for i = 1, 2 do
    local have = x:size(i + 2) + 2 * attrs.padding[i]
    local need = attrs.dilation[i] * (weight:size(i + 2) - 1) + 1
    if have < need then
      raise("conv2d: the kernel is larger than the image: input is %s, weight is %s, padding {%d,%d}, "
        .. "dilation {%d,%d}\n  %d (%s with padding) must be at least %d",
        describe(x), describe(weight), attrs.padding[1], attrs.padding[2],
        attrs.dilation[1], attrs.dilation[2], have, i == 1 and "height" or "width", need)
    end
  end
  explain_conv_bias("conv2d", bias, weight:size(1))
end

--- conv2d with options that were checked before.
local function conv2d(x, weight, bias, attrs)
  return (attempt(explain_conv2d, "conv2d", x, weight, bias, attrs))
end
F._conv2d = conv2d

--- padding = "same" (the size stays, with a stride of 1) or "valid" (none) as numbers.  Returns x, padded where its two
--- sides need different numbers, and the options.
local function named_padding(op, x, weight, opts, dims)
  opts = positional(opts, "stride")
  if type(opts) ~= "table" or type(opts.padding) ~= "string" then return x, opts end
  local name, plain = opts.padding, {}
  for key, value in pairs(opts) do plain[key] = value end
  if name ~= "same" and name ~= "valid" then
    raise("%s: 'padding' must be a number, an array, \"same\" or \"valid\", not \"%s\"", op, name)
  end
  plain.padding = 0
  if name == "valid" then return x, plain end
  want_tensor(op, "input", x)
  want_tensor(op, "weight", weight)
  local function nth(value, i) return type(value) == "table" and value[i] or value or 1 end
  local half, pads, even = {}, {}, true
  for i = 1, dims do
    if nth(opts.stride, i) ~= 1 then raise("%s: padding = \"same\" needs a stride of 1", op) end
    local total = nth(opts.dilation, i) * (weight:size(i - dims - 1) - 1)
    half[i], even = total // 2, even and total % 2 == 0
    table.insert(pads, 1, total - total // 2)
    table.insert(pads, 1, total // 2)
  end
  if not even then return core.call("pad", x, {pad = pads}), plain end
  plain.padding = half
  return x, plain
end

--- Convolution of x [N, C, H, W] with weight [out, C / groups, kH, kW].
---@param x Tensor
---@param weight Tensor
---@param bias Tensor?
---@param opts ConvOptions?
---@return Tensor
function F.conv2d(x, weight, bias, opts)
  x, opts = named_padding("conv2d", x, weight, opts, 2)
  return conv2d(x, weight, bias, conv_options("conv2d", opts))
end

local function explain_conv1d(x, weight, bias, attrs)
  local channels, wanted = x:size(2), weight:size(2) * attrs.groups
  if channels ~= wanted then
    raise("conv1d: channels differ: input is %s, weight is %s\n"
      .. "  %d (dim 2 of input) must equal %d (dim 2 of weight%s)%s",
      describe(x:squeeze(3)), describe(weight:squeeze(3)), channels, wanted,
      attrs.groups > 1 and (" times %d groups"):format(attrs.groups) or "",
      x:size(4) == wanted and "\n  hint: x:transpose(2, 3) turns [N, L, C] into [N, C, L]" or "")
  end
  if weight:size(1) % attrs.groups ~= 0 then
    raise("conv1d: %d output channels cannot be split into %d groups", weight:size(1), attrs.groups)
  end
  local have, need = x:size(4) + 2 * attrs.padding[2], attrs.dilation[2] * (weight:size(4) - 1) + 1
  if have < need then
    raise("conv1d: the kernel is longer than the input: input is %s, weight is %s\n"
      .. "  %d (length with padding) must be at least %d", describe(x:squeeze(3)), describe(weight:squeeze(3)), have,
        need)
  end
  explain_conv_bias("conv1d", bias, weight:size(1))
end

--- Checks the options of conv1d; the result may be passed to F._conv1d again and again.
function F._conv1d_options(op, opts)
  opts = options.check(op, positional(opts, "stride"), conv_spec)
  return {
    stride = single(op, "stride", opts.stride, 1, 1), padding = single(op, "padding", opts.padding, 0, 0),
    dilation = single(op, "dilation", opts.dilation, 1, 1), groups = opts.groups,
  }
end

--- conv1d with options that were checked before.
function F._conv1d(x, weight, bias, attrs)
  x = raised("conv1d", "input", x)
  want_tensor("conv1d", "weight", weight)
  if weight:dim() ~= 3 then raise("conv1d: weight must be [out, in, length], came %s", describe(weight)) end
  return attempt(explain_conv1d, "conv2d", x, weight:unsqueeze(3), bias, attrs):squeeze(3)
end

--- Convolution of x [N, C, L] with weight [out, C / groups, k].
---@param x Tensor
---@param weight Tensor
---@param bias Tensor?
---@param opts ConvOptions?
---@return Tensor
function F.conv1d(x, weight, bias, opts)
  x, opts = named_padding("conv1d", x, weight, opts, 1)
  return F._conv1d(x, weight, bias, F._conv1d_options("conv1d", opts))
end

-- ====== Transposed convolution ======

local conv_transpose_spec = {
  stride = {"integer|table", 1}, padding = {"integer|table", 0}, output_padding = {"integer|table", 0},
  dilation = {"integer|table", 1}, groups = {"integer", 1, options.at_least(1)},
}

---@class ConvTransposeOptions
---@field stride integer|integer[]|nil default 1
---@field padding integer|integer[]|nil default 0: what the convolution had
---@field output_padding integer|integer[]|nil default 0: added to the far sides of the result
---@field groups integer? default 1
---@field dilation integer|integer[]|nil default 1

--- Checks the options of conv_transpose2d; the result may be passed to F._conv_transpose2d again and again.
function F._conv_transpose_options(op, opts)
  opts = options.check(op, positional(opts, "stride"), conv_transpose_spec)
  local attrs = {
    stride = pair(op, "stride", opts.stride, 1), padding = pair(op, "padding", opts.padding, 0),
    output_padding = pair(op, "output_padding", opts.output_padding, 0),
    dilation = pair(op, "dilation", opts.dilation, 1), groups = opts.groups,
  }
  for i = 1, 2 do
    local extra = attrs.output_padding[i]
    if extra >= attrs.stride[i] and extra >= attrs.dilation[i] then
      raise("%s: output_padding %d must be below the stride or the dilation", op, extra)
    end
  end
  return attrs
end

--- The shape that conv_transpose2d gives.
local function transposed_shape(x, weight, attrs)
  local shape = {x:size(1), weight:size(2) * attrs.groups}
  for i = 1, 2 do
    local size = (x:size(i + 2) - 1) * attrs.stride[i] - 2 * attrs.padding[i]
      + attrs.dilation[i] * (weight:size(i + 2) - 1) + attrs.output_padding[i] + 1
    if size < 1 then
      raise("conv_transpose2d: the result would have no %s (%d): input is %s, weight is %s, padding {%d,%d}",
        i == 1 and "height" or "width", size, describe(x), describe(weight), attrs.padding[1], attrs.padding[2])
    end
    shape[i + 2] = size
  end
  return shape
end

--- conv_transpose2d with options that were checked before.
function F._conv_transpose2d(x, weight, bias, attrs)
  local op = "conv_transpose2d"
  want_tensor(op, "input", x)
  want_tensor(op, "weight", weight)
  if x:dim() ~= 4 then raise("%s: input must be [N, C, H, W], came %s", op, describe(x)) end
  if weight:dim() ~= 4 then
    raise("%s: weight must be [in, out / groups, height, width], came %s", op, describe(weight))
  end
  if x:size(2) ~= weight:size(1) then
    raise("%s: channels differ: input is %s, weight is %s\n  %d (dim 2 of input) must equal %d (dim 1 of weight)", op,
      describe(x), describe(weight), x:size(2), weight:size(1))
  end
  if x:size(2) % attrs.groups ~= 0 then
    raise("%s: %d input channels cannot be split into %d groups", op, x:size(2), attrs.groups)
  end
  explain_conv_bias(op, bias, weight:size(2) * attrs.groups)
  local y = core.call("conv2d_backward_input", x, weight, {
    shape = transposed_shape(x, weight, attrs), stride = attrs.stride, padding = attrs.padding,
    dilation = attrs.dilation, groups = attrs.groups,
  })
  if bias == nil then return y end
  if bias.dtype ~= y.dtype and not core.autocast_state().enabled then
    raise("%s: dtypes differ: the result is %s, bias is %s\n  hint: run inside amp.autocast", op, describe(y),
      describe(bias))
  end
  return y + bias:to(y.dtype):reshape(1, bias:size(1), 1, 1)
end

--- Transposed convolution of x [N, C, H, W] with weight [C, out / groups, kH, kW]: the gradient of conv2d by its input.
---@param x Tensor
---@param weight Tensor
---@param bias Tensor?
---@param opts ConvTransposeOptions?
---@return Tensor
function F.conv_transpose2d(x, weight, bias, opts)
  return F._conv_transpose2d(x, weight, bias, F._conv_transpose_options("conv_transpose2d", opts))
end

-- ====== Pooling: options ======

---@class MaxPoolOptions
---@field stride integer|integer[]|nil default: the kernel size
---@field padding integer|integer[]|nil default 0
---@field dilation integer|integer[]|nil default 1
---@field ceil_mode boolean? default false: whether a window may reach past the end
---@field return_indices boolean? default false

---@class AvgPoolOptions
---@field stride integer|integer[]|nil default: the kernel size
---@field padding integer|integer[]|nil default 0
---@field ceil_mode boolean? default false: whether a window may reach past the end
---@field count_include_pad boolean? default true: whether padding counts in the mean
---@field divisor_override integer? what sums are divided by instead of the count

local max_pool_spec = {
  stride = {"integer|table"}, padding = {"integer|table", 0}, dilation = {"integer|table", 1},
  ceil_mode = {"boolean", false}, return_indices = {"boolean", false},
}
local avg_pool_spec = {
  stride = {"integer|table"}, padding = {"integer|table", 0}, ceil_mode = {"boolean", false},
  count_include_pad = {"boolean", true}, divisor_override = {"integer", nil, options.at_least(1)},
}

--- Kernel, stride and padding, each read by `read` (pair or single).
local function window_options(op, kernel_size, opts, read)
  if kernel_size == nil then raise("%s: the kernel size is missing, e.g. %s(2)", op, op) end
  local kernel = read(op, "kernel_size", kernel_size, 1, 1)
  local padding = read(op, "padding", opts.padding, 0, 0)
  for i = 1, 2 do
    if 2 * padding[i] > kernel[i] then
      raise("%s: padding %d is more than half of the kernel size %d", op, padding[i], kernel[i])
    end
  end
  return {kernel_size = kernel, stride = opts.stride and read(op, "stride", opts.stride, 1, 1) or kernel,
    padding = padding, ceil_mode = opts.ceil_mode}
end

local function max_options(op, kernel_size, opts, read)
  opts = options.check(op, positional(opts, "stride"), max_pool_spec)
  local attrs = window_options(op, kernel_size, opts, read)
  local kernel = attrs.kernel_size
  if kernel[1] * kernel[2] > 256 then
    raise("%s: a window may have at most 256 places, not %dx%d", op, kernel[1], kernel[2])
  end
  attrs.dilation = read(op, "dilation", opts.dilation, 1, 1)
  return attrs, opts.return_indices
end

local function avg_options(op, kernel_size, opts, read)
  opts = options.check(op, positional(opts, "stride"), avg_pool_spec)
  local attrs = window_options(op, kernel_size, opts, read)
  attrs.count_include_pad = opts.count_include_pad
  attrs.divisor_override = opts.divisor_override or 0
  return attrs
end

--- Checks the options of max_pool2d; the result may be passed to F._max_pool2d again and again.
---@return table attrs
---@return boolean return_indices
function F._pool_options(op, kernel_size, opts) return max_options(op, kernel_size, opts, pair) end

--- Checks the options of avg_pool2d; the result may be passed to F._avg_pool2d again and again.
function F._avg_pool_options(op, kernel_size, opts) return avg_options(op, kernel_size, opts, pair) end

-- ====== Pooling ======

local function explain_pool(op)
  return function(x, attrs)
    want_tensor(op, "input", x)
    if x:dim() ~= 4 then raise("%s: input must be [N, C, H, W], came %s", op, describe(x)) end
    for i = 1, 2 do
      local need = (attrs.dilation and attrs.dilation[i] or 1) * (attrs.kernel_size[i] - 1) + 1
      if x:size(i + 2) + 2 * attrs.padding[i] < need then
        raise("%s: a window of %dx%d does not fit into the image: input is %s, padding {%d,%d}", op,
          attrs.kernel_size[1], attrs.kernel_size[2], describe(x), attrs.padding[1], attrs.padding[2])
      end
    end
  end
end

local explain_max_pool2d, explain_avg_pool2d = explain_pool("max_pool2d"), explain_pool("avg_pool2d")
local explain_max_pool1d, explain_avg_pool1d = explain_pool("max_pool1d"), explain_pool("avg_pool1d")

--- max_pool2d with options that were checked before.
local function max_pool2d(x, attrs) return (attempt(explain_max_pool2d, "max_pool2d", x, attrs)) end
F._max_pool2d = max_pool2d

--- avg_pool2d with options that were checked before.
function F._avg_pool2d(x, attrs) return (attempt(explain_avg_pool2d, "avg_pool2d", x, attrs)) end

--- Places in the image, h * W + w from 0, of what stood at each window's place.
local function image_places(x, index, attrs)
  local width, kernel_width = x:size(4), attrs.kernel_size[2]
  local place = index:long()
  local row, column = place // kernel_width, place % kernel_width
  local function corners(dim, i) -- where each window begins
    local shape = {1, 1, 1, 1}
    shape[dim] = index:size(dim)
    local first = core.arange(index:size(dim), {device = index.device}) * attrs.stride[i] - attrs.padding[i]
    return first:reshape(shape)
  end
  return (row * attrs.dilation[1] + corners(3, 1)) * width + (column * attrs.dilation[2] + corners(4, 2))
end

local plain_pools = {} -- kernel size -> checked options, for the plain x:max_pool2d(2)

--- The largest value in each window of x [N, C, H, W]; NaN wins.  With return_indices also where it stood: h * W + w.
---@param x Tensor
---@param kernel_size integer|integer[]
---@param opts MaxPoolOptions?
---@return Tensor
---@return Tensor? indices
function F.max_pool2d(x, kernel_size, opts)
  local attrs = opts == nil and plain_pools[kernel_size]
  if attrs then return max_pool2d(x, attrs) end
  local with_indices
  attrs, with_indices = F._pool_options("max_pool2d", kernel_size, opts)
  if opts == nil and type(kernel_size) == "number" then plain_pools[kernel_size] = attrs end
  if not with_indices then return max_pool2d(x, attrs) end
  local y, index = attempt(explain_max_pool2d, "max_pool2d", x, attrs)
  return y, image_places(x, index, attrs)
end

--- The largest value in each window of x [N, C, L]; NaN wins.  With return_indices also where it stood.
---@param x Tensor
---@param kernel_size integer
---@param opts MaxPoolOptions?
---@return Tensor
---@return Tensor? indices
function F.max_pool1d(x, kernel_size, opts)
  local attrs, with_indices = max_options("max_pool1d", kernel_size, opts, single)
  x = raised("max_pool1d", "input", x)
  local y, index = attempt(explain_max_pool1d, "max_pool2d", x, attrs)
  if not with_indices then return y:squeeze(3) end
  return y:squeeze(3), image_places(x, index, attrs):squeeze(3)
end

--- The mean of each window of x [N, C, H, W].
---@param x Tensor
---@param kernel_size integer|integer[]
---@param opts AvgPoolOptions?
---@return Tensor
function F.avg_pool2d(x, kernel_size, opts)
  return F._avg_pool2d(x, F._avg_pool_options("avg_pool2d", kernel_size, opts))
end

--- The mean of each window of x [N, C, L].
---@param x Tensor
---@param kernel_size integer
---@param opts AvgPoolOptions?
---@return Tensor
function F.avg_pool1d(x, kernel_size, opts)
  local attrs = avg_options("avg_pool1d", kernel_size, opts, single)
  return attempt(explain_avg_pool1d, "avg_pool2d", raised("avg_pool1d", "input", x), attrs):squeeze(3)
end

local function explain_adaptive(op)
  return function(x)
    want_tensor(op, "input", x)
    if x:dim() ~= 4 then raise("%s: input must be [N, C, H, W], came %s", op, describe(x)) end
  end
end

local explain_adaptive_avg, explain_adaptive_max = explain_adaptive("adaptive_avg_pool2d"),
  explain_adaptive("adaptive_max_pool2d")

--- Means of x [N, C, H, W] over windows that divide it into size: a number or {height, width}.
---@param x Tensor
---@param size integer|integer[]
---@return Tensor
function F.adaptive_avg_pool2d(x, size)
  local attrs = {output_size = pair("adaptive_avg_pool2d", "size", size, 1)}
  return (attempt(explain_adaptive_avg, "adaptive_avg_pool2d", x, attrs))
end

--- Means of x [N, C, L] over windows that divide it into size.
---@param x Tensor
---@param size integer
---@return Tensor
function F.adaptive_avg_pool1d(x, size)
  local attrs = {output_size = single("adaptive_avg_pool1d", "size", size, 1, 1)}
  return (core.call("adaptive_avg_pool2d", raised("adaptive_avg_pool1d", "input", x), attrs)):squeeze(3)
end

local adaptive_spec = {return_indices = {"boolean", false}}

--- Largest values of x [N, C, H, W] over windows that divide it into size: a number or {height, width}; NaN wins.
---@param x Tensor
---@param size integer|integer[]
---@param opts {return_indices: boolean}? also where they stood: h * W + w
---@return Tensor
---@return Tensor? indices
function F.adaptive_max_pool2d(x, size, opts)
  local attrs = {output_size = pair("adaptive_max_pool2d", "size", size, 1)}
  local y, index = attempt(explain_adaptive_max, "adaptive_max_pool2d", x, attrs)
  if opts ~= nil and options.check("adaptive_max_pool2d", opts, adaptive_spec).return_indices then return y, index end
  return y
end

-- ====== Interpolation ======

local interpolate_spec = {
  size = {"integer|table"}, scale_factor = {"number|table"},
  mode = {"string", "nearest", options.one_of("nearest", "linear", "bilinear")}, align_corners = {"boolean"},
}

---@class InterpolateOptions
---@field size integer|integer[]|nil of the result; or
---@field scale_factor number|number[]|nil
---@field mode "nearest"|"linear"|"bilinear"|nil default "nearest"
---@field align_corners boolean? default false: whether the corner points keep their values

--- Scales for height and width, from a number or an array.
local function scales_of(value, dims)
  local list = type(value) == "table" and value or (dims == 1 and {value} or {value, value})
  if #list ~= dims then raise("interpolate: scale_factor must be a number or an array of %d, came %d", dims, #list) end
  for _, scale in ipairs(list) do
    if type(scale) ~= "number" or scale ~= scale or scale <= 0 or scale == math.huge then
      raise("interpolate: scale_factor must be above 0, not %s", describe(scale))
    end
  end
  return dims == 1 and {1.0, list[1]} or list
end

--- x [N, C, H, W] (or [N, C, L]) resampled to a size, or by a scale_factor.  mode "bilinear" for images, "linear" for
--- [N, C, L], or "nearest".
---@param x Tensor
---@param opts InterpolateOptions
---@return Tensor
function F.interpolate(x, opts)
  local op = "interpolate"
  want_tensor(op, "x", x)
  opts = options.check(op, positional(opts, "size"), interpolate_spec)
  local dims = x:dim() - 2
  if dims ~= 1 and dims ~= 2 then raise("interpolate: x must be [N, C, H, W] or [N, C, L], came %s", describe(x)) end
  local smooth = opts.mode ~= "nearest"
  if smooth and (opts.mode == "linear") ~= (dims == 1) then
    raise("interpolate: mode \"%s\" does not fit %s: use \"%s\"", opts.mode, describe(x), dims == 1 and "linear"
      or "bilinear")
  end
  if not smooth and opts.align_corners ~= nil then
    raise("interpolate: align_corners has a meaning only with mode \"bilinear\" or \"linear\"")
  end
  if (opts.size == nil) == (opts.scale_factor == nil) then
    raise("interpolate: give one of size and scale_factor%s", opts.size and ", not both" or "")
  end
  local image = dims == 1 and x:unsqueeze(3) or x
  local attrs = {mode = smooth and "bilinear" or "nearest", align_corners = opts.align_corners or false}
  if opts.size then
    attrs.size = dims == 1 and single(op, "size", opts.size, 1, 1) or pair(op, "size", opts.size, 1)
  else
    local scale = scales_of(opts.scale_factor, dims)
    attrs.size, attrs.scale_h, attrs.scale_w = {}, scale[1], scale[2]
    for i = 1, 2 do
      attrs.size[i] = math.floor(image:size(i + 2) * scale[i])
      if attrs.size[i] < 1 then
        raise("interpolate: scale_factor %g leaves nothing of %s", scale[i], describe(x))
      end
    end
  end
  local y = core.call("interpolate2d", image, attrs)
  return dims == 1 and y:squeeze(3) or y
end

return F
