--- amp/policies/megatron.lua -- Megatron-LM's rule: chances that only growth gives back.
--
-- The rule.  Each overflow clears the count of clean steps and uses up one of `hysteresis` chances; with none left the
-- scale is multiplied by backoff_factor, down to min_scale, and so at each further overflow.  growth_interval clean
-- steps in a row multiply it by growth_factor and give the chances back; a clean step alone does not.  No cap.
-- Source: DynamicGradScaler in megatron/core/optimizer/grad_scaler.py (NVIDIA/Megatron-LM).  Its initial_scale,
-- min_scale (1), growth_interval (loss_scale_window) and hysteresis have these defaults: 2^32, 1, 1000, 2.
-- When.  Long runs of large models, where overflows are rare and most of them are single.  The start at 2^32 costs a
-- few skipped steps; give init_scale = 2^16 for small models.

return {
  name = "megatron",
  needs = {},
  options = {growth_factor = 2.0, backoff_factor = 0.5, growth_interval = 1000, hysteresis = 2},
  min_scale = 1.0,
  max_scale = math.huge,

  init = function(opts)
    if opts.hysteresis < 1 then error("hysteresis must be at least 1", 0) end
    return {scale = opts.init_scale or 2.0 ^ 32, clean = 0, chances = opts.hysteresis}
  end,

  update = function(state, event, opts)
    if event.found_inf then
      state.clean = 0
      state.chances = state.chances - 1
      if state.chances <= 0 then state.scale = math.max(state.scale * opts.backoff_factor, opts.min_scale) end
      return state.scale
    end
    state.clean = state.clean + 1
    if state.clean >= opts.growth_interval then
      state.clean = 0
      state.chances = opts.hysteresis
      state.scale = state.scale * opts.growth_factor
    end
    return state.scale
  end,
}
