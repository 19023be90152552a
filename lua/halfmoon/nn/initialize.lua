--- nn/initialize.lua -- nn.init: first values of parameters, drawn from hm.manual_seed's generator.
--
-- Every function fills the tensor in place, outside the graph, and returns it.

local core = require "halfmoon.core"
local errors = require "halfmoon.errors"
local options = require "halfmoon.options"

local raise = errors.raise

local init = {}

--- Runs t:method(...) without recording; returns t.
local function fill(name, t, method, ...)
  if not core.is_tensor(t) then raise("nn.init.%s: expected a tensor, not %s", name, errors.describe(t)) end
  local _ <close> = core.no_grad()
  t[method](t, ...)
  return t
end

--- Inputs and outputs of one unit: [out, in] or [out, in, kernel...].
---@param t Tensor
---@return integer fan_in
---@return integer fan_out
function init.fans(t)
  if t:dim() < 2 then raise("nn.init: fan in and fan out need at least 2 dims, came %s", errors.describe(t)) end
  local shape, field = t.shape, 1
  for d = 3, #shape do field = field * shape[d] end
  return shape[2] * field, shape[1] * field
end

local gains = {linear = 1.0, conv2d = 1.0, sigmoid = 1.0, tanh = 5 / 3, relu = math.sqrt(2)}

--- The factor by which a nonlinearity wants its weights widened.
---@param nonlinearity "linear"|"conv2d"|"sigmoid"|"tanh"|"relu"|"leaky_relu"
---@param a number? slope of leaky_relu below 0, default 0.01
---@return number
function init.calculate_gain(nonlinearity, a)
  if nonlinearity == "leaky_relu" then return math.sqrt(2 / (1 + (a or 0.01) ^ 2)) end
  local gain = gains[nonlinearity]
  if not gain then
    raise("nn.init.calculate_gain: unknown nonlinearity %s\n  known: conv2d, leaky_relu, linear, relu, sigmoid, tanh",
      errors.describe(nonlinearity))
  end
  return gain
end

--- Uniform numbers in [low, high), by default [0, 1).
---@param t Tensor
---@param low number?
---@param high number?
---@return Tensor t
function init.uniform_(t, low, high) return fill("uniform_", t, "uniform_", low or 0.0, high or 1.0) end

--- Normal numbers, by default with mean 0 and standard deviation 1.
---@param t Tensor
---@param mean number?
---@param std number?
---@return Tensor t
function init.normal_(t, mean, std) return fill("normal_", t, "normal_", mean or 0.0, std or 1.0) end

--- One value everywhere.
---@param t Tensor
---@param value number
---@return Tensor t
function init.constant_(t, value) return fill("constant_", t, "fill_", value) end

--- Zeros.
---@param t Tensor
---@return Tensor t
function init.zeros_(t) return fill("zeros_", t, "fill_", 0) end

--- Ones.
---@param t Tensor
---@return Tensor t
function init.ones_(t) return fill("ones_", t, "fill_", 1) end

local kaiming_spec = {
  a = {"number", 0.0}, mode = {"string", "fan_in", options.one_of("fan_in", "fan_out")},
  nonlinearity = {"string", "leaky_relu"},
}

--- gain / sqrt(fan), the standard deviation that keeps the variance of activations or gradients.
local function kaiming_std(name, t, opts)
  opts = options.check("nn.init." .. name, opts, kaiming_spec)
  local fan_in, fan_out = init.fans(t)
  return init.calculate_gain(opts.nonlinearity, opts.a) / math.sqrt(opts.mode == "fan_in" and fan_in or fan_out)
end

--- Uniform numbers after He et al.; {a = slope, mode = "fan_in"|"fan_out", nonlinearity = "leaky_relu"}.
---@param t Tensor
---@param opts table?
---@return Tensor t
function init.kaiming_uniform_(t, opts)
  local bound = math.sqrt(3) * kaiming_std("kaiming_uniform_", t, opts)
  return init.uniform_(t, -bound, bound)
end

--- Normal numbers after He et al.; options as kaiming_uniform_.
---@param t Tensor
---@param opts table?
---@return Tensor t
function init.kaiming_normal_(t, opts) return init.normal_(t, 0.0, kaiming_std("kaiming_normal_", t, opts)) end

--- Uniform numbers after Glorot and Bengio.
---@param t Tensor
---@param gain number? default 1
---@return Tensor t
function init.xavier_uniform_(t, gain)
  local fan_in, fan_out = init.fans(t)
  local bound = (gain or 1.0) * math.sqrt(6 / (fan_in + fan_out))
  return init.uniform_(t, -bound, bound)
end

--- Normal numbers after Glorot and Bengio.
---@param t Tensor
---@param gain number? default 1
---@return Tensor t
function init.xavier_normal_(t, gain)
  local fan_in, fan_out = init.fans(t)
  return init.normal_(t, 0.0, (gain or 1.0) * math.sqrt(2 / (fan_in + fan_out)))
end

return init
