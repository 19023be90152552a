-- amp_ports.lua -- the tests of other libraries whose meaning the specs here carry, and what users of those libraries trip over.
--
-- tests: id -> {the test's name there, left = why nothing of it is here, part = which part of it is not here}.  A test that is not left out
-- has its id in the name of a case.  G: GradScaler (PyTorch's test_torch.py, test_cuda.py, test_optim.py), S: its sharded form,
-- A: autocast on a GPU (test_cuda.py), C: on the CPU (test_autocast.py), K: checkpoints (test_autograd.py, test_utils.py); then Apex's
-- tests/L0/run_amp by their names.
--
-- keras: what loss_scale_optimizer_test.py of Keras 3 and tf-keras ask -> a piece of the name of the case in keras_spec.lua, or left = why.
--
-- pains: what is asked for most in their issue trackers -> {spec file, piece of the name of the case that shows the answer} ...

local M = {}

local one_process = "there is one process"
local no_capture = "there are no captured graphs"

M.tests = {
  G1 = {"test_pickle_gradscaler"},
  G2 = {"test_grad_scaling_unscale", part = "gradients on two devices: an optimizer's parameters lie on one"},
  G3 = {"test_grad_scaling_update_scale"},
  G4 = {"test_grad_scaling_unscale_sparse",
    part = "sparse gradients: there are none; what is asked of duplicate float16 entries is asked of rows of an embedding"},
  G5 = {"test_grad_scaling_state_dict"},
  G6 = {"test_grad_scaling_autocast", part = "foreach and fused forms: an optimizer has one form"},
  G7 = {"test_grad_scaling_clipping"},
  G8 = {"test_grad_scaling_clipping_separate_unscale"},
  G9 = {"test_grad_scaling_penalty"},
  G10 = {"test_grad_scaling_accumulation"},
  G11 = {"test_params_invalidated_with_grads_invalidated_between_unscale_and_step"},
  G12 = {"test_grad_scale_will_not_overflow"},
  G13 = {"test_grad_scaling_multiple"},
  G14 = {"test_grad_scaler_pass_itself",
    part = "an optimizer that takes the scaler as an argument: optimizers are the engine's; that step() refuses closures is checked"},
  G15 = {"test_grad_scaler_deprecated_warning", left = "there are no deprecated constructors"},
  G16 = {"test_grad_scaling_device_as_key", left = "devices are strings"},
  G17 = {"test_grad_scaling_scale", part = "leaves on two devices: a scaler's tensors lie on one"},
  G18 = {"test_grad_scaling_multigpu", left = "a scaler's tensors lie on one device; on one device it is G13"},
  G19 = {"test_grad_scaling_autocast_fused_optimizers"},
  G20 = {"test_graph_grad_scaling", part = no_capture .. "; the trace is run step by step"},
  G21 = {"test_graph_scaling_fused_optimizers", left = no_capture},
  G22 = {"test_fused_does_not_step_if_foundinf"},
  S1 = {"test_grad_scaling"},
  S2 = {"test_scaling_unscaling_sparse", part = "as G4"},
  S3 = {"test_inf_gradients_skip_optim_step"},
  S4 = {"test_fsdp_ddp_parity_with_grad_scaler", left = one_process},
  S5 = {"test_sharded_grad_scaler_found_inf", left = one_process},

  A1 = {"test_autocast_torch_fp16",
    part = "conv_tbc, conv3d, conv_transpose1d, conv_transpose3d, addr, addbmm, chain_matmul, fused cells: there are no such functions"},
  A2 = {"test_autocast_torch_bf16"},
  A3 = {"test_autocast_torch_fp32",
    part = "dist, cdist, pdist, renorm, nuclear norm, the margin and Poisson losses: there are no such functions"},
  A4 = {"test_autocast_torch_need_autocast_promote", part = "grid_sampler, bilinear, cross: there are no such functions"},
  A5 = {"test_autocast_torch_expect_builtin_promote"},
  A6 = {"test_autocast_nn_fp16, _nn_bf16, _nn_fp32"},
  A7 = {"test_autocast_linalg_fp16"},
  A8 = {"test_autocast_methods_fp16, _methods_fp32, _methods_expect_builtin_promote"},
  A9 = {"test_autocast_banned", part = "on the CPU PyTorch computes binary_cross_entropy in float32; here it is banned on every device"},
  A10 = {"test_autocast_ignored_types"},
  A11 = {"test_autocast_custom_enabled"},
  A12 = {"test_autocast_custom_cast_inputs"},
  A13 = {"test_autocast_custom_deprecated_warning", left = "there is one spelling"},
  A14 = {"test_autocast_cat_jit", left = "there is one way of calling an op"},
  A15 = {"test_autocast_rnn"},
  A16 = {"test_autocast_cache_leak"},
  A17 = {"test_autocast_checkpointing"},

  C1 = {"test_autocast_torch_16, _nn_16"},
  C2 = {"test_autocast_torch_fp32, _nn_fp32", part = "as A3; max_pool3d, linalg and fft functions: there are none"},
  C3 = {"test_autocast_torch_need_autocast_promote"},
  C4 = {"test_autocast_torch_expect_builtin_promote"},
  C5 = {"test_autocast_rnn", part = "outside autocast the error is raised by the product, not by the layer; that it is raised is checked"},
  C6 = {"test_autocast_disabled_with_fp32_dtype"},
  C7 = {"test_generic_autocast, test_cpu_autocast_deprecated_warning", left = "there is one spelling"},
  C8 = {"test_cast_cache_is_global"},
  C9 = {"test_cache_disabled"},
  C10 = {"test_autocast_fast_dtype", part = "devices have no default of their own: float16 everywhere"},
  C11 = {"test_invalid_device, test_non_string_device", part = "there is no device argument: the same is asked of the dtype"},

  K1 = {"test_checkpointing_non_reentrant_autocast_cpu, _gpu"},
  K2 = {"test_checkpoint_rng_cpu, _rng_cuda"},
  K3 = {"test_checkpoint_not_preserve_rng_state_and_without_reentrant"},
  K4 = {"test_checkpoint_detects_non_determinism"},
  K5 = {"test_checkpointing_without_reentrant_*", part = "context_fn: there is no such option; the reentrant form: there is one form"},
  K6 = {"test_nested_checkpoint*",
    part = "early_stop: there is no such option; that a region computes no more than backward needs is not promised"},

  test_basic_casts = {"test_basic_casts.py"},
  test_promotion = {"test_promotion.py"},
  test_cache = {"test_cache.py"},
  test_checkpointing = {"test_checkpointing.py"},
  test_multiple_models_optimizers_losses = {"test_multiple_models_optimizers_losses.py"},
  test_add_param_group = {"test_add_param_group.py"},
  test_update_scale_hysteresis = {"test_update_scale_hysteresis.py"},
}

M.keras = {
  {"finite step", "a finite step"}, {"infinite step", "an infinite step leaves the variables"}, {"downscaling", "downscaling: 400 to 25"},
  {"upscaling", "upscaling: 2 to 32"}, {"iterations", "iterations count the steps made"},
  {"serialization", "serialisation"}, {"invalid arguments", "refuses unknown options"},
  {"an inner optimizer's own loss scale", left = "optimizers have none"},
  {"fixed scale", "a fixed scale"}, {"dynamic scale", "a dynamic scale"}, {"fp16 loss", "a float16 loss is scaled in float32"},
  {"NaN on one replica only", left = one_process}, {"clipping", "clipping between unscaling and applying"},
  {"checkpoint", "a checkpoint goes on where it was"}, {"forgotten scaling", "says once that scaling or unscaling was forgotten"},
  {"nesting, wrapping twice", "nesting, and wrapping an optimizer twice, are errors"},
}

M.pains = {
  {"the scale falls towards 0 without a floor or a word", {"scaler", "keeps the scale within its bounds and says floor or cap"},
    {"scaler", "the bounds are 1 and 2^24"}, {"policy", "stop makes update() raise"}},
  {"was the step skipped? the schedule runs ahead", {"amp_ports_scaler", "a scheduler is held back while steps are left out"},
    {"schedulers", "by what the scaler returns, with and without async"}},
  {"which layer overflowed", {"scaler", "a real overflow in float16 names the layer it came from"},
    {"amp_debug", "tells op, line, shapes, largest values and counts"}},
  {"a run is stopped at the smallest scale without a diagnosis", {"amp_ports", "a run that a policy stops is told of"}},
  {"unscale_ twice, accumulation, steps left out by hand", {"scaler", "refuses unscale_ twice, unscale_ after step, step twice"},
    {"amp_ports_scaler", "accumulation: one unscale_, clip, step and update for several losses"},
    {"scaler", "step() after a skipped step without update() works"}},
  {"float16 parameters", {"amp_groups", "are refused by default, with a way out"},
    {"amp_groups", "step() unscales in float32"}, {"apex", "keep what float16 loses, and the model's copy follows"}},
  {"bfloat16 with a scaler, lost updates", {"amp_groups", "fixes the scale at 1; checks are on and counted"},
    {"amp_groups", "the warning goes by the graph of the loss"}, {"optim_more", "small updates are lost, and not with Kahan sums"}},
  {"the cache of casts: memory, lost gradients, stale values", {"autocast", "repeated forwards under no_grad keep memory still"},
    {"autocast", "a forward under no_grad first does not cost a later forward its weight gradient"},
    {"autocast", "are made again after an in-place change under no_grad"}, {"autocast", "each dtype has its own"}},
  {"the scaler's state is missing on resume", {"amp_ports_scaler", "a checkpoint before the first scale() and after it goes on the same"},
    {"resume", "has the counters and all that its policy keeps"}},
  {"frozen or unused optimizers; one scale for all losses", {"amp_groups", "is a clean no-op: frozen, unused, or cleared"},
    {"amp_groups", "one loss overflows: its scale falls"}},
}

return M
