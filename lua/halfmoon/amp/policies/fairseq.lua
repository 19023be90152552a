--- amp/policies/fairseq.lua -- fairseq's rule: bears a share of overflows, stops below a smallest scale.
--
-- The rule.  An overflow multiplies the scale by backoff_factor if the overflows since the scale last moved are at
-- least the share `tolerance` of the steps since then.  The scale does not fall below `threshold` (0: none).  Where it
-- would reach min_scale, it stays as it was and the training is stopped.  At every growth_interval-th step after the
-- last overflow it is multiplied by growth_factor.
-- Source: DynamicLossScaler in fairseq/optim/dynamic_loss_scaler.py (facebookresearch/fairseq).  Defaults of the class:
-- 2^15, interval 2000, tolerance 0, no threshold, min 1e-4.  Its command line begins at 2^7 and takes the interval
-- 2^14 / (workers * accumulated batches).  A threshold above min_scale makes the stop unreachable.
-- When.  Data with a known share of bad batches: tolerance = 0.05 lets one step in twenty overflow without a halving.

return {
  name = "fairseq",
  needs = {},
  options = {growth_factor = 2.0, backoff_factor = 0.5, growth_interval = 2000, tolerance = 0.0, threshold = 0.0},
  min_scale = 1e-4,
  max_scale = math.huge,

  init = function(opts)
    if not (opts.tolerance >= 0 and opts.tolerance <= 1) then error("tolerance must lie between 0 and 1", 0) end
    if opts.threshold < 0 then error("threshold must be 0 (none) or a positive scale", 0) end
    return {
      scale = opts.init_scale or 2.0 ^ 15, iteration = 0, last_overflow = -1, last_rescale = -1, overflows = 0,
    }
  end,

  update = function(state, event, opts)
    if not event.found_inf then
      if (state.iteration - state.last_overflow) % opts.growth_interval == 0 then
        state.scale = state.scale * opts.growth_factor
        state.last_rescale = state.iteration
      end
      state.iteration = state.iteration + 1
      return state.scale
    end
    local before = state.scale
    state.last_overflow = state.iteration
    state.overflows = state.overflows + 1
    local share = state.overflows / math.max(1, state.iteration - state.last_rescale)
    if share >= opts.tolerance then
      state.scale = math.max(state.scale * opts.backoff_factor, opts.threshold)
      state.last_rescale = state.iteration
      state.overflows = 0
    end
    if state.scale <= opts.min_scale then
      state.scale = before
      return before, {
        stop = string.format("Minimum loss scale reached (%g). Your loss is probably exploding. Try lowering the "
          .. "learning rate, using gradient clipping or increasing the batch size.", opts.min_scale),
      }
    end
    state.iteration = state.iteration + 1
    return state.scale
  end,
}
