-- gpu_cost.lua -- what one training step would cost on a GPU, by count: a model, not a measurement.
--
--     HALFMOON_CUDA=emu build/halfmoon scripts/gpu_cost.lua [--workload cnn] [--runs f32,bf16,f16,async] [--figures]
--
-- One step of a workload of scripts/bench/workloads.lua runs on the CUDA test double, after one that warms up.  Counted there: launches
-- (of kernels and matrix products) and waits of the host for the device.  From the log of ops: bytes and FLOPs.
--
-- Bytes        Each op reads every input once and writes every output once, at the sizes in which they lie in memory; but
--              linear_backward_input_relu reads relu's result only where linear_relu kept nothing smaller for it (aux is empty).
--              A product with an activation or a bias gradient counts as one pass, also where the device makes two of it.  The
--              passes over all parameters are counted from their sizes, with P parameters: AdamW reads gradient, value and two
--              moments and writes value and moments, 28 P; the low copy of the weights that it writes for the next step, 2 P; the
--              scaler's check reads the gradients, 4 P.
-- Buffers      Convolutions without cuDNN go through a matrix of windows, which is written once and read once.
-- Least        What must exist in memory: operands and results of matrix products, convolutions, pools and the loss, each read or
--              written once by each of them, and the passes over the parameters (with a scaler, gradients must be known to be finite
--              before the first parameter changes, so they are read twice).  All else costs no memory traffic in the least: elementwise
--              ops, casts and fills happen where their operand is made or their result is read, and a bias gradient is summed where
--              the weight gradient reads the same tensor.  So what a fused op reads or writes for these alone is not in the least
--              either: relu's result in max_pool2d_relu_backward and linear_backward_input_relu, what linear_relu (aux) and
--              linear_gelu_tanh (pre) keep for their activation's backward, and the bias gradient of linear_backward_params.
-- FLOPs        2 m n k of each matrix product; a convolution is the product of its windows with its weights.
-- Time         Of each op the larger of bytes / 3.35 TB/s and FLOPs / rate, added up: the H100 SXM's published bandwidth and dense
--              rates, 989 TFLOP/s in float16 and bfloat16, 67 in float32 (495 in TF32, which is off unless a script asks for it).
--              Gaps between launches, caches and everything else are left out, so a real step takes longer.

local hm = require "halfmoon"
local core = require "halfmoon.core"
local cli = require "halfmoon.train.cli"

local here = arg[0]:match("^(.*)/[^/]*$") or "."
local workloads = dofile(here .. "/bench/workloads.lua")

local BANDWIDTH <const> = 3.35e12
local RATES = {float16 = 989e12, bfloat16 = 989e12, float32 = 67e12, float64 = 67e12}
local SIZES = {float64 = 8, int64 = 8, float32 = 4, int32 = 4, float16 = 2, bfloat16 = 2, uint8 = 1, bool = 1}
local RUNS = {"f32", "bf16", "f16", "async"}
-- What need not be in memory for its own sake.
local FREE_FAMILIES = {elementwise = true, copy = true, fill = true}
local FREE_OPS = {linear_backward_bias = true, conv2d_backward_bias = true}
-- By op, the inputs that it reads, and the outputs that it writes, only for what was fused into it.
local FREE_INPUTS = {max_pool2d_relu_backward = {3}, linear_backward_input_relu = {3, 4}, linear_backward_input_gelu_tanh = {3}}
local FREE_OUTPUTS = {linear_relu = {2}, linear_gelu_tanh = {2}, linear_backward_params = {2}}

--- Every line says what it is.
local function say(...) io.write("[model, not a measurement] ", string.format(...), "\n") end

-- ====== Counting one op ======

local function count(shape)
  local n = 1
  for _, size in ipairs(shape) do n = n * size end
  return n
end

local function bytes_of(views)
  local n = 0
  for _, v in ipairs(views) do
    if not v.absent and not v.scalar then n = n + count(v.shape) * SIZES[v.dtype] end
  end
  return n
end

--- Elements of the matrix of windows: one line per output place, as long as one output's weights.
local function windows(places, weight) return count(places) // places[2] * count(weight) // weight[1] end

local function by_linear(x, w) return 2 * count(x) * w[1] end
local function by_linear_input(g, w) return 2 * count(g) * w[2] end
local function by_linear_weight(g, x) return 2 * count(g) * x[#x] end

--- By op: FLOPs, and the elements of the matrix of windows (nil: none), from the shapes of inputs and outputs.
local PRODUCTS = {
  linear = by_linear, linear_relu = by_linear, linear_gelu_tanh = by_linear,
  linear_backward_input = by_linear_input, linear_backward_input_relu = by_linear_input,
  linear_backward_input_gelu_tanh = by_linear_input,
  linear_backward_weight = by_linear_weight, linear_backward_params = by_linear_weight,
  conv2d = function(_, w, out) return 2 * count(out) * (count(w) // w[1]), windows(out, w) end,
  conv2d_backward_input = function(g, w) return 2 * count(g) * (count(w) // w[1]), windows(g, w) end,
  conv2d_backward_weight = function(g, _, out) return 2 * count(g) * (count(out) // out[1]), windows(g, out) end,
}

--- The bytes of those views whose positions are listed; 0 without a list.
local function bytes_at(views, positions)
  local n = 0
  for _, i in ipairs(positions or {}) do n = n + bytes_of {views[i]} end
  return n
end

--- Bytes of an input that the op was given and does not read.
local function unread(record)
  local is_kept = record.op == "linear_backward_input_relu" and bytes_of {record.inputs[4]} > 0
  return is_kept and bytes_of {record.inputs[3]} or 0
end

--- One op of the log -> {op, bytes, least, buffers, flops, seconds, least_seconds}
local function cost_of(record)
  local given = bytes_of(record.inputs) + bytes_of(record.outputs)
  local moved = given - unread(record)
  local least = given - bytes_at(record.inputs, FREE_INPUTS[record.op]) - bytes_at(record.outputs, FREE_OUTPUTS[record.op])
  if FREE_FAMILIES[record.family] or FREE_OPS[record.op] then least = 0 end
  local flops, lines = 0, nil
  if PRODUCTS[record.op] then
    flops, lines = PRODUCTS[record.op](record.inputs[1].shape, record.inputs[2].shape, record.outputs[1].shape)
  elseif record.family == "matmul" or record.family == "conv" then
    error(("gpu_cost: the FLOPs of op '%s' are not known: give them in PRODUCTS"):format(record.op))
  end
  local dtype = record.inputs[1] and record.inputs[1].dtype or "float32"
  local compute = flops > 0 and flops / RATES[dtype] or 0
  return {
    op = record.op, bytes = moved, least = least,
    buffers = lines and 2 * lines * SIZES[dtype] or 0, flops = flops,
    seconds = math.max(moved / BANDWIDTH, compute), least_seconds = least == 0 and 0 or math.max(least / BANDWIDTH, compute),
  }
end

--- The passes over all parameters, as costs.
local function passes(parameters, run)
  local out = {}
  local function pass(name, bytes)
    out[#out + 1] = {
      op = name, bytes = bytes, least = bytes, buffers = 0, flops = 0, seconds = bytes / BANDWIDTH,
      least_seconds = bytes / BANDWIDTH,
    }
  end
  if run ~= "f32" and run ~= "bf16" then pass("(scaler's check)", 4 * parameters) end
  pass("(AdamW)", 28 * parameters)
  if run ~= "f32" then pass("(low copies)", 2 * parameters) end
  return out
end

-- ====== One step ======

--- Runs two steps of a workload on cuda and counts the second -> {launches, waits, by_cudnn, by_windows, fused,
--- stepped, costs, parameters}
local function measure(name, run)
  local training = workloads.on_cuda(name, run, 1)
  training:step()
  hm.cuda.synchronize()
  local costs = {}
  core.op_log(function(record) costs[#costs + 1] = cost_of(record) end)
  hm.cuda.reset_stats()
  training:step()
  local stats = hm.cuda.stats()
  core.op_log(nil)
  local parameters = training:parameters()
  for _, pass in ipairs(passes(parameters, run)) do costs[#costs + 1] = pass end
  return {
    launches = stats.launches, waits = stats.synchronisations, by_cudnn = stats.cudnn_convolutions,
    by_windows = stats.im2col_convolutions, fused = stats.fused_linears, stepped = stats.stepped_linears, costs = costs,
    parameters = parameters,
  }
end

--- Adds up the costs of a step, and by op.
local function total(costs)
  local sum = {bytes = 0, least = 0, buffers = 0, flops = 0, seconds = 0, least_seconds = 0}
  local by_op, order = {}, {}
  for _, cost in ipairs(costs) do
    local entry = by_op[cost.op]
    if not entry then
      entry = {op = cost.op, calls = 0, bytes = 0, least = 0, buffers = 0, flops = 0}
      by_op[cost.op], order[#order + 1] = entry, entry
    end
    entry.calls = entry.calls + 1
    for key in pairs(sum) do
      sum[key] = sum[key] + cost[key]
      if entry[key] then entry[key] = entry[key] + cost[key] end
    end
  end
  table.sort(order, function(a, b) return a.bytes - a.least > b.bytes - b.least end)
  return sum, order
end

-- ====== Output ======

local TITLES = {f32 = "float32", bf16 = "bfloat16", f16 = "float16, scaler", async = "float16, scaler{async = true}"}

local function report(name, run, step)
  local sum, ops = total(step.costs)
  say("%s, %s, batch %d, %d parameters", name, TITLES[run], workloads.batch, step.parameters)
  say("  launches %d, waits of the host %d", step.launches, step.waits)
  say("  convolutions: %d by cuDNN, %d through windows; linears with more than a product: %d in one pass, %d in two",
    step.by_cudnn, step.by_windows, step.fused, step.stepped)
  say("  bytes %.2f MB, least %.2f MB: %.3f times the least; without cuDNN %.2f MB more for windows: %.3f times",
    sum.bytes / 1e6, sum.least / 1e6, sum.bytes / sum.least, sum.buffers / 1e6, (sum.bytes + sum.buffers) / sum.least)
  say("  products %.3f GFLOP", sum.flops / 1e9)
  say("  an H100's published rates would allow %.1f us, the least %.1f us", sum.seconds * 1e6, sum.least_seconds * 1e6)
  say("  %-26s %5s %10s %10s %10s %9s", "op, most avoidable first", "calls", "MB", "least MB", "windows MB", "GFLOP")
  for _, entry in ipairs(ops) do
    say("  %-26s %5d %10.3f %10.3f %10.3f %9.3f", entry.op, entry.calls, entry.bytes / 1e6, entry.least / 1e6,
      entry.buffers / 1e6, entry.flops / 1e9)
  end
end

--- For the spec: one line of numbers.
local function figures(name, run, step)
  local sum = total(step.costs)
  say("%s %s launches=%d waits=%d bytes=%d least=%d buffers=%d flops=%d", name, run, step.launches, step.waits, sum.bytes,
    sum.least, sum.buffers, sum.flops)
end

local function main(opt)
  local ok, why = hm.cuda.is_available()
  if not ok then
    io.stderr:write("gpu_cost.lua counts on the CUDA test double: HALFMOON_CUDA=emu build/halfmoon scripts/gpu_cost.lua\n  ", why, "\n")
    os.exit(1, true)
  end
  say("counted on %s", hm.cuda.properties().name)
  for run in opt.runs:gmatch("[^,]+") do
    (opt.figures and figures or report)(opt.workload, run, measure(opt.workload, run))
  end
end

main(cli.parse("gpu_cost.lua: what a training step would cost on a GPU, by count (a model, not a measurement)", {
  {"workload", "cnn", "cnn or mlp", cli.among(workloads.names)},
  {"runs", table.concat(RUNS, ","), "f32, bf16, f16 (with the scaler), async (with GradScaler{async = true})", cli.among(RUNS)},
  {"figures", false, "one line of numbers for each run"},
}, arg))
