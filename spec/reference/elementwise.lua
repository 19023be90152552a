-- elementwise.lua -- what each elementwise row of the op table should give, in doubles, by plain mathematics.
--
-- One function per op, written from the definition, not from the row's formula.  Comparisons return booleans.  `attr`
-- holds attributes by name.
-- A row without an entry here fails ops_spec.

local M = {}

local inf, nan = math.huge, 0 / 0
local function isnan(x) return x ~= x end

-- erf by its series, erfc by a continued fraction (Lentz) where the series loses digits.
local function erf_series(x)
  local sum, term, n = x, x, 0
  repeat
    n = n + 1
    term = -term * x * x / n
    local add = term / (2 * n + 1)
    sum = sum + add
  until math.abs(add) < 1e-18 * math.abs(sum) or n > 400
  return 2 / math.sqrt(math.pi) * sum
end

local function erfc_fraction(x) -- x >= 2
  local tiny = 1e-300
  local f = x
  local c, d = x, 0
  for n = 1, 2000 do
    local a = n / 2
    d = x + a * d
    if d == 0 then d = tiny end
    c = x + a / c
    if c == 0 then c = tiny end
    d = 1 / d
    local delta = c * d
    f = f * delta
    if math.abs(delta - 1) < 1e-17 then break end
  end
  return math.exp(-x * x) / (f * math.sqrt(math.pi))
end

local function erf(x)
  if isnan(x) then return x end
  if x == inf then return 1 elseif x == -inf then return -1 end
  if math.abs(x) < 2.5 then return erf_series(x) end
  local tail = math.abs(x) > 27 and 0 or erfc_fraction(math.abs(x))
  return x > 0 and 1 - tail or tail - 1
end

local function erfc(x)
  if isnan(x) then return x end
  if x > 27 then return 0 elseif x < -6.5 then return 2 end
  if x > 1.5 then return erfc_fraction(x) end
  return 1 - erf(x)
end

local function tanh(x)
  if isnan(x) or x == 0 then return x end
  if math.abs(x) < 1e-4 then return x - x * x * x / 3 end
  if x > 20 then return 1 elseif x < -20 then return -1 end
  local e = math.exp(2 * x)
  return (e - 1) / (e + 1)
end

local function floor(x) return (isnan(x) or x == inf or x == -inf) and x or x - (x % 1) end
local function remainder(x, y)
  if isnan(x) or isnan(y) or y == 0 or x == inf or x == -inf then return nan end
  if y == inf then return x >= 0 and x or inf end
  if y == -inf then return x <= 0 and x or -inf end
  return x % y
end

M.add = function(x, y) return x + y end
M.sub = function(x, y) return x - y end
M.mul = function(x, y) return x * y end
M.div = function(x, y) return x / y end
M.floor_divide = function(x, y) return floor(x / y) end
M.remainder = remainder
M.pow = function(x, y) return x ^ y end
M.neg = function(x) return -x end
M.abs = function(x) return x < 0 and -x or x == 0 and 0.0 or x end
M.maximum = function(x, y) return (isnan(x) or isnan(y)) and nan or math.max(x, y) end
M.minimum = function(x, y) return (isnan(x) or isnan(y)) and nan or math.min(x, y) end
M.clamp = function(x, attr) return isnan(x) and x or math.max(attr.min or -inf, math.min(x, attr.max or inf)) end
M.where = function(c, x, y) if c then return x end return y end

M.exp = math.exp
M.log = function(x) return x < 0 and nan or math.log(x) end
M.sqrt = function(x) return x < 0 and nan or math.sqrt(x) end
M.rsqrt = function(x) return x < 0 and nan or 1 / math.sqrt(x) end
M.sin = function(x) return (x == inf or x == -inf) and nan or math.sin(x) end
M.cos = function(x) return (x == inf or x == -inf) and nan or math.cos(x) end
M.tanh = tanh
M.erf = erf
M.sigmoid = function(x) return 1 / (1 + math.exp(-x)) end
M.relu = function(x) return x < 0 and 0 or x end
M.gelu = function(x) return x == -inf and nan or x * 0.5 * erfc(-x / math.sqrt(2)) end
M.gelu_tanh = function(x) return 0.5 * x * (1 + tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ^ 3))) end
M.silu = function(x) return x / (1 + math.exp(-x)) end
M.softplus = function(x, attr)
  local beta = attr.beta or 1
  if x * beta > (attr.threshold or 20) then return x end
  local e = math.exp(x * beta)
  local s = 1 + e -- log1p without loss: log(s) corrected by what the sum rounded away
  return (s == 1 and e or math.log(s) + (e - (s - 1)) / s) / beta
end

M.eq = function(x, y) return x == y end
M.ne = function(x, y) return x ~= y end
M.lt = function(x, y) return x < y end
M.le = function(x, y) return x <= y end
M.gt = function(x, y) return x > y end
M.ge = function(x, y) return x >= y end
M.isnan = isnan
M.isinf = function(x) return x == inf or x == -inf end
M.isfinite = function(x) return x == x and x ~= inf and x ~= -inf end
M.logical_not = function(x) return x == 0 end
M.logical_and = function(x, y) return x ~= 0 and y ~= 0 end
M.logical_or = function(x, y) return x ~= 0 or y ~= 0 end

M.logical_xor = function(x, y) return (x ~= 0) ~= (y ~= 0) end

-- log(1 + x) and e^x - 1 without loss: what a sum rounded away is put back; a series.
local function log1p(x)
  if isnan(x) or x == inf then return x end
  if x < -1 then return nan end
  local s = 1 + x
  return (s == 1 and x) or (s == 0 and -inf) or math.log(s) + (x - (s - 1)) / s
end

local function expm1(x)
  if isnan(x) or math.abs(x) > 0.4 then return math.exp(x) - 1 end
  local sum, term = 0.0, 1
  for n = 1, 20 do
    term = term * x / n
    sum = sum + term
  end
  return x == 0 and x or sum
end

-- Sums of odd powers need no subtraction of near numbers.
local function sinh(x)
  if math.abs(x) >= 0.4 or isnan(x) then return (math.exp(x) - math.exp(-x)) / 2 end
  local sum, term = x, x
  for n = 1, 12 do
    term = term * x * x / (2 * n * (2 * n + 1))
    sum = sum + term
  end
  return sum
end

local function softplus(x) return math.max(x, 0) + log1p(math.exp(-math.abs(x))) end
local function is_finite(x) return x == x and x ~= inf and x ~= -inf end
local function round(x)
  if not is_finite(x) then return x end
  local below = floor(x)
  local rest = x - below
  if rest < 0.5 or (rest == 0.5 and below % 2 == 0) then return below end
  return below + 1
end

M.sign = function(x) return isnan(x) and x or x > 0 and 1 or x < 0 and -1 or 0 end
M.square = function(x) return x ^ 2 end
M.reciprocal = function(x) return 1 / x end
M.floor = floor
M.ceil = function(x) return -floor(-x) end
M.round = round
M.trunc = function(x) return x < 0 and -floor(-x) or floor(x) end
M.hypot = function(x, y)
  if math.abs(x) == inf or math.abs(y) == inf then return inf end
  return math.sqrt(x * x + y * y)
end
-- From the nearer end, so that weight 1 gives y to the bit.
M.lerp = function(x, y, weight)
  if math.abs(weight) < 0.5 then return x + weight * (y - x) end
  return y - (y - x) * (1 - weight)
end
M.addcmul = function(x, y, z, attr) return x + (attr.value or 1) * (y * z) end
M.addcdiv = function(x, y, z, attr) return x + (attr.value or 1) * (y / z) end
M.masked_fill = function(x, mask, value) if mask then return value end return x end

M.log2 = function(x) return x < 0 and nan or math.log(x) / math.log(2) end
M.log10 = function(x) return x < 0 and nan or math.log(x) / math.log(10) end
M.log1p = log1p
M.expm1 = expm1
M.tan = function(x) return is_finite(x) and math.sin(x) / math.cos(x) or nan end
M.asin = function(x) return math.abs(x) <= 1 and math.asin(x) or nan end
M.acos = function(x) return math.abs(x) <= 1 and math.acos(x) or nan end
M.atan = function(x) return math.atan(x) end
M.atan2 = function(x, y) return math.atan(x, y) end
M.sinh = sinh
M.cosh = function(x) return (math.exp(x) + math.exp(-x)) / 2 end
M.softsign = function(x) return x / (1 + math.abs(x)) end
M.logsigmoid = function(x) return isnan(x) and x or -softplus(-x) end
M.leaky_relu = function(x, attr) return x > 0 and x or x * (attr.negative_slope or 0.01) end
M.prelu = function(x, weight) return x > 0 and x or x * weight end
M.elu = function(x, attr) return x > 0 and x or (attr.alpha or 1) * expm1(x) end
M.hardtanh = function(x, attr) return isnan(x) and x or math.max(attr.min_val or -1, math.min(x, attr.max_val or 1)) end
M.mish = function(x) return isnan(x) and x or x * tanh(softplus(x)) end

--- The place on the grid before it is limited.
local function grid(x, scale, zero_point) return round(x * (1 / scale)) + zero_point end
M.fake_quantize = function(x, scale, zero_point, attr)
  local q, low, high = grid(x, scale, zero_point), attr.quant_min or -128, attr.quant_max or 127
  if q < low then q = low elseif q > high then q = high end
  return (q - zero_point) * scale
end

--- x rounded to an 8-bit float: mantissa bits, exponent of the smallest normal number, largest number; saturating.
local function to_f8(x, digits, least, most)
  if x == 0 or isnan(x) then return x end
  local e = x ~= inf and x ~= -inf and floor(math.log(math.abs(x), 2)) + 1 or 20
  while 2.0 ^ (e - 1) > math.abs(x) do e = e - 1 end
  while 2.0 ^ e <= math.abs(x) and e < 1025 do e = e + 1 end
  local step = 2.0 ^ (math.max(e - 1, least) - digits)
  local r = round(x / step) * step
  return math.max(-most, math.min(r, most))
end
M.to_f8 = to_f8

M.fp8_round = function(x, attr)
  if x == inf or x == -inf then return x end
  local scale = attr.scale or 1
  if attr.format == "e5m2" then return to_f8(x * scale, 2, -14, 57344) / scale end
  return to_f8(x * scale, 3, -6, 448) / scale
end

--- What goes through the rows whose derivative is declared, not that of the value: by the first input.
M.straight_through = {
  fp8_round = function() return 1 end,
  fake_quantize = function(x, scale, zero_point, attr)
    local q = grid(x, scale, zero_point)
    return (q < (attr.quant_min or -128) or q > (attr.quant_max or 127)) and 0 or 1
  end,
}

M.squared_error = function(x, target) return (x - target) ^ 2 end
M.absolute_error = function(x, target) return math.abs(x - target) end
M.smooth_l1 = function(x, target, attr)
  local beta, d = attr.beta or 1, math.abs(x - target)
  if d < beta then return 0.5 * d * d / beta end
  return d - 0.5 * beta
end
M.bce_with_logits = function(x, target, pos_weight)
  return (1 - target) * x + (1 + (pos_weight - 1) * target) * (isnan(x) and x or softplus(-x))
end
M.kl_div_term = function(x, target, attr)
  if attr.log_target then return math.exp(target) * (target - x) end
  return (target == 0 and 0 or target < 0 and nan or target * math.log(target)) - target * x
end
M.norm_grad = function(u, x, n, attr)
  local p = attr.p or 2
  if n == 0 or p == 0 then return 0 end
  if p == 1 then return isnan(x) and x or x > 0 and u or x < 0 and -u or u * x end
  if p == 2 then return u * (x / n) end
  return x == 0 and 0 or u * (x / n * (math.abs(x) / n) ^ (p - 2))
end

return M
