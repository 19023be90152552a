--- nn/functional.lua -- layers as functions: what modules compute, without state.
--
-- An op that refuses its arguments is looked into afterwards: the functions named explain_* know what people usually
-- got wrong, and raise with shapes and hints.  A call that succeeds pays nothing for them.  Requiring this file also
-- gives tensors the methods max_pool2d, cross_entropy and so on.

local core = require "halfmoon.core"
local errors = require "halfmoon.errors"
local options = require "halfmoon.options"

local raise, describe = errors.raise, errors.describe
local is_tensor, run = core.is_tensor, core.call

local F = {}

-- ====== Arguments ======

local function want_tensor(op, name, x)
  if not is_tensor(x) then raise("%s: %s must be a tensor, not %s", op, name, describe(x)) end
end

--- A number or an array of two, as an array of two.
local function pair(op, name, value, low)
  local a, b = value, value
  if type(value) == "table" then
    if #value ~= 2 then raise("%s: '%s' must be a number or {height, width}, came an array of %d", op, name, #value) end
    a, b = value[1], value[2]
  end
  local h, w = math.tointeger(a), math.tointeger(b)
  if not h or not w then raise("%s: '%s' must be whole numbers, not %s", op, name, describe(h and b or a)) end
  if h < low or w < low then raise("%s: '%s' must be at least %d, not {%d,%d}", op, name, low, h, w) end
  return {h, w}
end
F._pair = pair

--- Options given as a bare number or array mean the first of `names`.
local function positional(opts, name)
  if type(opts) == "number" or (type(opts) == "table" and opts[1] ~= nil) then return {[name] = opts} end
  return opts
end

--- Runs a row of the op table; when it raises, explain(operands...) may raise something better.
local function attempt(explain, op, ...)
  local ok, result = pcall(run, op, ...)
  if ok then return result end
  explain(...)
  error(result, 0) -- it has its place and path already
end

-- ====== Linear ======

local function explain_linear(x, weight, bias)
  want_tensor("linear", "x", x)
  want_tensor("linear", "weight", weight)
  if weight:dim() ~= 2 then raise("linear: weight must be [out, in], came %s", describe(weight)) end
  local dims, inner = x:dim(), weight:size(2)
  local features = dims > 0 and x:size(dims) or 1
  if features ~= inner then
    local text = ("linear: inner sizes differ: x is %s, weight is %s\n"
      .. "  %d (last dim of x) must equal %d (dim 2 of weight)")
      :format(describe(x), describe(weight), features, inner)
    if dims > 2 and x:numel() == x:size(1) * inner then
      text = text .. "\n  hint: x:flatten(2) joins the dims after the first to " .. inner
    elseif dims == 4 then
      text = text .. ("\n  hint: x:flatten(2) would have %d features"):format(x:numel() // math.max(1, x:size(1)))
    elseif dims == 2 and x:size(1) == inner then
      text = text .. "\n  hint: x:t() has its dims the other way round"
    end
    raise("%s", text)
  end
  if bias ~= nil then
    want_tensor("linear", "bias", bias)
    if bias:dim() ~= 1 or bias:size(1) ~= weight:size(1) then
      raise("linear: bias must be [%d], one for each row of weight, came %s", weight:size(1), describe(bias))
    end
  end
end

--- x times the transpose of weight, plus bias: x is [..., in], weight [out, in], bias [out] or nil.
---@param x Tensor
---@param weight Tensor
---@param bias Tensor?
---@return Tensor
function F.linear(x, weight, bias) return attempt(explain_linear, "linear", x, weight, bias) end

-- ====== Convolution and pooling ======

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
  if bias ~= nil then
    want_tensor("conv2d", "bias", bias)
    if bias:dim() ~= 1 or bias:size(1) ~= weight:size(1) then
      raise("conv2d: bias must be [%d], one for each output channel, came %s", weight:size(1), describe(bias))
    end
  end
end

--- conv2d with options that were checked before.
local function conv2d(x, weight, bias, attrs)
  return attempt(explain_conv2d, "conv2d", x, weight, bias, attrs)
end
F._conv2d = conv2d

--- Convolution of x [N, C, H, W] with weight [out, C / groups, kH, kW].
---@param x Tensor
---@param weight Tensor
---@param bias Tensor?
---@param opts {stride: integer|integer[], padding: integer|integer[], dilation: integer|integer[], groups: integer}?
---@return Tensor
function F.conv2d(x, weight, bias, opts) return conv2d(x, weight, bias, conv_options("conv2d", opts)) end

local pool_spec = {stride = {"integer|table"}, padding = {"integer|table", 0}}

local function pool_options(op, kernel_size, opts)
  if kernel_size == nil then raise("%s: the kernel size is missing, e.g. %s(2)", op, op) end
  opts = options.check(op, positional(opts, "stride"), pool_spec)
  local kernel = pair(op, "kernel_size", kernel_size, 1)
  local padding = pair(op, "padding", opts.padding, 0)
  for i = 1, 2 do
    if 2 * padding[i] > kernel[i] then
      raise("%s: padding %d is more than half of the kernel size %d", op, padding[i], kernel[i])
    end
  end
  if kernel[1] * kernel[2] > 256 then
    raise("%s: a window may have at most 256 places, not %dx%d", op, kernel[1], kernel[2])
  end
  return {kernel_size = kernel, stride = opts.stride and pair(op, "stride", opts.stride, 1) or kernel,
    padding = padding}
end
F._pool_options = pool_options

local function explain_max_pool2d(x, attrs)
  want_tensor("max_pool2d", "input", x)
  if x:dim() ~= 4 then raise("max_pool2d: input must be [N, C, H, W], came %s", describe(x)) end
  for i = 1, 2 do
    if x:size(i + 2) + 2 * attrs.padding[i] < attrs.kernel_size[i] then
      raise("max_pool2d: a window of %dx%d does not fit into the image: input is %s, padding {%d,%d}",
        attrs.kernel_size[1], attrs.kernel_size[2], describe(x), attrs.padding[1], attrs.padding[2])
    end
  end
end

--- max_pool2d with options that were checked before.
local function max_pool2d(x, attrs) return attempt(explain_max_pool2d, "max_pool2d", x, attrs) end
F._max_pool2d = max_pool2d

local plain_pools = {} -- kernel size -> checked options, for the plain x:max_pool2d(2)

--- The largest value in each window of x [N, C, H, W]; NaN wins.
---@param x Tensor
---@param kernel_size integer|integer[]
---@param opts {stride: integer|integer[], padding: integer|integer[]}? stride is the kernel size unless given
---@return Tensor
function F.max_pool2d(x, kernel_size, opts)
  local attrs = opts == nil and plain_pools[kernel_size]
  if not attrs then
    attrs = pool_options("max_pool2d", kernel_size, opts)
    if opts == nil and type(kernel_size) == "number" then plain_pools[kernel_size] = attrs end
  end
  return max_pool2d(x, attrs)
end

-- ====== Activations ======

--- x where positive, else 0.
---@param x Tensor
---@return Tensor
function F.relu(x) return core.relu(x) end

--- Hyperbolic tangent.
---@param x Tensor
---@return Tensor
function F.tanh(x) return core.tanh(x) end

--- 1 / (1 + e^-x).
---@param x Tensor
---@return Tensor
function F.sigmoid(x) return core.sigmoid(x) end

--- x times sigmoid(x).
---@param x Tensor
---@return Tensor
function F.silu(x) return core.silu(x) end

local gelu_spec = {approximate = {"string", "none", options.one_of("none", "tanh")}}

--- Gaussian error linear unit.
---@param x Tensor
---@param opts {approximate: "none"|"tanh"}?
---@return Tensor
function F.gelu(x, opts)
  if opts ~= nil and options.check("gelu", opts, gelu_spec).approximate == "tanh" then return core.gelu_tanh(x) end
  return core.gelu(x)
end

--- log(1 + e^x).
---@param x Tensor
---@return Tensor
function F.softplus(x) return core.softplus(x) end

--- e^x divided by its sum along a dim.
---@param x Tensor
---@param dim integer
---@return Tensor
function F.softmax(x, dim) return core.softmax(x, dim) end

--- Logarithm of softmax.
---@param x Tensor
---@param dim integer
---@return Tensor
function F.log_softmax(x, dim) return core.log_softmax(x, dim) end

-- ====== Losses ======

local reductions = options.one_of("mean", "sum", "none")
local cross_entropy_spec = {
  reduction = {"string", "mean", reductions}, ignore_index = {"integer", -100},
  label_smoothing = {"number", 0.0, function(v)
    if v >= 0 and v <= 1 then return end
    return "must lie between 0 and 1"
  end},
}

--- Checks the options of cross_entropy, for callers that use them again and again.
function F._cross_entropy_options(opts) return options.check("cross_entropy", opts, cross_entropy_spec) end

local cross_entropy_defaults = F._cross_entropy_options()

local function explain_cross_entropy(logits, target)
  want_tensor("cross_entropy", "logits", logits)
  want_tensor("cross_entropy", "target", target)
  local dims, target_dims = logits:dim(), target:dim()
  if dims < 2 then
    raise("cross_entropy: logits must be [N, classes] or [N, classes, ...], came %s%s", describe(logits),
      dims == 1 and "\n  hint: logits:unsqueeze(1) and target:reshape(1) make a batch of one" or "")
  end
  if target.dtype ~= "int64" then
    local hint = target.dtype:find("float", 1, true) and target_dims == dims
      and "hint: rows of probabilities become class ids with target:argmax(2)" or "hint: target:to('int64')"
    raise("cross_entropy: target must hold class ids as int64, came %s\n  %s", describe(target), hint)
  end
  local fits = target_dims == dims - 1 and target:size(1) == logits:size(1)
  for d = 3, fits and dims or 0 do
    if logits:size(d) ~= target:size(d - 1) then fits = false break end
  end
  if not fits then
    local shape = logits.shape
    table.remove(shape, 2)
    local hint = ""
    if target_dims == dims and target:size(2) == 1 then
      hint = "\n  hint: target:squeeze(2)"
    elseif target_dims == 1 and dims == 2 then
      hint = "\n  hint: logits and target come from batches of different sizes"
    end
    raise("cross_entropy: shapes differ: logits is %s, target is %s\n  target must be [%s], the shape of logits "
      .. "without dim 2 (the classes)%s", describe(logits), describe(target), table.concat(shape, ","), hint)
  end
end

--- cross_entropy with options that were checked before.
function F._cross_entropy(logits, target, attrs)
  return attempt(explain_cross_entropy, "cross_entropy", logits, target, attrs)
end

--- Softmax and cross entropy in one pass.  The class dim is dim 2; target holds class ids from 0 as int64.
---@param logits Tensor [N, C] or [N, C, ...]
---@param target Tensor [N] or [N, ...]
---@param opts {reduction: "mean"|"sum"|"none", ignore_index: integer, label_smoothing: number}?
---@return Tensor
function F.cross_entropy(logits, target, opts)
  return F._cross_entropy(logits, target, opts == nil and cross_entropy_defaults or F._cross_entropy_options(opts))
end

local loss_spec = {reduction = {"string", "mean", reductions}}

--- Checks two tensors of equal shape; inside autocast low ones are read as float32, as losses are.
local function loss_operands(op, x, target)
  want_tensor(op, "input", x)
  want_tensor(op, "target", target)
  if table.concat(x.shape, ",") ~= table.concat(target.shape, ",") then
    raise("%s: shapes differ: input is %s, target is %s\n"
      .. "  hint: a shape that differs by a dim of 1 would broadcast to a wrong mean; use reshape",
      op, describe(x), describe(target))
  end
  if core.autocast_state().enabled then
    if x.dtype ~= "float64" then x = x:float() end
    if target.dtype ~= "float64" then target = target:float() end
  end
  return x, target
end

local function reduced(loss, reduction)
  if reduction == "none" then return loss end
  return reduction == "sum" and loss:sum() or loss:mean()
end

--- Mean of the squared differences.
---@param x Tensor
---@param target Tensor
---@param opts {reduction: "mean"|"sum"|"none"}?
---@return Tensor
function F.mse_loss(x, target, opts)
  local reduction = options.check("mse_loss", opts, loss_spec).reduction
  x, target = loss_operands("mse_loss", x, target)
  local difference = x - target
  return reduced(difference * difference, reduction)
end

--- Mean of the absolute differences.
---@param x Tensor
---@param target Tensor
---@param opts {reduction: "mean"|"sum"|"none"}?
---@return Tensor
function F.l1_loss(x, target, opts)
  local reduction = options.check("l1_loss", opts, loss_spec).reduction
  x, target = loss_operands("l1_loss", x, target)
  return reduced((x - target):abs(), reduction)
end

-- ====== Methods of tensors ======

for _, name in ipairs {"max_pool2d", "conv2d", "linear", "cross_entropy", "mse_loss", "l1_loss", "gelu"} do
  core.Tensor[name] = F[name]
end

return F
