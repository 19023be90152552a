-- numbers.lua -- comparing numbers and tensors in specs.

local M = {}

--- Flattens what totable() gives into one array of numbers (booleans stay).
function M.flat(x)
  if type(x) == "userdata" then x = x:totable() end
  if type(x) ~= "table" then return {x} end
  local out = {}
  local function go(t)
    for _, v in ipairs(t) do
      if type(v) == "table" then go(v) else out[#out + 1] = v end
    end
  end
  go(x)
  return out
end

--- Same number: NaN equals NaN, zeros of both signs are equal.
function M.same(a, b) return a == b or (a ~= a and b ~= b) end

-- Binades of each format: digits of the significand, least normal exponent.
local FORMATS = {float64 = {53, -1022}, float32 = {24, -126}, float16 = {11, -14}, bfloat16 = {8, -126}}
local LARGEST = {float64 = math.huge, float32 = 3.4028234663852886e38, float16 = 65504, bfloat16 = 3.3895313892515355e38}

--- The spacing of numbers of a dtype around x.
function M.ulp(x, dtype)
  local digits, least = table.unpack(FORMATS[dtype])
  x = math.abs(x)
  if x == 0 or x ~= x or x == math.huge then return 2.0 ^ (least - digits + 1) end
  local e = math.floor(math.log(x, 2))
  if 2.0 ^ e > x then e = e - 1 elseif 2.0 ^ (e + 1) <= x then e = e + 1 end
  return 2.0 ^ (math.max(e, least) - digits + 1)
end

--- Distance of a from the exact value b in units in the last place of dtype; 0 for equal, infinite where one is NaN or
-- of another infinity.
-- A value past the format's largest counts as infinity within half an ulp of it.
function M.ulps(a, b, dtype)
  if M.same(a, b) then return 0 end
  if a ~= a or b ~= b then return math.huge end
  local top = LARGEST[dtype]
  if math.abs(a) == math.huge and math.abs(b) > top then return (a > 0) == (b > 0) and 0 or math.huge end
  if math.abs(a) == math.huge or math.abs(b) == math.huge then return math.huge end
  return math.abs(a - b) / M.ulp(b, dtype)
end

--- |a - b| <= atol + rtol * |b|, or same.
function M.near(a, b, rtol, atol)
  if M.same(a, b) then return true end
  return math.abs(a - b) <= (atol or 0) + (rtol or 0) * math.abs(b)
end

--- Raises with the first place where two tensors or tables differ by more than the tolerances.
function M.assert_near(got, want, rtol, atol, what)
  local g, w = M.flat(got), M.flat(want)
  if #g ~= #w then error(("%s: %d values, expected %d"):format(what or "values", #g, #w), 2) end
  for i = 1, #w do
    if not (M.near(g[i], w[i], rtol, atol)) then
      error(("%s: value %d is %.9g, expected %.9g (rtol %g, atol %g)"):format(what or "values", i, g[i], w[i], rtol or 0, atol or 0), 2)
    end
  end
end

--- Raises unless two tensors hold the same values exactly (NaN equals NaN).
function M.assert_same(got, want, what)
  local g, w = M.flat(got), M.flat(want)
  if #g ~= #w then error(("%s: %d values, expected %d"):format(what or "values", #g, #w), 2) end
  for i = 1, #w do
    if not M.same(g[i], w[i]) then
      error(("%s: value %d is %s, expected %s"):format(what or "values", i, tostring(g[i]), tostring(w[i])), 2)
    end
  end
end

return M
