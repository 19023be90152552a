-- telemetry_spec.lua -- amp.histogram and amp.report, and the trace of a scaler as a file.

local hm = require "halfmoon"
local json = require "halfmoon.json"
local core = require "halfmoon.core"
local expect = require "spec.support.expect"

local nn, optim, amp = hm.nn, hm.optim, hm.amp
local raises = expect.raises
local inf, nan = math.huge, 0 / 0

--- A parameter with the given gradient.
local function param(values, dtype)
  local p = hm.zeros({#values}, {requires_grad = true, dtype = dtype})
  p.grad = hm.tensor(values, {dtype = dtype})
  return p
end

local function sgd(...) return optim.SGD({...}, {lr = 0}) end

describe("amp.histogram", function()
  it("counts each power of two, zeros, subnormals, infinities and NaN", function()
    local h = amp.histogram(sgd(param {1, -1.5, 2, 3.999, 4, 0, -0.0, 2.0 ^ -126, 2.0 ^ -130, inf, -inf, nan,
      2.0 ^ 127}))
    local c = h[1]
    assert.same({[0] = 2, [1] = 2, [2] = 1, [-126] = 1, [127] = 1}, c.bins)
    assert.same({13, 2, 1, 2, 1}, {c.count, c.zeros, c.subnormals, c.inf_count, c.nan_count})
    assert.equal(2.0 ^ 127, c.amax)
    assert.equal(c.count, h.total.count)
    assert.same(c.bins, h.total.bins)
  end)

  it("tells the shares that float16 loses at a scale, as its conversion does", function()
    hm.manual_seed(5)
    local values = {}
    for e = -45, 20 do
      for _, m in ipairs {1, 1.0000001, 1.25, 1.5, 1.9990234375, 1.99951171875, 1.9999999} do
        values[#values + 1] = (e % 2 == 0 and 1 or -1) * m * 2.0 ^ e
      end
    end
    for _, scale in ipairs {1, 2.0 ^ 10, 2.0 ^ -5} do
      local p = param(values)
      local got = amp.histogram(sgd(p), {scale = scale})[1]
      local half = (p.grad * scale):to("f16"):to("f32")
      local flushed, subnormal, overflow = 0, 0, 0
      for _, v in ipairs(half:totable()) do
        local a = math.abs(v)
        if a == 0 then flushed = flushed + 1
        elseif a == inf then overflow = overflow + 1
        elseif a < 2.0 ^ -14 then subnormal = subnormal + 1 end
      end
      assert.is_true(flushed > 0 and subnormal > 0 and overflow > 0)
      assert.same({flushed / #values, subnormal / #values, overflow / #values},
        {got.flushed, got.f16_subnormal, got.overflow})
    end
  end)

  it("leaves zeros and what is not finite out of the shares", function()
    local c = amp.histogram(sgd(param {0, inf, nan, 1, 2.0 ^ -30}))[1]
    assert.equal(0.5, c.flushed)
    assert.equal(0, amp.histogram(sgd(param {0, nan})).total.flushed)
  end)

  it("takes gradients of every floating dtype, and views", function()
    for _, dtype in ipairs {"f16", "bf16", "f32", "f64"} do
      local c = amp.histogram(sgd(param({1, 2, 2.5, 0}, dtype)))[1]
      assert.same({[0] = 1, [1] = 2}, c.bins)
      assert.equal(2.5, c.amax)
      assert.is_true(math.abs(c.norm - math.sqrt(11.25)) < 1e-12)
    end
    assert.same({[1] = 1, [3] = 1}, core.census(hm.tensor({{1, 2}, {4, 8}}):t()[{2}]).bins)
    assert.equal(0, core.census(hm.zeros({0})).count)
    raises("floating dtype", core.census, hm.tensor({1}, {dtype = "i64"}))
  end)

  it("walks a model by name, prints, and leaves out what has no gradient", function()
    hm.manual_seed(1)
    local model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    assert.equal(0, #amp.histogram(model))
    model(hm.randn({5, 4})):sum():backward()
    local h = amp.histogram(model, {scale = 2.0 ^ 16})
    local names = {}
    for i, c in ipairs(h) do names[i] = c.name end
    assert.same({"0.weight", "0.bias", "2.weight", "2.bias"}, names)
    local text = tostring(h)
    for _, part in ipairs {"0.weight", "all", "flushed", "2^1 ", "scale 65536"} do
      assert.truthy(text:find(part, 1, true), text)
    end
    raises("expected a model or an optimizer, not 3", amp.histogram, 3)
    raises("option 'scale' must be above 0", amp.histogram, model, {scale = 0})
  end)
end)

-- ====== A run of one parameter ======

--- A layer of one weight; go("G") is a clean step, go("X") one that overflows.
local function new_run(options)
  local model = nn.Linear(2, 1, {bias = false})
  local opt = optim.SGD(model:parameters(), {lr = 0})
  local run = {opt = opt, model = model, scaler = amp.GradScaler(options)}
  function run.go(letters)
    local result
    for kind in letters:gmatch("[GX]") do
      opt:zero_grad()
      run.scaler:scale((model.weight * (kind == "X" and inf or 3)):sum()):backward()
      run.scaler:step(opt)
      result = run.scaler:update()
    end
    return result
  end
  return run
end

describe("amp.report", function()
  it("tells scale, policy, steps, skips, overflow rate and culprits of a scaler", function()
    local run = new_run {init_scale = 1024, growth_interval = 100}
    run.go "GXGG"
    local r = amp.report(run.scaler)
    assert.same({512, "dynamic", 4, 1, 0.25, 2}, {r.scale, r.policy, r.steps, r.skipped, r.overflow_rate, r.last_skip})
    assert.same({{name = "weight", inf_count = 2, nan_count = 0}}, r.culprits)
    assert.equal(1, #r.parameters) -- of the optimizer that was stepped
    assert.equal(512, r.parameters.scale)
    local text = tostring(r)
    for _, part in ipairs {"scale 512 (2^9)", "policy dynamic", "steps 4", "skipped 1", "25.00%", "step 2",
      "weight (2 inf, 0 nan)"} do
      assert.truthy(text:find(part, 1, true), text)
    end
  end)

  it("takes a model, an optimizer, or both with a scaler", function()
    local run = new_run {init_scale = 2.0 ^ 15}
    assert.truthy(tostring(amp.report(run.model)):find("no parameter has a gradient", 1, true))
    run.go "G"
    assert.equal(1, #amp.report(run.model).parameters)
    local r = amp.report(run.scaler, run.model, run.opt)
    assert.equal(1, #r.parameters) -- once
    assert.equal(1, r.parameters[1].overflow) -- 3 * 2^15 does not fit
    assert.equal(0, amp.report(run.opt).parameters[1].overflow)
    assert.truthy(tostring(amp.report(amp.GradScaler {enabled = false})):find("scaler disabled", 1, true))
    raises("argument 1 must be", amp.report, "x")
    raises("expected a scaler", amp.report)
  end)
end)

-- ====== Traces ======

describe("a trace", function()
  local path
  before_each(function() path = os.tmpname() end)
  after_each(function() os.remove(path) end)

  local function lines()
    local list = {}
    for line in io.lines(path) do list[#list + 1] = assert(json.decode(line)) end
    return list
  end

  it("has a line for each update, at once", function()
    local run = new_run {init_scale = 1024, growth_interval = 3, trace = path}
    run.go "G"
    assert.equal(1, #lines()) -- while the file is open
    run.go "XGGG"
    local all = lines()
    assert.equal(5, #all)
    local events, scales = {}, {}
    for i, line in ipairs(all) do
      assert.same({i, "dynamic"}, {line.step, line.policy})
      events[i], scales[i] = line.event, line.new_scale
    end
    assert.same({"hold", "backoff", "hold", "hold", "grow"}, events)
    assert.same({1024, 512, 512, 512, 1024}, scales)
    assert.same({false, 1024, 3, math.sqrt(18)}, {all[1].found_inf, all[1].scale, all[1].amax, all[1].norm})
    assert.is_nil(all[1].culprits)
    assert.same({true, 2, 0}, {all[2].found_inf, all[2].inf_count, all[2].nan_count})
    assert.same({{name = "weight", inf_count = 2, nan_count = 0}}, all[2].culprits)
    assert.is_nil(all[3].culprits)
    assert.is_nil(all[1].histogram)
  end)

  it("has histogram and figures of parameters when asked for, whatever the policy needs", function()
    local run = new_run {init_scale = 1024, trace = {path, histogram = true, per_param = true}}
    run.go "G"
    run.scaler:set_policy("static")
    run.go "G"
    for _, line in ipairs(lines()) do
      assert.same({zeros = 0, subnormals = 0, exponents = {["1"] = 2}}, line.histogram)
      assert.equal("weight", line.per_param[1].name)
      assert.equal(3, line.per_param[1].amax)
    end
  end)

  it("begins, ends and goes on", function()
    local run = new_run {init_scale = 1024}
    run.go "G"
    assert.is_true(amp.trace(run.scaler, path))
    run.go "GG"
    assert.is_true(amp.trace(run.scaler, nil))
    run.go "G"
    assert.equal(2, #lines())
    assert.is_true(amp.trace(run.scaler, path, {append = true}))
    run.go "G"
    local all = lines()
    assert.same({2, 3, 5}, {all[1].step, all[2].step, all[3].step})
    assert.is_true(amp.trace(run.scaler, path)) -- begins anew
    assert.equal(0, #lines())
    assert.is_true(amp.trace(run.scaler))
    assert.is_nil(run.scaler.tracer)
  end)

  it("keeps what a policy said when it failed or stopped", function()
    local calls = 0
    local run = new_run {
      init_scale = 8, trace = path,
      policy = {name = "odd", update = function(state)
        calls = calls + 1
        if calls == 2 then error("no idea", 0) end
        return state.scale or 8, calls == 3 and {stop = "enough"} or nil
      end},
    }
    run.go "GG"
    raises("enough", run.go, "G")
    local all = lines()
    assert.same({"hold", "fault", "stop"}, {all[1].event, all[2].event, all[3].event})
    assert.truthy(all[2].message:find("no idea", 1, true))
    assert.equal("enough", all[3].message)
  end)

  it("says what is wrong with its place or options", function()
    local run = new_run {}
    local ok, message, code = amp.trace(run.scaler, "/nowhere/run.jsonl")
    assert.is_nil(ok)
    assert.truthy(message:find("/nowhere/run.jsonl", 1, true))
    assert.equal("integer", math.type(code))
    raises("/nowhere/run.jsonl", amp.GradScaler, {trace = "/nowhere/run.jsonl"})
    raises("must be a path", amp.GradScaler, {trace = {histogram = true}})
    raises("did you mean 'histogram'", amp.trace, run.scaler, path, {histograms = true})
    raises("expected a GradScaler", amp.trace, {}, path)
    raises("path must be a string", amp.trace, run.scaler, 3)
    raises("a trace of its own", amp.GradScaler, {groups = {a = {}}, trace = path})
    raises("async = true", amp.GradScaler, {async = true, trace = {path, histogram = true}})
  end)

  it("that cannot be written is given up, with a word", function()
    local full = io.open("/dev/full", "w")
    if not full then return pending("no /dev/full") end
    full:close()
    local run = new_run {trace = "/dev/full"}
    run.go "GG" -- says so on the error stream
    assert.is_nil(run.scaler.tracer)
    assert.equal(2, #run.scaler:record())
  end)
end)

describe("core.gradient_watch", function()
  it("may be switched off by its own function at any sight", function()
    local b = hm.tensor({1, 2}, {dtype = "f16", requires_grad = true})
    --- Sights heard of before the watch goes off at number `last`.
    local function run(last)
      local heard = 0
      core.gradient_watch(function()
        heard = heard + 1
        if heard == last then core.gradient_watch(nil) end
      end)
      local ok, why = pcall(function() (hm.ones({3, 2}, {dtype = "f16"}) + b * 2):sum():backward() end)
      core.gradient_watch(nil)
      assert(ok, why)
      return heard
    end
    local all = run(0)
    assert(all >= 4, all) -- what comes to b * 2, and its sum over rows, among them
    for last = 1, all do assert.equal(last, run(last)) end
  end)
end)
