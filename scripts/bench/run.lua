-- run.lua -- `make bench`: time and memory of training steps beside the machine's limits and beside PyTorch; and,
-- with --telemetry, what a gradient scaler and its statistics add to a step.
--
--     build/halfmoon scripts/bench/run.lua [--quick] [--workloads mlp,cnn] [--dtypes f32,bf16,f16] [--rounds 9]
--                                          [--modes eager,compiled] [--peer PYTHON | none]
--     build/halfmoon scripts/bench/run.lua --telemetry [--quick] [--workloads mlp,cnn] [--dtypes f32,bf16]
--
-- In each round the machine's limits, our run and the peer's runs take turns, a few steps each, so that a machine whose
-- clock moves or that others use slows them all alike.  Each turn begins with products that are not timed, so that the threads
-- are where they belong.  Figures are medians over the rounds.  Warm-up is left out.

local hm = require "halfmoon"
local core = require "halfmoon.core"
local cli = require "halfmoon.train.cli"

local here = arg[0]:match("^(.*)/[^/]*$") or "."
local workloads = dofile(here .. "/workloads.lua")
local client = dofile(here .. "/client.lua")
local telemetry = dofile(here .. "/telemetry.lua")
local quote = client.quote

local WARMUP <const> = 6      -- steps before anything is timed, ours and the peer's
local BATCHES <const> = 32    -- batches of data, taken in turn
local PAUSE = "sleep 0.03"    -- lets the threads of the last one fall asleep

-- ====== Small tools ======

local function median(values)
  local sorted = table.move(values, 1, #values, 1, {})
  table.sort(sorted)
  local n = #sorted
  if n == 0 then return nil end
  return n % 2 == 1 and sorted[n // 2 + 1] or (sorted[n // 2] + sorted[n // 2 + 1]) / 2
end

local function spread(values) return math.min(table.unpack(values)), math.max(table.unpack(values)) end

local function say(...) io.write(string.format(...), "\n"):flush() end

--- The words of a list with commas, each of which must be known.
local function words(option, text, known)
  local out = {}
  for word in text:gmatch("[^,%s]+") do
    local found = false
    for _, name in ipairs(known) do found = found or name == word end
    if not found then
      io.stderr:write(("--%s: '%s' is not one of %s\n"):format(option, word, table.concat(known, ", ")))
      os.exit(1, true)
    end
    out[#out + 1] = word
  end
  return out
end

local function output_of(command)
  local pipe = assert(io.popen(command, "r"))
  local text = pipe:read("a")
  return pipe:close() and text or nil
end

local function megabytes(bytes) return bytes and ("%.1f"):format(bytes / 1e6) or "-" end

--- Prints rows of texts in columns; the first `left` columns are set to the left.
local function print_table(left, rows)
  local width = {}
  for _, row in ipairs(rows) do
    for i, cell in ipairs(row) do width[i] = math.max(width[i] or 0, utf8.len(cell)) end
  end
  for _, row in ipairs(rows) do
    local cells = {}
    for i, cell in ipairs(row) do
      local gap = (" "):rep(width[i] - utf8.len(cell))
      cells[i] = i <= left and cell .. gap or gap .. cell
    end
    say("  %s", (table.concat(cells, "  "):gsub("%s+$", "")))
  end
end

-- ====== The machine's limits ======

--- Builds peak.c; nil where there is no compiler.
local function build_peak(scratch)
  local program = scratch .. "/peak"
  local source = here .. "/peak.c"
  local built, made = core.mtime(program), core.mtime(source)
  if built and made and built >= made then return program end
  local command = ("%s -std=gnu11 -O3 -fopenmp %s -o %s"):format(os.getenv("CC") or "gcc", quote(source), quote(program))
  return os.execute(command) and program or nil
end

--- Measures the limits -> {f32, bf16, bandwidth = numbers, f32_name, bf16_name} | nil
local function limits(program, threads, seconds)
  local text = program and output_of(("OMP_NUM_THREADS=%d %s %g"):format(threads, quote(program), seconds))
  if not text then return nil end
  local out = {}
  for what, name, value in text:gmatch("(%S+) (%S+) (%S+)\n") do
    out[what], out[what .. "_name"] = tonumber(value), name
  end
  return out
end

--- Medians of several measurements.
local function median_limits(list)
  local out = {}
  for _, what in ipairs {"f32", "bf16", "bandwidth"} do
    local values = {}
    for _, entry in ipairs(list) do values[#values + 1] = entry[what] end
    out[what] = median(values)
  end
  return out
end

--- The least time of a step in milliseconds: products at the peak of the dtype, then the optimizer's bytes at the
--- machine's bandwidth.  float16 products sum in float32 and CPUs have no instruction for that: their peak is float32's.
local function floor_of(name, dtype, parameters, limit)
  local peak = dtype == "bf16" and limit.bf16 or limit.f32
  local products = workloads.models[name].flops / peak / 1e6
  local bytes = workloads.optimizer_bytes(parameters, dtype) / limit.bandwidth / 1e6
  return products + bytes, products, bytes
end

-- ====== Training steps ======

--- Makes the peer's models of one workload -> array of {mode, ms}, array of messages about modes that do not work
local function make_peers(peer, modes, name, dtype, init)
  local made, refused = {}, {}
  for _, mode in ipairs(peer and modes or {}) do
    local answer, message = peer:ask("make %s %s %s %s %s %d", mode, name, dtype, mode, init, WARMUP)
    if answer then
      made[#made + 1] = {mode = mode, warm = answer.ms, layout = answer.layout, ms = {}}
    else
      refused[#refused + 1] = ("PyTorch %s, %s %s: %s"):format(mode, name, dtype, message)
    end
  end
  return made, refused
end

--- Measures one workload in one dtype -> row of results
local function measure(name, dtype, bench)
  local init = bench.scratch .. "/init.safetensors"
  local run = workloads.run(name, dtype, bench.batches, init)
  run:steps(2)
  local warm = run:steps(WARMUP - 2)
  local peers, refused = make_peers(bench.peer, bench.modes, name, dtype, init)

  -- All do the same steps; as many in a turn as fill it, by the slowest.
  local slowest = warm
  for _, p in ipairs(peers) do slowest = math.max(slowest, p.warm) end
  local steps = math.max(2, math.min(200, math.ceil(bench.turn / slowest)))

  local row = {name = name, dtype = dtype, ms = {}, steps = steps, refused = refused, peers = peers}
  local seen = {}
  for _ = 1, bench.rounds do
    os.execute(PAUSE)
    seen[#seen + 1] = limits(bench.peak, bench.threads, 0.05)
    workloads.settle()
    local ms
    ms, row.loss = run:steps(steps)
    row.ms[#row.ms + 1] = ms
    for _, p in ipairs(peers) do
      os.execute(PAUSE)
      local answer = assert(bench.peer:ask("run %s %d", p.mode, steps))
      p.ms[#p.ms + 1], p.loss = answer.ms, answer.loss
    end
  end

  row.fixed, row.peak = run:fixed_bytes(), run:peak_bytes(math.min(steps, 50))
  row.shadows = hm.cpu.memory_stats().shadow_bytes
  if #seen > 0 then
    row.limit = median_limits(seen)
    row.floor, row.products, row.bytes = floor_of(name, dtype, run:parameters(), row.limit)
  end
  for _, p in ipairs(peers) do
    if not row.best or median(p.ms) < median(row.best.ms) then row.best = p end
  end
  if row.best then
    local memory = bench.peer:ask("memory %s", row.best.mode)
    if memory then row.best.peak, row.best.fixed = memory.peak, memory.fixed end
  end
  for _, p in ipairs(peers) do bench.peer:ask("drop %s", p.mode) end
  return row
end

--- Peer over ours: the median of the rounds' ratios, for the machine may be quick in one round and slow in the next.
local function ratio(row)
  local values = {}
  for i, ms in ipairs(row.ms) do values[i] = row.best.ms[i] / ms end
  return median(values)
end

local function report_steps(rows)
  say("\nTraining steps, batch %d, AdamW (median of the rounds)", workloads.batch)
  local out = {{"model", "dtype", "ms", "min", "max", "PyTorch ms", "PyTorch/ours", "floor ms", "share", "loss", "PyTorch"}}
  for _, row in ipairs(rows) do
    local ours, low, high = median(row.ms), spread(row.ms)
    out[#out + 1] = {
      row.name, row.dtype, ("%.2f"):format(ours), ("%.2f"):format(low), ("%.2f"):format(high),
      row.best and ("%.2f %s"):format(median(row.best.ms), row.best.mode) or "-",
      row.best and ("%.2f"):format(ratio(row)) or "-",
      row.floor and ("%.2f = %.2f + %.2f"):format(row.floor, row.products, row.bytes) or "-",
      row.floor and ("%.0f %%"):format(100 * row.floor / ours) or "-",
      ("%.4f"):format(row.loss), row.best and ("%.4f"):format(row.best.loss) or "-",
    }
  end
  print_table(2, out)
  say("  PyTorch: the faster of its modes.  Floor: products at the peak + optimizer's bytes at the bandwidth (a model that")
  say("  fits the cache can beat the second part).  Share: floor / ours.  Loss: of the last step, the same step for both.")

  say("\nMemory of tensors in MB, without data")
  out = {{"model", "dtype", "peak", "fixed", "shadows", "the rest", "of f32's", "PyTorch peak", "fixed", "the rest"}}
  local f32 = {}
  for _, row in ipairs(rows) do
    local rest = row.peak - row.fixed - row.shadows
    if row.dtype == "f32" then f32[row.name] = rest end
    local p = row.best or {}
    out[#out + 1] = {
      row.name, row.dtype, megabytes(row.peak), megabytes(row.fixed), megabytes(row.shadows), megabytes(rest),
      f32[row.name] and ("%.2f"):format(rest / f32[row.name]) or "-",
      megabytes(p.peak), megabytes(p.fixed), megabytes(p.peak and p.peak - p.fixed),
    }
  end
  print_table(2, out)
  say("  fixed: parameters and optimizer state.  shadows: the parameters' copies in other dtypes and layouts.")

  for _, row in ipairs(rows) do
    for _, p in ipairs(row.peers) do
      if p ~= row.best then
        say("  PyTorch %s, %s %s: %.2f ms", p.mode, row.name, row.dtype, median(p.ms))
      end
    end
    for _, message in ipairs(row.refused) do say("  %s", message) end
  end
end

-- ====== One op, the program ======

local function report_ops(bench)
  say("\nOne op on tensors of one element (ns per call, median of the rounds)")
  local out = {{"op", "gradients", "ns", "PyTorch ns", "PyTorch/ours"}}
  local calls = bench.quick and 20000 or 100000
  for _, name in ipairs {"add", "relu"} do
    for _, grad in ipairs {"off", "on"} do
      workloads.op(name, grad == "on", calls // 10)
      local ours, theirs, ratios = {}, {}, {}
      for i = 1, bench.rounds do
        collectgarbage()
        os.execute(PAUSE)
        ours[i] = workloads.op(name, grad == "on", calls)
        os.execute(PAUSE)
        local answer = bench.peer and bench.peer:ask("op %s %s %d", name, grad, calls)
        if answer then
          theirs[#theirs + 1], ratios[#ratios + 1] = answer.ns, answer.ns / ours[i]
        end
      end
      local peer = median(theirs)
      out[#out + 1] = {
        name, grad, ("%.0f"):format(median(ours)), peer and ("%.0f"):format(peer) or "-",
        peer and ("%.2f"):format(median(ratios)) or "-",
      }
    end
  end
  print_table(2, out)
end

--- Milliseconds of a shell command, median.
local function time_command(command, rounds)
  local values = {}
  for i = 1, rounds do
    local begin = core.now()
    os.execute("exec " .. command)
    values[i] = (core.now() - begin) * 1e3
  end
  return median(values)
end

local function stripped_bytes(path, scratch)
  local target = scratch .. "/stripped"
  if not os.execute(("strip -o %s %s 2>/dev/null"):format(quote(target), quote(path))) then return nil end
  local file <close> = assert(io.open(target, "rb"))
  return file:seek("end")
end

local function report_program(bench)
  say("\nThe program")
  local rounds = bench.quick and 11 or 31
  local started = time_command(quote(bench.program) .. " -e ''", rounds)
  say("  %s -e '' takes %.1f ms (a program that does nothing: %.1f ms)", bench.program, started,
    time_command("true", rounds))
  local total = 0
  local sizes = {}
  for _, path in ipairs {bench.program, bench.build .. "/halfmoon.so"} do
    local bytes = stripped_bytes(path, bench.scratch)
    if bytes then
      total = total + bytes
      sizes[#sizes + 1] = ("%s %s MB"):format(path, megabytes(bytes))
    end
  end
  say("  without debug symbols: %s; together %s MB", table.concat(sizes, ", "), megabytes(total))
end

-- ====== The command line ======

local OPTIONS = {
  {"quick", false, "few rounds, no compiled peer: for a look, not for a claim"},
  {"workloads", table.concat(workloads.names, ","), "models"},
  {"dtypes", table.concat(workloads.dtypes, ","), "what to compute in"},
  {"rounds", 9, "turns of each"},
  {"telemetry", false, "only what a gradient scaler costs: its check, its statistics, a policy update"},
  {"modes", "", "the peer's modes: eager, compiled; default: both, with --quick eager"},
  {"peer", "", "Python with torch, or none; default: build/peer/env/bin/python, else python3"},
}

local function describe_machine(bench)
  local features = core.features()
  say("Halfmoon %s, oneDNN %s, %s, %d threads; data: %s", hm.version, features.onednn, features.isa, bench.threads,
    bench.source)
  if bench.peer then
    say("Peer: PyTorch %s, %d threads, %s", bench.peer.torch, bench.peer.threads, table.concat(bench.modes, " and "))
  else
    say("Peer: none (%s)", bench.no_peer)
  end
  local limit = limits(bench.peak, bench.threads, bench.quick and 0.1 or 0.5)
  if not limit then
    say("Limits: not measured, for peak.c did not build (CC=gcc chooses the compiler)")
    return
  end
  say("Limits: float32 %.0f GFLOP/s (%s), bfloat16 %s, memory %.1f GB/s", limit.f32, limit.f32_name,
    limit.bf16 and ("%.0f GFLOP/s (%s)"):format(limit.bf16, limit.bf16_name) or "as float32 (no instructions)",
    limit.bandwidth)
end

--- Starts the peer, if there is one, and leaves out the modes that it lacks.
local function join_peer(bench, opt)
  local python
  python, bench.no_peer = client.find(opt.peer, bench.build)
  if not python then return end
  bench.peer, bench.no_peer = client.start(python, here .. "/peer.py", bench.scratch, bench.threads)
  if not bench.peer or bench.peer.compiles then return end
  for i = #bench.modes, 1, -1 do
    if bench.modes[i] == "compiled" then table.remove(bench.modes, i) end
  end
end

local function main(opt)
  local program = arg[-1] or "build/halfmoon"
  local build = program:match("^(.*)/[^/]*$") or "build"
  local modes = opt.modes ~= "" and opt.modes or opt.quick and "eager" or "eager,compiled"
  local bench = {
    program = program, build = build, scratch = build .. "/bench", quick = opt.quick,
    rounds = opt.quick and math.min(opt.rounds, 3) or opt.rounds, turn = opt.quick and 200 or 500,
    modes = words("modes", modes, {"eager", "compiled"}), threads = hm.get_num_threads(),
  }
  local names = words("workloads", opt.workloads, workloads.names)
  local dtypes = words("dtypes", opt.dtypes, workloads.dtypes)
  assert(os.execute("mkdir -p " .. quote(bench.scratch)))
  local data = bench.scratch .. "/data.safetensors"
  bench.batches, bench.source = workloads.batches(data, BATCHES)
  if opt.telemetry then
    bench.examples = here .. "/../../examples"
    return telemetry.report(workloads, names, dtypes, bench, {say = say, print_table = print_table, median = median})
  end
  bench.peak = build_peak(bench.scratch)
  join_peer(bench, opt)
  if bench.peer then assert(bench.peer:ask("data %s", data)) end
  describe_machine(bench)

  local rows = {}
  for _, name in ipairs(names) do
    for _, dtype in ipairs(dtypes) do
      io.stderr:write(("  measuring %s %s ...\n"):format(name, dtype))
      rows[#rows + 1] = measure(name, dtype, bench)
    end
  end
  report_steps(rows)
  report_ops(bench)
  report_program(bench)
  if bench.peer then bench.peer:close() else say("\nPeer: none (%s)", bench.no_peer) end
end

main(cli.parse("run.lua: speed and memory against the machine's limits, and PyTorch where there is one", OPTIONS, arg))
