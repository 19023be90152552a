-- Short trainings on real images, one for each dtype: they must reach a bound on the loss; skipped steps, resuming, the shortest example.

local hm = require "halfmoon"
local cnn = require "spec.support.cnn"
local devices = require "spec.support.devices"
local numbers = require "spec.support.numbers"
local process = require "spec.support.process"

local nn, optim, amp, data = hm.nn, hm.optim, hm.amp, hm.data

-- Smaller on the test double, which is slow.
local BATCH, STEPS, TEST = devices.pick(32, 16), devices.pick(80, 40), devices.pick(500, 100)
local train_set = data.fashion_mnist():slice(1, 4000)
local test_set = data.fashion_mnist({train = false}):slice(1, TEST)
local NORMALIZE = {mean = 0.2860, std = 0.3530}
local LOW = {bf16 = "bfloat16", f16 = "float16"}

--- A run that can be stopped and gone on with: {model, opt, scaler, losses, skipped}.
local function new_run(dtype, scale)
  hm.manual_seed(2)
  local run = {dtype = dtype, losses = {}, skipped = 0, events = {}}
  run.model = cnn.Net()
  run.opt = optim.AdamW(run.model:parameters(), {lr = 2e-3})
  run.scaler = amp.GradScaler {enabled = dtype == "f16", init_scale = scale or 2.0 ^ 16, growth_interval = 1000}
  return run
end

local function one_step(run, x, y)
  run.opt:zero_grad()
  local loss
  do
    local _ <close> = LOW[run.dtype] and amp.autocast(LOW[run.dtype])
    loss = nn.functional.cross_entropy(run.model(x), y)
  end
  run.scaler:scale(loss):backward()
  local stepped = run.scaler:step(run.opt)
  run.events[#run.events + 1] = run.scaler:is_enabled() and run.scaler:update().event or nil
  run.losses[#run.losses + 1] = loss:item()
  run.skipped = run.skipped + (stepped and 0 or 1)
end

--- Steps from..to of the stream of batches, which depends on nothing but its seed.
local function train(run, from, to)
  local n, loader = 0, data.DataLoader {train_set, batch_size = BATCH, shuffle = true, seed = 5, drop_last = true, normalize = NORMALIZE}
  while n < to do
    for x, y in loader:batches() do
      n = n + 1
      if n >= from then one_step(run, x:to(devices.name), y:to(devices.name)) end
      if n == to then break end
    end
  end
  return run
end

local function accuracy(run)
  local correct = 0
  hm.no_grad(function()
    for x, y in data.DataLoader({test_set, batch_size = 250, normalize = NORMALIZE}):batches() do
      local logits
      do
        local _ <close> = LOW[run.dtype] and amp.autocast(LOW[run.dtype])
        logits = run.model(x:to(devices.name)):cpu()
      end
      correct = correct + logits:argmax(2):eq(y):sum():item()
    end
  end)
  return correct / #test_set
end

local function mean_of_last(losses, n)
  local sum = 0
  for i = #losses - n + 1, #losses do sum = sum + losses[i] end
  return sum / n
end

describe("training", function()
  local finals = {}

  for _, dtype in ipairs {"f32", "bf16", "f16"} do
    it("reaches its bound: " .. dtype, function()
      local run = train(new_run(dtype), 1, STEPS)
      finals[dtype] = mean_of_last(run.losses, 20)
      assert(run.losses[1] > 2.1 and run.losses[1] < 2.6, run.losses[1])
      assert(finals[dtype] < devices.pick(0.70, 0.95), finals[dtype])
      assert(accuracy(run) > devices.pick(0.74, 0.6), accuracy(run))
      assert(run.skipped <= (dtype == "f16" and 8 or 0), run.skipped)
      for _, p in ipairs(run.model:parameters()) do
        assert.equal("float32", p.dtype)
        assert.is_true(p:isfinite():all():item())
      end
    end)
  end

  it("comes to the same in all three", function()
    for _, dtype in ipairs {"bf16", "f16"} do
      assert(math.abs(finals[dtype] / finals.f32 - 1) < 0.08, ("%s: %g, f32: %g"):format(dtype, finals[dtype], finals.f32))
    end
  end)

  it("in f16 from a scale of 2^24 skips steps first, then goes on", function()
    local run = new_run("f16", 2.0 ^ 24)
    local before = run.model.fc1.weight:detach():clone()
    train(run, 1, 1)
    assert.equal(1, run.skipped)
    assert.equal("backoff", run.events[1])
    assert.equal(2.0 ^ 23, run.scaler:get_scale())
    numbers.assert_same(run.model.fc1.weight, before)
    train(run, 2, devices.pick(40, 30))
    assert(run.skipped >= 2 and run.skipped < 20, run.skipped)
    local skips = 0
    for _, event in ipairs(run.events) do skips = skips + (event == "backoff" and 1 or 0) end
    assert.equal(run.skipped, skips)
    assert.equal(2.0 ^ (24 - skips), run.scaler:get_scale())
    assert(mean_of_last(run.losses, 10) < devices.pick(1.0, 1.2), mean_of_last(run.losses, 10))
  end)
end)

describe("a checkpoint", function()
  it("gives the same test accuracy in another process, and the same losses when training goes on", function()
    local path = os.tmpname()
    local at, more = devices.pick(12, 7), devices.pick(8, 3)
    for _, dtype in ipairs {"f32", "f16"} do
      local run = train(new_run(dtype, 2.0 ^ 20), 1, at)
      assert(hm.save(path, {model = run.model, opt = run.opt, scaler = run.scaler, dtype = dtype}))
      local reached = accuracy(run)
      train(run, at + 1, at + more)

      local state = assert(hm.load(path))
      local other = new_run(state.dtype, 4.0)
      other.model:load_state_dict(state.model)
      other.opt:load_state_dict(state.opt)
      other.scaler:load_state_dict(state.scaler)
      assert.equal(reached, accuracy(other))
      train(other, at + 1, at + more)
      for i = 1, more do
        numbers.assert_near(other.losses[i], run.losses[at + i], 1e-4, 0, ("%s: the loss of step %d"):format(dtype, at + i))
      end
      assert.equal(run.scaler:get_scale(), other.scaler:get_scale())
    end
    os.remove(path)
  end)

  it("of the weights alone is what examples save", function()
    local path = os.tmpname()
    local run = train(new_run("f32"), 1, 5)
    assert(hm.save(path, run.model:state_dict()))
    local other = new_run("f32")
    other.model:load_state_dict(assert(hm.load(path)))
    assert.equal(accuracy(run), accuracy(other))
    os.remove(path)
  end)
end)

describe("examples", function()
  -- The scripts as they are, on a few images: the data set is shortened before they run.
  it("mlp.lua runs as printed", devices.cpu_only("the program from outside", function()
    local folder = os.tmpname()
    os.remove(folder)
    local here = process.shell("pwd"):gsub("\n", "")
    local program = process.program:sub(1, 1) == "/" and process.program or here .. "/" .. process.program
    local short = ([[
      local data = require "halfmoon.data"
      local whole = data.fashion_mnist
      data.fashion_mnist = function(...) return whole(...):slice(1, 2000) end
      arg = {[0] = "%s/examples/mlp.lua"}
      dofile(arg[0])]]):format(here)
    local said, status = process.shell(("mkdir %s && cd %s && %s -e %s && ls"):format(folder, folder, program, process.quote(short)))
    process.shell("rm -rf " .. folder)
    assert.equal(0, status, said)
    assert.equal(3, select(2, said:gsub("epoch %d: test accuracy 0%.%d+", "")), said)
    assert.truthy(said:find("mlp.safetensors", 1, true), said)
  end))
end)
