--- nn/functional/quantize.lua -- fake quantisation: numbers rounded to what a few integers can say, in floating point.

local core = require "halfmoon.core"
local arguments = require "halfmoon.arguments"
local errors = require "halfmoon.errors"
local options = require "halfmoon.options"

local raise, describe = errors.raise, errors.describe

---@class halfmoon.functional
local F = {}

local spec = {
  scale = {"number|tensor"}, zero_point = {"number|tensor", 0}, quant_min = {"integer", -128},
  quant_max = {"integer", 127}, axis = {"integer"},
}

--- A number that is a scale: above 0 and finite.
local function check_scale(scale)
  if scale == nil then raise("fake_quantize: option 'scale' is missing\n  hint: {scale = 0.1}, or a tensor") end
  if not core.is_tensor(scale) and not (scale > 0 and scale < math.huge) then
    raise("fake_quantize: option 'scale' must be above 0 and finite, not %s", describe(scale))
  end
end

--- A number that is a zero point: whole, and on the grid, so that 0 is quantised without error.
local function check_zero_point(zero_point, low, high)
  if core.is_tensor(zero_point) then return end
  local whole = math.tointeger(zero_point)
  if not whole or whole < low or whole > high then
    raise("fake_quantize: option 'zero_point' must be a whole number from quant_min %d to quant_max %d, not %s", low,
      high, describe(zero_point))
  end
end

--- A value for each entry of a dim of x, shaped so that it broadcasts.
local function along(x, name, value, axis)
  if not core.is_tensor(value) then return value end
  local size = x:size(axis)
  if value:dim() ~= 1 or value:size(1) ~= size then
    raise("fake_quantize: %s must be [%d], one for each entry of dim %d of x, came %s", name, size, axis,
      describe(value))
  end
  local shape = {}
  for d = 1, x:dim() do shape[d] = d == axis and size or 1 end
  return value:reshape(shape)
end

--- x rounded to the grid of integers from quant_min to quant_max: q = round(x / scale) + zero_point, halves to the even
--- one, limited, and back as (q - zero_point) * scale.  x / scale is computed as x * (1 / scale), as PyTorch does.  The
--- gradient passes straight through where q was not limited, and is 0 elsewhere.  NaN stays NaN; infinities are limited
--- like other large numbers.  With axis, scale and zero_point are [size of that dim]: one for each channel; tensors
--- without axis broadcast; neither has a derivative.  Computed in float32; the result is float32 inside autocast.
---@param x Tensor
---@param opts {scale: number|Tensor, zero_point: integer|Tensor, quant_min: integer, quant_max: integer, axis: integer}
---@return Tensor
function F.fake_quantize(x, opts)
  arguments.want_tensor("fake_quantize", "x", x)
  opts = options.check("fake_quantize", opts, spec)
  local low, high = opts.quant_min, opts.quant_max
  if low >= high then
    raise("fake_quantize: option 'quant_min' must be below quant_max, came %d and %d", low, high)
  end
  if high >= 2 ^ 24 or low <= -2 ^ 24 then
    raise("fake_quantize: quant_min and quant_max must lie within 2^24, which float32 counts to, came %d and %d", low,
      high)
  end
  check_scale(opts.scale)
  check_zero_point(opts.zero_point, low, high)
  local scale, zero_point = opts.scale, opts.zero_point
  if opts.axis then
    local axis = arguments.dim("fake_quantize", x, opts.axis)
    scale, zero_point = along(x, "scale", scale, axis), along(x, "zero_point", zero_point, axis)
  end
  return core.fake_quantize(x, scale, zero_point, low, high)
end

return F
