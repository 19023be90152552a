--- cpu.lua -- hm.cpu: what the processor can do, and the memory that tensors take.

local core = require "halfmoon.core"

return {
  --- hm.cpu.features() -> {isa, avx2, f16c, avx512, avx512_bf16, amx, native_bf16, threads, onednn}
  features = core.features,
  --- hm.cpu.memory_stats() -> {live, peak, cached, reserved, allocs, system_allocs, layout_copies, shadow_bytes}, in
  --- bytes
  memory_stats = function() return core.memory_stats("cpu") end,
  --- hm.cpu.reset_peak(): collects garbage; the peak starts again from what is live then
  reset_peak = function() core.reset_peak("cpu") end,
  --- hm.cpu.trim(): gives cached memory back to the system
  trim = function() core.trim("cpu") end,
}
