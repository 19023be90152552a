--- amp/policies/search.lua -- raises the scale until the first overflow, then holds it below.
--
-- The rule.  Begin at 512.  Multiply by growth_factor after every growth_interval clean steps.  At the first overflow
-- go back by backoff_factor and never raise again; a later overflow lowers the scale once more.
-- Source: the recipe of many tutorials for finding a static scale by hand.
-- When.  To find a scale for `static`, or where gradients keep their size through a training.  Where they shrink, the
-- scale found at the start is too small later: take `dynamic` or `auto`.

return {
  name = "search",
  needs = {},
  options = {growth_factor = 2.0, backoff_factor = 0.5, growth_interval = 1},

  init = function(opts) return {scale = opts.init_scale or 512.0, clean = 0, found = false} end,

  update = function(state, event, opts)
    if event.found_inf then
      state.found = true
      state.scale = state.scale * opts.backoff_factor
      return state.scale
    end
    state.clean = state.clean + 1
    if not state.found and state.clean >= opts.growth_interval then
      state.clean = 0
      state.scale = state.scale * opts.growth_factor
    end
    return state.scale
  end,
}
