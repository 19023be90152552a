--- amp/policies/histogram.lua -- Graphcore's rule: keeps the largest gradients just below overflow, without waiting for
-- one.
--
-- The rule.  Scaled gradients are counted as large or not; large are those above bin_edge_location * 65504 (8188).
-- After every update_period steps: halve the scale if more than the share threshold_upper_count_proportion is large,
-- else double it.  Zeros count as not large.
-- Source: automatic loss scaling of PopART (graphcore/popart, willow/include/popart/sessionoptions.hpp).  There the
-- tracked tensors are all gradients in float16; here they are the parameters' gradients.  Here the edge is the
-- next power of two (8192 for 8188).  And here an overflow halves the scale and its step is skipped; PopART has
-- neither.
-- When.  Gradients of many sizes whose large end matters less than the small one.  The scale always moves, by a factor
-- of 2 at each period.

local LARGEST = 65504.0 -- of float16

return {
  name = "histogram",
  needs = {"histogram"},
  options = {bin_edge_location = 0.125, threshold_upper_count_proportion = 1e-7, update_period = 1},

  init = function(opts)
    if not (opts.bin_edge_location > 0 and opts.bin_edge_location <= 1) then
      error("bin_edge_location must be above 0 and at most 1", 0)
    end
    if opts.update_period < 1 then error("update_period must be at least 1", 0) end
    return {scale = opts.init_scale or 1.0, upper = 0, lower = 0, steps = 0}
  end,

  update = function(state, event, opts)
    if event.found_inf then
      state.upper, state.lower, state.steps = 0, 0, 0
      state.scale = state.scale * 0.5
      return state.scale
    end
    local counts = event.histogram
    local edge = math.log(opts.bin_edge_location * LARGEST / event.scale, 2) // 1
    state.lower = state.lower + counts.zeros + counts.subnormals
    for exponent = -126, 127 do
      local n = counts[exponent]
      if n and exponent > edge then state.upper = state.upper + n elseif n then state.lower = state.lower + n end
    end
    state.steps = state.steps + 1
    if state.steps < opts.update_period then return state.scale end
    local large = state.upper > opts.threshold_upper_count_proportion * (state.upper + state.lower)
    state.upper, state.lower, state.steps = 0, 0, 0
    state.scale = state.scale * (large and 0.5 or 2.0)
    return state.scale
  end,
}
