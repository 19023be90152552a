-- gpu.lua -- training steps on a GPU, and what the GPU does at most: the part of the benchmark that scripts/gpu-check.sh runs.
--
--     build/halfmoon scripts/bench/gpu.lua [--workloads mlp,cnn] [--runs f32,bf16,f16,async] [--rounds 7] [--quick]
--
-- Batches lie on the device before the clock starts.  A figure is the median over the rounds; each round ends with a wait for the
-- device.  gpu_peer.py times the same steps in PyTorch and prints them in the same form.  On the CUDA test double the times mean
-- nothing, and the script says so.

local hm = require "halfmoon"
local core = require "halfmoon.core"
local cli = require "halfmoon.train.cli"

local here = arg[0]:match("^(.*)/[^/]*$") or "."
local workloads = dofile(here .. "/workloads.lua")

local WARMUP <const> = 10
local BATCHES <const> = 8
local RUNS = {"f32", "bf16", "f16", "async"}

local function say(...) io.write(string.format(...), "\n"):flush() end

local function median(values)
  table.sort(values)
  local n = #values
  return n % 2 == 1 and values[n // 2 + 1] or (values[n // 2] + values[n // 2 + 1]) / 2
end

--- Seconds of fn(), the device's work included.
local function seconds(fn)
  hm.cuda.synchronize()
  local begin = core.now()
  fn()
  hm.cuda.synchronize()
  return core.now() - begin
end

--- The median time of one of `calls` calls of fn.
local function time_of(fn, calls, rounds)
  fn()
  local values = {}
  for i = 1, rounds do
    values[i] = seconds(function() for _ = 1, calls do fn() end end) / calls
  end
  return median(values)
end

-- ====== The device's limits ======

local function report_limits(quick, rounds)
  local n = quick and 64 or 8192
  local calls = quick and 1 or 10
  local bytes = quick and 1 << 16 or 1 << 30
  local _ <close> = hm.no_grad()
  local x = hm.zeros({bytes // 4}, {device = "cuda"})
  local copy = time_of(function() x:clone() end, calls, rounds)
  say("  copy of %d MB: %.0f GB/s, read and written", bytes // 1000000, 2 * bytes / copy / 1e9)
  for _, dtype in ipairs {"bfloat16", "float16", "float32"} do
    local a = hm.randn({n, n}, {device = "cuda"}):to(dtype)
    local b = hm.randn({n, n}, {device = "cuda"}):to(dtype)
    local t = time_of(function() a:matmul(b) end, calls, rounds)
    say("  product of %d x %d in %s: %.1f TFLOP/s", n, n, dtype, 2 * n ^ 3 / t / 1e12)
  end
end

-- ====== Training steps ======

local function report_training(name, run, opt)
  local training = workloads.on_cuda(name, run, BATCHES)
  local function step() return training:step() end
  for _ = 1, opt.quick and 1 or WARMUP do step() end
  local rough = seconds(step)
  local steps = opt.quick and 1 or math.max(10, math.min(1000, math.ceil(0.3 / rough)))
  hm.cuda.reset_peak()
  hm.cuda.reset_stats()
  local values, loss = {}, nil
  for i = 1, opt.rounds do
    values[i] = seconds(function() for _ = 1, steps do loss = step() end end) / steps * 1e3
  end
  local stats, all = hm.cuda.stats(), steps * opt.rounds
  say("  ours      %-4s %-6s %8.3f ms a step (%.3f to %.3f), loss %.4f, peak %.1f MB, %.1f launches, %.2f waits", name, run,
    median(values), math.min(table.unpack(values)), math.max(table.unpack(values)), loss:item(),
    hm.cuda.memory_stats().peak / 1e6, stats.launches / all, (stats.synchronisations - 2 * opt.rounds) / all)
end

local function words(text)
  local out = {}
  for word in text:gmatch("[^,%s]+") do out[#out + 1] = word end
  return out
end

local function main(opt)
  local ok, why = hm.cuda.is_available()
  if not ok then
    io.stderr:write("gpu.lua: there is no GPU to time: ", why, "\n")
    os.exit(1, true)
  end
  local name = hm.cuda.properties().name
  say("  on %s, batch %d, AdamW", name, workloads.batch)
  if name:find("test double", 1, true) then say("  A TEST DOUBLE: these times say nothing about a GPU") end
  if opt.quick then opt.rounds = 1 end
  report_limits(opt.quick, opt.rounds)
  for _, workload in ipairs(words(opt.workloads)) do
    for _, run in ipairs(words(opt.runs)) do report_training(workload, run, opt) end
  end
end

main(cli.parse("gpu.lua: training steps on a GPU, and what the GPU does at most", {
  {"workloads", table.concat(workloads.names, ","), "models", cli.among(workloads.names)},
  {"runs", table.concat(RUNS, ","), "what to compute in; f16 has the scaler, async GradScaler{async = true}", cli.among(RUNS)},
  {"rounds", 7, "rounds of each"},
  {"quick", false, "one step of each: shows that it works"},
}, arg))
