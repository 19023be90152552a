--- amp/layer_rules/layerwise.lua -- each layer has a scale of its own and moves it alone, as loss scales do.
--
-- The rule.  A layer whose own parameters have a gradient that is not finite multiplies its scale by backoff_factor;
-- growth_interval updates without that multiply it by growth_factor.  What happens in other layers does not count,
-- though the step is skipped if any layer overflowed.  First scales: `scales` by layer name, else init_scale.
-- Source: LayerwiseGradientScaler of fairscale (growth 2, backoff 0.5, interval 10000, bounds those of float32).
-- When.  The layers' gradients lie so far apart that no one scale suits all, and you know about how far (`scales`), or
-- train long enough for the rule to find out.
-- Note.  An infinity in the gradient of a layer's result reaches all layers before it, so those back off, too.

return {
  name = "layerwise",
  options = {
    scales = {}, init_scale = 1.0, growth_factor = 2.0, backoff_factor = 0.5, growth_interval = 10000,
    min_scale = 1.1754943508222875e-38, max_scale = 3.4028234663852886e38,
  },

  init = function(layer, opts)
    if not (opts.growth_factor >= 1 and opts.growth_factor < math.huge) then
      error("growth_factor must be at least 1 and finite", 0)
    end
    if not (opts.backoff_factor > 0 and opts.backoff_factor <= 1) then
      error("backoff_factor must be above 0 and at most 1", 0)
    end
    if not (opts.growth_interval >= 1 and opts.growth_interval % 1 == 0) then
      error("growth_interval must be a whole number from 1 on", 0)
    end
    if not (opts.min_scale > 0 and opts.min_scale <= opts.max_scale) then
      error("min_scale must be above 0 and not above max_scale", 0)
    end
    return {scale = (opts.scales[layer.name] or opts.init_scale) + 0.0, clean = 0}
  end,

  update = function(state, event, opts)
    if event.found_inf then
      state.clean = 0
      return math.max(state.scale * opts.backoff_factor, opts.min_scale)
    end
    state.clean = state.clean + 1
    if state.clean < opts.growth_interval then return state.scale end
    state.clean = 0
    return math.min(state.scale * opts.growth_factor, opts.max_scale)
  end,
}
