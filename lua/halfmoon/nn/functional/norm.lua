--- nn/functional/norm.lua -- normalization: by batch, by row, by group; and vectors made of length 1.

local core = require "halfmoon.core"
local arguments = require "halfmoon.arguments"
local errors = require "halfmoon.errors"
local options = require "halfmoon.options"

local raise, describe = errors.raise, errors.describe
local want_tensor, attempt = arguments.want_tensor, arguments.attempt
local shape_text = arguments.shape_text

---@class halfmoon.functional
local F = {}

local not_negative = options.at_least(0)

--- A given per-channel operand must be [channels].
local function want_channels(op, name, t, channels)
  if t == nil then return end
  want_tensor(op, name, t)
  if t:dim() ~= 1 or t:size(1) ~= channels then
    raise("%s: %s must be [%d], one number for each channel (dim 2 of x), came %s", op, name, channels, describe(t))
  end
end

-- ====== By batch ======

local batch_norm_spec = {
  weight = {"tensor"}, bias = {"tensor"}, training = {"boolean", false}, momentum = {"number", 0.1},
  eps = {"number", 1e-5, not_negative}, activation = {"string", nil, options.one_of("relu")},
}

local function explain_batch_norm(op)
  return function(x, weight, bias, running_mean, running_var)
    want_tensor(op, "x", x)
    if x:dim() < 2 then raise("%s: x must be [N, C] or [N, C, d...], came %s", op, describe(x)) end
    local channels = x:size(2)
    want_channels(op, "weight", weight, channels)
    want_channels(op, "bias", bias, channels)
    want_channels(op, "running_mean", running_mean, channels)
    want_channels(op, "running_var", running_var, channels)
  end
end

local explain_plain_batch_norm = explain_batch_norm("batch_norm")

--- x [N, C] or [N, C, d...] less its mean, by its standard deviation, channel by channel.  training: those of the
--- batch, and the running statistics, where given, move by momentum; else the running ones.  activation "relu" is
--- applied at once.
---@param x Tensor
---@param running_mean Tensor? [C], float32
---@param running_var Tensor? [C], float32
---@param opts {weight: Tensor, bias: Tensor, training: boolean, momentum: number, eps: number, activation: "relu"}?
---@return Tensor
function F.batch_norm(x, running_mean, running_var, opts)
  opts = options.check("batch_norm", opts, batch_norm_spec)
  if not opts.training and (running_mean == nil or running_var == nil) then
    raise("batch_norm: running_mean and running_var are missing\n"
      .. "  hint: {training = true} takes the statistics of the batch")
  end
  if opts.training and core.is_tensor(x) and x:dim() >= 2 and x:numel() == x:size(2) and x:numel() > 0 then
    raise("batch_norm: training needs more than one value for each channel, x is %s\n"
      .. "  hint: model:eval(), or a larger batch",
      describe(x))
  end
  if opts.training and core.is_recomputing() then -- hm.checkpoint runs this again: they have moved already
    running_mean, running_var = nil, nil
  end
  return (attempt(explain_plain_batch_norm, "batch_norm", x, opts.weight, opts.bias, running_mean, running_var,
    {training = opts.training, momentum = opts.momentum, eps = opts.eps, relu = opts.activation == "relu"}))
end

local instance_norm_spec = {
  running_mean = {"tensor"}, running_var = {"tensor"}, weight = {"tensor"}, bias = {"tensor"},
  use_input_stats = {"boolean", true}, momentum = {"number", 0.1}, eps = {"number", 1e-5, not_negative},
}

---@class InstanceNormOptions
---@field running_mean Tensor? [C], float32
---@field running_var Tensor? [C], float32
---@field weight Tensor? [C]
---@field bias Tensor? [C]
---@field use_input_stats boolean? default true; else the running statistics
---@field momentum number? default 0.1
---@field eps number? default 1e-5

--- A vector [C] written n times, [n * C]; nil stays.
local function repeated(t, n)
  return t and t:unsqueeze(1):expand(n, t:size(1)):reshape(n * t:size(1))
end

--- x [N, C, d...] less its mean, by its standard deviation, over each channel of each sample.
---@param x Tensor
---@param opts InstanceNormOptions?
---@return Tensor
function F.instance_norm(x, opts)
  local op = "instance_norm"
  want_tensor(op, "x", x)
  opts = options.check(op, opts, instance_norm_spec)
  if x:dim() < 3 then raise("instance_norm: x must be [N, C, d...], came %s", describe(x)) end
  local n, channels = x:size(1), x:size(2)
  for _, name in ipairs {"weight", "bias", "running_mean", "running_var"} do
    want_channels(op, name, opts[name], channels)
  end
  if not opts.use_input_stats then
    if not opts.running_mean or not opts.running_var then
      raise("instance_norm: running_mean and running_var are missing\n"
        .. "  hint: {use_input_stats = true} takes the statistics of each sample")
    end
    return (core.call("batch_norm", x, opts.weight, opts.bias, opts.running_mean, opts.running_var,
      {training = false, eps = opts.eps}))
  end
  if core.is_recomputing() then opts.running_mean, opts.running_var = nil, nil end -- as in batch_norm
  if n * channels == x:numel() and n > 0 then
    raise("instance_norm: needs more than one value for each channel of a sample, x is %s", describe(x))
  end
  -- As batch_norm of one sample with N * C channels.
  local shape = x.shape
  local wide = table.move(shape, 3, #shape, 3, {1, n * channels})
  local mean, var = repeated(opts.running_mean, n), repeated(opts.running_var, n)
  if n == 1 and mean then mean, var = mean:clone(), var:clone() end
  local y = core.call("batch_norm", x:contiguous():reshape(wide), repeated(opts.weight, n), repeated(opts.bias, n),
    mean, var, {training = true, momentum = opts.momentum, eps = opts.eps})
  if mean and n > 0 then
    local _ <close> = core.no_grad()
    opts.running_mean:copy_(mean:reshape(n, channels):mean(1))
    opts.running_var:copy_(var:reshape(n, channels):mean(1))
  end
  return y:reshape(shape)
end

-- ====== By row and by group ======

--- How many dims the normalized shape has; x must end in them.
local function row_dims(op, x, normalized_shape)
  want_tensor(op, "x", x)
  local shape = normalized_shape
  if math.tointeger(shape) then shape = {shape} end
  if type(shape) ~= "table" or #shape == 0 then
    raise("%s: the normalized shape must be a number or an array of sizes, not %s", op, describe(normalized_shape))
  end
  local count, dims = #shape, x:dim()
  for i = 1, count do
    if dims < count or x:size(dims - count + i) ~= shape[i] then
      raise("%s: x must end in %s, the normalized shape, came %s", op, shape_text(shape), describe(x))
    end
  end
  return count
end

--- Raises for a weight or bias that has not the normalized shape.
local function explain_rows(op)
  local function check(name, t, shape)
    if t == nil then return end
    want_tensor(op, name, t)
    if shape_text(t.shape) ~= shape then
      raise("%s: %s must be %s, the normalized shape, came %s", op, name, shape, describe(t))
    end
  end
  return function(x, weight, ...)
    local bias, attrs = nil, ...
    if select("#", ...) == 2 then bias, attrs = ... end
    local shape = x.shape
    local wanted = shape_text(table.move(shape, #shape - attrs.dims + 1, #shape, 1, {}))
    check("weight", weight, wanted)
    check("bias", bias, wanted)
  end
end

local explain_layer_norm, explain_rms_norm = explain_rows("layer_norm"), explain_rows("rms_norm")

--- x less its mean, by its standard deviation, over the last dims, which are normalized_shape.
---@param x Tensor
---@param normalized_shape integer|integer[]
---@param weight Tensor?
---@param bias Tensor?
---@param eps number? default 1e-5
---@return Tensor
function F.layer_norm(x, normalized_shape, weight, bias, eps)
  local dims = row_dims("layer_norm", x, normalized_shape)
  return (attempt(explain_layer_norm, "layer_norm", x, weight, bias, {dims = dims, eps = eps}))
end

--- The distance from 1 to the next number of a dtype.
local EPSILON = {float64 = 2.0 ^ -52}

--- x by the root of its mean square, over the last dims, which are normalized_shape.
---@param x Tensor
---@param normalized_shape integer|integer[]
---@param weight Tensor?
---@param eps number? the distance from 1 to the next float32 (float64 for float64) when left out
---@return Tensor
function F.rms_norm(x, normalized_shape, weight, eps)
  local dims = row_dims("rms_norm", x, normalized_shape)
  return (attempt(explain_rms_norm, "rms_norm", x, weight, {dims = dims, eps = eps or EPSILON[x.dtype]}))
end

--- x [N, C, d...] less its mean, by its standard deviation, over each of `groups` groups of channels of each sample.
---@param x Tensor
---@param groups integer
---@param weight Tensor? [C]
---@param bias Tensor? [C]
---@param eps number? default 1e-5
---@return Tensor
function F.group_norm(x, groups, weight, bias, eps)
  want_tensor("group_norm", "x", x)
  local count = math.tointeger(groups)
  if not count or count < 1 then
    raise("group_norm: the number of groups must be a whole number from 1, not %s", describe(groups))
  end
  if x:dim() < 2 then raise("group_norm: x must be [N, C, d...], came %s", describe(x)) end
  if x:size(2) % count ~= 0 then
    raise("group_norm: %d channels cannot be split into %d groups: x is %s", x:size(2), count, describe(x))
  end
  want_channels("group_norm", "weight", weight, x:size(2))
  want_channels("group_norm", "bias", bias, x:size(2))
  return (core.call("group_norm", x, weight, bias, {groups = count, eps = eps}))
end

-- ====== Vectors ======

local normalize_spec = {p = {"number", 2.0}, dim = {"integer|table", 2}, eps = {"number", 1e-12, not_negative}}

--- x by its p-norm along a dim, which is taken for at least eps.
---@param x Tensor
---@param opts {p: number, dim: integer|integer[], eps: number}? 2, dim 2 and 1e-12 unless given
---@return Tensor
function F.normalize(x, opts)
  want_tensor("normalize", "x", x)
  opts = options.check("normalize", opts, normalize_spec)
  local length = x:norm(opts.p, opts.dim, true)
  return x / length:clamp(opts.eps)
end

local cosine_spec = {dim = {"integer", 2}, eps = {"number", 1e-8, not_negative}}

--- The cosine of the angle between a and b along a dim; lengths are taken for at least eps.
---@param a Tensor
---@param b Tensor
---@param opts {dim: integer, eps: number}? dim 2 and 1e-8 unless given
---@return Tensor
function F.cosine_similarity(a, b, opts)
  want_tensor("cosine_similarity", "a", a)
  want_tensor("cosine_similarity", "b", b)
  opts = options.check("cosine_similarity", opts, cosine_spec)
  a, b = arguments.wide(a), arguments.wide(b)
  local function unit(x) return x / x:norm(2, opts.dim, true):clamp(opts.eps) end
  return (unit(a) * unit(b)):sum(opts.dim)
end

return F
