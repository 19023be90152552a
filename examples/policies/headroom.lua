-- headroom.lua -- a loss-scale policy that looks at the gradients instead of waiting for an overflow.
--
--   build/halfmoon examples/fashion_cnn.lua --dtype f16 --policy examples/policies/headroom.lua
--
-- It follows the largest gradient (`amax`, which the scaler measures because `needs` asks for it) and sets the scale to
-- the power of two that puts this value a factor of 2^headroom below the largest float16.  The memory of the largest
-- value fades by one percent a step, so that the scale follows a training whose gradients shrink.

local LARGEST = 65504.0 -- of float16
local headroom = 6      -- binary orders kept free

return {
  name = "headroom",
  needs = {"amax"},

  init = function(opts) return {scale = opts.init_scale or 1024.0, largest = 0.0} end,

  update = function(state, event)
    if event.found_inf then
      state.scale = state.scale / 2
      return state.scale
    end
    state.largest = math.max(event.amax, state.largest * 0.99)
    if state.largest > 0 then
      local exponent = math.floor(math.log(LARGEST / state.largest, 2)) - headroom
      state.scale = 2.0 ^ exponent
    end
    return state.scale
  end,
}
