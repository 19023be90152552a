-- study_precision.lua -- the claims about mixed precision, measured: two networks on Fashion-MNIST, trained from the
-- same weights with the same batches in float32, in bfloat16, in float16 with several loss-scale policies, and in
-- float16 without what makes it work.
--
--     build/halfmoon examples/study_precision.lua              -- both networks, about four minutes on two cores
--     build/halfmoon examples/study_precision.lua --policies all                -- twice as long
--     build/halfmoon examples/study_precision.lua --models cnn --policies dynamic,auto --steps 600
--     build/halfmoon examples/study_precision.lua --json study.json
--
-- The claims are those of Micikevicius et al., "Mixed Precision Training" (ICLR 2018): float16 with float32 master
-- weights and loss scaling keeps up with float32; without scaling small gradients are lost; with weights in float16
-- small updates are lost.  What a run shows is said below its tables, from its numbers.

local hm = require "halfmoon"
local core = require "halfmoon.core"
local json = require "halfmoon.json"
local cli = require "halfmoon.train.cli"
local nn, optim, amp, data = hm.nn, hm.optim, hm.amp, hm.data

local INTERVAL <const> = 50 -- growth_interval: with the usual 2000 no scale would grow in so short a run
local WINDOW <const> = 25   -- steps of a moving mean, which smooths a loss curve
local NUDGED <const> = 3    -- float32 runs from weights that differ by a rounding: what chance does
local PROBES <const> = 12   -- steps of a run, about, whose gradients are compared with those of a float32 backward pass
local LEARNT <const> = 0.3  -- accuracy from which float32 is something to keep up with; guessing gives 0.1
local FEWEST <const> = 8    -- steps of a run: some to warm up, some to probe, one to weigh

-- ====== The networks ======

-- The demo's: conv32 - pool - conv64 - pool - fc128 - fc10.
local Cnn = nn.class("Cnn")

function Cnn:init()
  self.conv1 = nn.Conv2d(1, 32, 3, {padding = 1})
  self.conv2 = nn.Conv2d(32, 64, 3, {padding = 1})
  self.fc1 = nn.Linear(64 * 7 * 7, 128, {activation = "relu"})
  self.fc2 = nn.Linear(128, 10)
end

function Cnn:forward(x)
  x = self.conv1(x):max_pool2d(2):relu()
  x = self.conv2(x):max_pool2d(2):relu()
  return self.fc2(self.fc1(x:flatten(2)))
end

-- Ten convolutions in a row, their mean over places, a linear layer.  Nothing normalizes, the weights begin as the
-- library makes them: gradients shrink from layer to layer on their way back.
local Deep = nn.class("Deep")

function Deep:init()
  local layers = {nn.Conv2d(1, 16, 3, {padding = 1, stride = 2})}
  for _ = 1, 4 do layers[#layers + 1] = nn.Conv2d(16, 16, 3, {padding = 1}) end
  layers[#layers + 1] = nn.Conv2d(16, 32, 3, {padding = 1, stride = 2})
  for _ = 1, 4 do layers[#layers + 1] = nn.Conv2d(32, 32, 3, {padding = 1}) end
  self.layers = nn.ModuleList(layers)
  self.head = nn.Linear(32, 10)
end

function Deep:forward(x)
  for _, layer in ipairs(self.layers) do x = layer(x):relu() end
  return self.head(x:mean {3, 4})
end

local MODELS = {
  cnn = {class = Cnn, batch = 128, steps = 200, title = "the demo's network (2 convolutions, 2 linear layers)"},
  deep = {class = Deep, batch = 64, steps = 300, title = "a plain deep network (10 convolutions, 1 linear layer)"},
}

local POLICIES <const> = {"static", "dynamic", "histogram", "auto"} -- unless others are asked for

-- ====== What is trained ======

--- The rows of a table, float32's first.  low: what autocast computes in; scaler: options of a GradScaler; half: the
--- dtype of the weights themselves, without masters, and of all that is computed; nudge: a seed.
local function variants_of(policies)
  local list = {{name = "f32"}}
  for i = 1, NUDGED do list[i + 1] = {name = ("f32, nudged %d"):format(i), nudge = i} end
  list[#list + 1] = {name = "bf16", low = "bfloat16"}
  for _, policy in ipairs(policies) do
    local own = amp.policies[policy].options.growth_interval
    list[#list + 1] = {
      name = "f16, " .. policy, low = "float16", policy = policy,
      scaler = {policy = policy, growth_interval = own and math.min(own, INTERVAL) or nil},
    }
  end
  local dynamic = {policy = "dynamic", growth_interval = INTERVAL, allow_f16_grads = true}
  table.move({
    {name = "f16, no scaling", low = "float16"},
    {name = "f16 weights, no scaling", half = "float16"},
    {name = "f16 weights, dynamic", half = "float16", scaler = dynamic},
    {name = "bf16 weights", half = "bfloat16"},
    {name = "bf16 weights, stochastic", half = "bfloat16", rounding = "stochastic"},
  }, 1, 5, #list + 1, list)
  return list
end

--- Moves all weights by at most the rounding error of float16, each by chance.
local function nudge(model, seed)
  local _ <close> = hm.no_grad()
  hm.manual_seed(1000 + seed)
  for _, p in ipairs(model:parameters()) do p:mul_(1 + (hm.rand(p.shape) * 2 - 1) * 2.0 ^ -11) end
end

--- The logits of a model, computed in the variant's dtypes.
local function forward(variant, model, x)
  if variant.half then return model(x:to(variant.half)):float() end
  local _ <close> = variant.low and amp.autocast(variant.low)
  return model(x):float()
end

-- ====== Probes: what float16 loses in a step ======

--- The gradients that a float32 backward pass gives for the same weights and batch: of the parameters, and a count of
--- those of the outputs of all layers: how many are not zero, and how many of them float16 flushes at `scale`.
local function exact_gradients(model, x, y, scale)
  local probe = model:clone():float()
  local alive, flushed = 0, 0
  local function watch(_, _, out)
    out:register_hook(function(grad)
      local census = core.census(grad:float(), scale)
      alive, flushed = alive + census.count - census.zeros, flushed + census.flushed
    end)
  end
  for _, module in probe:named_modules() do
    if module.weight then module:register_forward_hook(watch) end
  end
  local loss
  do
    local _ <close> = amp.autocast {dtype = "float16", backward = "float32"}
    loss = nn.functional.cross_entropy(probe(x), y)
  end
  loss:backward()
  local grads = {}
  for i, p in ipairs(probe:parameters()) do grads[i] = p.grad end
  return grads, alive, flushed
end

--- Adds to the sums: parameters' gradients that are not zero, and those of them that became zero in this step.
local function count_lost(sums, params, exact)
  for i, p in ipairs(params) do
    local alive = exact[i]:ne(0)
    sums.alive = sums.alive + alive:sum():item()
    sums.lost = sums.lost + alive:logical_and(p.grad:eq(0)):sum():item()
  end
end

--- The weights before a step, and which of them have a gradient: afterwards it is unscaled, and a float16 one may have
--- become zero.
local function remember(params)
  local before = {}
  for i, p in ipairs(params) do before[i] = {p:detach():clone(), p.grad:ne(0)} end
  return before
end

--- Adds to the sums: weights with a gradient, and those of them that the step left as they were.
local function count_stuck(sums, params, before)
  for i, p in ipairs(params) do
    local value, moving = table.unpack(before[i])
    sums.moving = sums.moving + moving:sum():item()
    sums.stuck = sums.stuck + moving:logical_and(p:detach():eq(value)):sum():item()
  end
end

-- ====== One run ======

---@class StudyRun
---@field model Module
---@field params Tensor[]
---@field opt Optimizer
---@field scaler GradScaler?
---@field sums table what probes counted
---@field ms number[] times of steps
---@field cpu number[] times of all processors
---@field peak integer bytes that a step takes at most

--- Backward pass, optimizer step, next scale -> was the step made?
local function finish_step(run, loss, probed)
  (run.scaler and run.scaler:scale(loss) or loss):backward()
  local before
  if probed then
    local overflow = false
    for _, p in ipairs(run.params) do overflow = overflow or not p.grad:isfinite():all():item() end
    if probed.exact and not overflow then count_lost(run.sums, run.params, probed.exact) end
    before = remember(run.params)
  end
  local stepped = true
  if run.scaler then
    stepped = run.scaler:step(run.opt)
    run.scaler:update()
  else
    run.opt:step()
  end
  if probed and stepped then count_stuck(run.sums, run.params, before) end
  return stepped
end

--- One training step; with a probe, or untimed, its time is left out.
local function train_step(run, variant, x, y, step, probe, untimed)
  run.opt:zero_grad()
  local probed
  if probe then
    probed = {}
    if variant.low == "float16" or variant.half == "float16" then
      local alive, flushed
      probed.exact, alive, flushed = exact_gradients(run.model, x, y, run.scaler and run.scaler:get_scale() or 1)
      run.sums.outputs, run.sums.flushed = run.sums.outputs + alive, run.sums.flushed + flushed
    end
  end
  local begin, used = core.now(), os.clock()
  local loss = nn.functional.cross_entropy(forward(variant, run.model, x), y)
  local stepped = finish_step(run, loss, probed)
  run.schedule:step(stepped)
  run.losses[step] = loss:item()
  if not stepped then run.skipped = run.skipped + 1 end
  if probe or untimed then return end
  run.ms[#run.ms + 1], run.cpu[#run.cpu + 1] = (core.now() - begin) * 1e3, (os.clock() - used) * 1e3
end

--- Does fn(), one step, with a collection after every op, so that a tensor goes with the last reference to it -> the
--- peak of tensor memory meanwhile, in bytes.  Else the peak would depend on when Lua's collector runs, and on what the
--- cache of freed memory happens to hold.
local function peak_of(fn)
  hm.cpu.reset_peak()
  hm.cpu.trim()
  core.op_log(function() collectgarbage() end)
  fn()
  core.op_log(nil)
  return hm.cpu.memory_stats().peak
end

--- The share of test images that are named rightly.
local function test(run, variant, batches)
  local images, correct = 0, 0
  local _ <close> = hm.no_grad()
  for _, batch in ipairs(batches) do
    images = images + #batch[2]
    correct = correct + forward(variant, run.model, batch[1]):argmax(2):eq(batch[2]):sum():item()
  end
  return correct / images
end

local function median(values)
  table.sort(values)
  return values[#values // 2 + 1]
end

--- Part over whole; nil for a whole of nothing.
local function share(part, whole) return whole > 0 and part / whole or nil end

--- Trains one network in one way -> the figures of a row.
local function train(spec, variant, sets, opt)
  collectgarbage()
  hm.cpu.trim()
  hm.cpu.reset_peak()
  hm.manual_seed(opt.seed)
  local before = hm.cpu.memory_stats().live
  local run = {
    losses = {}, ms = {}, cpu = {}, skipped = 0,
    sums = {alive = 0, lost = 0, moving = 0, stuck = 0, outputs = 0, flushed = 0},
  }
  run.model = spec.class()
  if variant.nudge then nudge(run.model, variant.nudge) end
  if variant.half then run.model:to(variant.half) end
  run.params = run.model:parameters()
  run.opt = optim.AdamW(run.params, {lr = opt.lr, rounding = variant.rounding})
  local warmup = spec.steps // 8
  run.schedule = optim.lr_scheduler.LinearWarmup(run.opt, {
    steps = warmup, after = optim.lr_scheduler.CosineAnnealingLR(run.opt, {T_max = math.max(1, spec.steps - warmup)}),
  })
  run.scaler = variant.scaler and amp.GradScaler(variant.scaler)

  local every = spec.every
  for step = 1, spec.steps do
    local batch = sets.train[(step - 1) % #sets.train + 1]
    local weighed = step == every + 1
    local function once() train_step(run, variant, batch[1], batch[2], step, step % every == 0, weighed) end
    if weighed then run.peak = peak_of(once) - before else once() end
  end
  local sums = run.sums
  return {
    name = variant.name, policy = variant.policy, accuracy = test(run, variant, sets.test), losses = run.losses,
    skipped = run.scaler and run.skipped or nil, overflow = run.scaler and amp.report(run.scaler).overflow_rate or nil,
    scale = run.scaler and run.scaler:get_scale() or nil, flushed = share(sums.flushed, sums.outputs),
    lost = share(sums.lost, sums.alive), stuck = share(sums.stuck, sums.moving), peak = run.peak,
    ms = median(run.ms), cpu_ms = median(run.cpu),
  }
end

-- ====== Loss curves ======

--- Moving means of a curve; each is summed anew, so that a loss that is not finite spoils its own window alone.
local function smooth(losses)
  local window, out = math.min(WINDOW, #losses), {}
  for last = window, #losses do
    local sum = 0
    for i = last - window + 1, last do sum = sum + losses[i] end
    out[#out + 1] = sum / window
  end
  return out
end

--- The mean distance of two smoothed curves in their last quarter; NaN if one of them is not finite there.
local function distance(a, b)
  a, b = smooth(a), smooth(b)
  local from, sum = #a - #a // 4, 0
  for i = from, #a do sum = sum + math.abs(a[i] - b[i]) end
  return sum / (#a - from + 1)
end

-- ====== The table ======

local LINE <const> = "  %-27s %8s %9s %9s %8s %9s %9s %9s %9s %8s %7s %7s"

local function percent(x) return x and (x > 0 and x < 5e-5 and "<0.01 %" or ("%.2f %%"):format(100 * x)) or "-" end

local function print_head()
  print(LINE:format("", "accuracy", "from f32", "skipped", "overflow", "scale", "flushed", "lost", "stuck", "peak MB",
    "ms", "cpu ms"))
end

local function print_row(row)
  print(LINE:format(row.name, percent(row.accuracy), ("%.4f"):format(row.distance), row.skipped or "-",
    percent(row.overflow), row.scale and ("2^%.4g"):format(math.log(row.scale, 2)) or "-", percent(row.flushed),
    percent(row.lost), percent(row.stuck), ("%.1f"):format(row.peak / 1e6), ("%.1f"):format(row.ms),
    ("%.1f"):format(row.cpu_ms)))
  io.stdout:flush()
end

local LEGEND = [[
  from f32  mean distance of the training loss to f32's over the last quarter of the steps, both as moving means of %d
  skipped   steps that the scaler skipped; overflow: their share of all updates; scale: the last one
  flushed   share of the gradients of the layers' outputs, not zero in a float32 backward pass, that float16 rounds to
            zero at the scale in use
  lost      share of the parameters' gradients, not zero in a float32 backward pass, that came out as zero
  stuck     share of the weights with a gradient that an optimizer step left as they were
            (these three: at %d steps of the run; lost and stuck without those whose gradients overflowed)
  peak      tensors of one step, each counted until the last reference to it is gone; without the data
  ms        median time of a step, rows one after the other; cpu ms: of all processors together]]

-- ====== What the numbers say ======

local function find(rows, name)
  for _, row in ipairs(rows) do
    if row.name == name then return row end
  end
end

--- What float32 does: the mean accuracy of its runs; by how much one more run can be below that by chance (twice the
--- standard deviation of a run less the mean) or without anyone's notice (half a point), whichever is more; and the
--- mean distance of the nudged runs' losses.
local function reference_of(rows)
  local n, mean, square, far = NUDGED + 1, 0, 0, 0
  for i = 1, n do mean, far = mean + rows[i].accuracy / n, far + rows[i].distance / NUDGED end
  for i = 1, n do square = square + (rows[i].accuracy - mean) ^ 2 / (n - 1) end
  return {accuracy = mean, chance = math.max(0.005, 2 * math.sqrt(square * (1 + 1 / n))), distance = far}
end

--- Does a row keep up with float32?
local function keeps_up(f32, row) return row.accuracy >= f32.accuracy - f32.chance end

local function points(f32, row) return ("%+.2f points"):format(100 * (row.accuracy - f32.accuracy)) end

local function verdict(held, format, ...) print(("  %-5s "):format(held and "yes" or "NO") .. format:format(...)) end

--- float16 with masters and a scale.
local function judge_mixed(rows, f32)
  local kept, fell, low, high = 0, {}, math.huge, -math.huge
  for _, row in ipairs(rows) do
    if row.policy then
      low, high = math.min(low, row.accuracy), math.max(high, row.accuracy)
      if keeps_up(f32, row) then kept = kept + 1
      else fell[#fell + 1] = ("%s (%s)"):format(row.policy, points(f32, row)) end
    end
  end
  if kept + #fell == 0 then return end
  verdict(#fell == 0, "mixed float16 keeps up with float32: %d of %d policies do, %+.2f to %+.2f points%s", kept,
    kept + #fell, 100 * (low - f32.accuracy), 100 * (high - f32.accuracy),
    #fell > 0 and "; not " .. table.concat(fell, ", ") or "")
end

--- The best policy's share of what is lost, to compare with.
local function least_lost(rows)
  local least
  for _, row in ipairs(rows) do
    if row.policy and row.lost and (not least or row.lost < least.lost) then least = row end
  end
  return least
end

local function judge_scaling(rows, f32)
  local plain, best = find(rows, "f16, no scaling"), least_lost(rows)
  if best and plain.lost then -- nil where the gradients of all probes overflowed
    verdict(plain.lost > 0.001 and plain.lost > 10 * best.lost,
      "without scaling small gradients are lost: %s of the parameters' (with '%s': %s);", percent(plain.lost),
      best.policy, percent(best.lost))
    print(("        float16 flushes %s of the outputs' (%s)"):format(percent(plain.flushed), percent(best.flushed)))
  end
  verdict(not keeps_up(f32, plain), "and that costs accuracy: %s; loss %.4f from float32's", points(f32, plain),
    plain.distance)
end

local function judge_weights(rows, f32)
  local pure, scaled = find(rows, "f16 weights, no scaling"), find(rows, "f16 weights, dynamic")
  verdict(not keeps_up(f32, pure), "float16 weights without masters lose accuracy: %s; with scaling %s",
    points(f32, pure), points(f32, scaled))
  if scaled.stuck and rows[1].stuck then
    verdict(scaled.stuck > 0.001 and scaled.stuck > 10 * rows[1].stuck,
      "and small updates are lost in them: with scaling %s of the weights stay as they were in a step (f32: %s)",
      percent(scaled.stuck), percent(rows[1].stuck))
  end
  local nearest, chance = find(rows, "bf16 weights"), find(rows, "bf16 weights, stochastic")
  verdict(not keeps_up(f32, nearest) and keeps_up(f32, chance),
    "bfloat16 weights need stochastic rounding: %s without, %s with it", points(f32, nearest), points(f32, chance))
end

local function conclude(rows)
  local f32, bf16 = reference_of(rows), find(rows, "bf16")
  if f32.accuracy < LEARNT then
    return print(("\n  What this run shows: nothing.  float32 itself has hardly learnt (%s, mean of %d runs), so whoever\n"
      .. "  fails keeps up with it."):format(percent(f32.accuracy), NUDGED + 1))
  end
  print(("\n  What this run shows.  float32: %s, mean of %d runs; a difference of %.2f points is taken for chance, or\n"
    .. "  for nothing (half a point); nudged runs' losses are %.4f from the first one's.  Other rows are one run each,\n"
    .. "  all of one seed; another may show something else:"):format(percent(f32.accuracy), NUDGED + 1,
    100 * f32.chance, f32.distance))
  verdict(keeps_up(f32, bf16), "bfloat16 keeps up with float32: %s", points(f32, bf16))
  judge_mixed(rows, f32)
  judge_scaling(rows, f32)
  judge_weights(rows, f32)
end

-- ====== The command line ======

--- The words of a list with commas.
local function words(text)
  local list = {}
  for word in text:gmatch("[^,%s]+") do list[#list + 1] = word end
  return list
end

--- The first batches of a data set, in a shuffled order, each {x, y}.
local function batches_of(set, size, count, seed)
  local loader = data.DataLoader {
    set, batch_size = size, shuffle = seed ~= nil, seed = seed, normalize = {mean = 0.2860, std = 0.3530},
  }
  local list = {}
  for x, y in loader:batches() do
    list[#list + 1] = {x, y}
    if #list == count then break end
  end
  loader:close()
  return list
end

local known_policies = amp.policies.names()

local OPTIONS = {
  {"models", "cnn,deep", "networks to train: cnn, deep", cli.among {"cnn", "deep"}},
  {"policies", "", "loss-scale policies, or all; default: " .. table.concat(POLICIES, ","),
    cli.among(table.move(known_policies, 1, #known_policies, 2, {"all"}))},
  {"steps", 0, "steps of each run (0: 200 for cnn, 300 for deep)",
    function(n) if n ~= 0 and n < FEWEST then return ("must be 0, or at least %d"):format(FEWEST) end end},
  {"lr", 2e-3, "highest learning rate of AdamW"},
  {"seed", 1, "seed of weights and order"},
  {"json", "", "a file that gets all figures and loss curves"},
  {"quick", false, "a few steps, two policies, few images: to see that it runs"},
}

--- What the command line says of one network.
local function settings(name, opt)
  local model, spec = MODELS[name], {name = name}
  for key, value in pairs(model) do spec[key] = value end
  local asked = words(opt.policies)
  spec.policies = #asked > 0 and asked or opt.quick and {"dynamic", "auto"} or POLICIES
  for _, policy in ipairs(asked) do
    if policy == "all" then spec.policies = known_policies end
  end
  spec.steps = opt.steps > 0 and opt.steps or opt.quick and FEWEST or model.steps
  spec.every = math.max(2, spec.steps // PROBES)
  return spec
end

local function study(spec, opt)
  local train_set, test_set = data.fashion_mnist(), data.fashion_mnist {train = false}
  if opt.quick then test_set = test_set:slice(1, 200) end
  local sets = {
    train = batches_of(train_set, spec.batch, opt.quick and 4 or spec.steps, opt.seed),
    test = batches_of(test_set, 500),
  }
  print(("\n%s: %s, %d steps of %d images, %d test images"):format(spec.name, spec.title, spec.steps, spec.batch,
    #test_set))
  print_head()
  local rows = {}
  for i, variant in ipairs(variants_of(spec.policies)) do
    local row = train(spec, variant, sets, opt)
    row.distance = distance(row.losses, i == 1 and row.losses or rows[1].losses)
    rows[i] = row
    print_row(row)
  end
  print(LEGEND:format(WINDOW, spec.steps // spec.every))
  conclude(rows)
  if spec.steps < 100 then print("  But so few steps show nothing.") end
  return {model = spec.name, steps = spec.steps, batch = spec.batch, test_images = #test_set, rows = rows}
end

local function main(opt)
  local features = hm.cpu.features()
  print(("Fashion-MNIST, AdamW, seed %d; %s, %d threads.  Each run: the same first weights, the same batches."):format(
    opt.seed, features.isa, features.threads))
  print(("The CPU has no float16 arithmetic: f16 is computed in float32 and rounded; its time says nothing of a\n"
    .. "GPU's.  growth_interval is at most %d, so that scales move in so short a run; else policies have their own\n"
    .. "settings, also of the first scale.")
    :format(INTERVAL))
  local results = {}
  for i, name in ipairs(words(opt.models)) do results[i] = study(settings(name, opt), opt) end
  if opt.json ~= "" then
    local file <close> = assert(io.open(opt.json, "w"))
    file:write(json.encode(results), "\n")
  end
end

main(cli.parse("study_precision.lua: mixed precision's claims, measured on Fashion-MNIST", OPTIONS, arg))
