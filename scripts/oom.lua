-- oom.lua -- memory that runs out, at every allocation in turn.
--
--   build/halfmoon scripts/oom.lua                        names of the scenarios
--   build/halfmoon scripts/oom.lua NAME [engine|lua] [options]
--       --stride=7      every seventh allocation only
--       --check=1       look for leaks after each failure (else after every 16th)
--       --from=130      begin at that allocation
--
-- A scenario runs with its n-th allocation refused, n = 1, 2, ... until it runs through: once for the allocations of the engine (structs
-- and tensor memory), once for those of Lua.  Whenever it fails it must be by an error that speaks of memory (or by nil, message, code);
-- afterwards the same objects must go on working, and when they are dropped, tensor bytes, host blocks and open files must be back where
-- they were.  The last line is `NAME KIND: failures injected, survived`, where survived means that the scenario ran through all the
-- same.  Exit status 0, or 1 and what was wrong.

local hm = require "halfmoon"
local core = require "halfmoon.core"
local files = require("halfmoon.program").files
local nn, optim, amp, data, autograd = hm.nn, hm.optim, hm.amp, hm.data, hm.autograd

-- ====== Scenarios ======

-- Each makes its objects and returns `attempt`, which may fail, and `after`, which must work, whatever became of attempt.
local scenarios = {}

--- A small network with a layer of each common kind.
local function network()
  return nn.Sequential(nn.Conv2d(1, 2, 3, {padding = 1}), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
    nn.Linear(8, 4), nn.LayerNorm(4), nn.GELU(), nn.Dropout(0.25), nn.Linear(4, 3))
end

--- A training run: step() returns the loss.
local function training(low)
  local run = {model = network()}
  run.opt = optim.AdamW(run.model:parameters(), {lr = 0.01})
  run.scaler = amp.GradScaler {init_scale = 8.0, enabled = low ~= nil}
  local x, y = hm.ones {2, 1, 4, 4}, hm.tensor({0, 2}, {dtype = "i64"})
  local function loss_of() return nn.functional.cross_entropy(run.model(x), y) end
  function run.step()
    run.opt:zero_grad()
    local loss = low and amp.autocast(low, loss_of) or loss_of()
    if low then
      run.scaler:scale(loss):backward()
      run.scaler:unscale_(run.opt)
      nn.utils.clip_grad_norm_(run.model:parameters(), 1.0)
      run.scaler:step(run.opt)
      run.scaler:update()
    else
      loss:backward()
      run.opt:step()
    end
    return loss:item()
  end
  return run
end

--- A step that must work: its loss is a number, and so is every weight.
local function healthy(run)
  run.scaler:update() -- what was left half done ends here
  local loss = run.step()
  assert(loss == loss and loss < 20, ("the loss is %s"):format(loss))
  for name, p in run.model:named_parameters() do
    assert(p:isfinite():all():item(), name .. " is not finite")
  end
end

function scenarios.build()
  local function build() return #training("f16").opt.param_groups end
  return build, build
end

function scenarios.step_f32()
  local run = training()
  return run.step, function() healthy(run) end
end

function scenarios.step_f16()
  local run = training("f16")
  run.step()
  return run.step, function() healthy(run) end
end

-- Layers that run with their activations, and in pairs backward: plainly, in float16, computed again, and differentiated twice.
function scenarios.layers()
  local model = nn.Sequential(nn.Linear(4, 6, {activation = "relu"}), nn.Linear(6, 5, {activation = "gelu_tanh"}),
    nn.Linear(5, 4, {activation = "relu"}), nn.Linear(4, 3))
  local x = hm.ones {2, 4}
  local function attempt()
    model:zero_grad()
    local sum = 0
    local function backward(y)
      sum = sum + y:float():sum():item()
      y:float():sum():backward()
    end
    backward(model(x))
    backward(amp.autocast("f16", model, x))
    backward(hm.checkpoint(function(t) return model[4](model[3](t)) end, model[2](model[1](x))))
    local g = autograd.grad(model(x):sum(), {model[1].weight}, {create_graph = true})[1]
    backward(g * g)
    for _, p in ipairs(model:parameters()) do sum = sum + p.grad:sum():item() end
    return sum
  end
  local want = attempt()
  return attempt, function()
    local got = attempt()
    assert(got == want, ("%s, not %s"):format(got, want))
  end
end

function scenarios.sequences()
  local embed, rnn = nn.Embedding(5, 8), nn.LSTM(8, 8, {num_layers = 2, batch_first = true, bidirectional = true})
  local mix = nn.TransformerEncoderLayer(16, 2, {dim_feedforward = 8, dropout = 0.1, batch_first = true})
  local head = nn.Linear(16, 5)
  local groups = {}
  for i, part in ipairs {embed, rnn, mix, head} do groups[i] = {params = part:parameters(), lr = 0.01 * i} end
  local opt = optim.SGD(groups, {lr = 0.01, momentum = 0.9, nesterov = true, weight_decay = 0.01})
  local schedule = optim.lr_scheduler.CosineAnnealingLR(opt, {T_max = 10})
  local ids = hm.tensor({{0, 1, 2, 3}, {4, 3, 2, 1}}, {dtype = "i64"})
  local function attempt()
    opt:zero_grad()
    local loss = amp.autocast("bf16", function()
      local y = head(mix((rnn(embed(ids))))) -- [2, 4, 5]
      return nn.functional.cross_entropy(y:reshape {8, 5}, ids:reshape {8})
    end)
    loss:backward()
    nn.utils.clip_grad_value_(head:parameters(), 1.0)
    opt:step()
    schedule:step()
    return loss:item()
  end
  return attempt, function()
    local loss = attempt()
    assert(loss == loss and loss < 20, ("the loss is %s"):format(loss))
  end
end

function scenarios.checkpoint()
  local run, path = training("f16"), os.tmpname()
  run.step()
  local function state() return {model = run.model, optimizer = run.opt, scaler = run.scaler, epoch = 3} end
  assert(hm.save(path, state()))
  local function attempt()
    assert(hm.save(path, state()))
    local saved = assert(hm.load(path))
    run.model:load_state_dict(saved.model)
    run.opt:load_state_dict(saved.optimizer)
    run.scaler:load_state_dict(saved.scaler)
  end
  local function after()
    local saved = assert(hm.load(path)) -- the old file or the new one, whole
    assert(saved.epoch == 3)
    attempt()
    healthy(run)
  end
  return attempt, after, function() os.remove(path) end
end

function scenarios.files()
  local base = os.tmpname()
  local t = {a = hm.tensor {{1, 2}, {3, 4}}, b = hm.arange(3)}
  local npy, npz, csv = base .. ".npy", base .. ".npz", base .. ".csv"
  assert(hm.save(npy, t.a) and hm.save(npz, t))
  local f <close> = assert(io.open(csv, "w"))
  f:write("x,y\n1,2\n3,4\n")
  f:close()
  local function attempt()
    assert(hm.save(npy, t.a))
    assert(hm.save(npz, t))
    local sum = assert(hm.load(npy)):sum():item()
    for _, each in pairs(assert(hm.load(npz))) do sum = sum + each:sum():item() end
    sum = sum + data.csv(csv):sum():item()
    return sum + core.idx "scripts/fuzz/corpus/idx/gzip-u8":sum():item()
  end
  local want = attempt()
  return attempt, function() assert(attempt() == want) end, function()
    for _, path in ipairs {base, npy, npz, csv} do os.remove(path) end
  end
end

function scenarios.loader()
  local rows = data.TensorDataset(hm.arange(24):reshape {12, 2}, hm.arange(12))
  local function epoch()
    local loader = data.DataLoader {rows, batch_size = 5, shuffle = true, seed = 1, dtype = "f32"}
    local sum = 0
    for _ = 1, 2 do
      for x, y in loader:batches() do sum = sum + x:sum():item() + y:sum():item() end
    end
    loader:close()
    assert(sum == 2 * (23 * 12 + 11 * 6), sum)
  end
  return epoch, epoch
end

function scenarios.autograd()
  local square = autograd.Function("square", {
    forward = function(ctx, x)
      ctx:save_for_backward(x)
      return x * x
    end,
    backward = function(ctx, g)
      local x = ctx:saved()
      return g * x * 2
    end,
  })
  local w = nn.Parameter(hm.tensor {1, 2, 3})
  local x = hm.tensor {{1, 2, 3}, {4, 5, 6}}
  local function attempt()
    w.grad = nil
    local seen = 0
    local h = (x * w):sum(2)
    local handle = h:register_hook(function(g)
      seen = seen + 1
      return g * 2
    end)
    local on_leaf = w:register_hook(function(g) return g * 0.5 end)
    local y = hm.checkpoint(function(t) return (t:exp():log() + square(t)):sum() end, h)
    y:backward()
    handle:remove()
    on_leaf:remove()
    assert(seen == 1)
    local z = (square(w) * w):sum()
    local g = autograd.grad(z, {w}, {create_graph = true})[1]
    local gg = autograd.grad(g:sum(), {w})[1]
    autograd.detect_anomaly(function() (w * 2):tanh():sum():backward() end)
    return w.grad:sum():item() + gg:sum():item()
  end
  local want = attempt()
  return attempt, function()
    w = nn.Parameter(hm.tensor {1, 2, 3})
    local got = attempt()
    assert(got == want, ("%s, not %s"):format(got, want))
  end
end

function scenarios.policy()
  local path = os.tmpname()
  local f <close> = assert(io.open(path, "w"))
  f:write([[
    return {name = "mine", needs = {"amax"}, init = function(o) return {scale = o.init_scale, list = {1, 2, {3}}} end,
      update = function(s, e) s.list[#s.list + 1] = e.amax; return s.scale * 2, {note = string.format("%g", s.scale)} end}]])
  f:close()
  local w = nn.Parameter(hm.ones {3})
  local opt = optim.SGD({w}, {lr = 0.1})
  local function attempt()
    local scaler = amp.GradScaler {init_scale = 4.0, policy = path}
    for _ = 1, 2 do
      opt:zero_grad()
      scaler:scale((w * w):sum()):backward()
      scaler:step(opt)
      scaler:update()
    end
    local state = scaler:state_dict()
    scaler:load_state_dict(state)
    return scaler:get_scale()
  end
  local function after() assert(attempt() == 16) end
  return attempt, after, function() os.remove(path) end
end

function scenarios.ops()
  local gelu = hm.elementwise("y = x * sigmoid(1.702 * x)")
  local function attempt()
    local x = hm.tensor {{3, 1, 2}, {6, 5, 4}}
    local sorted, at = x:sort(2)
    local parts = {
      hm.einsum("ij,kj->ik", x, x), sorted, at:float(), hm.cat({x, x}, 1), x:t():contiguous(), x[{1, {2, 3}}], gelu(x),
      hm.stack({x, x}, 1), x:var(), x:topk(2), x:to("f16"):softmax(2), x:gather(2, at),
      x:index_select(1, hm.tensor({1, 0}, {dtype = "i64"})), hm.where(x:gt(3), x, -x), x:cumsum(2),
    }
    local sum = 0
    for _, t in ipairs(parts) do sum = sum + t:float():sum():item() end
    return #tostring(x) + sum + #x:totable()
  end
  local want = attempt()
  return attempt, function() assert(attempt() == want) end
end

-- ====== The walk ======

local function collect()
  for _ = 1, 3 do collectgarbage() end
end

--- What must be back where it was.
local function holdings()
  collect()
  return {bytes = core.memory_stats().live, blocks = core.host_blocks(), files = #files("/proc/self/fd")}
end

local kinds = {
  engine = {arm = core.alloc_fail_at, came = function() return core.alloc_fail_at(0) == 0 end},
  lua = {arm = core.lua_alloc_fail_at, came = function() return core.lua_alloc_fail_at(0) > 0 end},
}

--- Is this error one that a lack of memory may make?
local function speaks_of_memory(message)
  return type(message) == "string" and (message:find("memory", 1, true) or message:find("stack overflow", 1, true)) ~= nil
end

--- One attempt with the n-th allocation refused.  Returns whether it ran through, and whether the failure came.
local function one(name, kind, n)
  local attempt, after, finish = scenarios[name]()
  local came
  local function guarded()
    attempt()
    came = kind.came()
  end
  kind.arm(n)
  local ok, message = pcall(guarded)
  if not ok then came = kind.came() end
  if not ok and not speaks_of_memory(message) then
    error(("%s, allocation %d: the error does not speak of memory: %s"):format(name, n, tostring(message)), 0)
  end
  assert(ok or came, "failed without a failure")
  if not (core.is_grad_enabled() and not core.autocast_state().enabled) then error(name .. ": a scope was left open", 0) end
  if require("halfmoon.nn.class").path() then error(name .. ": the module path was left", 0) end
  local fine, why = xpcall(after, debug.traceback)
  if finish then finish() end
  if not fine then
    error(("%s, allocation %d (%s): what comes next fails: %s"):format(name, n, ok and "survived" or message, why), 0)
  end
  return ok, came, message
end

local function differs(before, after)
  for key, value in pairs(before) do
    if after[key] ~= value then return ("%s: %d, were %d"):format(key, after[key], value) end
  end
end

--- Walks through a scenario; returns failures injected and survived.
local function walk(name, kind, options)
  for _ = 1, 3 do one(name, kind, 1 << 40) end -- caches, primitives, lazily loaded modules
  local before = holdings()
  local injected, survived, n, last = 0, 0, options.from, "nothing"
  while true do
    local ok, came, message = one(name, kind, n)
    if not came then break end
    injected = injected + 1
    if ok then survived = survived + 1 else last = message end
    if injected % options.check == 0 then
      local what = differs(before, holdings())
      if what then error(("%s, up to allocation %d: a leak: %s\n  the last error: %s"):format(name, n, what, last), 0) end
    end
    n = n + options.stride
  end
  local what = differs(before, holdings())
  if what then error(("%s: a leak: %s"):format(name, what), 0) end
  return injected, survived
end

-- ====== The command line ======

local options, words = {stride = 1, check = 16, from = 1}, {}
for _, word in ipairs(arg) do
  local name, value = word:match("^%-%-(%a+)=(%d+)$")
  if name and options[name] then options[name] = math.tointeger(tonumber(value)) else words[#words + 1] = word end
end
local name = words[1]
if not name then
  local names = {}
  for each in pairs(scenarios) do names[#names + 1] = each end
  table.sort(names)
  print(table.concat(names, "\n"))
  return
end
assert(scenarios[name], "no such scenario: " .. name)
for _, kind in ipairs(words[2] and {words[2]} or {"engine", "lua"}) do
  hm.manual_seed(1)
  local injected, survived = walk(name, assert(kinds[kind], "engine or lua"), options)
  print(("%s %s: %d failures injected, %d survived"):format(name, kind, injected, survived))
end
