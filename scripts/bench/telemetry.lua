-- telemetry.lua -- what a gradient scaler costs: the check, each statistic and the trace as a share of a training step,
-- and the time of one policy update.
--
-- Loaded by run.lua for --telemetry.  One model takes turns with all scalers, a few steps each, so that a machine that
-- others use slows them all alike.  Shares are of processor time, to which others do not add: medians of the ratios of
-- a round.  Differences of a few hundredths need some dozens of rounds.

local hm = require "halfmoon"
local amp, nn, optim = hm.amp, hm.nn, hm.optim
local now = require("halfmoon.core").now
local policies = require "halfmoon.amp.policies"

local M = {}

--- A policy that holds the scale and asks for statistics.
local function asking(...)
  return {
    name = "asking", needs = {...}, init = function(opts) return {scale = opts.init_scale} end,
    update = function(state) return state.scale end,
  }
end

-- ====== The ways of a step ======

--- What takes turns: a name, and the scaler's options; false: no scaler; "norm": none, but the norm of the gradients.
local function ways_of(scratch)
  return {
    {"no scaler", false},
    {"no scaler, one pass for the norm", "norm"},
    {"scaler at 1: nothing to write back", {policy = "static", init_scale = 1.0}},
    {"scaler, telemetry off", {policy = "static"}},
    {"norm", {policy = asking "norm"}},
    {"amax and norm", {policy = asking("amax", "norm")}},
    {"histogram", {policy = asking "histogram"}},
    {"per_param", {policy = asking "per_param"}},
    {"trace file", {policy = "static", trace = scratch .. "/trace.jsonl"}},
    {"trace file with both", {
      policy = "static", trace = {scratch .. "/all.jsonl", histogram = true, per_param = true},
    }},
    {"policy auto", {policy = "auto"}},
  }
end

--- The scaler of a way.  Unless it says so its scale is not 1: gradients need unscaling.
local function scaler_of(options, low)
  options.init_scale, options.dtype = options.init_scale or 1024.0, low or "float32"
  return amp.GradScaler(options)
end

--- One step of the model in one of the ways.
local function step(run, way)
  local loss = run:forward()
  if way.scaler then
    way.scaler:scale(loss):backward()
    way.scaler:step(run.opt)
    way.scaler:update()
    return
  end
  loss:backward()
  if way.pass then nn.utils.clip_grad_norm_(run.params, math.huge) end
  run.opt:step()
end

--- Does `steps` steps -> milliseconds of each: by the clock, of the processors
local function turn(run, way, steps)
  local begin, used = now(), os.clock()
  for _ = 1, steps do step(run, way) end
  return (now() - begin) / steps * 1e3, (os.clock() - used) / steps * 1e3
end

--- Measures all ways on one model in one dtype -> array of {name, ms = rounds, cpu = rounds}, the number of parameters
local function measure(workloads, name, dtype, bench)
  local run = workloads.run(name, dtype, bench.batches, bench.scratch .. "/init.safetensors")
  run.params = run.model:parameters()
  local ways, warm = {}, nil
  for i, entry in ipairs(ways_of(bench.scratch)) do
    local options = entry[2]
    local scaler = type(options) == "table" and scaler_of(options, run.low) or nil
    ways[i] = {name = entry[1], pass = options == "norm", scaler = scaler, ms = {}, cpu = {}}
    warm = turn(run, ways[i], 3)
  end
  local steps = math.max(2, math.ceil((bench.quick and 20 or 60) / warm))
  for round = 1, bench.quick and 9 or 5 * bench.rounds do
    collectgarbage()
    for k = 1, #ways do -- forwards and backwards in turn: none comes always after the same one
      local way = ways[round % 2 == 0 and #ways + 1 - k or k]
      way.ms[round], way.cpu[round] = turn(run, way, steps)
    end
  end
  for _, way in ipairs(ways) do
    if way.scaler then amp.trace(way.scaler, nil) end
  end
  return ways, run:parameters()
end

local function report_steps(workloads, names, dtypes, bench, tools)
  for _, name in ipairs(names) do
    for _, dtype in ipairs(dtypes) do
      if dtype ~= "f16" then -- nothing may overflow, or steps would be skipped
        local ways, parameters = measure(workloads, name, dtype, bench)
        tools.say("\n%s %s, %d parameters: what a step takes", name, dtype, parameters)
        local rows = {{"", "ms", "processors' ms", "beyond no scaler"}}
        for _, way in ipairs(ways) do
          local more = {}
          for round, cpu in ipairs(way.cpu) do more[round] = 100 * (cpu / ways[1].cpu[round] - 1) end
          rows[#rows + 1] = {
            way.name, ("%.3f"):format(math.min(table.unpack(way.ms))),
            ("%.3f"):format(math.min(table.unpack(way.cpu))), ("%+.1f %%"):format(tools.median(more)),
          }
        end
        tools.print_table(1, rows)
      end
    end
  end
end

-- ====== One policy update ======

--- An event as policies get it, with all statistics.
local function sample_event()
  local heard
  local policy = asking("amax", "norm", "histogram", "per_param")
  policy.update = function(state, event)
    heard = event
    return state.scale
  end
  local scaler = amp.GradScaler {init_scale = 1024.0, policy = policy}
  local model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 10))
  local opt = optim.SGD(model:parameters(), {lr = 0})
  scaler:scale(model(hm.randn {32, 64}):pow(2):mean()):backward()
  scaler:step(opt)
  scaler:update()
  return heard
end

--- Microseconds of one call of a policy, without the scaler around it.
local function time_rule(policy, event, calls)
  local runner = policies.resolve("bench", policy)
  local opts = {}
  for name, value in pairs(runner.options or {}) do opts[name] = value end
  opts.init_scale, opts.min_scale, opts.max_scale = 1024.0, 1.0, 2.0 ^ 24
  opts.growth_factor, opts.backoff_factor = opts.growth_factor or 2.0, opts.backoff_factor or 0.5
  opts.growth_interval = opts.growth_interval or 2000
  local told = {found_inf = false, inf_count = 0, nan_count = 0, step = 1, scale = 1024.0}
  for _, name in ipairs(runner.needs) do told[name] = event[name] end
  local state = runner.init(opts)
  local begin = os.clock()
  for _ = 1, calls do
    local _, _, new = runner.update(state, told, opts)
    state = new
    if state.scale then state.scale = 1024.0 end -- as if nothing had changed
  end
  return (os.clock() - begin) / calls * 1e6
end

--- Microseconds of step() and update() with one parameter of 64 values.
local function time_step(policy, calls)
  local p, grad = hm.ones({64}, {requires_grad = true}), hm.ones {64}
  local opt = optim.SGD({p}, {lr = 0})
  local scaler = amp.GradScaler {init_scale = 1024.0, policy = policy}
  p.grad = grad
  local begin = os.clock()
  for _ = 1, calls do
    scaler:step(opt)
    scaler:update()
  end
  return (os.clock() - begin) / calls * 1e6
end

local function report_updates(bench, tools)
  tools.say("\nOne policy update on a clean step; step() and update() of 64 values (processors' µs, median of rounds)")
  local calls = bench.quick and 200 or 2000
  local event = sample_event()
  local folder = bench.examples .. "/policies/"
  local rows = {{"policy", "kind", "the rule alone", "step() and update()"}}
  for _, entry in ipairs {
    {"static", "table"}, {"dynamic", "table"}, {"logmax", "table"}, {"histogram", "table"}, {"auto", "table"},
    {folder .. "cautious.lua", "file, in its sandbox"}, {folder .. "flush_budget.lua", "file, in its sandbox"},
  } do
    local rule, whole = {}, {}
    for round = 1, bench.rounds do
      rule[round], whole[round] = time_rule(entry[1], event, calls), time_step(entry[1], calls)
    end
    rows[#rows + 1] = {
      entry[1]:match "[^/]*$", entry[2], ("%.2f"):format(tools.median(rule)), ("%.2f"):format(tools.median(whole)),
    }
  end
  tools.print_table(2, rows)
end

--- Measures and prints.  tools: {say, print_table, median} of run.lua.
---@param workloads table
---@param names string[] models
---@param dtypes string[] f32, bf16; f16 is left out
---@param bench table
---@param tools table
function M.report(workloads, names, dtypes, bench, tools)
  report_steps(workloads, names, dtypes, bench, tools)
  tools.say("\n  ms, processors' ms: of the quickest round.  Beyond: median of the rounds' ratios of processors' ms.")
  tools.say("  norm and amax come with the check; the histogram is another look at gradients in cache.")
  tools.say("  Unscaled gradients are written back in the optimizer's pass.")
  report_updates(bench, tools)
end

return M
