-- resume_run.lua -- a small training run that saves its whole state, can be killed, and goes on: for resume_spec.lua.
--
--   halfmoon spec/support/resume_run.lua KIND CHECKPOINT OUT KILL
--
-- Trains for four epochs and writes the final state to OUT.  Saves to CHECKPOINT behind every second step, and begins from
-- it if it is there.  KILL: the step in which the process gets SIGKILL (0: none), odd ones in the middle of unsaved work.

local hm = require "halfmoon"
local nn, optim, amp, data = hm.nn, hm.optim, hm.amp, hm.data

local kind, checkpoint, out, kill = arg[1], arg[2], arg[3], tonumber(arg[4])
local EPOCHS, CLASSES = 4, 5

-- A policy that puts more into its state than init did.
local counting = {
  name = "counting", needs = {},
  init = function(opts) return {scale = opts.init_scale or 1024.0} end,
  update = function(state, event)
    state.seen = (state.seen or 0) + 1
    if event.found_inf then state.scale = state.scale / 4 elseif state.seen % 3 == 0 then state.scale = state.scale * 2 end
    return state.scale
  end,
}

hm.manual_seed(5)
local images, labels = hm.randn({150, 12}), hm.randint(0, CLASSES, {150})
local device = os.getenv("RESUME_DEVICE") or "cpu"
local loader = data.DataLoader {data.TensorDataset(images, labels), batch_size = 16, shuffle = true, seed = 3, prefetch = 2,
  device = device}
local model = nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d and nn.BatchNorm1d(32) or nn.LayerNorm(32), nn.ReLU(),
  nn.Dropout(0.3), nn.Linear(32, CLASSES))
if kind == "bf16" then model:to("bfloat16") end
model:to(device)

local params = model:parameters()
local opt, schedule, scaler
if kind == "f32" then
  opt = optim.SGD(params, {lr = 0.1, momentum = 0.9, nesterov = true, weight_decay = 1e-3})
  schedule = optim.lr_scheduler.StepLR(opt, {step_size = 7, gamma = 0.7})
elseif kind == "bf16" then
  opt = optim.AdamW(params, {lr = 1e-2, rounding = "stochastic"})
  schedule = optim.lr_scheduler.CosineAnnealingLR(opt, {T_max = 40})
else
  opt = optim.Adam(params, {lr = 1e-2, amsgrad = true})
  schedule = optim.lr_scheduler.OneCycleLR(opt, {max_lr = 3e-2, total_steps = 60})
  scaler = amp.GradScaler(kind == "policy" and {policy = counting} or {init_scale = 2.0 ^ 15, growth_interval = 3})
end

local run = {model = model, optimizer = opt, schedule = schedule, scaler = scaler, loader = loader, rng = true, step = 0,
  more = {losses = "", best = math.huge}}
local f = io.open(checkpoint, "rb")
if f then
  f:close()
  hm.manual_seed(987654) -- whatever happened before
  hm.randn({3})
  assert(hm.load(checkpoint, {into = run}))
end

local function forward(x, y)
  return nn.functional.cross_entropy(model(kind == "bf16" and x:to("bfloat16") or x), y)
end

local function train(x, y)
  opt:zero_grad()
  if not scaler then
    local loss = forward(x, y)
    loss:backward()
    opt:step()
    schedule:step()
    return loss
  end
  local loss = amp.autocast("float16", forward, x, y)
  if run.step % 9 == 5 then loss = loss * 1e6 end -- overflows in float16: the step is skipped, the scale backs off
  scaler:scale(loss):backward()
  local stepped = scaler:step(opt)
  scaler:update()
  schedule:step(stepped)
  return loss
end

for _ = loader.epoch + 1, EPOCHS do
  for x, y in loader:batches() do
    run.step = run.step + 1
    local loss = train(x, y):item()
    if run.step == kill then os.execute("kill -9 $PPID") end
    run.more.best = math.min(run.more.best, loss)
    run.more.losses = run.more.losses .. ("%.9g "):format(loss)
    if run.step % 2 == 0 then assert(hm.save(checkpoint, run)) end
  end
end
assert(hm.save(out, run))
print(("%d steps, epoch %d, %s"):format(run.step, loader.epoch, scaler and tostring(scaler) or "no scaler"))
