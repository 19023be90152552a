--- amp/policies/apex_hysteresis.lua -- bears `hysteresis` - 1 overflows in a row before it backs off.
--
-- The rule.  Each overflow uses up one of `hysteresis` chances and clears the count of clean steps; with none left the
-- scale is multiplied by backoff_factor, and so at each further overflow.  Any clean step gives all chances back.
-- growth_interval clean steps in a row double the scale, unless that would leave the range of float32.
-- Source: update_scale_hysteresis.cu of NVIDIA/apex.
-- When.  Single bad batches are known to happen and should not cost a halving; two overflows in a row mean that the
-- scale is too high.  Skipped steps are the price: each real excess is paid `hysteresis` times.

local LARGEST = 3.4028234663852886e38 -- of float32

return {
  name = "apex_hysteresis",
  needs = {},
  options = {growth_factor = 2.0, backoff_factor = 0.5, growth_interval = 2000, hysteresis = 2},

  init = function(opts)
    if opts.hysteresis < 1 then error("hysteresis must be at least 1", 0) end
    return {scale = opts.init_scale or 2.0 ^ 16, clean = 0, chances = opts.hysteresis}
  end,

  update = function(state, event, opts)
    if event.found_inf then
      state.clean = 0
      state.chances = state.chances - 1
      if state.chances <= 0 then state.scale = state.scale * opts.backoff_factor end
      return state.scale
    end
    state.chances = opts.hysteresis
    state.clean = state.clean + 1
    if state.clean >= opts.growth_interval then
      local grown = state.scale * opts.growth_factor
      if grown <= LARGEST then state.scale = grown end
      state.clean = 0
    end
    return state.scale
  end,
}
