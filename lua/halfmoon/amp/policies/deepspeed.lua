--- amp/policies/deepspeed.lua -- DeepSpeed's rule, with and without hysteresis; stops at the smallest scale.
--
-- The rule.  An overflow multiplies the scale by backoff_factor, unless chances are left (`hysteresis` > 1): then it
-- uses up one.  At every growth_interval-th step after the last overflow the scale is multiplied by growth_factor and
-- the chances come back; with consecutive_hysteresis they come back at every clean step.  An overflow at min_scale
-- stops the training, unless raise_error_at_min_scale is false.
-- Source: DynamicLossScaler in deepspeed/runtime/fp16/loss_scaler.py (microsoft/DeepSpeed).  The defaults are those of
-- the class: 2^32, interval 1000, min 1, hysteresis (delayed_shift) 1.  A configuration file that names any dynamic
-- option begins at 2^16 with hysteresis 2: GradScaler{policy = "deepspeed", init_scale = 2^16, hysteresis = 2}.
-- When.  To repeat a run of DeepSpeed, or where a run that skips for ever should end by itself.

return {
  name = "deepspeed",
  needs = {},
  options = {
    growth_factor = 2.0, backoff_factor = 0.5, growth_interval = 1000, hysteresis = 1, consecutive_hysteresis = false,
    raise_error_at_min_scale = true,
  },
  min_scale = 1.0,
  max_scale = math.huge,

  init = function(opts)
    if opts.hysteresis < 1 then error("hysteresis must be at least 1", 0) end
    return {scale = opts.init_scale or 2.0 ^ 32, iteration = 0, last_overflow = -1, chances = opts.hysteresis}
  end,

  update = function(state, event, opts)
    if event.found_inf then
      if opts.hysteresis == 1 or state.chances <= 1 then
        if state.scale <= opts.min_scale and opts.raise_error_at_min_scale then
          return state.scale, {
            stop = "Current loss scale already at minimum - cannot decrease scale anymore. Exiting run.",
          }
        end
        state.scale = math.max(state.scale * opts.backoff_factor, opts.min_scale)
      else
        state.chances = state.chances - 1
      end
      state.last_overflow = state.iteration
    else
      if opts.consecutive_hysteresis then state.chances = opts.hysteresis end
      if (state.iteration - state.last_overflow) % opts.growth_interval == 0 then
        state.chances = opts.hysteresis
        state.scale = state.scale * opts.growth_factor
      end
    end
    state.iteration = state.iteration + 1
    return state.scale
  end,
}
