-- workloads.lua -- the benchmark's models in training, as a user would write them, and what their steps cost at least.
--
-- Loaded by run.lua, gpu.lua and gpu_cost.lua.  Names of layers are those of peer.py, so that both start from the same weights.

local hm = require "halfmoon"
local nn, optim, amp, data = hm.nn, hm.optim, hm.amp, hm.data
local now = require("halfmoon.core").now

local BATCH <const> = 128

local M = {batch = BATCH}

-- ====== Models ======

local MLP = nn.class("MLP")

function MLP:init()
  self.fc1 = nn.Linear(784, 512, {activation = "relu"})
  self.fc2 = nn.Linear(512, 512, {activation = "relu"})
  self.fc3 = nn.Linear(512, 10)
end

function MLP:forward(x) return self.fc3(self.fc2(self.fc1(x:flatten(2)))) end

local CNN = nn.class("CNN")

function CNN:init()
  self.conv1 = nn.Conv2d(1, 32, 3, {padding = 1})
  self.conv2 = nn.Conv2d(32, 64, 3, {padding = 1})
  self.fc1 = nn.Linear(64 * 7 * 7, 128, {activation = "relu"})
  self.fc2 = nn.Linear(128, 10)
end

function CNN:forward(x)
  x = self.conv1(x):max_pool2d(2):relu()
  x = self.conv2(x):max_pool2d(2):relu()
  return self.fc2(self.fc1(x:flatten(2)))
end

--- Multiply-adds of one product, counted as two: forward, weight gradient, and input gradient but in the first layer.
local function product(is_first, ...)
  local n = 2 * BATCH * (is_first and 2 or 3)
  for _, size in ipairs {...} do n = n * size end
  return n
end

--- By name: the model, and the FLOPs of its matrix products and convolutions in one step.
M.models = {
  mlp = {class = MLP, flops = product(true, 784, 512) + product(false, 512, 512) + product(false, 512, 10)},
  cnn = {
    class = CNN,
    flops = product(true, 28 * 28, 9 * 1, 32) + product(false, 14 * 14, 9 * 32, 64) + product(false, 3136, 128)
      + product(false, 128, 10),
  },
}
M.names = {"mlp", "cnn"}
M.low = {f32 = false, bf16 = "bfloat16", f16 = "float16"}
M.dtypes = {"f32", "bf16", "f16"}

--- Bytes that AdamW must move in a step: reads value, gradient and two moments, writes value and moments; with a low
--- dtype also the copy that the next step computes with.
---@param params integer number of parameters
---@param dtype string
---@return integer
function M.optimizer_bytes(params, dtype) return params * (7 * 4 + (M.low[dtype] and 2 or 0)) end

-- ====== Data ======

--- The batches that all runs take in turn, and where they come from.  Writes them to `path` for the peer.
---@param path string a safetensors file
---@param count integer
---@return table[] batches {x, y}
---@return string source
function M.batches(path, count)
  local images, labels, source = {}, {}, "Fashion-MNIST"
  local ok, set = pcall(data.fashion_mnist)
  if ok then
    local loader = data.DataLoader {
      set:slice(1, count * BATCH), batch_size = BATCH, normalize = {mean = 0.2860, std = 0.3530},
    }
    for x, y in loader:batches() do
      images[#images + 1], labels[#labels + 1] = x, y
    end
    loader:close()
  else
    source = "random numbers of the shape of Fashion-MNIST (the files are not there)"
    for i = 1, count do
      images[i], labels[i] = hm.randn {BATCH, 1, 28, 28}, hm.randint(0, 10, {BATCH})
    end
  end
  assert(hm.save(path, {images = hm.cat(images, 1), labels = hm.cat(labels, 1)}))
  local batches = {}
  for i = 1, count do batches[i] = {images[i], labels[i]} end
  return batches, source
end

-- ====== A model in training ======

---@class Run
local Run = {}
Run.__index = Run

--- A model of workload `name` in training in `dtype`.  Writes its first weights to `path` for the peer.
---@param name string
---@param dtype string
---@param batches table[]
---@param path string
---@return Run
function M.run(name, dtype, batches, path)
  collectgarbage()
  collectgarbage()
  local self = setmetatable({low = M.low[dtype], batches = batches, at = 0}, Run)
  self.before = hm.cpu.memory_stats().live
  hm.manual_seed(1)
  self.model = M.models[name].class()
  assert(hm.save(path, self.model:state_dict()))
  self.opt = optim.AdamW(self.model:parameters(), {lr = 1e-3, weight_decay = 0.01})
  self.scaler = dtype == "f16" and amp.GradScaler {init_scale = 2.0 ^ 16} or nil
  return self
end

--- A model of workload `name` in training on cuda, for gpu.lua and gpu_cost.lua, with `count` batches of random numbers there.
---@param name string
---@param run string f32, bf16, f16 (with the scaler) or async (with GradScaler{async = true})
---@param count integer
---@return Run
function M.on_cuda(name, run, count)
  hm.manual_seed(1)
  local low = run == "async" and "float16" or M.low[run]
  local self = setmetatable({low = low, batches = {}, at = 0}, Run)
  self.model = M.models[name].class():to("cuda")
  self.opt = optim.AdamW(self.model:parameters(), {lr = 1e-3, weight_decay = 0.01})
  self.scaler = low == "float16" and amp.GradScaler {init_scale = 2.0 ^ 16, async = run == "async" or nil} or nil
  for i = 1, count do
    self.batches[i] = {hm.randn({BATCH, 1, 28, 28}):to("cuda"), hm.randint(0, 10, {BATCH}):to("cuda")}
  end
  return self
end

--- The next batch's loss (a tensor), from no gradients.
function Run:forward()
  local batch = self.batches[self.at % #self.batches + 1]
  self.at = self.at + 1
  self.opt:zero_grad()
  local loss
  do
    local _ <close> = self.low and amp.autocast(self.low)
    loss = nn.functional.cross_entropy(self.model(batch[1]), batch[2])
  end
  return loss
end

--- One training step -> loss (a tensor)
function Run:step()
  local loss = self:forward()
  if self.scaler then
    self.scaler:scale(loss):backward()
    self.scaler:step(self.opt)
    self.scaler:update()
  else
    loss:backward()
    self.opt:step()
  end
  return loss
end

--- Multiplies matrices for a tenth of a second.  After a pause the scheduler may have put both threads on one processor, where they
--- stay for some tens of milliseconds: in a turn of a few short steps that would be all that is seen.
function M.settle()
  local x = hm.ones {512, 512}
  local begin = now()
  while now() - begin < 0.1 do x:matmul(x):release() end
end

--- Does `steps` steps -> milliseconds per step, loss of the last one
function Run:steps(steps)
  local begin = now()
  local loss
  for _ = 1, steps do loss = self:step() end
  loss = loss:item()
  return (now() - begin) / steps * 1e3, loss
end

--- The number of parameters.
function Run:parameters()
  local n = 0
  for _, p in ipairs(self.model:parameters()) do n = n + p:numel() end
  return n
end

--- Bytes of parameters and optimizer state.
function Run:fixed_bytes() return self:parameters() * 4 + self.opt.core:state_bytes() end

--- The most bytes that tensors take in `steps` steps, without the data.
function Run:peak_bytes(steps)
  hm.cpu.reset_peak()
  self:steps(steps)
  return hm.cpu.memory_stats().peak - self.before
end

-- ====== Calls of one op ======

local ops = {
  add = function(x, y, n)
    for _ = 1, n do local _ = x + y end
  end,
  relu = function(x, _, n)
    for _ = 1, n do local _ = x:relu() end
  end,
}

--- Calls an op `n` times on tensors of one element -> nanoseconds per call
---@param name string add or relu
---@param grad boolean
---@param n integer
function M.op(name, grad, n)
  local x, y = hm.ones({1}, {requires_grad = grad}), hm.ones({1})
  local _ <close> = (grad and hm.enable_grad or hm.no_grad)()
  local begin = now()
  ops[name](x, y, n)
  return (now() - begin) / n * 1e9
end

return M
