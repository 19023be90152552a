-- scaler_async_spec.lua -- GradScaler{async = true}: the plain scaler's weights without a wait for the device.
--
-- The cases of a device run where HALFMOON_CUDA says, else on the test double; those about delays run in a child with
-- deferred streams (HALFMOON_EMU_DEFER), where nothing is done before somebody waits.

local hm = require "halfmoon"
local cnn = require "spec.support.cnn"
local devices = require "spec.support.devices"
local numbers = require "spec.support.numbers"
local process = require "spec.support.process"
local raises = require "spec.support.raises"

local nn, optim, amp = hm.nn, hm.optim, hm.amp
local same, near = numbers.assert_same, numbers.assert_near
local inf, nan = math.huge, 0 / 0

local cases, why = devices.cases("spec/scaler_async_spec.lua")

local function case(name, fn) it(name, function() cases:run(name, fn) end) end

-- ====== A training run with overflows ======

local STEPS = 30
local OVERFLOWS = {[1] = inf, [2] = nan, [9] = -inf, [16] = inf, [17] = inf, [30] = nan} -- by step

local function optimizer(kind, params)
  if kind == "SGD" then return optim.SGD(params, {lr = 0.1, momentum = 0.9, dampening = 0.25}) end
  if kind == "Nesterov" then
    return optim.SGD(params, {lr = 0.1, momentum = 0.9, nesterov = true, weight_decay = 0.1})
  end
  if kind == "plain" then return optim.SGD(params, {lr = 0.1}) end
  return optim[kind](params, {lr = 0.01, weight_decay = 0.05})
end

--- Trains a small network; factors that are no powers of two, so that a rounded scale would be seen.
--- opts: async, kind, max_norm, unscale ("clip" also clips), policy, dtype.
local function train(device, opts)
  hm.manual_seed(5)
  local model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)):to(device)
  local params = model:parameters()
  if opts.dtype then
    for i, p in ipairs(params) do params[i] = p:detach():to(opts.dtype):requires_grad_() end
  end
  local run = {params = params, opt = optimizer(opts.kind or "AdamW", params), records = {}, updates = {}}
  run.scaler = amp.GradScaler {
    async = opts.async, init_scale = 1000.0, growth_interval = 3, growth_factor = 1.7, backoff_factor = 0.3,
    policy = opts.policy,
  }
  local x = hm.randn({8, 6}, {device = "cpu"}):to(device, opts.dtype or "f32")
  for step = 1, STEPS do
    run.opt:zero_grad()
    local loss = (x:matmul(params[1]:t()) + params[2]):tanh():matmul(params[3]:t()):pow(2):mean()
    run.scaler:scale(loss):backward()
    if OVERFLOWS[step] then params[3].grad[{2, 3}] = OVERFLOWS[step] end
    if opts.unscale then run.scaler:unscale_(run.opt) end
    if opts.unscale == "clip" then nn.utils.clip_grad_norm_(params, 0.05) end
    run.stepped, run.records[step] = run.scaler:step(run.opt, opts.max_norm and {max_norm = opts.max_norm})
    run.updates[step] = run.scaler:update()
  end
  return run
end

local FIELDS = {"stepped", "found_inf", "inf_count", "nan_count", "scale", "norm", "amax"}

--- Two runs did the same, to the bit.
--- The state without the last culprit's name, which an update on the device does not wait for.
local function known(scaler)
  local state = scaler:state_dict()
  if state.counters.last_skip then state.counters.last_skip.name = nil end
  return state
end

local function assert_same_runs(got, want)
  for i, p in ipairs(want.params) do
    same(got.params[i]:cpu(), p:cpu(), "parameter " .. i)
    if p.grad then same(got.params[i].grad:cpu(), p.grad:cpu(), "gradient " .. i) end
  end
  assert.equal(want.scaler:get_scale(), got.scaler:get_scale())
  local a, b = got.opt:state_dict().state, want.opt:state_dict().state
  for i, entry in pairs(b) do
    assert.equal(entry.step, a[i].step, "step count of parameter " .. i)
    for _, name in ipairs {"momentum_buffer", "exp_avg", "exp_avg_sq"} do
      if entry[name] then same(a[i][name]:cpu(), entry[name]:cpu(), name) end
    end
  end
  for step = 1, STEPS do
    for _, name in ipairs(FIELDS) do
      assert.equal(want.records[step][name], got.records[step][name], ("%s of step %d"):format(name, step))
    end
    assert.equal(#want.records[step].culprits, #got.records[step].culprits)
    for _, name in ipairs {"old_scale", "new_scale", "event"} do
      assert.equal(want.updates[step][name], got.updates[step][name], ("%s of update %d"):format(name, step))
    end
  end
  assert.same(known(want.scaler), known(got.scaler))
end

-- ====== On the CPU ======

describe("on the CPU", function()
  it("all is known at once: step() answers nil and the record, the rest is as without async", function()
    for _, kind in ipairs {"SGD", "AdamW"} do
      local got, want = train("cpu", {async = true, kind = kind}), train("cpu", {kind = kind})
      assert.is_nil(got.stepped)
      assert.is_boolean(want.stepped)
      assert.is_nil(getmetatable(got.records[1]))
      assert_same_runs(got, want)
      assert.same(want.scaler:record(), got.scaler:record())
    end
  end)

  it("disabled, or without gradients: nil and a record too", function()
    local p = hm.tensor({1.0}, {requires_grad = true, device = "cpu"})
    local opt = optim.SGD({p}, {lr = 1})
    local stepped, record = amp.GradScaler {async = true}:step(opt)
    assert.is_nil(stepped)
    assert.is_true(record.empty)
    p.grad = hm.ones({1}, {device = "cpu"})
    stepped, record = amp.GradScaler {async = true, enabled = false}:step(opt)
    assert.is_nil(stepped)
    assert.is_true(record.stepped)
    same(p, {0})
  end)

  it("async is a boolean, and a near miss is named", function()
    raises({"option 'async' must be boolean"}, amp.GradScaler, {async = 1})
    raises("did you mean 'async'", amp.GradScaler, {asynk = true})
  end)

  it("a schedule takes the record where there is no boolean", function()
    local p = hm.tensor({1.0}, {requires_grad = true, device = "cpu"})
    local schedule = optim.lr_scheduler.StepLR(optim.SGD({p}, {lr = 1}), {step_size = 1})
    schedule:step({stepped = false})
    assert.equal(0, schedule.t)
    schedule:step({stepped = true})
    schedule:step(nil)
    assert.equal(2, schedule.t)
  end)
end)

-- ====== The same on the device ======

local function values()
  for _, kind in ipairs {"plain", "SGD", "Nesterov", "Adam", "AdamW"} do
    case(kind .. ": the plain scaler's weights, state and records to the bit, with and without max_norm", function()
      for _, max_norm in ipairs {false, 0.05} do
        local opts = {kind = kind, max_norm = max_norm or nil}
        local want, host = train("cuda", opts), train("cpu", opts)
        opts.async = true
        local got = train("cuda", opts)
        assert.is_nil(got.stepped)
        assert_same_runs(got, want)
        for i, p in ipairs(host.params) do near(got.params[i], p, 1e-5, 1e-6, "against the CPU") end
        assert.equal(host.scaler:get_scale(), got.scaler:get_scale())
      end
    end)
  end

  case("unscale_, with and without clipping in between, and max_norm behind it", function()
    for _, opts in ipairs {{unscale = true}, {unscale = "clip"}, {unscale = true, max_norm = 0.05, kind = "SGD"}} do
      local want = train("cuda", opts)
      opts.async = true
      assert_same_runs(train("cuda", opts), want)
    end
  end)

  case("float64 parameters and losses", function()
    local want = train("cuda", {dtype = "f64"})
    assert_same_runs(train("cuda", {dtype = "f64", async = true}), want)
  end)

  case("the static policy stays where it is, bounds hold, and a scale may be given", function()
    for _, options in ipairs {
      {policy = "static", init_scale = 8.0}, {init_scale = 8.0, min_scale = 4.0, max_scale = 16.0, growth_interval = 1},
    } do
      local function run(async)
        options.async = async
        local p = hm.ones({3}, {device = "cuda", requires_grad = true})
        local opt, s, seen = optim.SGD({p}, {lr = 0.5}), amp.GradScaler(options), {}
        for _, g in ipairs {1, inf, inf, nan, 2, 3, 4, 5} do
          p.grad = nil
          s:scale((p * g):sum()):backward()
          s:step(opt)
          local u = s:update()
          seen[#seen + 1] = {u.old_scale, u.new_scale, u.event}
        end
        local u = s:update(2.0 ^ 30)
        seen[#seen + 1] = {u.old_scale, u.new_scale, u.event}
        s:set_scale(9.5)
        seen[#seen + 1] = {s:get_scale()}
        u = s:update()
        seen[#seen + 1] = {u.old_scale, u.new_scale, u.event}
        return {seen, p:totable(), known(s)}
      end
      local want = run(false)
      assert.same(want, run(true))
    end
  end)

  case("many parameters, large and empty ones, in two groups", function()
    local function run(kind, async)
      hm.manual_seed(11)
      local first, second = {}, {}
      for i = 1, 270 do
        local n = i == 7 and 20000 or i == 9 and 0 or i % 5 + 1
        local list = i % 3 == 0 and second or first
        list[#list + 1] = hm.randn({n}, {device = "cuda"}):requires_grad_()
      end
      local opt = optim[kind]({{params = first}, {params = second, lr = 0.01}}, {lr = 0.1})
      local s = amp.GradScaler {async = async, init_scale = 64.0, backoff_factor = 0.3}
      local records = {}
      for _, list in ipairs {first, second} do
        for _, p in ipairs(list) do p.grad = p:detach() * 65 end -- each step unscales what the one before left
      end
      for step = 1, 3 do
        if step == 2 then second[50].grad[1], first[3].grad[1] = nan, inf end
        local _, record = s:step(opt, {max_norm = 3.0})
        records[step] = {record.norm, record.amax, record.inf_count, record.nan_count, #record.culprits,
          record.culprits[1] and record.culprits[1].index}
        s:update()
      end
      return {records, hm.cat(first, 1):totable(), hm.cat(second, 1):totable()}
    end
    for _, kind in ipairs {"SGD", "AdamW"} do
      local want = run(kind, false)
      assert.same({1, 1, 2}, {want[1][2][3], want[1][2][4], want[1][2][5]})
      assert.same(want, run(kind, true))
    end
  end)

  case("a parameter that has a gradient only now and then counts its own steps", function()
    local function run(async)
      local p = hm.ones({3}, {device = "cuda", requires_grad = true})
      local q = hm.ones({2}, {device = "cuda", requires_grad = true})
      local opt, s = optim.AdamW({p, q}, {lr = 0.1}), amp.GradScaler {async = async, init_scale = 4.0}
      for step = 1, 8 do
        opt:zero_grad()
        local loss = (p * p):sum()
        if step % 3 == 0 then loss = loss + (q * q * q):sum() end
        s:scale(loss):backward()
        if step == 2 or step == 6 then p.grad[1] = inf end
        s:step(opt)
        s:update()
      end
      local state = opt:state_dict().state
      return {p:totable(), q:totable(), state[1].step, state[2].step}
    end
    local want = run(false)
    assert.equal(1, want[4])
    assert.same(want, run(true))
  end)

  case("steps without the scaler, and a plain one, go on where the asynchronous one was", function()
    local function run(async)
      local p = hm.ones({3}, {device = "cuda", requires_grad = true})
      local opt = optim.Adam({p}, {lr = 0.1})
      local s = amp.GradScaler {async = async, init_scale = 4.0}
      for step = 1, 6 do
        p.grad = nil
        s:scale((p * p):sum()):backward()
        if step % 2 == 0 then p.grad[2] = nan end
        s:step(opt)
        s:update()
        if step == 3 then
          p.grad = hm.ones({3}, {device = "cuda"})
          opt:step()
        end
      end
      return {p:totable(), opt:state_dict().state[1].step}
    end
    assert.same(run(false), run(true))
  end)

  case("the gradients' scale is the one their loss was multiplied by, whatever is set in between", function()
    local p = hm.ones({2}, {device = "cuda", requires_grad = true})
    local opt, s = optim.SGD({p}, {lr = 1}), amp.GradScaler {async = true, init_scale = 4.0}
    local scaled = s:scale(p:sum())
    s:set_scale(64)
    scaled:backward()
    same(p.grad, {4, 4})
    local _, record = s:step(opt)
    same(p.grad, {1, 1})
    assert.equal(4, record.scale)
    assert.equal(64, s:get_scale())
  end)
end

-- ====== The state machine ======

local function machine()
  local function with_grad(grad)
    local p = hm.tensor({1, 2, 3}, {device = "cuda", requires_grad = true})
    p.grad = hm.tensor(grad, {device = "cuda"})
    return p, optim.SGD({p}, {lr = 1}), amp.GradScaler {async = true, init_scale = 4.0, growth_interval = 1}
  end

  case("a step after a skipped one is allowed and heard of, one after a step that was made is an error", function()
    local p, opt, s = with_grad {4, inf, 4}
    s:step(opt)
    p.grad = hm.tensor({4, 4, 4}, {device = "cuda"})
    local _, record = s:step(opt)
    assert.is_true(record.stepped)
    same(p, {0, 1, 2})
    raises("step() has already been called since the last update()", s.step, s, opt)
    raises("unscale_() is being called after step()", s.unscale_, s, opt)
    local u = s:update()
    assert.equal("grow", u.event)
    assert.equal(4, u.new_scale) -- halved, then doubled
    local log = s:record()
    assert.same({true, false}, {log[1].found_inf, log[2].found_inf})
    assert.same({1, 2}, {log[1].step, log[2].step})
    p.grad = hm.tensor({4, 4, 4}, {device = "cuda"})
    s:step(opt)
  end)

  case("unscale_ twice, float16 gradients, closures: the plain scaler's errors", function()
    local _, opt, s = with_grad {4, 4, 4}
    s:unscale_(opt)
    raises("unscale_() has already been called", s.unscale_, s, opt)
    raises("Closure use is not currently supported", s.step, s, opt, function() end)
    raises("must be above 0", s.step, s, opt, {max_norm = -1})
    local q = hm.ones({2}, {device = "cuda", dtype = "f16", requires_grad = true})
    q.grad = hm.ones({2}, {device = "cuda", dtype = "f16"})
    raises("Attempting to unscale FP16 gradients.", s.step, s, optim.SGD({q}, {lr = 1}))
  end)

  case("what unscale_ found decides, also when the record was read before step()", function()
    local p, opt, s = with_grad {4, nan, 4}
    s:unscale_(opt)
    p.grad:fill_(1)
    local _, record = s:step(opt)
    assert.is_false(record.stepped)
    assert.equal("parameter 1", record.culprits[1].name)
    assert.equal(p, record.culprits[1].param)
    same(p, {1, 2, 3})
    assert.equal("backoff", s:update().event)
  end)

  case("several optimizers make one event; a scaler and its tensors live on one device", function()
    local p, opt, s = with_grad {4, inf, 4}
    local q, other = with_grad {4, 4, 4}
    local _, first = s:step(opt)
    local _, second = s:step(other)
    assert.equal("backoff", s:update().event)
    assert.is_false(first.stepped)
    assert.is_true(second.stepped)
    same(p, {1, 2, 3})
    same(q, {0, 1, 2})
    assert.equal(1, #s:record())
    raises({"scale: ", "cpu", "cuda:0", "async", "hint"}, s.scale, s, hm.ones({1}, {device = "cpu"}))
    local here = hm.ones({2}, {device = "cpu", requires_grad = true})
    here.grad = hm.ones({2}, {device = "cpu"})
    q.grad = hm.ones({3}, {device = "cuda"})
    raises({"step: ", "several devices", "hint"}, s.step, s, optim.SGD({here, q}, {lr = 1}))
    raises({"unscale_: ", "cpu", "cuda:0"}, s.unscale_, s, optim.SGD({here}, {lr = 1}))
    local quiet = amp.GradScaler {async = true}
    quiet:scale(hm.ones({1}, {device = "cpu"}))
    raises({"scale: ", "cuda:0", "expected cpu"}, quiet.scale, quiet, p)
  end)

  case("a record outlives its optimizer's and scaler's names, and pairs() shows it whole", function()
    local record, update
    do
      local _, opt, s = with_grad {4, inf, nan}
      _, record = s:step(opt)
      update = s:update()
    end
    collectgarbage()
    collectgarbage()
    local names = {}
    for name in pairs(record) do names[#names + 1] = name end
    table.sort(names)
    assert.same({"amax", "culprits", "found_inf", "inf_count", "nan_count", "norm", "scale", "stepped"}, names)
    assert.equal(1, record.culprits[1].inf_count)
    assert.same({3, record.culprits[1].nan_count + 2}, {#record.culprits[1].param, 3})
    local fields = {}
    for name, value in pairs(update) do fields[name] = value end
    assert.same({old_scale = 4.0, new_scale = 2.0, event = "backoff"}, fields)
  end)
end

-- ====== Waits ======

local function waits()
  for _, how in ipairs {"step", "max_norm", "clip"} do
    case("a training step of the cnn does not wait at all: " .. how, function()
      local run = cnn.run("f16", 2, "cuda")
      run.scaler = amp.GradScaler {async = true, init_scale = 2.0 ^ 10}
      local step = run.scaler.step
      function run.scaler:step(opt)
        if how == "clip" then
          self:unscale_(opt)
          nn.utils.clip_grad_norm_(run.model:parameters(), 1.0)
        end
        return step(self, opt, how == "max_norm" and {max_norm = 1.0} or nil)
      end
      for _ = 1, 3 do run.step() end
      for _ = 1, 3 do
        hm.cuda.reset_stats()
        run.step()
        assert.equal(0, hm.cuda.stats().synchronisations)
      end
      assert.is_true(run.scaler:get_scale() > 0)
      assert.equal(6, #run.scaler:record())
    end)
  end

  case("reading a record waits, once; reading nothing does not", function()
    local p = hm.ones({4}, {device = "cuda", requires_grad = true})
    local opt, s = optim.SGD({p}, {lr = 0.1}), amp.GradScaler {async = true, init_scale = 4.0}
    local function step()
      p.grad = nil
      s:scale(p:sum()):backward()
      return select(2, s:step(opt))
    end
    step()
    s:update()
    hm.cuda.synchronize()
    hm.cuda.reset_stats()
    local record = step()
    s:update()
    assert.equal(0, hm.cuda.stats().synchronisations)
    assert.is_true(record.stepped)
    assert.equal(1, hm.cuda.stats().synchronisations)
    assert.equal(4, record.scale)
    assert.near(2, record.norm, 1e-6)
    assert.equal(1, hm.cuda.stats().synchronisations)
  end)

  case("clip_grad_norm_ gives the norm on the device, clips as on the CPU, and keeps what is not finite", function()
    for _, values_of in ipairs {{3, 4, 0}, {0.3, 0.4, 0}, {1, inf, 2}, {1, nan, inf}} do
      local function run(device)
        local p = hm.zeros({3}, {device = device, requires_grad = true})
        p.grad = hm.tensor(values_of, {device = device})
        return nn.utils.clip_grad_norm_({p}, 1.0), p.grad
      end
      hm.cuda.synchronize()
      local want, clipped = run("cpu")
      hm.cuda.reset_stats()
      local norm, grad = run("cuda")
      assert.equal(0, hm.cuda.stats().synchronisations)
      assert.equal("cuda:0", norm.device)
      assert.same({}, norm.shape)
      same(norm:cpu(), want)
      same(grad:cpu(), clipped)
    end
    local p = hm.zeros({1}, {device = "cuda", requires_grad = true})
    p.grad = hm.tensor({inf}, {device = "cuda"})
    raises("nothing was clipped", nn.utils.clip_grad_norm_, {p}, 1.0, {error_if_nonfinite = true})
  end)

  case("a run gives every byte back, and asks for none in its steady state", function()
    collectgarbage()
    collectgarbage()
    local before = hm.cuda.memory_stats().live
    local function whole()
      local p = hm.ones({100}, {device = "cuda", requires_grad = true})
      local opt, s = optim.AdamW({p}, {lr = 0.1}), amp.GradScaler {async = true, init_scale = 4.0}
      local function step()
        p.grad = nil
        s:scale(p:sum()):backward()
        s:step(opt)
        s:update()
        collectgarbage()
        collectgarbage()
      end
      for _ = 1, 4 do step() end
      local at = hm.cuda.memory_stats().system_allocs
      for _ = 1, 10 do step() end
      assert.equal(at, hm.cuda.memory_stats().system_allocs)
    end
    whole()
    collectgarbage()
    collectgarbage()
    assert.equal(before, hm.cuda.memory_stats().live)
  end)
end

-- ====== Policies of one's own ======

--- Like "dynamic", and keeps what it heard.
local function listening(heard)
  return {
    name = "listening", needs = {"amax", "norm"},
    init = function(opts) return {scale = opts.init_scale, clean = 0} end,
    update = function(state, event, opts)
      heard[#heard + 1] = event
      return amp.policies.dynamic.update(state, event, opts)
    end,
  }
end

local function own_policies()
  case("a policy in Lua hears every event once, in order, and its word counts", function()
    local heard, expected = {}, {}
    local function cautious(list) -- never grows: a growth comes later the later the policy hears
      local policy = listening(list)
      function policy.update(state, event, opts)
        list[#list + 1] = event
        if event.found_inf then state.scale = state.scale * opts.backoff_factor end
        return state.scale
      end
      return policy
    end
    local want = train("cuda", {kind = "SGD", policy = cautious(expected)})
    local got = train("cuda", {kind = "SGD", policy = cautious(heard), async = true})
    assert_same_runs(got, want)
    assert.equal(STEPS, #heard)
    for step, event in ipairs(heard) do
      assert.equal(step, event.step)
      assert.equal(OVERFLOWS[step] ~= nil, event.found_inf)
      assert.same(expected[step], event)
    end
  end)

  case("one that fails leaves the scale, one that returns stop ends the update that hears of it", function()
    local turn = 0
    local policy = {
      name = "moody", init = function(opts) return {scale = opts.init_scale} end,
      update = function(state)
        turn = turn + 1
        if turn == 1 then error("not today") end
        if turn == 3 then return state.scale, {stop = "enough of it"} end
        return state.scale * 3
      end,
    }
    local p = hm.ones({2}, {device = "cuda", requires_grad = true})
    local opt, s = optim.SGD({p}, {lr = 0.1}), amp.GradScaler {async = true, init_scale = 4.0, policy = policy}
    local function step(g)
      p.grad = nil
      s:scale((p * g):sum()):backward()
      s:step(opt)
      local u = s:update()
      return u.event, u
    end
    local said = require("spec.support.expect").stderr(function()
      local event, u = step(inf)
      assert.equal("fault", event)
      assert.truthy(u.message:find("not today", 1, true), u.message)
    end)
    assert.truthy(said:find("moody", 1, true), said)
    assert.equal(4, s:get_scale()) -- the device's own backing off is undone
    assert.equal("grow", (step(1)))
    assert.equal(12, s:get_scale())
    raises({"update: loss-scale policy 'moody' stopped the training", "enough of it"}, function()
      step(1) -- this one, or the next
      step(1)
    end)
    assert.equal("stop", s:record()[3].event)
  end)

  case("policies are exchanged in mid-run, with the device's scale and count", function()
    local p = hm.ones({2}, {device = "cuda", requires_grad = true})
    local opt = optim.SGD({p}, {lr = 0.1})
    local s = amp.GradScaler {async = true, init_scale = 4.0, growth_interval = 5}
    local function steps(n)
      for _ = 1, n do
        p.grad = nil
        s:scale(p:sum()):backward()
        s:step(opt)
        s:update()
      end
    end
    steps(3)
    local heard = {}
    assert.same({"clean", "scale"}, s:set_policy(listening(heard)).kept)
    steps(1)
    assert.equal(4, s:get_scale())
    assert.equal(4, s:state_dict().policy_state.clean)
    s:set_policy("dynamic")
    steps(1)
    assert.equal(8, s:get_scale())
    assert.same({1, 4}, {#heard, heard[1].step})
    assert.truthy(tostring(s):find("scale 8  policy dynamic  clean steps 0/5", 1, true), tostring(s))
  end)

  case("a state dict goes on in another scaler, asynchronous or not", function()
    for _, policy in ipairs {"dynamic", listening {}} do
      local p = hm.ones({2}, {device = "cuda", requires_grad = true})
      local opt = optim.SGD({p}, {lr = 0.1})
      local function new(async)
        return amp.GradScaler {async = async, init_scale = 64.0, growth_interval = 4, policy = policy}
      end
      local function steps(s, list)
        for _, g in ipairs(list) do
          p.grad = nil
          s:scale((p * g):sum()):backward()
          s:step(opt)
          s:update()
        end
        return s
      end
      local saved = steps(new(true), {1, inf, 1, 1}):state_dict()
      assert.equal(32, saved.scale)
      assert.equal(2, saved._growth_tracker)
      for _, async in ipairs {true, false} do
        local fresh, used = new(async), steps(new(async), {1, 1, 1})
        for _, s in ipairs {fresh, used} do
          s:load_state_dict(saved)
          assert.equal(32, s:get_scale())
          steps(s, {1})
          assert.equal(32, s:get_scale())
          steps(s, {1})
          assert.equal(64, s:get_scale())
        end
      end
    end
  end)
end

-- ====== Delays: in a child with deferred streams ======

local DEFERRED = {HALFMOON_CUDA = "emu", HALFMOON_EMU_DEFER = 1, HALFMOON_THREADS = 1, HALFMOON_EMU_QUIET = 1,
  HALFMOON_SPEC_REPORT = ""}

local DELAYED = [[
local hm = require "halfmoon"
local amp, optim = hm.amp, hm.optim
local OVERFLOWS = {[2] = true, [3] = true, [4] = true, [9] = true, [15] = true}
local function run(async, heard)
  local p = hm.ones({4}, {device = "cuda", requires_grad = true})
  local opt = optim.AdamW({p}, {lr = 0.1})
  local s = amp.GradScaler {async = async, init_scale = 1024.0, growth_interval = 1000, policy = {
    name = "late", init = function(opts) return {scale = opts.init_scale} end,
    update = function(state, event)
      heard[#heard + 1] = event
      if event.found_inf then state.scale = state.scale / 2 end
      return state.scale
    end}}
  local lag = 0
  for step = 1, 20 do
    p.grad = nil
    s:scale((p * p):sum()):backward()
    if OVERFLOWS[step] then p.grad[1] = math.huge end
    s:step(opt)
    s:update()
    lag = math.max(lag, step - #heard)
  end
  local scale = s:get_scale()
  return p:totable(), scale, lag, heard
end
local w1, s1, lag1 = run(false, {})
local w2, s2, lag2, heard = run(true, {})
assert(lag1 == 0)
assert(#heard == 20)
local scale = 1024.0
for step, event in ipairs(heard) do
  assert(event.step == step and event.found_inf == (OVERFLOWS[step] or false))
  assert(event.scale == scale, ("step %d was made with %g, not %g"):format(step, event.scale, scale))
  if event.found_inf then scale = scale / 2 end
end
for i in ipairs(w1) do assert(w1[i] == w2[i]) end
assert(s1 == s2, s2)
print("lag", lag2)
]]

local function delays()
  case("nothing is heard before it comes, four events at most are missing, the scale is as without delay", function()
    local said, status = process.script(DELAYED, DEFERRED)
    assert.equal(0, status, said)
    assert.equal("lag\t4\n", said)
  end)

  case("the dynamic policy on the device is told of late and waits for nothing; all is told in the end", function()
    local said, status = process.script([[
      local hm = require "halfmoon"
      local p = hm.ones({4}, {device = "cuda", requires_grad = true})
      local opt = hm.optim.SGD({p}, {lr = 0.1})
      local s = hm.amp.GradScaler {async = true, init_scale = 4.0, growth_interval = 2}
      local records = {}
      hm.cuda.synchronize()
      for step = 1, 20 do
        if step == 4 then hm.cuda.reset_stats() end
        p.grad = nil
        s:scale((p * (step == 5 and math.huge or 1)):sum()):backward()
        s:step(opt)
        records[step] = s:update()
      end
      print(hm.cuda.stats().synchronisations)
      print(records[5].event, records[7].event, records[7].new_scale, #s:record(), s:get_scale())
    ]], DEFERRED)
    assert.equal(0, status, said)
    assert.equal("0\nbackoff\tgrow\t16.0\t20\t1024.0\n", said)
  end)

  case("a device that is lost in between is an ordinary error where it is noticed", function()
    local said, status = process.script([[
      local hm = require "halfmoon"
      local p = hm.ones({4}, {device = "cuda", requires_grad = true})
      local opt = hm.optim.SGD({p}, {lr = 0.1})
      local s = hm.amp.GradScaler {async = true, init_scale = 4.0}
      s:scale(p:sum()):backward()
      local _, record = s:step(opt)
      local k = hm.cuda.kernel("__global__ void wild(float *x, int i) { x[i] = 1; }", "wild")
      k{grid = 1, block = 1}(hm.ones({4}, {device = "cuda"}), 1 << 28)
      print(pcall(function() s:update() return record.stepped end))
      print(pcall(function() return record.stepped end))
    ]], DEFERRED)
    assert.equal(0, status, said)
    assert.truthy(said:find("^false\t"), said)
    assert.truthy(said:find("illegal", 1, true), said)
    assert.truthy(said:find("\nfalse\t", 1, true), said)
  end)
end

describe("async on cuda", function()
  if not cases then return pending(why) end
  values()
  machine()
  waits()
  own_policies()
  if devices.has_double() then delays() else pending("delays: " .. devices.plugin .. " is not built") end
end)
