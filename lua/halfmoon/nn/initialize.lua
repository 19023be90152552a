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

local gains = {
  linear = 1.0, conv1d = 1.0, conv2d = 1.0, conv_transpose2d = 1.0, sigmoid = 1.0, tanh = 5 / 3, relu = math.sqrt(2),
  selu = 3 / 4,
}

--- The factor by which a nonlinearity wants its weights widened.
---@param nonlinearity "linear"|"conv1d"|"conv2d"|"conv_transpose2d"|"sigmoid"|"tanh"|"relu"|"leaky_relu"|"selu"
---@param a number? slope of leaky_relu below 0, default 0.01
---@return number
function init.calculate_gain(nonlinearity, a)
  if nonlinearity == "leaky_relu" then return math.sqrt(2 / (1 + (a or 0.01) ^ 2)) end
  local gain = gains[nonlinearity]
  if not gain then
    local known = options.names(gains)
    known[#known + 1] = "leaky_relu"
    table.sort(known)
    raise("nn.init.calculate_gain: unknown nonlinearity %s\n  known: %s", errors.describe(nonlinearity),
      table.concat(known, ", "))
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

--- Ones on the main diagonal of a matrix, zeros elsewhere.
---@param t Tensor
---@return Tensor t
function init.eye_(t)
  if core.is_tensor(t) and t:dim() ~= 2 then
    raise("nn.init.eye_: needs a matrix, came %s", errors.describe(t))
  end
  if not core.is_tensor(t) then raise("nn.init.eye_: expected a tensor, not %s", errors.describe(t)) end
  local _ <close> = core.no_grad()
  core.call("eye_", t)
  return t
end

-- ====== Cut and orthogonal ======

local trunc_spec = {
  mean = {"number", 0.0}, std = {"number", 1.0, options.above(0)}, a = {"number", -2.0}, b = {"number", 2.0},
}

--- The share of a normal distribution that lies below x standard deviations: (1 + erf(x / sqrt 2)) / 2.
local function share_below(x) return (1 + core.tensor(x / math.sqrt(2), {dtype = "float64", device = "cpu"}):erf():item()) / 2 end

--- Normal numbers from [a, b] only.
---@param t Tensor
---@param opts {mean: number, std: number, a: number, b: number}? 0, 1, -2 and 2 unless given; or mean, std, a, b in order
---@param std number?
---@param a number?
---@param b number?
---@return Tensor t
function init.trunc_normal_(t, opts, std, a, b)
  if type(opts) ~= "table" then opts = {mean = opts, std = std, a = a, b = b} end
  opts = options.check("nn.init.trunc_normal_", opts, trunc_spec)
  local ordered = opts.a < opts.b -- not so with a NaN
  if not ordered then raise("nn.init.trunc_normal_: a = %g must be below b = %g", opts.a, opts.b) end
  if not core.is_tensor(t) then raise("nn.init.trunc_normal_: expected a tensor, not %s", errors.describe(t)) end
  local _ <close> = core.no_grad()
  local low, high = (opts.a - opts.mean) / opts.std, (opts.b - opts.mean) / opts.std
  local place = {dtype = t.dtype == "float64" and "float64" or "float32", device = t.device}
  -- Draws outside [a, b] are drawn again; where that would take long, the draw is uniform and accepted by its density.
  local likely = share_below(high) - share_below(low)
  local peak = low > 0 and low or high < 0 and high or 0
  local reach = 20 / math.max(3, math.abs(peak)) -- beyond it the density is nothing in float32
  local from, to = math.max(low, peak - reach), math.min(high, peak + reach)
  local function draw()
    if likely > 0.25 then
      local z = core.empty(t.shape, place):normal_(0, 1)
      return z, z:ge(low):logical_and(z:le(high))
    end
    local z = core.empty(t.shape, place):uniform_(from, to)
    return z, core.rand(t.shape, place):lt(((peak * peak - z * z) * 0.5):exp())
  end
  local z, good = draw()
  while not good:all():item() do
    local again, fits = draw()
    z = core.where(good, z, again)
    good = good:logical_or(fits)
  end
  t:copy_((z * opts.std + opts.mean):clamp(opts.a, opts.b))
  return t
end

--- Rows made orthogonal to each other and of length 1, twice over for accuracy (Gram and Schmidt).
local function orthonormal_rows(m)
  local rows = {}
  for i = 1, m:size(1) do
    local row = m:select(1, i)
    for _ = 1, i > 1 and 2 or 0 do
      local before = core.stack(rows, 1)
      row = row - before:matmul(row):unsqueeze(1):matmul(before):squeeze(1)
    end
    rows[i] = row / (row * row):sum():sqrt()
  end
  return core.stack(rows, 1)
end

--- A matrix (later dims joined) whose rows, or columns where there are fewer, are orthogonal and of length gain.
---@param t Tensor
---@param gain number? default 1
---@return Tensor t
function init.orthogonal_(t, gain)
  if not core.is_tensor(t) then raise("nn.init.orthogonal_: expected a tensor, not %s", errors.describe(t)) end
  if t:dim() < 2 then raise("nn.init.orthogonal_: needs at least 2 dims, came %s", errors.describe(t)) end
  if t:numel() == 0 then return t end
  local _ <close> = core.no_grad()
  local rows, columns = t:size(1), t:numel() // t:size(1)
  local few, many = math.min(rows, columns), math.max(rows, columns)
  local m = orthonormal_rows(core.empty({few, many}, {dtype = "float64", device = "cpu"}):normal_(0, 1)) * (gain or 1.0)
  if rows > columns then m = m:t() end
  t:copy_(m:reshape(t.shape):to{dtype = t.dtype, device = t.device})
  return t
end

-- ====== By fans ======

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
