-- cnn.lua -- the network of the demo, and training steps on made-up images, for specs of memory and time.

local hm = require "halfmoon"
local nn, amp = hm.nn, hm.amp

local M = {}

local Net = nn.class("Net")

function Net:init()
  self.conv1 = nn.Conv2d(1, 32, 3, {padding = 1})
  self.conv2 = nn.Conv2d(32, 64, 3, {padding = 1})
  self.fc1 = nn.Linear(64 * 7 * 7, 128)
  self.fc2 = nn.Linear(128, 10)
end

function Net:forward(x)
  x = self.conv1(x):max_pool2d(2):relu()
  x = self.conv2(x):max_pool2d(2):relu()
  x = self.fc1(x:flatten(2)):relu()
  return self.fc2(x)
end

M.Net = Net

--- A training run on one batch of random images: run.step() does one step and returns the loss as a tensor.
---@param dtype "f32"|"bf16"|"f16"
---@param batch integer
---@param device string? the default device if left out; weights and images are the same on all
function M.run(dtype, batch, device)
  device = device or hm.get_default_device()
  hm.manual_seed(1)
  local run = {model = Net():to(device)}
  run.opt = hm.optim.AdamW(run.model:parameters(), {lr = 1e-3})
  run.scaler = amp.GradScaler {enabled = dtype == "f16", init_scale = 2.0 ^ 10}
  local x, y = hm.randn({batch, 1, 28, 28}):to(device), hm.randint(0, 10, {batch}):to(device)
  function run.step()
    run.opt:zero_grad()
    local loss
    do
      local _ <close> = dtype ~= "f32" and amp.autocast(dtype) or nil
      loss = nn.functional.cross_entropy(run.model(x), y)
    end
    run.scaler:scale(loss):backward()
    run.scaler:step(run.opt)
    run.scaler:update()
    return loss
  end
  return run
end

return M
