-- auto_policy.lua -- what a loss scale costs, with four policies, where gradients change their size.
--
--     build/halfmoon examples/auto_policy.lua            -- a small network, a second or so
--     build/halfmoon examples/auto_policy.lua --cnn      -- and the demo's network on a few hundred images
--
-- Two things are counted in each run in float16: steps that were skipped, and gradients of parameters that were lost.
-- Lost means: not zero where the same step has its backward pass in float32, and zero in float16 (flushed); of a skipped
-- step, all of them.  Gradients inside the network are not counted here; scripts/simulate_policies.lua counts those.
-- "drift": the loss of a small network is multiplied by a factor that goes from 2^-20 to 2^20 and back, twice.
--
-- The best static scale is found in hindsight: several powers of two are tried, and the one that loses least is
-- shown, the smallest if several lose the same.

local hm = require "halfmoon"
local nn, optim, amp, data = hm.nn, hm.optim, hm.amp, hm.data

local M = {}

-- ====== One run ======

--- Trains in float16 with a scaler and counts what is lost.
--- case: {steps, model() -> module, batch(step) -> x, y, factor(step) -> number, loss(out, y), lr}
---@return {skipped: integer, lost: number, scale: number, loss: number}
function M.run(case, options)
  hm.manual_seed(1)
  local model = case.model()
  local params = model:parameters()
  local opt = optim.SGD(params, {lr = case.lr})
  local scaler = amp.GradScaler(options)
  local skipped, lost_sum, logs, loss = 0, 0.0, 0.0, nil
  for step = 1, case.steps do
    local x, y = case.batch(step)
    local factor = case.factor(step)
    -- what no rounding would give
    opt:zero_grad()
    local plain
    do
      local _ <close> = amp.autocast {dtype = "float16", backward = "float32"}
      plain = case.loss(model(x), y)
    end
    (plain * factor):backward()
    local exact = {}
    for i, p in ipairs(params) do exact[i] = p.grad:detach():clone() end
    -- the float16 step
    opt:zero_grad()
    do
      local _ <close> = amp.autocast("float16")
      loss = case.loss(model(x), y)
    end
    scaler:scale(loss * factor):backward()
    local zeros, all = 0, 0
    for i, p in ipairs(params) do
      local alive = exact[i]:ne(0)
      all = all + alive:sum():item()
      zeros = zeros + alive:logical_and(p.grad:eq(0)):sum():item()
    end
    logs = logs + math.log(scaler:get_scale(), 2)
    scaler:unscale_(opt)
    for _, p in ipairs(params) do p.grad = p.grad / factor end -- the factor shall not change the training
    local stepped = scaler:step(opt)
    scaler:update()
    if not stepped then skipped = skipped + 1 end
    lost_sum = lost_sum + (stepped and zeros / all or 1)
    case.done = {model = model, scaler = scaler}
  end
  return {
    skipped = skipped, lost = lost_sum / case.steps, flushed = (lost_sum - skipped) / case.steps,
    scale = logs / case.steps, loss = loss:item(),
  }
end

-- ====== The cases ======

--- A small network whose loss drifts by 2^20 both ways.
function M.drift(steps)
  local x = hm.randn {64, 16}
  local y = x:matmul(hm.randn {16, 1}):tanh()
  return {
    steps = steps or 400, lr = 0.05,
    model = function() return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1)) end,
    batch = function() return x, y end,
    factor = function(step) return 2.0 ^ (20 * math.sin(4 * math.pi * step / (steps or 400))) end,
    loss = function(out, want) return (out:float() - want):pow(2):mean() end,
  }
end

local Net = nn.class("Net")

function Net:init()
  self.conv1 = nn.Conv2d(1, 32, 3, {padding = 1})
  self.conv2 = nn.Conv2d(32, 64, 3, {padding = 1})
  self.fc1 = nn.Linear(64 * 7 * 7, 128, {activation = "relu"})
  self.fc2 = nn.Linear(128, 10)
end

function Net:forward(x)
  x = self.conv1(x):max_pool2d(2):relu()
  x = self.conv2(x):max_pool2d(2):relu()
  return self.fc2(self.fc1(x:flatten(2)))
end

--- The demo's network on the first images of Fashion-MNIST.
function M.cnn(steps, images, batch)
  local set = data.fashion_mnist():slice(1, images)
  local batches = {}
  for x, y in data.DataLoader {set, batch_size = batch, normalize = {mean = 0.286, std = 0.353}}:batches() do
    batches[#batches + 1] = {x, y}
  end
  return {
    steps = steps, lr = 0.02,
    model = function() return Net() end,
    batch = function(step)
      local b = batches[(step - 1) % #batches + 1]
      return b[1], b[2]
    end,
    factor = function() return 1.0 end,
    loss = nn.functional.cross_entropy,
  }
end

--- The static scale that loses least, of the given exponents.
function M.best_static(case, exponents)
  local best
  for _, e in ipairs(exponents) do
    local result = M.run(case, {policy = "static", init_scale = 2.0 ^ e, min_scale = 0, max_scale = math.huge})
    result.exponent = e
    if not best or result.lost < best.lost then best = result end
  end
  return best
end

--- Options of the scaler for a policy: no bounds, so that the drift can be followed.
function M.options(policy)
  return {policy = policy, init_scale = 2.0 ^ 16, growth_interval = 50, min_scale = 0, max_scale = math.huge}
end

local function show(title, case, exponents)
  print(("%s, %d steps"):format(title, case.steps))
  print("  policy          skipped   flushed share   lost in all   mean log2 scale   final loss")
  local function line(name, r)
    print(("  %-14s %8d %15.5f %13.5f %17.2f %12.4f"):format(name, r.skipped, r.flushed, r.lost, r.scale, r.loss))
  end
  for _, policy in ipairs {"dynamic", "histogram", "auto"} do line(policy, M.run(case, M.options(policy))) end
  local best = M.best_static(case, exponents)
  line(("static 2^%d"):format(best.exponent), best)
end

if arg and arg[0] and arg[0]:find("auto_policy%.lua$") then
  hm.manual_seed(7)
  show("drift", M.drift(), {-12, -8, -4, -2, 0, 2, 4, 6, 8, 12})
  if arg[1] == "--cnn" then show("the demo's network", M.cnn(240, 320, 8), {8, 10, 12, 14, 16}) end
end
return M
