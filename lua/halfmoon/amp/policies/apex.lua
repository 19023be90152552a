--- amp/policies/apex.lua -- Apex's rule: as PyTorch's, with a cap of 2^24 and no floor.
--
-- The rule.  An overflow halves the scale and clears the count of clean steps; growth_interval clean steps in a row
-- double it, up to max_scale.  Once the scale is at the cap, every further interval leaves it there.
-- Source: LossScaler in apex/amp/scaler.py (NVIDIA/apex).  Its scale_factor is growth_factor here (and 1/scale_factor
-- is backoff_factor), its scale_window is growth_interval, its min_loss_scale and max_loss_scale are min_scale and
-- max_scale.
-- When.  To repeat a run made with Apex.  `dynamic` is the same with a floor of 1.

return {
  name = "apex",
  needs = {},
  options = {growth_factor = 2.0, backoff_factor = 0.5, growth_interval = 2000},
  min_scale = 0.0,
  max_scale = 2.0 ^ 24,

  init = function(opts) return {scale = opts.init_scale or 2.0 ^ 16, clean = 0} end,

  update = function(state, event, opts)
    if event.found_inf then
      state.scale = state.scale * opts.backoff_factor
      state.clean = 0
      return state.scale
    end
    state.clean = state.clean + 1
    if state.clean >= opts.growth_interval then
      state.scale = math.min(state.scale * opts.growth_factor, opts.max_scale)
      state.clean = 0
    end
    return state.scale
  end,
}
