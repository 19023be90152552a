--- amp/policies/auto.lua -- Halfmoon's own: the scale at which least is lost, from the gradients' exponents.
--
-- The rule.  After every step the policy asks of each power of two: if this were the next scale, which share of the
-- gradients would be lost?
--   underflow   the share of non-zero gradients that float16 would round to zero, a subnormal counting for the part of
--               it that rounding takes; from the exponent histogram.  What the present scale has already flushed cannot
--               be seen: it is estimated by going on with the slope of the smallest visible exponents, and is never
--               more than the zeros that were counted.
--   overflow    the chance that the next step overflows, in which all of it is lost.  log2 of the largest gradient is
--               followed with its trend; the mean square of the errors of these forecasts is the variance of the next
--               one, with the heavy tails of Student's t with 3 degrees of freedom (gradients do spike).
-- Gradients inside the network are smaller than those of the parameters, which are sums over batch and places: the
-- first part is taken for values 2^inner_bits smaller.  The scale with the least sum is taken.  So the scale moves
-- both ways before anything overflows; skip_cost weighs the second part (1: a skipped step is worth as much as one
-- whose gradients all became zero).
-- Values inside the network can overflow before any parameter's gradient does.  An overflow that comes although the
-- parameters' gradients had room teaches the policy how far those lie above (`hidden`); clean steps slowly unteach it,
-- half in 350 steps.
-- What it gains.  Less is lost in all, a skipped step counted as all of its gradients.  It does not flush less than
-- `dynamic` everywhere: that climbs until it overflows, holds a higher scale between two overflows, and flushes less
-- inside the network.  703 steps of the demo (batches of 64), recorded, then replayed with growth_interval 50: auto at
-- 2^13.6 on average, no step skipped, 2.9e-5 of the gradients of layers' results flushed; dynamic at 2^20.3, 6 steps
-- skipped (8.5e-3 of all), 2.6e-7 flushed.  Where gradients drift by 2^20 (examples/auto_policy.lua), it has less of
-- both.
-- When.  Gradients that change their size in the course of the training, or models where every lost gradient counts.
-- It needs the histogram, so it costs one more look at the gradients while they are in cache, and cannot be used with
-- async = true.

local LIMIT = 16.0        -- log2 of where float16 overflows (65520)
local SMALLEST = -25      -- below 2^-25 values are rounded to zero
local NORMAL = -14        -- from 2^-14 on values keep all their bits
local WIDTH = 24          -- scales that are tried: the highest one that is not hopeless, and so many below

local function log2(x) return math.log(x, 2) end

-- The chance to be above z standard deviations, by Student's t with 3 degrees of freedom.  Its variance is 3, so z stands
-- for t = sqrt(3) z; its distribution function is written in t / sqrt(3), which is z.
local function tail(z) return 0.5 - (z / (1 + z * z) + math.atan(z)) / math.pi end

-- Follows log2 of the largest gradient: level and trend, and the mean square of its forecasts' errors (spread).
local function follow(state, x)
  if state.seen == 0 then
    state.level, state.trend = x, 0.0
  else
    local miss = x - (state.level + state.trend)
    state.spread = state.spread + 0.05 * (miss * miss - state.spread)
    state.level = state.level + state.trend + 0.5 * miss
    state.trend = math.max(-2.0, math.min(2.0, state.trend + 0.08 * miss))
  end
  state.seen = state.seen + 1
end

-- An overflow at a scale of 2^s: the largest value was above 2^(LIMIT - s).
local function overflowed(state, s)
  local room = LIMIT - s - (state.level + state.trend)
  state.row = state.row + 1
  if state.seen > 0 and room > state.hidden then state.hidden = state.hidden + 0.5 * (room - state.hidden) end
  local top = state.level + state.trend + state.hidden
  if state.seen == 0 then top = LIMIT - s end
  state.bump = math.max(state.bump, LIMIT - s - top) + 2.0 ^ (state.row - 1)
  state.spread = math.min(9.0, state.spread + 0.25)
end

-- Two arrays: exponents and the share of the non-zero gradients that has each, with an estimate of what 2^s flushed.
local function shares(histogram, s)
  local exponents, counts, total = {}, {}, 0
  for exponent = -126, 127 do
    local n = histogram[exponent]
    if n then
      exponents[#exponents + 1], counts[#counts + 1] = exponent, n
      total = total + n
    end
  end
  local edge = SMALLEST - s // 1 + 1 -- the smallest exponent that is seen whole
  local low, high = 0, 0
  for i = 0, 3 do
    low = low + (histogram[edge + i] or 0)
    high = high + (histogram[edge + 4 + i] or 0)
  end
  if low > 0 and high > 0 and histogram.zeros > 0 then
    local ratio = math.max(0.25, math.min(0.95, (low / high) ^ 0.25))
    local n, unseen = low / 4, histogram.zeros
    for exponent = edge - 1, edge - 24, -1 do
      n = math.min(n * ratio, unseen)
      unseen = unseen - n
      exponents[#exponents + 1], counts[#counts + 1] = exponent, n
      total = total + n
    end
  end
  for i = 1, #counts do counts[i] = counts[i] / total end
  return exponents, counts
end

-- The share of the gradients that float16 loses at a scale of 2^s.
local function underflow(exponents, share, s)
  local lost = 0.0
  for i = 1, #exponents do
    local x = exponents[i] + s
    if x < SMALLEST then lost = lost + share[i]
    elseif x < NORMAL then lost = lost + share[i] * 2.0 ^ (SMALLEST - 1 - x) end
  end
  return lost
end

-- The exponent of the scale with the least loss.
local function best(state, exponents, share, opts)
  local top = state.level + state.trend + state.hidden + state.bump
  local spread = math.sqrt(state.spread + 0.25)
  local lowest = opts.min_scale > 0 and math.ceil(log2(opts.min_scale)) or -126
  local highest = opts.max_scale < math.huge and log2(opts.max_scale) // 1 or 127
  local first = math.min(highest, math.max(lowest, LIMIT - top)) // 1
  local choice, least = first, math.huge
  for s = first, math.max(lowest, first - WIDTH), -1 do
    local loss = underflow(exponents, share, s - opts.inner_bits) + opts.skip_cost * tail((LIMIT - s - top) / spread)
    if loss < least then choice, least = s, loss end
  end
  return choice
end

return {
  name = "auto",
  needs = {"histogram", "amax"},
  options = {skip_cost = 1.0, inner_bits = 14.0},

  init = function(opts)
    if opts.skip_cost <= 0 then error("skip_cost must be above 0", 0) end
    return {
      scale = opts.init_scale or 2.0 ^ 16, level = 0.0, trend = 0.0, spread = 1.0, hidden = 0.0, bump = 0.0, row = 0,
      seen = 0,
    }
  end,

  update = function(state, event, opts)
    local s = log2(event.scale)
    if event.found_inf then
      overflowed(state, s)
      local top = state.level + state.trend + state.hidden + state.bump
      if state.seen == 0 then top = LIMIT - s + state.bump end
      state.scale = 2.0 ^ math.max(-126, math.min(s - 1, LIMIT - 1 - top) // 1)
      return state.scale
    end
    state.row = 0
    state.bump = state.bump * 0.5
    state.hidden = state.hidden * 0.998
    if event.amax == 0 then -- nothing is left to look at
      state.scale = state.scale * 16
      return state.scale
    end
    follow(state, log2(event.amax))
    local exponents, share = shares(event.histogram, s)
    state.scale = 2.0 ^ best(state, exponents, share, opts)
    return state.scale
  end,
}
