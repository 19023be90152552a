-- cautious.lua -- a loss-scale policy that grows slowly and forgives single overflows.
--
--   build/halfmoon examples/fashion_cnn.lua --dtype f16 --policy examples/policies/cautious.lua
--
-- The rule: one overflow alone is borne (the step is skipped, the scale stays).  A second one before `patience` clean
-- steps have passed quarters the scale.  After `interval` clean steps the scale grows by half.  Twenty overflows in a
-- row mean that the loss itself is broken: then the run stops.
--
-- A policy file is read again whenever it changes, also while a training runs: edit a number below and save.

local patience = 50  -- clean steps after which an overflow is forgotten
local interval = 500 -- clean steps before the scale grows

return {
  name = "cautious",
  needs = {},

  -- State is plain numbers and strings; it is saved with checkpoints and survives a change of this file.
  init = function(opts)
    return {scale = opts.init_scale or 2.0 ^ 13, clean = 0, strikes = 0, in_a_row = 0}
  end,

  update = function(state, event)
    if event.found_inf then
      state.strikes = state.strikes + 1
      state.in_a_row = state.in_a_row + 1
      state.clean = 0
      if state.strikes >= 2 then
        state.scale = state.scale / 4
        state.strikes = 0
      end
      if state.in_a_row >= 20 then
        return state.scale, {stop = "20 steps in a row overflowed: the loss is not finite"}
      end
      return state.scale
    end
    state.in_a_row = 0
    state.clean = state.clean + 1
    if state.clean % patience == 0 then state.strikes = 0 end
    if state.clean % interval == 0 then state.scale = state.scale * 1.5 end
    return state.scale
  end,
}
