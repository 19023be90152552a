-- flush_budget.lua -- a loss-scale policy that keeps the share of flushed gradients within a budget.
--
--   build/halfmoon examples/fashion_cnn.lua --dtype f16 --policy examples/policies/flush_budget.lua
--
-- The rule: from the exponent histogram, the smallest power of two is taken at which at most `budget` of the non-zero
-- gradients are so small that float16 cannot hold all their bits (below 2^-14 when scaled).  An overflow halves it, and
-- holds it below the scale that overflowed for `wait` steps.

local budget = 0.01
local wait = 200

return {
  name = "flush_budget",
  needs = {"histogram"},

  init = function(opts) return {scale = opts.init_scale or 2.0 ^ 16, ceiling = 2.0 ^ 24, held = 0} end,

  update = function(state, event)
    if event.found_inf then
      state.scale = state.scale / 2
      state.ceiling, state.held = state.scale, wait
      return state.scale
    end
    state.held = state.held - 1
    if state.held <= 0 then state.ceiling = 2.0 ^ 24 end
    local total = 0
    for exponent = -126, 127 do total = total + (event.histogram[exponent] or 0) end
    local below = 0
    for exponent = -126, 127 do
      below = below + (event.histogram[exponent] or 0)
      if below > budget * total then -- values of this exponent must be held in full
        state.scale = math.min(2.0 ^ math.max(0, -14 - exponent), state.ceiling)
        break
      end
    end
    return state.scale
  end,
}
