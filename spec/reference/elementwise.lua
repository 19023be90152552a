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

return M
