-- spike_guard.lua -- a loss-scale policy that lowers the scale when a gradient grows suddenly, before it overflows.
--
--   build/halfmoon examples/fashion_cnn.lua --dtype f16 --policy examples/policies/spike_guard.lua
--
-- The rule: `norm` is compared with its own running mean.  A step whose norm is `jump` times the mean quarters the
-- scale for the next ones; after `calm` steps without such a jump it doubles again, up to where it was before the last
-- jump.

local jump = 4.0  -- times the mean
local calm = 25   -- steps before the scale doubles

return {
  name = "spike_guard",
  needs = {"norm"},

  init = function(opts)
    local scale = opts.init_scale or 2.0 ^ 14
    return {scale = scale, ceiling = scale, mean = 0.0, quiet = 0}
  end,

  update = function(state, event)
    local jumped = event.found_inf or (state.mean > 0 and event.norm > jump * state.mean)
    if not event.found_inf then
      state.mean = state.mean == 0 and event.norm or 0.95 * state.mean + 0.05 * event.norm
    end
    if jumped then
      if state.quiet >= calm then state.ceiling = state.scale end
      state.scale = state.scale / 4
      state.quiet = 0
      return state.scale
    end
    state.quiet = state.quiet + 1
    if state.quiet % calm == 0 then state.scale = math.min(state.scale * 2, state.ceiling) end
    return state.scale
  end,
}
