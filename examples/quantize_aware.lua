-- quantize_aware.lua -- what rounding weights and activations to a few bits costs on Fashion-MNIST: after training, and
-- with training that knows of it.
--
--     build/halfmoon examples/quantize_aware.lua
--     build/halfmoon examples/quantize_aware.lua --bits 8 --dtype bf16 --save build/int8.safetensors
--
-- A small network is trained in floating point.  Then, for each number of bits, from the same weights:
--   rounded   ranges are measured on a few batches, and weights and inputs of every layer rounded: nothing is trained
--   trained   the same, and training goes on for --qat-epochs with the rounding in place, under autocast and a scaler
-- The floating network trains on as long, so that the comparison is fair.

local hm = require "halfmoon"
local cli = require "halfmoon.train.cli"
local nn, optim, amp, data = hm.nn, hm.optim, hm.amp, hm.data
local quantize = nn.quantize

local LOW = {f32 = false, bf16 = "bfloat16", f16 = "float16"} -- what autocast computes in

-- ====== The network, its data ======

local function new_model()
  return nn.Sequential(
    nn.Conv2d(1, 16, 3, {padding = 1}), nn.MaxPool2d(2), nn.ReLU(),
    nn.Conv2d(16, 32, 3, {padding = 1}), nn.MaxPool2d(2), nn.ReLU(),
    nn.Flatten(), nn.Linear(32 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10))
end

local function loader_of(opt, train)
  local set = data.fashion_mnist {root = opt.data ~= "" and opt.data or nil, train = train}
  if opt.limit > 0 then set = set:slice(1, math.min(opt.limit, #set)) end
  return data.DataLoader {
    set, batch_size = train and opt.batch or 500, shuffle = train, seed = opt.seed, drop_last = train,
    device = opt.device, normalize = {mean = 0.2860, std = 0.3530},
  }
end

-- ====== Training and testing ======

--- Trains for some epochs; returns the number of skipped steps.
local function train(model, loader, opt, epochs, lr)
  local low = LOW[opt.dtype]
  local optimizer = optim.AdamW(model:parameters(), {lr = lr})
  local schedule = optim.lr_scheduler.CosineAnnealingLR(optimizer, {T_max = math.max(1, epochs * #loader)})
  local scaler = amp.GradScaler {enabled = opt.dtype == "f16"}
  local skipped = 0
  model:train()
  for _ = 1, epochs do
    for x, y in loader:batches() do
      optimizer:zero_grad()
      local loss
      do
        local _ <close> = low and amp.autocast(low)
        loss = nn.functional.cross_entropy(model(x), y)
      end
      scaler:scale(loss):backward()
      local stepped = scaler:step(optimizer)
      scaler:update()
      schedule:step(stepped)
      skipped = skipped + (stepped and 0 or 1)
    end
  end
  return skipped
end

local function test(model, loader)
  local images, correct = 0, 0
  local _ <close> = hm.no_grad()
  model:eval()
  for x, y in loader:batches() do
    images = images + #y
    correct = correct + model(x):argmax(2):eq(y):sum():item()
  end
  return correct / images
end

-- ====== With a few bits ======

--- A copy of the model that rounds to `bits`, with the ranges of a few batches.
local function quantized(model, bits, loader)
  local most = 2 ^ (bits - 1)
  local copy = quantize.prepare_qat(model:clone(), {
    weight = {quant_min = 1 - most, quant_max = most - 1}, activation = {quant_min = -most, quant_max = most - 1},
  })
  return quantize.calibrate(copy, function(m)
    local count = 0
    for x in loader:batches() do
      m(x)
      count = count + 1
      if count == 20 then break end
    end
  end)
end

--- The integers of a model, and proof that they say what it computes: the accuracy with the weights that they give
--- back.
local function integers_of(model, loader, want)
  local int, bytes = quantize.convert(model), 0
  for name, entry in pairs(int) do
    local layer = model:get_submodule(name)
    hm.no_grad(function() layer.weight:copy_(quantize.dequantize(entry)) end)
    layer.weight_fake_quant:disable_fake_quant()
    bytes = bytes + entry.weight:numel()
  end
  assert(test(model, loader) == want, "the integers are not what the model computes with")
  return int, bytes
end

-- ====== The command line ======

local OPTIONS = {
  {"bits", "8,4,3", "bits of weights and inputs, 2 to 8; several with commas", function(text)
    for word in text:gmatch("[^,]+") do
      local bits = math.tointeger(tonumber(word))
      if not bits or bits < 2 or bits > 8 then return "must be whole numbers from 2 to 8" end
    end
  end},
  {"dtype", "f16", "what autocast computes in while training: f32, bf16 or f16",
    function(name) if LOW[name] == nil then return "must be f32, bf16 or f16" end end},
  {"epochs", 2, "passes over the training images in floating point",
    function(n) if n < 1 then return "must be at least 1" end end},
  {"qat-epochs", 1, "passes with the rounding in place", function(n) if n < 1 then return "must be at least 1" end end},
  {"batch", 128, "images per step", function(n) if n < 1 then return "must be at least 1" end end},
  {"lr", 2e-3, "highest learning rate of AdamW; half of it with the rounding in place"},
  {"seed", 1, "seed of weights and order"},
  {"device", "cpu", "where to train: cpu, cuda or cuda:N"},
  {"save", "", "where to save the integers of the first number of bits (safetensors)"},
  {"data", "", "folder of the Fashion-MNIST files; default: where Debian's package puts them"},
  {"limit", 0, "use the first N images only (0: all)"},
}

local function main(opt)
  hm.manual_seed(opt.seed)
  local train_set, test_set = loader_of(opt, true), loader_of(opt, false)
  local model = new_model():to(opt.device)
  train(model, train_set, opt, opt.epochs, opt.lr)
  local start = test(model, test_set)
  local longer = model:clone()
  train(longer, train_set, opt, opt["qat-epochs"], opt.lr / 2)
  print(("Fashion-MNIST, trained in %s; test accuracy"):format(opt.dtype))
  print(("  %-10s %10s %10s %14s"):format("", "rounded", "trained", "skipped steps"))
  print(("  %-10s %10.4f %10.4f"):format("floating", start, test(longer, test_set)))
  local results = {}
  for word in opt.bits:gmatch("[^,]+") do
    local bits = math.tointeger(tonumber(word))
    local rounded = test(quantized(model, bits, train_set), test_set)
    local qat = quantized(model, bits, train_set)
    local skipped = train(qat, train_set, opt, opt["qat-epochs"], opt.lr / 2)
    local trained = test(qat, test_set)
    print(("  %-10s %10.4f %10.4f %14d"):format(bits .. " bits", rounded, trained, skipped))
    local int, bytes = integers_of(qat, test_set, trained)
    results[#results + 1] = {bits = bits, rounded = rounded, trained = trained, integers = int, bytes = bytes}
  end
  print("floating, first column: as trained first; second: trained on as long as the others")
  print(("weights as integers, one byte each: %d bytes; as float32: %d"):format(results[1].bytes, 4 * results[1].bytes))
  if opt.save ~= "" then
    local flat = {}
    for name, entry in pairs(results[1].integers) do
      for key, t in pairs {weight = entry.weight, scale = entry.scale, zero_point = entry.zero_point, bias = entry.bias,
        ["input.scale"] = entry.input.scale, ["input.zero_point"] = entry.input.zero_point} do
        flat[name .. "." .. key] = t
      end
    end
    assert(hm.save(opt.save, flat, {bits = tostring(results[1].bits)}))
    print("saved " .. opt.save)
  end
  return start, results
end

if arg and arg[0] and arg[0]:find("quantize_aware%.lua$") then
  main(cli.parse("quantize_aware.lua: rounding to a few bits, after training and in training", OPTIONS, arg))
end
return {main = main, options = OPTIONS}
