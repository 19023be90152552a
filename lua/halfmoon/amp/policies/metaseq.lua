--- amp/policies/metaseq.lua -- the rule of OPT-175B's training: the interval grows and shrinks with the scale.
--
-- The rule.  At every window-th step after the last overflow the scale and the window are multiplied by growth_factor;
-- an overflow multiplies the scale by backoff_factor, down to min_scale, and divides the window (whole steps, at least
-- 1).  At min_scale it goes on skipping; nothing is stopped.
-- Source: metaseq/optim/dynamic_loss_scaler.py (facebookresearch/metaseq).  Defaults: 4, window (growth_interval here)
-- 256, min 2^-5.
-- When.  Trainings with bursts of overflows: the short window after a burst brings the scale back within few steps, the
-- long one in calm times costs few skips.

return {
  name = "metaseq",
  needs = {},
  options = {growth_factor = 2.0, backoff_factor = 0.5, growth_interval = 256},
  min_scale = 2.0 ^ -5,
  max_scale = math.huge,

  init = function(opts)
    return {scale = opts.init_scale or 4.0, window = opts.growth_interval, iteration = 0, last_overflow = -1}
  end,

  update = function(state, event, opts)
    if event.found_inf then
      state.last_overflow = state.iteration
      state.scale = math.max(state.scale * opts.backoff_factor, opts.min_scale)
      state.window = math.max(1, state.window / opts.growth_factor // 1)
    elseif (state.iteration - state.last_overflow) % state.window == 0 then
      state.scale = state.scale * opts.growth_factor
      state.window = state.window * opts.growth_factor // 1
    end
    state.iteration = state.iteration + 1
    return state.scale
  end,
}
