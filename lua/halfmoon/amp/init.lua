--- amp/init.lua -- hm.amp: mixed precision.
--
--     do local _ <close> = amp.autocast("float16")
--       loss = nn.functional.cross_entropy(model(x), y)
--     end
--     scaler:scale(loss):backward()
--     local stepped = scaler:step(opt)
--     scaler:update()

local core = require "halfmoon.core"

return {
  --- amp.autocast([dtype | {dtype, enabled, cache_enabled, backward, ops}][, fn, ...]): a scope that computes in low
  --- precision.
  autocast = core.autocast,
  --- amp.autocast_state() -> {enabled, dtype, cache_enabled}
  autocast_state = core.autocast_state,
  --- amp.cast_stats() -> counters of the casts that autocast made
  cast_stats = core.cast_stats,
  GradScaler = require("halfmoon.amp.grad_scaler").new,
  policies = require "halfmoon.amp.policies",
}
