--- amp/policies/keras.lua -- the rule of Keras: doubles and halves, begins at 2^15, no floor.
--
-- The rule.  An overflow halves the scale and clears the count of clean steps; growth_interval clean steps double it.
-- Source: LossScaleOptimizer in keras/src/optimizers/loss_scale_optimizer.py (keras-team/keras); dynamic_growth_steps
-- there is growth_interval here.  tf-keras has a floor of 1: give min_scale = 1.
-- When.  To repeat a run made with Keras.  Without a floor a loss that stays infinite drives the scale down for ever:
-- for a new run take `dynamic`, which stops at 1.

return {
  name = "keras",
  needs = {},
  options = {growth_interval = 2000},
  min_scale = 0.0,
  max_scale = math.huge,

  init = function(opts) return {scale = opts.init_scale or 2.0 ^ 15, clean = 0} end,

  update = function(state, event, opts)
    if event.found_inf then
      state.scale = state.scale * 0.5
      state.clean = 0
      return state.scale
    end
    state.clean = state.clean + 1
    if state.clean >= opts.growth_interval then
      state.scale = state.scale * 2.0
      state.clean = 0
    end
    return state.scale
  end,
}
