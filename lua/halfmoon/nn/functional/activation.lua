--- nn/functional/activation.lua -- activations, softmax, dropout.

local core = require "halfmoon.core"
local arguments = require "halfmoon.arguments"
local errors = require "halfmoon.errors"
local options = require "halfmoon.options"

local raise, describe = errors.raise, errors.describe
local want_tensor = arguments.want_tensor

---@class halfmoon.functional
local F = {}

-- ====== One tensor in, one out ======

--- x where positive, else 0.
---@param x Tensor
---@return Tensor
function F.relu(x) return core.relu(x) end

--- x limited to [0, 6].
---@param x Tensor
---@return Tensor
function F.relu6(x) return core.hardtanh(x, 0, 6) end

--- Hyperbolic tangent.
---@param x Tensor
---@return Tensor
function F.tanh(x) return core.tanh(x) end

--- 1 / (1 + e^-x).
---@param x Tensor
---@return Tensor
function F.sigmoid(x) return core.sigmoid(x) end

--- Logarithm of sigmoid(x), without overflow.
---@param x Tensor
---@return Tensor
function F.logsigmoid(x) return core.logsigmoid(x) end

--- x times sigmoid(x).
---@param x Tensor
---@return Tensor
function F.silu(x) return core.silu(x) end

--- x times tanh(softplus(x)).
---@param x Tensor
---@return Tensor
function F.mish(x) return core.mish(x) end

--- x / (1 + |x|).
---@param x Tensor
---@return Tensor
function F.softsign(x) return core.softsign(x) end

local gelu_spec = {approximate = {"string", "none", options.one_of("none", "tanh")}}

--- Gaussian error linear unit.
---@param x Tensor
---@param opts {approximate: "none"|"tanh"}?
---@return Tensor
function F.gelu(x, opts)
  if opts ~= nil and options.check("gelu", opts, gelu_spec).approximate == "tanh" then return core.gelu_tanh(x) end
  return core.gelu(x)
end

local softplus_spec = {beta = {"number", 1.0}, threshold = {"number", 20.0}}

--- log(1 + e^(beta x)) / beta; x itself where beta x is above the threshold.
---@param x Tensor
---@param opts {beta: number, threshold: number}?
---@return Tensor
function F.softplus(x, opts)
  if opts == nil then return core.softplus(x) end
  return core.softplus(x, options.check("softplus", arguments.positional(opts, "beta"), softplus_spec))
end

local elu_spec = {alpha = {"number", 1.0}}

--- x where positive, else alpha * (e^x - 1).
---@param x Tensor
---@param opts {alpha: number}? or the number alone
---@return Tensor
function F.elu(x, opts)
  if opts == nil then return core.elu(x) end
  return core.elu(x, options.check("elu", arguments.positional(opts, "alpha"), elu_spec))
end

local SELU_ALPHA, SELU_SCALE = 1.6732632423543772848, 1.0507009873554804934

--- Scaled exponential linear unit, with the two constants that keep mean 0 and variance 1.
---@param x Tensor
---@return Tensor
function F.selu(x) return core.elu(x, SELU_ALPHA) * SELU_SCALE end

local leaky_relu_spec = {negative_slope = {"number", 0.01}}

--- x where positive, else x times a small slope.
---@param x Tensor
---@param opts {negative_slope: number}? or the number alone
---@return Tensor
function F.leaky_relu(x, opts)
  if opts == nil then return core.leaky_relu(x) end
  return core.leaky_relu(x, options.check("leaky_relu", arguments.positional(opts, "negative_slope"), leaky_relu_spec))
end

local hardtanh_spec = {min_val = {"number", -1.0}, max_val = {"number", 1.0}}

--- x limited to [min_val, max_val].
---@param x Tensor
---@param opts {min_val: number, max_val: number}? -1 and 1 unless given
---@return Tensor
function F.hardtanh(x, opts)
  opts = options.check("hardtanh", opts, hardtanh_spec)
  if opts.min_val > opts.max_val then
    raise("hardtanh: min_val %g is above max_val %g", opts.min_val, opts.max_val)
  end
  return core.hardtanh(x, opts)
end

--- x limited to [-3, 3], plus 3, by 6: a sigmoid of straight lines.
---@param x Tensor
---@return Tensor
function F.hardsigmoid(x) return core.clamp(x + 3, 0, 6) / 6 end

--- x times hardsigmoid(x).
---@param x Tensor
---@return Tensor
function F.hardswish(x) return x * F.hardsigmoid(x) end

--- leaky_relu with slopes that are learnt: weight has one slope, or one for each entry of dim 2 of x.
---@param x Tensor
---@param weight Tensor
---@return Tensor
function F.prelu(x, weight)
  want_tensor("prelu", "x", x)
  want_tensor("prelu", "weight", weight)
  local slopes = weight:numel()
  if weight:dim() > 1 then raise("prelu: weight must be [1] or [channels], came %s", describe(weight)) end
  if slopes == 1 then return (core.call("prelu", x, weight:reshape(1))) end
  if x:dim() < 2 or x:size(2) ~= slopes then
    raise("prelu: %d slopes for %s: there must be one, or one for each entry of dim 2 of x", slopes, describe(x))
  end
  local shape = {1, slopes}
  for d = 3, x:dim() do shape[d] = 1 end
  return (core.call("prelu", x, weight:reshape(shape)))
end

--- The first half along a dim times the sigmoid of the second.
---@param x Tensor
---@param dim integer? default -1
---@return Tensor
function F.glu(x, dim)
  want_tensor("glu", "x", x)
  local d = arguments.dim("glu", x, dim or -1)
  if x:size(d) % 2 ~= 0 then raise("glu: dim %d of %s has an odd size and no halves", d, describe(x)) end
  local halves = x:chunk(2, d)
  if #halves < 2 then return halves[1] end -- an empty dim
  return halves[1] * core.sigmoid(halves[2])
end

-- ====== Softmax ======

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

--- softmax of -x: the smallest gets the most.
---@param x Tensor
---@param dim integer
---@return Tensor
function F.softmin(x, dim) return core.softmax(-x, dim) end

-- ====== Dropout ======

local function drop(op, x, p, training)
  want_tensor(op, "x", x)
  if p == nil then p = 0.5 end
  if type(p) ~= "number" or not (p >= 0 and p <= 1) then
    raise("%s: the probability must lie between 0 and 1, not %s", op, describe(p))
  end
  if training ~= nil and type(training) ~= "boolean" then
    raise("%s: training must be true or false, not %s", op, describe(training))
  end
  return training ~= false and p > 0, p
end

--- Zeros with probability p, the rest divided by 1 - p; x itself unless training.
---@param x Tensor
---@param p number? default 0.5
---@param training boolean? default true
---@return Tensor
function F.dropout(x, p, training)
  local active
  active, p = drop("dropout", x, p, training)
  if not active then return x end
  if p == 1 then return x * 0 end
  return (core.call("dropout", x, {p = p}))
end

--- dropout of whole channels: all of x[n][c] become zero together.  x is [N, C, d...].
---@param x Tensor
---@param p number? default 0.5
---@param training boolean? default true
---@return Tensor
function F.dropout2d(x, p, training)
  local active
  active, p = drop("dropout2d", x, p, training)
  if x:dim() < 2 then raise("dropout2d: x must be [N, C, d...], came %s", describe(x)) end
  if not active then return x end
  if p == 1 then return x * 0 end
  local shape = x.shape
  for d = 3, #shape do shape[d] = 1 end
  return x * core.call("dropout", core.ones(shape, {dtype = x.dtype, device = x.device}), {p = p})
end

return F
