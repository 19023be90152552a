-- philox.lua -- the engine's random numbers, in plain Lua integers: Philox4x32-10 as in Salmon and others, "Parallel
-- random numbers: as easy as 1, 2, 3", with the counters and the mappings that kernels/philox.h describes.
--
-- rng is {seed, offset}.  Every backend must give these.

local M = {}

local MASK = 0xffffffff

--- Four words of 32 bits for a counter of 128 bits (its low 64, the third word) and a key of 64.
local function words(seed, counter, stream)
  local c0, c1, c2, c3 = counter & MASK, counter >> 32 & MASK, stream, 0
  local k0, k1 = seed & MASK, seed >> 32 & MASK
  for _ = 1, 10 do
    local a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
    c0, c1, c2, c3 = (b >> 32 ~ c1 ~ k0) & MASK, b & MASK, (a >> 32 ~ c3 ~ k1) & MASK, a & MASK
    k0, k1 = k0 + 0x9E3779B9 & MASK, k1 + 0xBB67AE85 & MASK
  end
  return {c0, c1, c2, c3}
end
M.words = words

--- The first n words of a stream.
local function list(rng, n, stream)
  local out = {}
  for i = 0, n - 1, 4 do
    for k, w in ipairs(words(rng[1], rng[2] + i // 4, stream)) do
      if i + k <= n then out[i + k] = w end
    end
  end
  return out
end

--- Fractions in [0, 1): of 24 bits, or of 53 where the numbers are float64.
local function fractions(rng, n, wide)
  local high, low, out = list(rng, n, 0), wide and list(rng, n, 1), {}
  for i = 1, n do
    if wide then out[i] = ((high[i] << 32 | low[i]) >> 11) * 2.0 ^ -53 else out[i] = (high[i] >> 8) * 2.0 ^ -24 end
  end
  return out
end

--- Which of n elements stay, when each is dropped with probability p.
function M.keeps(rng, n, p)
  local out = list(rng, n, 0)
  for i = 1, n do out[i] = out[i] >= p * 2.0 ^ 32 end
  return out
end

local function filled(x, values)
  values.shape = x.shape
  return values
end

--- low + u * (high - low).
function M.uniform(x, attrs)
  local low, high = attrs.low or 0, attrs.high or 1
  local u = fractions(attrs.rng, #x, attrs.wide)
  for i = 1, #u do u[i] = low + u[i] * (high - low) end
  return filled(x, u)
end

--- Box and Muller: radius from the first of a pair, never of 0, angle from the second.
function M.normal(x, attrs)
  local n, out = #x, {}
  local u, first = fractions(attrs.rng, n + n % 2, attrs.wide), list(attrs.rng, n + n % 2, 0)
  for i = 1, n, 2 do
    local v = attrs.wide and u[i] + 2.0 ^ -53 or (first[i] >> 1) * 2.0 ^ -31 + 2.0 ^ -32
    local r, angle = math.sqrt(-2 * math.log(v)), 2 * math.pi * u[i + 1]
    out[i], out[i + 1] = r * math.cos(angle), r * math.sin(angle)
  end
  out[n + 1] = nil
  for i = 1, n do out[i] = (attrs.mean or 0) + (attrs.std or 1) * out[i] end
  return filled(x, out)
end

--- low + (64 bits * (high - low)) / 2^64, for ranges below 2^31.
function M.random(x, attrs)
  local high, low, out = list(attrs.rng, #x, 0), list(attrs.rng, #x, 1), {}
  local range = attrs.high - attrs.low
  for i = 1, #x do out[i] = attrs.low + ((high[i] * range + (low[i] * range >> 32)) >> 32) end
  return filled(x, out)
end

return M
