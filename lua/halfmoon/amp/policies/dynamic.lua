--- amp/policies/dynamic.lua -- PyTorch's rule: back off at each overflow, grow after growth_interval clean steps in a
--- row.
--
-- Lowering growth_interval in mid-run takes effect at once, since the test is "at least", not "equal".  A growth that
-- would leave the range of float32 is not taken.

local LARGEST = 3.4028234663852886e38 -- of float32

return {
  name = "dynamic",
  needs = {},
  options = {growth_factor = 2.0, backoff_factor = 0.5, growth_interval = 2000},

  init = function(opts) return {scale = opts.init_scale or 2.0 ^ 16, clean = 0} end,

  update = function(state, event, opts)
    if event.found_inf then
      state.scale = state.scale * opts.backoff_factor
      state.clean = 0
      return state.scale
    end
    state.clean = state.clean + 1
    if state.clean >= opts.growth_interval then
      local grown = state.scale * opts.growth_factor
      if grown <= LARGEST then state.scale = grown end
      state.clean = 0
    end
    return state.scale
  end,
}
