--- amp/policies/logmax.lua -- a normal model of log2 of the largest gradient; leaves one overflow in a thousand.
--
-- The rule.  x = log2(largest |unscaled gradient|) of each step is taken for normal.  Its mean is followed with weight
-- beta1, its variance with beta2, both corrected for their start.  The scale is 2^(log_max - (mean + overflow_std_dev *
-- deviation)): with 3.09 deviations, 1 step in 1000 is expected to overflow.
-- Source: LogMaxScaler in open_seq2seq/optimizers/automatic_loss_scaler.py (NVIDIA/OpenSeq2Seq); bounds 1 to 2^14.
-- Mended here: the original takes 2^log_max = 65536 for x at an overflow, although x is in log2; one overflow then
-- pins the scale at 1 for thousands of steps.  This one takes log_max.  The original's formula has 16 where log_max is
-- meant, and a gradient of zeros makes its mean minus infinity; here such a step is not counted.
-- When.  Gradients whose size moves slowly and without jumps.  `auto` also follows trends and looks at small gradients.

return {
  name = "logmax",
  needs = {"amax"},
  options = {log_max = 16.0, beta1 = 0.99, beta2 = 0.999, overflow_std_dev = 3.09},
  min_scale = 1.0,
  max_scale = 2.0 ^ 14,

  init = function(opts)
    for _, name in ipairs {"beta1", "beta2"} do
      if not (opts[name] > 0 and opts[name] < 1) then error(name .. " must lie between 0 and 1", 0) end
    end
    return {scale = opts.init_scale or 1.0, seen = 0, mean = 0.0, slow_mean = 0.0, square = 0.0}
  end,

  update = function(state, event, opts)
    local x = opts.log_max
    if not event.found_inf then
      if event.amax == 0 then return state.scale end
      x = math.log(event.amax, 2)
    end
    state.seen = state.seen + 1
    state.mean = opts.beta1 * state.mean + (1 - opts.beta1) * x
    state.slow_mean = opts.beta2 * state.slow_mean + (1 - opts.beta2) * x
    state.square = opts.beta2 * state.square + (1 - opts.beta2) * x * x
    local fast, slow = 1 - opts.beta1 ^ state.seen, 1 - opts.beta2 ^ state.seen
    local variance = state.square / slow - (state.slow_mean / slow) ^ 2
    local cutoff = state.mean / fast + opts.overflow_std_dev * math.sqrt(math.max(0, variance))
    state.scale = math.max(opts.min_scale, math.min(opts.max_scale, 2.0 ^ (opts.log_max - cutoff)))
    return state.scale
  end,
}
