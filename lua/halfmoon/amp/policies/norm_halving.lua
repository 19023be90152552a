--- amp/policies/norm_halving.lua -- halves the scale s when the norm of the unscaled gradient exceeds 1 / (2 s).
--
-- The rule.  s becomes s/2 when norm(gradient) > 1 / (2 s), and stays otherwise.  A gradient with an infinite or
-- undefined value counts as above.
-- Source: a rule found in tutorials.
-- When.  It keeps the norm of the scaled gradient at 1/2 or less.  That is far below the largest float16 (65504), so
-- the rule avoids overflows in a model whose gradients are tiny to begin with: norms below 2^-17 let s = 2^16 stand.
-- In any other model it only ever shrinks: a gradient of norm 1 halves s at each step until s <= 1/2, where nothing is
-- scaled up any more (the scaler's floor of 1 holds it there), and no rule raises it again.  Then small gradients are
-- lost as without scaling.  For training take `dynamic` or `auto`; this one is here to be compared with.

return {
  name = "norm_halving",
  needs = {"norm"},
  options = {},

  init = function(opts) return {scale = opts.init_scale or 2.0 ^ 16} end,

  update = function(state, event)
    if event.found_inf or event.norm > 1 / (2 * state.scale) then state.scale = state.scale / 2 end
    return state.scale
  end,
}
