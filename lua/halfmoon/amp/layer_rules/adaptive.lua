--- amp/layer_rules/adaptive.lua -- a scale from the statistics of the gradient and the weight, in each backward.
--
-- The rule.  Before a linear layer or convolution makes the gradient of its input, taking the products of gradient g
-- and weight W for normal and independent with mean 0,
--     sigma = sqrt(E[g^2] E[W^2]) * sqrt(0.5 * terms)                        (a ReLU halves what is added)
--     s     = u_min / (sqrt(2) * erfinv(n_uf_threshold) * sigma)             so that this share is lost, not more
-- where `terms` products are added for one element.  s is at least 1; then at most (u_max / terms) / max|g W|,
-- u_max / max|g|, accum_upper_bound / the scale that g carries already, and scale_upper_bound; then rounded down to a
-- power of two.  It is 1 where g or W is empty, all zero or not finite, and for layers that are neither linear nor
-- convolutions.  The gradient of the input carries the product of all scales on its way; gradients of parameters are
-- divided by it at once.
-- Source: Zhao, Vogel, Ahmed, Luk, "Reducing Underflow in Mixed Precision Training by Gradient Scaling" (IJCAI 2020), and
-- its implementation's defaults.
-- Ours: u_max / max|g| is a bound too, since g itself is what is multiplied.  And a skipped step halves the layer's bound
-- of what may be carried; it doubles again after recovery_interval clean ones: the same data would overflow again.
-- When.  Small gradients vanish on their way through a deep float16 network, and nobody wants to tune anything.
-- interval = k: the statistics of a layer are taken in every k-th step only; they wait for the device.

local erf = require "halfmoon.amp.layer_rules.erf"

--- The largest power of two that is not above x.
local function power_of_two(x)
  local p = 2.0 ^ math.floor(math.log(x, 2))
  if p > x then return p / 2 end -- the logarithm was rounded up, or down
  return 2 * p <= x and 2 * p or p
end

--- s of the rule from statistics.  Apart, for everything but the accumulated scale.
local function from_statistics(g, w, terms, opts)
  if not (g.finite and w.finite) or g.count == 0 or w.count == 0 then return 1.0 end
  local sigma = math.sqrt(g.norm ^ 2 / g.count) * math.sqrt(w.norm ^ 2 / w.count) * math.sqrt(0.5 * terms)
  if sigma == 0 then return 1.0 end
  local s = opts.u_min / (math.sqrt(2) * erf.inverse(opts.n_uf_threshold) * sigma)
  s = math.max(s, 1.0)
  s = math.min(s, opts.u_max / terms / (g.amax * w.amax), opts.u_max / g.amax)
  return s
end

return {
  name = "adaptive",
  options = {
    n_uf_threshold = 1e-3, u_min = 6e-8, u_max = 65504.0, power_of_two = true, scale_upper_bound = 16.0,
    accum_upper_bound = 1024.0, interval = 1, recovery_interval = 100,
  },

  init = function(_, opts)
    if not (opts.n_uf_threshold > 0 and opts.n_uf_threshold < 1) then
      error("n_uf_threshold must lie between 0 and 1", 0)
    end
    for _, name in ipairs {"u_min", "u_max", "scale_upper_bound"} do
      if not (opts[name] > 0 and opts[name] <= math.huge) then error(name .. " must be above 0", 0) end
    end
    if not (opts.accum_upper_bound >= 1 and opts.accum_upper_bound <= math.huge) then
      error("accum_upper_bound must be at least 1", 0)
    end
    for _, name in ipairs {"interval", "recovery_interval"} do
      if not (opts[name] >= 1 and opts[name] % 1 == 0) then error(name .. " must be a whole number from 1 on", 0) end
    end
    return {scale = 1.0, bound = opts.accum_upper_bound + 0.0, clean = 0, age = 0}
  end,

  backward = function(state, event, opts)
    if not event.terms then return 1.0 end
    if state.age == 0 or not state.raw then
      state.raw = from_statistics(event.grad(), event.weight(), event.terms, opts)
    end
    local s = math.min(state.raw, state.bound / event.incoming, opts.scale_upper_bound)
    state.scale = opts.power_of_two and power_of_two(s) or s
    return state.scale
  end,

  update = function(state, event, opts)
    state.age = (state.age + 1) % opts.interval
    if event.skipped then
      state.bound, state.clean = math.max(state.bound / 2, 1.0), 0
      return state.scale
    end
    state.clean = state.clean + 1
    if state.clean >= opts.recovery_interval then
      state.bound, state.clean = math.min(state.bound * 2, opts.accum_upper_bound), 0
    end
    return state.scale
  end,
}
