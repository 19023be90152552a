--- amp/init.lua -- hm.amp: mixed precision.
--
--     do local _ <close> = amp.autocast("float16")
--       loss = nn.functional.cross_entropy(model(x), y)
--     end
--     scaler:scale(loss):backward()
--     local stepped = scaler:step(opt)
--     scaler:update()
--
-- That is PyTorch's front.  Apex's is initialize and scale_loss (amp/apex.lua), Keras's LossScaleOptimizer and the
-- dtype policies (amp/loss_scale_optimizer.lua, amp/dtype_policy.lua).

local core = require "halfmoon.core"
local apex = require "halfmoon.amp.apex"
local custom = require "halfmoon.amp.custom"
local dtype_policy = require "halfmoon.amp.dtype_policy"
local fp8 = require "halfmoon.amp.fp8"
local report = require "halfmoon.amp.report"

return {
  --- amp.autocast([dtype | {dtype, enabled, cache_enabled, backward, ops, recipe}][, fn, ...]): a scope that computes in
  --- low precision ("f16" by default; "fp8" is an emulation).  ops = {exp = "low"} gives ops another class: low, f32,
  --- promote or follow; what it says of linear counts for linear_relu and linear_gelu_tanh (a linear layer with its
  --- activation), too.  With a function: its results; without: the guard of local _ <close> = amp.autocast("f16")
  autocast = core.autocast,
  --- amp.autocast_state() -> {enabled, dtype, cache_enabled}
  autocast_state = core.autocast_state,
  --- amp.cast_stats() -> counters of the casts that autocast made
  cast_stats = core.cast_stats,
  DelayedScaling = fp8.DelayedScaling,
  --- amp.default_recipe() -> the DelayedScaling that amp.autocast("fp8") uses where none is given
  default_recipe = fp8.default_recipe,
  GradScaler = require("halfmoon.amp.grad_scaler").new,
  debug = require "halfmoon.amp.debug",
  histogram = report.histogram,
  report = report.report,
  trace = require("halfmoon.amp.trace").trace,
  record_gradients = require("halfmoon.amp.recorder").record_gradients,
  read_gradients = require("halfmoon.amp.gradient_trace").read,
  simulate = require("halfmoon.amp.simulate").simulate,
  layer_scale = require("halfmoon.amp.layer_scale").new,
  layer_rules = require "halfmoon.amp.layer_rules",

  custom_fwd = custom.custom_fwd,
  custom_bwd = custom.custom_bwd,
  half_function = custom.half_function,
  float_function = custom.float_function,
  promote_function = custom.promote_function,
  --- amp.register_half_function(table, "name"): puts half_function(table.name) in its place; float and promote likewise
  register_half_function = custom.register_half_function,
  --- amp.register_float_function(table, "name"): puts float_function(table.name) in its place
  register_float_function = custom.register_float_function,
  --- amp.register_promote_function(table, "name"): puts promote_function(table.name) in its place
  register_promote_function = custom.register_promote_function,
  disable_casts = custom.disable_casts,

  initialize = apex.initialize,
  scale_loss = apex.scale_loss,
  master_params = apex.master_params,
  state_dict = apex.state_dict,
  load_state_dict = apex.load_state_dict,

  LossScaleOptimizer = require("halfmoon.amp.loss_scale_optimizer").new,
  Policy = dtype_policy.Policy,
  set_policy = dtype_policy.set_policy,
  get_policy = dtype_policy.get_policy,
  set_global_policy = dtype_policy.set_global_policy,
  global_policy = dtype_policy.global_policy,
  policies = require "halfmoon.amp.policies",
}
