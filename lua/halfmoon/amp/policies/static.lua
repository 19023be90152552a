--- amp/policies/static.lua -- one scale for the whole run: init_scale.  Steps that overflow are still skipped.

return {
  name = "static",
  needs = {},
  options = {},

  init = function(opts) return {scale = opts.init_scale or 2.0 ^ 16} end,

  update = function(state) return state.scale end,
}
