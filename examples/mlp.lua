-- mlp.lua -- a network of three layers on Fashion-MNIST in float16: the shortest complete training script.
local hm = require "halfmoon"
local nn, optim, amp, data = hm.nn, hm.optim, hm.amp, hm.data

hm.manual_seed(1)
local model = nn.Sequential(
  nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
local opt = optim.AdamW(model:parameters(), {lr = 1e-3})
local scaler = amp.GradScaler {policy = "dynamic"}
local normalize = {mean = 0.286, std = 0.353}
local train = data.DataLoader {data.fashion_mnist(), batch_size = 128, shuffle = true, normalize = normalize}
local test = data.DataLoader {data.fashion_mnist {train = false}, batch_size = 500, normalize = normalize}

for epoch = 1, 3 do
  for x, y in train:batches() do
    opt:zero_grad()
    local loss = amp.autocast("float16", function() return nn.functional.cross_entropy(model(x), y) end)
    scaler:scale(loss):backward()
    scaler:step(opt)
    scaler:update()
  end
  local correct = 0
  hm.no_grad(function()
    for x, y in test:batches() do correct = correct + model(x):argmax(2):eq(y):sum():item() end
  end)
  print(("epoch %d: test accuracy %.4f, %s"):format(epoch, correct / 10000, tostring(scaler)))
end
assert(hm.save("mlp.safetensors", model:state_dict()))
