-- fashion_cnn.lua -- trains a small convolutional network on Fashion-MNIST in float32, bfloat16 or float16.
--
--     build/halfmoon examples/fashion_cnn.lua --dtype f16 --epochs 3
--     build/halfmoon examples/fashion_cnn.lua --dtype bf16 --epochs 5 --save build/cnn.safetensors
--     build/halfmoon examples/fashion_cnn.lua --dtype f16 --policy examples/policies/cautious.lua
--     build/halfmoon examples/fashion_cnn.lua --dtype bf16 --device cuda
--     build/halfmoon examples/fashion_cnn.lua --dtype f16 --epochs 1 --record gradients.jsonl
--
-- Read it from top to bottom: the network, one epoch of training, the test, a whole run, the command line.

local hm = require "halfmoon"
local cli = require "halfmoon.train.cli"
local progress = require "halfmoon.train.progress"
local nn, optim, amp, data = hm.nn, hm.optim, hm.amp, hm.data

-- ====== The network: conv32 - pool - conv64 - pool - fc128 - fc10 ======

local Net = nn.class("Net")

function Net:init()
  self.conv1 = nn.Conv2d(1, 32, 3, {padding = 1})
  self.conv2 = nn.Conv2d(32, 64, 3, {padding = 1})
  self.fc1 = nn.Linear(64 * 7 * 7, 128, {activation = "relu"})
  self.fc2 = nn.Linear(128, 10)
end

function Net:forward(x)
  x = self.conv1(x):max_pool2d(2):relu() -- relu after the pool: the same values from a quarter of the work
  x = self.conv2(x):max_pool2d(2):relu()
  return self.fc2(self.fc1(x:flatten(2)))
end

-- ====== One epoch of training ======

local function train_epoch(run, title)
  local bar = progress.new {
    title = title, total = #run.loader, fields = {"loss", "accuracy", "images/s", "scale", "skipped"},
  }
  local images, correct = 0, 0
  for x, y in run.loader:batches() do
    run.opt:zero_grad()

    -- Inside the scope, convolutions and linear layers compute in float16 or bfloat16; the loss is float32.
    local logits, loss
    do
      local _ <close> = run.low and amp.autocast(run.low)
      logits = run.model(x)
      loss = nn.functional.cross_entropy(logits, y)
    end

    -- The loss is scaled up, so that small gradients do not vanish in float16.  step() divides the gradients again, and
    -- skips the step if one of them overflowed; update() asks the policy for the next scale.
    run.scaler:scale(loss):backward()
    if run.recording then run.recording:step() end
    local stepped = run.scaler:step(run.opt)
    run.scaler:update()
    run.schedule:step(stepped)

    run.losses[#run.losses + 1] = loss:item()
    run.skipped = run.skipped + (stepped and 0 or 1)
    images = images + #y
    correct = correct + logits:argmax(2):eq(y):sum():item()
    bar:step {
      loss = loss:item(), accuracy = correct / images, ["images/s"] = images // bar:seconds(), skipped = run.skipped,
      scale = run.scaler:is_enabled() and run.scaler:get_scale() or nil,
    }
  end
  return bar:finish()
end

-- ====== The test ======

local function test(model, loader, low)
  local images, correct = 0, 0
  local _ <close> = hm.no_grad()
  for x, y in loader:batches() do
    local _ <close> = low and amp.autocast(low)
    images = images + #y
    correct = correct + model(x):argmax(2):eq(y):sum():item()
  end
  return correct / images
end

-- ====== A whole run in one dtype ======

local LOW = {f32 = false, bf16 = "bfloat16", f16 = "float16"} -- what autocast computes in

-- "f32,f16" -> {"f32", "f16"}; a second result says what is wrong with it.
local function dtypes_of(text)
  local list = {}
  for name in (text == "all" and "f32,bf16,f16" or text):gmatch("[^,%s]+") do
    if LOW[name] == nil then return nil, ("must be f32, bf16, f16 or all, not '%s'"):format(name) end
    list[#list + 1] = name
  end
  return list
end

local function loader_of(dataset, opt, train)
  if opt.limit > 0 then dataset = dataset:slice(1, math.min(opt.limit, #dataset)) end
  return data.DataLoader {
    dataset, batch_size = opt.batch, shuffle = train, seed = opt.seed, drop_last = train, device = opt.device,
    normalize = {mean = 0.2860, std = 0.3530}, -- of the training images
  }
end

--- Records the gradients for scripts/simulate_policies.lua: the backward is in float32, and no step is skipped.
local function record(run, path)
  run.recording = amp.record_gradients(path, run.model)
  run.scaler = amp.GradScaler {enabled = false}
  run.low = run.low and {dtype = run.low, backward = "float32"}
end

--- Trains one network.  sets: {train =, test =} data sets; opt: the values of the command line.
local function train(dtype, sets, opt, record_to)
  local memory = opt.device == "cpu" and hm.cpu or hm.cuda -- of the tensors
  collectgarbage() -- what the last run left behind is not this one's memory
  memory.trim(opt.device)
  memory.reset_peak(opt.device)
  local before = memory.memory_stats(opt.device).live
  hm.manual_seed(opt.seed)

  local run = {low = LOW[dtype], losses = {}, skipped = 0}
  run.model = Net():to(opt.device)
  run.loader = loader_of(sets.train, opt, true)
  run.opt = optim.AdamW(run.model:parameters(), {lr = opt.lr})
  local warmup, steps = 100, #run.loader * opt.epochs
  run.schedule = optim.lr_scheduler.LinearWarmup(run.opt, {
    steps = warmup, after = optim.lr_scheduler.CosineAnnealingLR(run.opt, {T_max = math.max(1, steps - warmup)}),
  })
  run.scaler = amp.GradScaler {
    enabled = dtype == "f16", init_scale = 2.0 ^ 16, growth_interval = opt["growth-interval"], policy = opt.policy,
  }
  if record_to then record(run, record_to) end

  local seconds = 0
  for epoch = 1, opt.epochs do
    seconds = seconds + train_epoch(run, ("%-4s epoch %d/%d"):format(dtype, epoch, opt.epochs))
  end
  if run.recording then run.recording:close() end
  local accuracy = test(run.model, loader_of(sets.test, opt, false), run.low)

  local last = math.min(100, #run.losses)
  local mean = 0
  for i = #run.losses - last + 1, #run.losses do mean = mean + run.losses[i] / last end
  run.loader:close()
  return {
    dtype = dtype, accuracy = accuracy, loss = mean, epoch_seconds = seconds / opt.epochs, skipped = run.skipped,
    scale = run.scaler:is_enabled() and run.scaler:get_scale() or nil,
    peak = memory.memory_stats(opt.device).peak - before, model = run.model, scaler = run.scaler,
  }
end

--- One line for each run.
local function print_table(results)
  print(("\n%-6s %13s %11s %9s %12s %8s %12s"):format(
    "dtype", "test accuracy", "train loss", "s/epoch", "peak memory", "skipped", "final scale"))
  for _, r in ipairs(results) do
    local scale = r.scale and ("%.14g"):format(r.scale) or "-"
    print(("%-6s %13.4f %11.4f %9.1f %9.1f MB %8d %12s"):format(
      r.dtype, r.accuracy, r.loss, r.epoch_seconds, r.peak / 1e6, r.skipped, scale))
  end
  print("train loss: mean of the last 100 steps; peak memory: tensors, without the data set\n")
end

--- Where the weights or the recording of one run go: the name of its dtype comes in when there are several.
local function save_path(path, dtype, several)
  if not several then return path end
  local stem, suffix = path:match("^(.*)(%.[^./]*)$")
  return ("%s_%s%s"):format(stem or path, dtype, suffix or "")
end

-- ====== The command line ======

local OPTIONS = {
  {"dtype", "f32", "what to compute in: f32, bf16, f16, several of them (f32,f16), or all",
    function(text) return select(2, dtypes_of(text)) end},
  {"epochs", 3, "passes over the training images", function(n) if n < 1 then return "must be at least 1" end end},
  {"batch", 128, "images per step", function(n) if n < 1 then return "must be at least 1" end end},
  {"lr", 2e-3, "highest learning rate of AdamW"},
  {"policy", "dynamic", "loss-scale policy for f16: a name or a file, e.g. examples/policies/cautious.lua"},
  {"growth-interval", 200, "clean steps before the dynamic policy doubles the scale"},
  {"seed", 1, "seed of weights and order"},
  {"device", "cpu", "where to train: cpu, cuda or cuda:N", function(name)
    local ok, message = pcall(hm.empty, {0}, {device = name})
    if not ok then return "cannot be used: " .. message:gsub("^.-empty: ", "") end
  end},
  {"save", "", "where to save the trained weights (safetensors)"},
  {"record", "", "where to record the gradients for scripts/simulate_policies.lua; the backward is then in float32, "
    .. "and without a scaler, so --policy and --growth-interval do not count"},
  {"data", "", "folder of the Fashion-MNIST files; default: where Debian's package puts them"},
  {"limit", 0, "use the first N images only (0: all)"},
}

--- Trains in each dtype that opt.dtype names, prints the table, saves.
local function main(opt)
  local root = opt.data ~= "" and opt.data or nil
  local sets = {train = data.fashion_mnist {root = root}, test = data.fashion_mnist {root = root, train = false}}
  local dtypes = dtypes_of(opt.dtype)
  local features = hm.cpu.features()
  print(("Fashion-MNIST: %d training and %d test images, batch %d, %d epochs; %s, %d threads"):format(
    #sets.train, #sets.test, opt.batch, opt.epochs, features.isa, features.threads))
  local results = {}
  for i, dtype in ipairs(dtypes) do
    local record_to = opt.record ~= "" and save_path(opt.record, dtype, #dtypes > 1) or nil
    local result = train(dtype, sets, opt, record_to)
    result.recorded = record_to
    if opt.save ~= "" then
      result.path = save_path(opt.save, dtype, #dtypes > 1)
      local about = {dtype = dtype, accuracy = ("%.4f"):format(result.accuracy)}
      assert(hm.save(result.path, result.model:state_dict(), about))
    end
    result.model = nil -- its memory is not the next run's
    results[i] = result
  end
  print_table(results)
  for _, r in ipairs(results) do
    if r.path then print("saved " .. r.path) end
    if r.recorded then print("recorded " .. r.recorded) end
  end
  return results
end

-- Run as a script: train.  Loaded by another script (examples/demo.lua): hand over main.
if arg and arg[0] and arg[0]:find("fashion_cnn%.lua$") then
  main(cli.parse("fashion_cnn.lua: trains a small convolutional network on Fashion-MNIST", OPTIONS, arg))
end
return {main = main, options = OPTIONS}
