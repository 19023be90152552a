-- worst_layer.lua -- a loss-scale policy that looks at each parameter by itself.
--
--   build/halfmoon examples/fashion_cnn.lua --dtype f16 --policy examples/policies/worst_layer.lua
--
-- The rule: the scale is the power of two that puts the parameter with the smallest gradients (by their largest value)
-- at `wanted`, if the parameter with the largest ones then stays a factor of 2^headroom below the largest float16.  Its
-- state says which parameters these were: scaler:state_dict().policy_state.

local LARGEST = 65504.0 -- of float16
local wanted = 1.0
local headroom = 4

return {
  name = "worst_layer",
  needs = {"per_param"},

  init = function(opts) return {scale = opts.init_scale or 1024.0, smallest = "", largest = ""} end,

  update = function(state, event)
    if event.found_inf then
      state.scale = state.scale / 2
      return state.scale
    end
    local low, high = math.huge, 0.0
    for _, p in ipairs(event.per_param) do
      if p.amax > 0 and p.amax < low then low, state.smallest = p.amax, p.name end
      if p.amax > high then high, state.largest = p.amax, p.name end
    end
    if high > 0 then
      local best = math.min(math.log(wanted / low, 2), math.log(LARGEST / high, 2) - headroom)
      state.scale = 2.0 ^ (best // 1)
    end
    return state.scale
  end,
}
