-- policy_auto_spec.lua -- the policy `auto`: fewer skipped steps than with `dynamic`, less lost in all, and its ways.
--
-- The runs are those of examples/auto_policy.lua, which says what is counted: gradients of parameters.  Those of
-- layers' results are counted in a replay of a recorded run.

local hm = require "halfmoon"
local devices = require "spec.support.devices"

local optim, amp = hm.optim, hm.amp
local inf = math.huge

package.path = "examples/?.lua;" .. package.path
local study = require "auto_policy"

describe("auto", function()
  it("loses less than dynamic, and than the best static scale, where gradients drift by 2^20 both ways",
    devices.cpu_only("float16 steps by the thousand", function()
      hm.manual_seed(7)
      local case = study.drift()
      local auto = study.run(case, study.options "auto")
      local dynamic = study.run(case, study.options "dynamic")
      local static = study.best_static(case, {-4, -2, 0, 2, 4})
      assert(auto.skipped < dynamic.skipped, auto.skipped .. " skipped")
      assert(auto.flushed < dynamic.flushed / 10, auto.flushed)
      assert(auto.skipped <= static.skipped)
      assert(auto.flushed < static.flushed / 10)
      assert(auto.lost < static.lost / 10)
    end))

  it("loses less than dynamic, and no more than the best static scale, on the demo's network",
    devices.cpu_only("a training of its own", function()
      local case = study.cnn(240, 320, 8)
      local auto = study.run(case, study.options "auto")
      local dynamic = study.run(case, study.options "dynamic")
      local static = study.run(case, {policy = "static", init_scale = 2.0 ^ 14})
      assert.equal(0, auto.skipped)
      assert(dynamic.skipped >= 1)
      assert(auto.flushed <= dynamic.flushed)
      assert(auto.lost < dynamic.lost)
      assert(auto.lost <= static.lost)
    end))

  it("loses less than dynamic among the gradients of layers' results, too, though it flushes more of them",
    devices.cpu_only("a training of its own", function()
      local case, path = study.cnn(240, 320, 8), os.tmpname()
      hm.manual_seed(1)
      local model = case.model()
      local opt = optim.SGD(model:parameters(), {lr = case.lr})
      amp.record_gradients(path, model, {per_tensor = false}, function(rec)
        for step = 1, case.steps do
          local x, y = case.batch(step)
          opt:zero_grad()
          local loss = amp.autocast({dtype = "f16", backward = "float32"}, function() return case.loss(model(x), y) end)
          loss:backward()
          rec:step()
          opt:step()
        end
      end)
      local result = amp.simulate(path, {"auto", {"dynamic", growth_interval = 50}})
      os.remove(path)
      local auto, dynamic = result[1], result[2]
      local function lost(run) return run.overflow_rate + (1 - run.overflow_rate) * run.flushed end
      assert.equal(0, auto.skipped)
      assert(dynamic.skipped >= 1)
      assert(auto.flushed < 1e-5, auto.flushed)
      assert(lost(auto) < lost(dynamic) / 100, tostring(result))
      assert(auto.mean_log2 > 11 and auto.mean_log2 < dynamic.mean_log2, tostring(result))
    end))

  -- ====== How it decides ======

  --- A scaler with gradients given from outside: go(values) is one step with these unscaled gradients, rounded as
  --- float16 holds them when scaled.
  local function new_run(options)
    local run = {scaler = amp.GradScaler(options)}
    run.p = hm.zeros({64}, {requires_grad = true})
    run.opt = optim.SGD({run.p}, {lr = 0})
    function run.go(values)
      local scale = run.scaler:get_scale()
      local all = hm.zeros {64}
      for i, v in ipairs(values) do all[i] = v end
      run.p.grad = (all * scale):to("f16"):to("f32")
      run.scaler:step(run.opt)
      return run.scaler:update()
    end
    return run
  end

  --- 64 values, one per half binary order, downwards from 2^top.
  local function ladder(top)
    local values = {}
    for i = 1, 64 do values[i] = 2.0 ^ (top - (i - 1) / 2) end
    return values
  end

  local free = {policy = "auto", min_scale = 0, max_scale = inf}

  it("follows gradients that grow and shrink, without an overflow", function()
    local run = new_run(free)
    run.go(ladder(-20))
    local last
    for step = 1, 120 do
      local top = -20 + 15 * math.sin(step / 15)
      assert.not_equal("fault", run.go(ladder(top)).event)
      last = math.log(run.scaler:get_scale(), 2) + top
      assert(last < 16 and last > -2, last)
    end
    assert.equal(0, run.scaler.skipped)
  end)

  it("keeps more room where gradients jump", function()
    local calm, wild = new_run(free), new_run(free)
    for step = 1, 60 do
      calm.go(ladder(-10))
      wild.go(ladder(-10 + (step % 2) * 6))
    end
    assert(wild.scaler:get_scale() * 2 ^ 4 < calm.scaler:get_scale() * 2 ^ 3)
  end)

  it("goes down faster with each overflow in a row, and comes back", function()
    local run = new_run {policy = "auto", init_scale = 2.0 ^ 30, min_scale = 0, max_scale = inf}
    local steps = 0
    while run.go(ladder(0)).event ~= "grow" and steps < 20 do steps = steps + 1 end
    assert(run.scaler.skipped >= 2 and run.scaler.skipped <= 6, run.scaler.skipped)
    for _ = 1, 50 do run.go(ladder(0)) end
    local before = run.scaler:get_scale()
    run.go({inf})
    assert(run.scaler:get_scale() < before)
    for _ = 1, 150 do run.go(ladder(0)) end
    assert(run.scaler:get_scale() >= before / 4)
  end)

  it("raises the scale by 2^4 where everything is flushed", function()
    local run = new_run {policy = "auto", init_scale = 1, min_scale = 0, max_scale = inf}
    run.go(ladder(-40))
    assert.equal(16, run.scaler:get_scale())
    for _ = 1, 10 do run.go(ladder(-40)) end
    assert(run.scaler:get_scale() > 2.0 ^ 30)
  end)

  it("learns where values inside the network overflow first", function()
    local run = new_run(free)
    -- the parameters' gradients have plenty of room, but above 2^6 the step overflows
    local skipped = 0
    for _ = 1, 200 do
      local over = run.scaler:get_scale() > 2.0 ^ 6
      if over then skipped = skipped + 1 end
      run.go(over and {inf} or ladder(-6))
    end
    assert(skipped <= 20, skipped)
  end)

  it("skip_cost moves the balance", function()
    local careful, bold = new_run {policy = "auto", skip_cost = 100.0}, new_run {policy = "auto", skip_cost = 1e-3}
    for _ = 1, 20 do
      careful.go(ladder(0))
      bold.go(ladder(0))
    end
    assert(careful.scaler:get_scale() < bold.scaler:get_scale())
  end)

  it("stays within the scaler's bounds", function()
    local run = new_run {policy = "auto", init_scale = 64, min_scale = 32, max_scale = 128}
    for _ = 1, 10 do run.go(ladder(-30)) end
    assert.equal(128, run.scaler:get_scale())
    for _ = 1, 10 do run.go(ladder(14)) end
    assert.equal(32, run.scaler:get_scale())
  end)
end)
