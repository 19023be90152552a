-- traces.lua -- golden traces of loss-scale policies: {id, policy, options, letters, scales}.
--
-- Of the letters, one a step, G is a step with good gradients and X one that overflows; the scales are those after each step, "stop" where
-- the policy ends the training.  All begin at 64 with a growth interval of 3.

local LONG = "GGGGXGGGXXGGGGGGXGXG"
local PLAIN = "64 64 128 128 64 64 64 128 64 32 32 32 64 64 64 128 64 64 32 32"
local REFILL_AT_GROWTH = "64 64 128 128 128 128 128 256 256 128 128 128 256 256 256 512 512 512 256 256"
local REFILL_WHEN_CLEAN = "64 64 128 128 128 128 128 256 256 128 128 128 256 256 256 512 512 512 512 512"
local WINDOWED = "64 64 128 128 64 64 64 128 64 32 64 128 128 256 256 256 128 128 64 64"
local FALL = "XXXXXXXXXXG"

return {
  {"T1 PyTorch", "dynamic", {}, LONG, PLAIN},
  {"T1 Apex amp", "apex", {min_scale = 1, max_scale = 128}, LONG, PLAIN},
  {"T1 Keras 3", "keras", {}, LONG, PLAIN},
  {"T1 DeepSpeed d=1", "deepspeed", {}, LONG, PLAIN},
  {"T1 fairseq tolerance 0", "fairseq", {}, LONG, PLAIN},
  {"T2 Megatron h=2", "megatron", {hysteresis = 2}, LONG, REFILL_AT_GROWTH},
  {"T2 DeepSpeed d=2", "deepspeed", {hysteresis = 2}, LONG, REFILL_AT_GROWTH},
  {"T3 Apex hysteresis kernel h=2", "apex_hysteresis", {hysteresis = 2}, LONG, REFILL_WHEN_CLEAN},
  {"T3 DeepSpeed d=2 consecutive", "deepspeed", {hysteresis = 2, consecutive_hysteresis = true}, LONG,
    REFILL_WHEN_CLEAN},
  {"T4 metaseq", "metaseq", {}, LONG, WINDOWED},
  {"T5 Apex amp min 1", "apex", {min_scale = 1}, FALL, "32 16 8 4 2 1 1 1 1 1 1"},
  {"T6 Megatron h=2 min 1", "megatron", {hysteresis = 2}, FALL, "64 32 16 8 4 2 1 1 1 1 1"},
  {"T7 DeepSpeed d=1", "deepspeed", {}, "XXXXXXX", "32 16 8 4 2 1 stop"},
  {"T7 DeepSpeed d=2", "deepspeed", {hysteresis = 2}, "XXXXXXXX", "64 32 16 8 4 2 1 stop"},
  {"T8 fairseq min 1e-4", "fairseq", {}, FALL, "32 16 8 4 2 1 0.5 0.25 0.125 0.0625 0.0625"},
}
