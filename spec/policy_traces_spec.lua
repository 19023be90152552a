-- policy_traces_spec.lua -- the rules of other systems, step by step: golden traces of the scale after each update.
--
-- The traces of PyTorch, Apex, Keras and logmax follow from the rules; those of Megatron-LM, DeepSpeed, fairseq and
-- metaseq were made by running those systems' own classes.  Also here: what each policy's options do, the statistics
-- that policies can ask for, and that every policy runs as a table and as a file.

local hm = require "halfmoon"
local devices = require "spec.support.devices"
local expect = require "spec.support.expect"
local new_run = require "spec.support.policy_run"
local numbers = require "spec.support.numbers"
local traces = require "spec.reference.traces"

local optim, amp = hm.optim, hm.amp
local raises = expect.raises
local inf, nan = math.huge, 0 / 0

local COMMON = {init_scale = 64, growth_interval = 3}

local function with(base, more)
  local options = {}
  for k, v in pairs(base) do options[k] = v end
  for k, v in pairs(more) do options[k] = v end
  return options
end

describe("golden traces", function()
  for _, case in ipairs(traces) do
    local id, name, options, letters, want = table.unpack(case)
    it(id, function() assert.equal(want, new_run(with(COMMON, with(options, {policy = name}))):trace(letters)) end)
    it(id .. " from the policy's file", function()
      local path = assert(package.searchpath("halfmoon.amp.policies." .. name, package.path))
      assert.equal(want, new_run(with(COMMON, with(options, {policy = path}))):trace(letters))
    end)
  end

  --- Scales of logmax after gradients of the given sizes.
  local function logmax(amaxes)
    local run = new_run {policy = "logmax"}
    local scales = {}
    for i, amax in ipairs(amaxes) do
      run:go(amax)
      scales[i] = run.scaler:get_scale()
    end
    return scales
  end

  it("test_update_scale_hysteresis: any sequence of overflows does what Apex's rule says", function()
    for seed = 1, 12 do
      local growth, hysteresis, s, letters, want = 1 + seed % 5, 1 + seed % 4, seed * 7919 + 13, {}, {}
      local scale, clean, left = 64, 0, hysteresis
      for i = 1, 60 do
        s = (s * 1103515245 + 12345) % 2147483648
        local overflow = s / 2147483648 < (seed % 3 + 1) / 5 -- a fifth, two or three of the steps
        if overflow then
          left, clean = left - 1, 0
          if left <= 0 then scale = scale / 2 end
        else
          clean, left = clean + 1, hysteresis
          if clean == growth then scale, clean = scale * 2, 0 end
        end
        letters[i], want[i] = overflow and "X" or "G", ("%.14g"):format(scale)
      end
      local run = new_run {policy = "apex_hysteresis", init_scale = 64, growth_interval = growth, hysteresis = hysteresis, min_scale = 0,
        max_scale = math.huge}
      assert.equal(table.concat(want, " "), run:trace(table.concat(letters)), "seed " .. seed)
    end
  end)

  it("T9 logmax amax 64", function()
    numbers.assert_near(logmax {64, 64, 64, 64, 64}, {1024, 1024, 1024, 1024, 1024}, 1e-6, 0)
  end)
  it("T9 logmax amax 4 16 4 16", function()
    numbers.assert_near(logmax {4, 16, 4, 16}, {16384, 958.726, 1370.11, 958.726}, 1e-5, 1e-5)
  end)
  it("T9 logmax amax 64 64 64 64 1024 64", function()
    numbers.assert_near(logmax {64, 64, 64, 64, 1024, 64}, {1024, 1024, 1024, 1024, 18.845, 26.25}, 1e-4, 1e-4)
  end)
end)

describe("policy", function()
  it("every one comes with a head of its own, runs clean, overflowing and zero steps, and saves its state", function()
    for _, name in ipairs(amp.policies.names()) do
      assert.equal(name, amp.policies[name].name)
      for _, policy in ipairs {name, (assert(package.searchpath("halfmoon.amp.policies." .. name, package.path)))} do
        local run = new_run {init_scale = 256, policy = policy}
        for _, gradient in ipairs {1, 0.5, inf, 2, nan, inf, inf, 0, 0, 1e-6, 1} do
          local record = run:go(gradient)
          assert.not_equal("fault", record.event, ("%s: %s"):format(policy, record.message))
          assert(record.new_scale > 0 and record.new_scale < inf, policy)
        end
        local saved = run.scaler:state_dict()
        local other = new_run {init_scale = 256, policy = policy}
        local report = other.scaler:load_state_dict(saved)
        assert.same({}, report.reset, policy)
        run:go(1)
        other:go(1)
        assert.equal(run.scaler:get_scale(), other.scaler:get_scale(), policy)
      end
    end
  end)

  it("first scales and bounds are those of the systems", function()
    local WANT = {
      apex = {2 ^ 16, 0, 2 ^ 24}, keras = {2 ^ 15, 0, inf}, megatron = {2 ^ 32, 1, inf}, deepspeed = {2 ^ 32, 1, inf},
      fairseq = {2 ^ 15, 1e-4, inf}, metaseq = {4, 2 ^ -5, inf}, logmax = {1, 1, 2 ^ 14}, search = {512, 1, 2 ^ 24},
      dynamic = {2 ^ 16, 1, 2 ^ 24}, auto = {2 ^ 16, 1, 2 ^ 24},
    }
    for name, want in pairs(WANT) do
      local scaler = amp.GradScaler {policy = name}
      local low, high = scaler:bounds()
      assert.same({want[1] + 0.0, want[2] + 0.0, want[3] + 0.0}, {scaler:get_scale(), low, high}, name)
    end
    local low, high = amp.GradScaler({policy = "megatron", init_scale = 0.5, max_scale = 8}):bounds()
    assert.same({0.5, 8.0}, {low, high})
  end)

  it("options are checked: the closest name, the type, what makes no sense", function()
    raises({"GradScaler (policy 'megatron'): unknown option 'hysterisis'", "'hysteresis'"}, amp.GradScaler,
      {policy = "megatron", hysterisis = 3})
    raises({"option 'hysteresis' must be a number, not \"2\""}, amp.GradScaler, {policy = "megatron", hysteresis = "2"})
    raises({"unknown option 'hysteresis'"}, amp.GradScaler, {policy = "dynamic", hysteresis = 2})
    raises("hysteresis must be at least 1", amp.GradScaler, {policy = "deepspeed", hysteresis = 0})
    raises("tolerance must lie between 0 and 1", amp.GradScaler, {policy = "fairseq", tolerance = 2})
    raises("beta1 must lie between", amp.GradScaler, {policy = "logmax", beta1 = 1})
    raises("update_period must be at least 1", amp.GradScaler, {policy = "histogram", update_period = 0})
    raises("skip_cost must be above 0", amp.GradScaler, {policy = "auto", skip_cost = 0})
    raises("did you mean 'megatron'", amp.GradScaler, {policy = "megatrn"})
    local path = assert(package.searchpath("halfmoon.amp.policies.megatron", package.path))
    raises({"unknown option 'hysterisis'", "'hysteresis'"}, amp.GradScaler, {policy = path, hysterisis = 3})
  end)

  it("an option that was not given is the policy's own, also after a swap", function()
    local run = new_run {policy = "dynamic"}
    assert.equal(2000, run.scaler:get_growth_interval())
    run.scaler:set_policy("megatron")
    assert.equal(1000, run.scaler:get_growth_interval())
    run.scaler:set_growth_interval(7)
    run.scaler:set_policy("metaseq")
    assert.equal(7, run.scaler:get_growth_interval())
  end)

  it("Apex holds at its cap", function()
    assert.equal("128 128 128", new_run({policy = "apex", init_scale = 64, max_scale = 128, growth_interval = 1})
      :trace("GGG"))
  end)

  it("DeepSpeed goes on at the smallest scale if told to", function()
    local run = new_run {policy = "deepspeed", init_scale = 2, raise_error_at_min_scale = false}
    assert.equal("1 1 1", run:trace("XXX"))
    raises("already at minimum", function() new_run({policy = "deepspeed", init_scale = 1}):go(inf) end)
  end)

  it("fairseq bears a share of overflows, and stops below its smallest scale", function()
    assert.equal("64 64 64 32", new_run({policy = "fairseq", init_scale = 64, tolerance = 0.5}):trace("GGXX"))
    assert.equal("4 4 4", new_run({policy = "fairseq", init_scale = 8, threshold = 4}):trace("XXX"))
    local run = new_run {policy = "fairseq", init_scale = 2, min_scale = 1}
    raises("Minimum loss scale reached", run.go, run, inf)
    assert.equal(2, run.scaler:get_scale())
  end)

  it("metaseq stays at its smallest scale", function()
    assert.equal("0.0625 0.03125 0.03125 0.0625", new_run({policy = "metaseq", init_scale = 0.125, growth_interval = 1})
      :trace("XXXG"))
  end)

  it("logmax recovers from an overflow within a few hundred steps, and ignores gradients of zeros", function()
    local run = new_run {policy = "logmax"}
    for _ = 1, 100 do run:go(64) end
    local calm = run.scaler:get_scale()
    assert(numbers.near(calm, 1024, 1e-6))
    run:go(0)
    assert.equal(calm, run.scaler:get_scale())
    run:go(inf)
    local after = run.scaler:get_scale()
    assert(after >= 8 and after < 1024, after)
    for _ = 1, 300 do run:go(64) end
    assert(run.scaler:get_scale() > 2 * after)
  end)

  it("histogram doubles until a value is above its edge, then halves", function()
    local run = new_run {policy = "histogram", init_scale = 2048}
    assert.equal("4096 8192 4096 8192 4096", run:trace("GGGGG")) -- gradients of 1: 8192 is the first large one
    assert.equal("2048", run:trace("X"))
    local slow = new_run {policy = "histogram", init_scale = 64, update_period = 3}
    assert.equal("64 64 128 128 128 256", slow:trace("GGGGGG"))
  end)

  it("search raises until the first overflow and then only falls", function()
    assert.equal("1024 2048 1024 1024 512 512", new_run({policy = "search"}):trace("GGXGXG"))
    assert.equal("512 1024 1024 2048", new_run({policy = "search", growth_interval = 2}):trace("GGGG"))
  end)

  it("norm_halving: halves above 1 / (2 s), else stays", function()
    local run = new_run {policy = "norm_halving", init_scale = 8}
    assert.equal("4 2 1 1 1", run:trace("GGGGG")) -- norm sqrt(2), down to the scaler's floor
    local tiny = new_run {policy = "norm_halving", init_scale = 2 ^ 16}
    tiny:go(2 ^ -19) -- norm 2^-18.5: below 2^-17
    assert.equal(2 ^ 16, tiny.scaler:get_scale())
    tiny:go(2 ^ -17)
    assert.equal(2 ^ 15, tiny.scaler:get_scale())
    tiny:go(inf)
    assert.equal(2 ^ 14, tiny.scaler:get_scale())
  end)

  it("async scalers refuse policies that need the histogram, before and in mid-run", function()
    raises({"GradScaler: policy 'auto' needs 'histogram'", "async = true", "hint"}, amp.GradScaler,
      {policy = "auto", async = true})
    local scaler = amp.GradScaler {async = true}
    raises({"set_policy: policy 'histogram' needs 'histogram'"}, scaler.set_policy, scaler, "histogram")
    assert.equal("dynamic", scaler.policy.name)
    amp.GradScaler {policy = "logmax", async = true}
  end)
end)

-- ====== Statistics ======

describe("statistics for policies", function()
  --- Gradients of one step as a policy sees them; params: list of {values, dtype}.
  local function event_of(needs, params, scale, unscale, device)
    local seen
    local scaler = amp.GradScaler {init_scale = scale, min_scale = 0, policy = {
      needs = needs, update = function(_, event)
        seen = event
        return 1.0
      end,
    }}
    local list = {}
    for i, q in ipairs(params) do
      list[i] = hm.zeros({#q[1]}, {dtype = q[2] or "f32", device = device, requires_grad = true})
      list[i].grad = hm.tensor(q[1], {dtype = q[2] or "f32", device = device})
    end
    local opt = optim.SGD(list, {lr = 0})
    if unscale then scaler:unscale_(opt) end
    scaler:step(opt)
    scaler:update()
    return seen
  end

  local VALUES = {0, -0.0, 1, -1.5, 1.999, 2, 65504, 1e-40, -1e-45, 3e38, 2 ^ -126, 0.75}
  local COUNTS = {zeros = 2, subnormals = 2, [0] = 3, [1] = 1, [15] = 1, [127] = 1, [-126] = 1, [-1] = 1}

  for _, device in ipairs {"cpu", "cuda"} do
    local cases
    if device == "cuda" then cases = devices.cases("spec/policy_traces_spec.lua") end
    local function case(name, fn)
      if cases then it(name .. " (cuda)", function() cases:run(name, function() fn("cuda") end) end)
      else it(name, function() fn("cpu") end) end
    end

    case("the histogram counts exponents, zeros and subnormals", function(on)
      local event = event_of({"histogram"}, {{VALUES}}, 1, false, on)
      assert.same(COUNTS, event.histogram)
      assert.is_nil(event.amax)
      assert.is_nil(event.per_param)
    end)

    case("of unscaled values, with and without unscale_", function(on)
      for _, unscale in ipairs {false, true} do
        local event = event_of({"histogram"}, {{{8, 16, 24, inf, nan, 0}}}, 8, unscale, on)
        assert.same({zeros = 1, subnormals = 0, [0] = 1, [1] = 2}, event.histogram)
      end
    end)

    case("of all parameters and dtypes together", function(on)
      local event = event_of({"histogram", "per_param"}, {
        {{1, 2, 4}}, {{2 ^ -140, 1e-320, 1e300, 0, 2, -inf}, "f64"}, {{0.5, 1}, "bf16"},
      }, 1, false, on)
      assert.same({zeros = 1, subnormals = 2, [-1] = 1, [0] = 2, [1] = 2, [2] = 1, [127] = 1}, event.histogram)
      local p = event.per_param
      assert.equal(3, #p)
      assert.equal("parameter 1", p[1].name)
      assert.equal(4, p[1].amax)
      assert(numbers.near(p[1].norm, math.sqrt(21), 1e-6))
      assert.same({1, 0}, {p[2].inf_count, p[2].nan_count})
      assert.equal(1e300, p[2].amax)
      assert.equal(1, p[3].amax)
    end)

    case("many parameters, long ones, and the same counts as one by one", function(on)
      hm.manual_seed(3)
      local list, want = {}, {zeros = 0, subnormals = 0}
      for i = 1, 45 do
        local x = hm.randn({i == 7 and 40000 or 10 * i}):exp() * 2.0 ^ (i % 9 - 4)
        list[i] = {x:totable()}
        for _, v in ipairs(list[i][1]) do
          local e = math.floor(math.log(v, 2))
          if 2.0 ^ e > v then e = e - 1 elseif 2.0 ^ (e + 1) <= v then e = e + 1 end
          want[e] = (want[e] or 0) + 1
        end
      end
      assert.same(want, event_of({"histogram"}, list, 1, false, on).histogram)
    end)
  end

  it("several optimizers in one step are one event; parameters have their names", function()
    local seen
    local scaler = amp.GradScaler {init_scale = 2, policy = {needs = {"histogram", "per_param"}, update = function(_, e)
      seen = e
      return 2
    end}}
    local model = hm.nn.Sequential(hm.nn.Linear(2, 2), hm.nn.Linear(2, 1))
    local params = model:parameters()
    local a, b = optim.SGD({params[1], params[2]}, {lr = 0}), optim.SGD({params[3], params[4]}, {lr = 0})
    for _ = 1, 2 do
      a:zero_grad()
      b:zero_grad()
      scaler:scale(model(hm.ones {1, 2}):sum()):backward()
      scaler:step(a)
      scaler:unscale_(b)
      scaler:step(b)
      scaler:update()
      assert.equal(4, #seen.per_param)
      local n = 0
      for _, count in pairs(seen.histogram) do n = n + count end
      assert.equal(9, n)
    end
    local named = {}
    for name in pairs(model:state_dict()) do named[name] = true end
    for _, p in ipairs(seen.per_param) do assert(named[p.name], p.name) end
  end)

  it("cross into policy files", function()
    local path = os.tmpname() .. ".lua"
    local f = assert(io.open(path, "w"))
    f:write [[return {
      needs = {"histogram", "per_param"},
      update = function(state, event)
        state.bins, state.name, state.amax = event.histogram[1], event.per_param[1].name, event.per_param[1].amax
        return 2
      end,
    }]]
    f:close()
    local run = new_run {init_scale = 4, policy = path}
    assert.equal("hold", (run:go(3).event == "backoff" and run:go(3) or {}).event)
    assert.same({bins = 2, name = "parameter 1", amax = 3.0}, run.scaler.state)
    os.remove(path)
  end)

  it("a policy that comes between a check and update() is not asked about what nobody measured", function()
    local run = new_run {init_scale = 64}
    run.scaler:scale((run.p * inf):sum()):backward()
    run.scaler:step(run.opt)
    run.scaler:set_policy("auto")
    assert.equal("backoff", run.scaler:update().event)
    assert.equal(32, run.scaler:get_scale())
    run:go(1)
    assert.equal(1, run.scaler.state.seen)
  end)
end)
