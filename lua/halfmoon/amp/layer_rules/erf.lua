--- amp/layer_rules/erf.lua -- erf and its inverse for one number, in double precision.
--
-- erf by its Maclaurin series, which serves up to |x| = 4 (beyond, erf is 1 to 1.5e-8); its inverse by Newton's method
-- from Winitzki's approximation ("A handy approximation for the error function and its inverse", 2008).

local erf = {}

--- erf(x), to about 1e-10 for |x| up to 4.
---@param x number
---@return number
function erf.erf(x)
  if x > 4 then return 1.0 elseif x < -4 then return -1.0 end
  local term, sum, n = x, x, 0
  repeat
    n = n + 1
    term = -term * x * x / n
    sum = sum + term / (2 * n + 1)
  until math.abs(term) < 1e-17 * math.abs(sum) or n > 200
  return 2 / math.sqrt(math.pi) * sum
end

--- The x whose erf is y, for y between -1 and 1.
---@param y number
---@return number
function erf.inverse(y)
  if y == 0 then return 0.0 end
  local a = 0.147
  local log = math.log(1 - y * y)
  local b = 2 / (math.pi * a) + log / 2
  local x = math.sqrt(math.sqrt(b * b - log / a) - b)
  if y < 0 then x = -x end
  for _ = 1, 4 do
    x = x - (erf.erf(x) - y) * math.sqrt(math.pi) / 2 * math.exp(x * x)
  end
  return x
end

return erf
