-- custom_kernel.lua -- computations of your own: an activation made of a formula, trained against the same made of ops, and, where
-- there is a GPU, a kernel written in CUDA C++.
--
--     build/halfmoon examples/custom_kernel.lua
--     build/halfmoon examples/custom_kernel.lua --device cuda --dtype bf16
--
-- Read it from top to bottom: the two activations, the network, a run, the hand-written kernel, the command line.

local hm = require "halfmoon"
local cli = require "halfmoon.train.cli"
local nn, optim, amp, data = hm.nn, hm.optim, hm.amp, hm.data

-- ====== Mish, x * tanh(log(1 + e^x)), twice ======

-- As ops: four passes over memory, and three intermediate results that wait for backward.
local function composed(x) return x * x:exp():log1p():tanh() end

-- As a formula: one pass, and backward needs x alone.  Without `grad` the derivative is found symbolically.  That one would have
-- e^x in it, which overflows above 88; this one is right for every x.  What occurs twice is computed once.
local fused = hm.elementwise("y = x * tanhf(log1pf(expf(x)))", {
  name = "mish",
  grad = [[gx = g * (tanhf(log1pf(expf(x)))
           + x / (1 + expf(-x)) * (1 - tanhf(log1pf(expf(x))) * tanhf(log1pf(expf(x)))))]],
})

-- ====== The network ======

local Net = nn.class("Net")

function Net:init(activation)
  self.activation = activation
  self.fc1 = nn.Linear(784, 256)
  self.fc2 = nn.Linear(256, 256)
  self.fc3 = nn.Linear(256, 10)
end

function Net:forward(x)
  x = self.activation(self.fc1(x:flatten(2)))
  return self.fc3(self.activation(self.fc2(x)))
end

-- ====== A run ======

local LOW = {f32 = false, bf16 = "bfloat16", f16 = "float16"}

--- Trains a network with an activation; the same numbers every time.
local function train(activation, dataset, opt)
  hm.manual_seed(opt.seed)
  local model = Net(activation):to(opt.device)
  local adamw = optim.AdamW(model:parameters(), {lr = opt.lr})
  local scaler = amp.GradScaler {enabled = opt.dtype == "f16"}
  local loader = data.DataLoader {
    dataset, batch_size = opt.batch, shuffle = true, seed = opt.seed, drop_last = true, device = opt.device,
    normalize = {mean = 0.286, std = 0.353},
  }
  local sum, steps, begun = 0, 0, os.clock()
  for epoch = 1, opt.epochs do
    sum, steps = 0, 0
    for x, y in loader:batches() do
      adamw:zero_grad()
      local loss
      do
        local _ <close> = LOW[opt.dtype] and amp.autocast(LOW[opt.dtype])
        loss = nn.functional.cross_entropy(model(x), y)
      end
      scaler:scale(loss):backward()
      scaler:step(adamw)
      scaler:update()
      sum, steps = sum + loss:item(), steps + 1
    end
    print(("  epoch %d: mean loss %.4f"):format(epoch, sum / steps))
  end
  loader:close()
  return model, sum / steps, os.clock() - begun
end

-- ====== A kernel by hand, on a GPU ======

local SOURCE = [[
__global__ void mish(int n, const float *x, float *y) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    y[i] = x[i] * tanhf(log1pf(expf(x[i])));
}
]]

--- The same function once more.  A kernel writes to tensors that exist; it is outside autograd.
local function by_hand()
  local kernel = hm.cuda.kernel(SOURCE, "mish")
  local x = hm.randn({1000}, {device = "cuda"})
  local y = hm.empty({1000}, {device = "cuda"})
  kernel {grid = 4, block = 256}(x:numel(), x, y)
  print(("the hand-written kernel on %s: largest difference %.3g"):format(x.device, (y - fused(x)):abs():max():item()))
end

-- ====== The command line ======

local opt = cli.parse("custom_kernel.lua: an activation made of a formula, and a kernel by hand", {
  {"epochs", 1, "passes over the training images"},
  {"limit", 6400, "how many training images to use, 0: all"},
  {"batch", 64, "images of a step"},
  {"lr", 1e-3, "learning rate"},
  {"dtype", "f32", "what to compute in: f32, bf16, f16",
    function(v) return LOW[v] == nil and "must be f32, bf16 or f16" or nil end},
  {"device", "cpu", "where to train: cpu, cuda or cuda:N", function(name)
    local ok, message = pcall(hm.empty, {0}, {device = name})
    if not ok then return "cannot be used: " .. message end
  end},
  {"seed", 1, "of weights and shuffling"},
  {"save", "", "file to keep the trained weights in"},
}, arg)

local dataset = data.fashion_mnist()
if opt.limit > 0 then dataset = dataset:slice(1, math.min(opt.limit, #dataset)) end

print("mish as ops")
local _, loss_of_ops, seconds_of_ops = train(composed, dataset, opt)
print("mish as a formula")
local model, loss, seconds = train(fused, dataset, opt)
print(("mean loss %.4f as ops, %.4f as a formula; %.2f and %.2f seconds of processor time"):format(loss_of_ops, loss,
  seconds_of_ops, seconds))
if hm.cuda.is_available() then by_hand() else print("no device of CUDA: the hand-written kernel is left out") end
if opt.save ~= "" then
  assert(hm.save(opt.save, model:state_dict()))
  print("weights kept in " .. opt.save)
end
