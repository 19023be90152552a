-- valgrind.lua -- two steps of a small CNN in float32, and two in float16 with the loss scaler: what `make valgrind` watches.
--
-- Small enough for an interpreter of machine code; with a convolution, pooling, normalisation, a matrix product, a loss, backward, AdamW, a
-- checkpoint and a loader with its thread.

local hm = require "halfmoon"
local nn, optim, amp, data = hm.nn, hm.optim, hm.amp, hm.data

hm.manual_seed(1)

local function train(low)
  local model = nn.Sequential(nn.Conv2d(1, 3, 3, {padding = 1}), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
    nn.Linear(48, 7), nn.LayerNorm(7), nn.GELU(), nn.Dropout(0.25), nn.Linear(7, 3))
  local opt = optim.AdamW(model:parameters(), {lr = 0.01})
  local scaler = amp.GradScaler {init_scale = 8.0, enabled = low ~= nil}
  local rows = {hm.randn {6, 1, 8, 8}, hm.randint(0, 3, {6})}
  local loader = data.DataLoader {rows, batch_size = 3, shuffle = true, seed = 1}
  for x, y in loader:batches() do
    opt:zero_grad()
    local function forward() return nn.functional.cross_entropy(model(x), y) end
    local loss = low and amp.autocast(low, forward) or forward()
    scaler:scale(loss):backward()
    scaler:unscale_(opt)
    nn.utils.clip_grad_norm_(model:parameters(), 1.0)
    scaler:step(opt)
    scaler:update()
    assert(loss:item() < 20)
  end
  loader:close()
  local path = os.tmpname()
  assert(hm.save(path, {model = model, optimizer = opt}))
  model:load_state_dict(assert(hm.load(path)).model)
  os.remove(path)
end

train()
train("f16")
collectgarbage()
print("two steps in float32, two in float16")
