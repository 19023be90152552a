-- simulate_spec.lua -- amp.record_gradients and amp.simulate: what is recorded, each figure of a replay by hand,
-- damaged files, the picture, and predictions held against real float16 runs.

local hm = require "halfmoon"
local devices = require "spec.support.devices"
local expect = require "spec.support.expect"
local traces = require "spec.reference.traces"

local nn, optim, amp = hm.nn, hm.optim, hm.amp
local raises = expect.raises

-- ====== Traces made by hand ======

--- A step: amax, and counts by exponent.
local function step(amax, exponents, more)
  local line = {
    amax = amax, histogram = {zeros = 0, exponents = exponents or {}},
    params = {
      amax = amax, norm = amax, histogram = {zeros = 0, exponents = exponents or {[-10] = 1}},
      per_param = {{name = "w", amax = amax, norm = amax}},
    },
  }
  for key, value in pairs(more or {}) do line[key] = value end
  return line
end

--- G: a step that never overflows; X: one that always does.
local function letters_trace(letters)
  local steps = {}
  for letter in letters:gmatch("[GX]") do
    steps[#steps + 1] = step(2.0 ^ -60, nil, {bad_count = letter == "X" and 1 or 0})
  end
  return steps
end

--- The scales after each step of the letters; "stop" where the policy stopped.
local function scales_after(letters, entry)
  local run = amp.simulate(letters_trace(letters .. "G"), {entry})[1]
  local scales = {}
  for i = 1, #letters do
    scales[i] = run.stopped == i and "stop" or run.scales[i + 1] and ("%.14g"):format(run.scales[i + 1]) or nil
  end
  return table.concat(scales, " ")
end

describe("a replay gives the golden trace of", function()
  for _, case in ipairs(traces) do
    local id, name, more, letters, want = table.unpack(case)
    local entry = {name, init_scale = 64, growth_interval = 3}
    for key, value in pairs(more) do entry[key] = value end
    it(id, function() assert.equal(want, scales_after(letters, entry)) end)
  end

  it("logmax, from recorded sizes", function()
    local steps = {}
    for i, amax in ipairs {4, 16, 4, 16, 4} do
      steps[i] = step(2.0 ^ -60) -- float32 gradients of parameters do not overflow
      steps[i].params.amax = amax
    end
    local run = amp.simulate(steps, {"logmax"})[1]
    for i, want in ipairs {1, 16384, 958.726, 1370.11, 958.726} do
      assert(math.abs(run.scales[i] - want) <= 1e-5 * want, run.scales[i])
    end
  end)
end)

-- ====== Figures ======

describe("a replay counts", function()
  local function static(scale) return {"static", init_scale = scale, min_scale = 0, max_scale = math.huge} end

  it("skipped steps, their rate, and the mean scale", function()
    local run = amp.simulate(letters_trace "GXGG", {{"dynamic", init_scale = 1024}})[1]
    assert.same({1, {2}, 0.25, 9.5}, {run.skipped, run.skipped_steps, run.overflow_rate, run.mean_log2})
    assert.same({1024, 1024, 512, 512}, run.scales)
    assert.equal("recording", run.causes[2])
  end)

  it("an overflow from 65520 on, where float16 rounds to infinity", function()
    local limit = 65520 / 1024
    for amax, skips in pairs {[limit] = 1, [limit * (1 - 1e-12)] = 0} do
      local run = amp.simulate({step(amax)}, {static(1024)})[1]
      assert.equal(skips, run.skipped)
      local half = hm.tensor({amax}, {dtype = "f64"}):mul(1024):to("f16"):to("f32"):item()
      assert.equal(skips == 1, half == math.huge)
    end
  end)

  it("an overflow of the forward at every scale, and of float32 at a huge one", function()
    local forward = {step(1e-9, nil, {forward = {amax = 70000, top = "Net.fc linear"}})}
    for _, scale in ipairs {2.0 ^ -20, 1, 2.0 ^ 20} do
      local run = amp.simulate(forward, {static(scale)})[1]
      assert.same({1, "forward"}, {run.skipped, run.causes[1]})
    end
    local huge = step(2.0 ^ -120)
    huge.params.amax = 2.0 ^ 10
    assert.equal(0, amp.simulate({huge}, {static(2.0 ^ 117)})[1].skipped)
    assert.equal("parameter", amp.simulate({huge}, {static(2.0 ^ 118)})[1].causes[1])
  end)

  it("values lost to underflow among those that are not zero, in the steps taken", function()
    local line = step(2.0 ^ -9, {[-30] = 10, [-20] = 10, [-10] = 80})
    line.histogram.zeros = 1000
    for scale, want in pairs {[1] = 0.1, [8] = 0.1, [32] = 0.0, [24] = 0.1 / 3, [2.0 ^ -10] = 0.2} do
      assert(math.abs(amp.simulate({line}, {static(scale)})[1].flushed - want) < 1e-12, scale)
    end
    -- a step that is skipped loses all, and is not counted here
    local lost = step(2.0 ^ -9, {[-60] = 100}, {bad_count = 1})
    assert.equal(0.1, amp.simulate({line, lost}, {static(1)})[1].flushed)
  end)

  it("as float16's own rounding does, also between powers of two", function()
    hm.manual_seed(3)
    local x = hm.rand({20000}) * 2.0 ^ -22
    local census = require("halfmoon.core").census(x)
    local line = step(census.amax, census.bins)
    for _, scale in ipairs {1, 2, 0.7, 5.3, 16} do
      local zeros = (x * scale):to("f16"):eq(0):sum():item()
      local got = amp.simulate({line}, {static(scale)})[1].flushed * 20000
      assert(math.abs(got - zeros) <= 0.01 * 20000, ("%g instead of %d at %g"):format(got, zeros, scale))
    end
  end)

  it("steps until the scale is back after the first backoff of a spike", function()
    -- 64 64 64 128 | X: 64, back after 3 steps | XX: 32, back after 6 more
    local run = amp.simulate(letters_trace "GGGXGGGXXGGGGGGG", {{"dynamic", init_scale = 64, growth_interval = 3}})[1]
    assert.same({(3 + 7) / 2, 2, 0}, {run.recovery, run.recovered, run.unrecovered})
    local open = amp.simulate(letters_trace "GXGG", {{"dynamic", init_scale = 64}})[1]
    assert.is_nil(open.recovery)
    assert.same({0, 1}, {open.recovered, open.unrecovered})
    -- with a chance to spare the first overflow does not move the scale
    local spared = amp.simulate(letters_trace "GXGG", {{"megatron", init_scale = 64, hysteresis = 2}})[1]
    assert.same({1, 0}, {spared.skipped, spared.unrecovered})
  end)

  it("within the bounds of the scaler, and faults and stops as it does", function()
    local fall = amp.simulate(letters_trace(("X"):rep(30)), {"dynamic", {"dynamic", min_scale = 2.0 ^ 10}})
    assert.same({1, 2.0 ^ 10}, {fall[1].scales[30], fall[2].scales[30]})
    local rise = amp.simulate(letters_trace(("G"):rep(30)), {{"dynamic", growth_interval = 1}})[1]
    assert.equal(2.0 ^ 24, rise.scales[30])
    local heard = {}
    local odd = {name = "odd", update = function(state, event)
      heard[event.step] = event.found_inf
      if event.step == 2 then error("no idea", 0) end
      return 2.0 ^ event.step, event.step == 4 and {stop = "enough"} or nil
    end}
    local run = amp.simulate(letters_trace "GXGGGG", {{odd, init_scale = 4}})[1]
    assert.same({false, true, false, false}, heard)
    assert.same({4, 2, 2, 8}, run.scales)
    assert.same({1, 4, "odd 4"}, {run.faults, run.stopped, run.label})
    assert.truthy(run.message:find("enough", 1, true))
    assert.truthy(run.fault:find("no idea", 1, true))
  end)

  it("what policies ask for, from the recorded parameters", function()
    local got
    local curious = {
      name = "curious", needs = {"amax", "norm", "histogram", "per_param"},
      update = function(_, event)
        got = event
        return 8.0
      end,
    }
    local line = step(0.5, {[-1] = 7})
    line.params.norm = 3.0
    amp.simulate({line}, {curious})
    assert.same({0.5, 3.0, {[-1] = 7, zeros = 0, subnormals = 0}, "w", 1, 0},
      {got.amax, got.norm, got.histogram, got.per_param[1].name, got.step, got.inf_count})
    amp.simulate({step(2.0 ^ 20, {[19] = 3, [-4] = 9})}, {curious})
    assert.same({true, 3}, {got.found_inf, got.inf_count})
    raises("needs 'histogram' of the parameters' gradients, which step 1", amp.simulate,
      {{amax = 1, histogram = {exponents = {}}}}, {"auto"})
  end)

  it("every policy that comes with the library, and files, by default and by name", function()
    local steps = {}
    for i = 1, 40 do steps[i] = step(2.0 ^ (-6 + i % 5), {[-8] = 50, [-20] = 50}) end
    local all = amp.simulate(steps)
    assert.equal(#amp.policies.names(), #all)
    for _, run in ipairs(all) do assert.same({40, 0}, {#run.scales, run.faults}) end
    local mine = {"dynamic", label = "mine", growth_interval = 7}
    local two = amp.simulate(steps, {"examples/policies/cautious.lua", mine})
    assert.same({"cautious", "mine"}, {two[1].label, two[2].label})
    local text = tostring(two)
    for _, part in ipairs {"40 recorded steps", "skipped", "flushed", "recovery", "mine", "2^"} do
      assert.truthy(text:find(part, 1, true), text)
    end
    steps[3].histogram.exponents[-60] = 1 -- of 4,001 values
    assert.truthy(tostring(amp.simulate(steps, {{"static", init_scale = 2.0 ^ 6}})):find(" 0.025%", 1, true))
    local part = amp.simulate(steps, {"static"}, {first = 11, last = 20})
    assert.equal(10, part.steps)
  end)

  it("nothing for options that do not fit", function()
    local steps = letters_trace "G"
    raises("unknown policy 'dynamc', did you mean 'dynamic'?", amp.simulate, steps, {"dynamc"})
    raises("unknown option 'growth_intervall'", amp.simulate, steps, {{"dynamic", growth_intervall = 3}})
    raises("option 'async' does not fit", amp.simulate, steps, {{"dynamic", async = true}})
    raises("option 'groups' does not fit", amp.simulate, steps, {{"dynamic", groups = {}}})
    raises("the array of policies has the key 'growth_interval'", amp.simulate, steps, {"dynamic", growth_interval = 3})
    raises("no policy was given", amp.simulate, steps, {})
    raises("policies must be an array", amp.simulate, steps, 3)
    raises("policy 1 must be a name", amp.simulate, steps, {3})
    raises("the trace has no steps", amp.simulate, {}, {"dynamic"})
    raises("the trace must be a path", amp.simulate, 3)
    raises("ends before step 2", amp.simulate, steps, {"dynamic"}, {first = 2})
    raises("last (2) must not be below first (3)", amp.simulate, steps, {"dynamic"}, {first = 3, last = 2})
  end)
end)

-- ====== Files ======

describe("a recording", function()
  local path
  before_each(function() path = os.tmpname() end)
  after_each(function() os.remove(path) end)

  local function write(...)
    local file = assert(io.open(path, "w"))
    file:write(table.concat({...}, "\n"), "\n")
    file:close()
  end

  local HEADER = '{"trace": "halfmoon gradients", "version": 1}'
  local GOOD = '{"step": 1, "amax": 0.5, "histogram": {"zeros": 0, "exponents": {"-1": 3}}}'

  it("that is damaged or something else is refused, with the line", function()
    local function refused(part, ...)
      write(...)
      raises(part, amp.simulate, path, {"dynamic"})
      raises(part, amp.read_gradients, path)
    end
    refused("line 3: no JSON", HEADER, GOOD, GOOD:sub(1, 40))
    refused("line 1: not a recording of gradients", GOOD)
    refused("line 1: no JSON", "step,amax", "1,2")
    refused("the trace of a scaler", '{"step": 1, "scale": 2, "new_scale": 2, "found_inf": false}')
    refused("version 2 is not known", '{"trace": "halfmoon gradients", "version": 2}')
    refused("line 3: 'amax' must be a finite number that is not negative, not", HEADER, GOOD,
      '{"step": 2, "amax": "big", "histogram": {"exponents": {}}}')
    refused("line 2: 'amax'", HEADER, '{"step": 1, "amax": {"$number": "inf"}, "histogram": {"exponents": {}}}')
    refused("line 2: 'histogram' must be an object", HEADER, '{"step": 1, "amax": 1}')
    refused("line 2: 'histogram.exponents[4]' must be a count", HEADER,
      '{"step": 1, "amax": 1, "histogram": {"exponents": {"4": -1}}}')
    refused("has the key", HEADER, '{"step": 1, "amax": 1, "histogram": {"exponents": {"x": 1}}}')
    refused("line 2: 'params.norm'", HEADER,
      '{"step": 1, "amax": 1, "histogram": {"exponents": {}}, "params": {"amax": 1}}')
    refused("line 2: expected an object", HEADER, "7")
    write()
    raises("line 1", amp.simulate, path)
    raises("No such file", amp.simulate, path .. ".none")
    raises("No such file", amp.read_gradients, path .. ".none")
    raises("examples cannot be read: Is a directory", amp.simulate, "examples")
    raises("the path must be a string", amp.read_gradients, 3)
    write(HEADER, GOOD)
    assert.equal(0.5, amp.read_gradients(path)[1].amax)
    assert.equal(0, amp.simulate(path, {"dynamic"})[1].skipped)
  end)

  -- ====== What is recorded ======

  local MODES = {
    bf16 = function() return amp.autocast("bf16") end,
    ["float32 backward"] = function() return amp.autocast {dtype = "f16", backward = "float32"} end,
    ["no autocast"] = function() return nil end,
  }

  --- One backward of a small network, recorded; returns its line.
  local function record_one(mode, scale, opts)
    hm.manual_seed(1)
    local model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    local x, y = hm.randn {32, 8}, hm.randint(0, 3, {32})
    amp.record_gradients(path, model, opts or {}, function(rec)
      local loss
      do
        local _ <close> = MODES[mode]()
        loss = nn.functional.cross_entropy(model(x), y)
      end
      (loss * (scale or 1)):backward()
      rec:step(scale)
    end)
    return amp.read_gradients(path)[1], model
  end

  it("holds the gradients that float16 training would hold, whatever the backward's dtype", function()
    for mode in pairs(MODES) do
      local line, model = record_one(mode)
      local names = {}
      for i, t in ipairs(line.tensors) do names[i] = ("%s %d"):format(t.name, t.count) end
      assert.same({"Sequential.2 linear 128", "Sequential.1 relu 512", "Sequential.0 linear 512"}, names, mode)
      local n = line.histogram.zeros
      for _, count in pairs(line.histogram.exponents) do n = n + count end
      assert.equal(128 + 512 + 512, n)
      assert.equal("Sequential.2 linear", line.top)
      assert.equal(line.tensors[1].amax, line.amax)
      local exact = amp.histogram(model)
      assert.equal(exact.total.amax, line.params.amax)
      assert(math.abs(exact.total.norm - line.params.norm) < 1e-9)
      assert.equal("0.weight", line.params.per_param[1].name)
      assert.equal(0, line.bad_count)
      assert.equal("Sequential.0 linear", line.forward.top)
    end
  end)

  it("has the same figures whatever the loss was scaled by", function()
    local plain, scaled = record_one("float32 backward"), record_one("float32 backward", 1024)
    assert.same({1.0, 1024}, {plain.scale, scaled.scale})
    scaled.scale = plain.scale
    assert.same(plain, scaled)
    raises("must be a power of two, not 3", record_one, "bf16", 3)
  end)

  it("leaves out figures of tensors when told to", function()
    local line = record_one("bf16", 1, {per_tensor = false})
    assert.is_nil(line.tensors)
    assert(line.amax > 0)
  end)

  it("has the exact largest gradient, also of sums where paths meet", function()
    for mode, open in pairs(MODES) do
      hm.manual_seed(2)
      local fc = nn.Linear(4, 4)
      local x = hm.randn {8, 4}
      local h, rec
      rec = amp.record_gradients(path, fc)
      do
        local _ <close> = open()
        h = fc(x)
        h:retain_grad()
        local out = (h * 100):add(h * 50)
        out:float():sum():backward()
      end
      rec:step()
      rec:close()
      rec:close() -- does nothing
      raises("has ended", rec.step, rec)
      local line = amp.read_gradients(path)[1]
      assert.equal(150, line.amax, mode)
      assert.equal(h.grad:abs():max():item(), line.amax)
      assert.truthy(line.top:find("linear", 1, true), line.top)
    end
  end)

  it("tells of values that were not finite, and of none where a batch is empty", function()
    local fc = nn.Linear(4, 4)
    amp.record_gradients(path, fc, function(rec)
      for _, factor in ipairs {1, math.huge, 0 / 0} do
        fc:zero_grad()
        local x = hm.randn {2, 4}
        local h = amp.autocast("bf16", function() return fc(x) end)
        h[{1, 1}]:float():mul(factor):sum():backward()
        rec:step()
      end
      fc:zero_grad()
      amp.autocast("bf16", function() return fc(hm.zeros {0, 4}) end):float():sum():backward()
      rec:step()
    end)
    local lines = amp.read_gradients(path)
    assert.same({0, 0}, {lines[1].bad_count, lines[4].bad_count})
    assert(lines[2].bad_count > 0 and lines[3].bad_count > 0 and lines[2].params.inf_count > 0)
    assert.equal(0, lines[4].amax)
    local run = amp.simulate(path, {{"static", init_scale = 1}})[1]
    assert.same({{2, 3}, "recording"}, {run.skipped_steps, run.causes[2]})
  end)

  it("predicts what overflows in the forward, which float16 then does", function()
    local fc = nn.Linear(4, 4)
    local opt = optim.SGD(fc:parameters(), {lr = 0})
    local x = hm.full({2, 4}, 30000)
    hm.no_grad(function() fc.weight:fill_(2) end)
    amp.record_gradients(path, opt, function(rec)
      amp.autocast("bf16", function() return fc(x):float():mean() end):backward()
      rec:step()
    end)
    for _, run in ipairs(amp.simulate(path, {"static", "dynamic"})) do assert.equal("forward", run.causes[1]) end
    opt:zero_grad()
    local scaler = amp.GradScaler()
    scaler:scale(amp.autocast("f16", function() return fc(x):float():pow(2):mean() end)):backward()
    assert.is_false((scaler:step(opt)))
  end)

  it("is one at a time, ends with its function, and says what is wrong", function()
    local fc = nn.Linear(2, 2)
    local rec = amp.record_gradients(path, fc)
    raises("is being recorded already", amp.record_gradients, path, fc)
    raises("no gradient was made since the last step", rec.step, rec)
    rec:close()
    raises("oh no", amp.record_gradients, path, fc, function() error("oh no") end)
    assert.same({7, "x"}, {amp.record_gradients(path, fc, function(_, a, b) return a, b end, 7, "x")})
    raises("expected a model or an optimizer", amp.record_gradients, path, 3)
    raises("path must be a string", amp.record_gradients, 3, fc)
    raises("did you mean 'per_tensor'", amp.record_gradients, path, fc, {per_tensors = true})
    raises("/nowhere/run.jsonl", amp.record_gradients, "/nowhere/run.jsonl", fc)
    do
      local scope <close> = amp.record_gradients(path, fc)
      assert.equal(0, scope.steps)
    end
    local again = amp.record_gradients(path, fc)
    again:close()
    local full = io.open("/dev/full", "w")
    if not full then return end
    full:close()
    raises("cannot be written", amp.record_gradients, "/dev/full", fc)
    amp.record_gradients(path, fc):close()
  end)

  it("does not change what it looks at", function()
    local function train(recorded)
      hm.manual_seed(4)
      local model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
      local opt = optim.Adam(model:parameters(), {lr = 0.01})
      local rec = recorded and amp.record_gradients(path, model)
      for _ = 1, 3 do
        opt:zero_grad()
        amp.autocast("bf16", function() return model(hm.randn {16, 8}):float():pow(2):mean() end):backward()
        if rec then rec:step() end
        opt:step()
      end
      if rec then rec:close() end
      return model[1].weight:detach():clone()
    end
    assert.is_true(train(false):eq(train(true)):all():item())
    assert.equal(3, #amp.read_gradients(path))
  end)

  -- ====== The picture ======

  --- Raises unless every element is closed; returns how many of each name and class there are.
  local function parse(text)
    local open, counts = {}, {}
    for slash, name, rest in text:gmatch("<(/?)([%a]+)([^<>]*)>") do
      if slash == "/" then
        assert(table.remove(open) == name, "</" .. name .. "> closes another")
      else
        local class = rest:match('class="([^"]*)"')
        local key = class and name .. "." .. class or name
        counts[key] = (counts[key] or 0) + 1
        assert(select(2, rest:gsub('"', "")) % 2 == 0, rest)
        if rest:sub(-1) ~= "/" then open[#open + 1] = name end
      end
    end
    assert(#open == 0, "not closed: " .. table.concat(open, " "))
    local plain = text:gsub("<[^<>]*>", "")
    assert(not plain:find("[<>]") and not plain:gsub("&%a+;", ""):find("&", 1, true))
    return counts
  end

  it("draws all scales, with a mark at each overflow", function()
    local steps = letters_trace "GGXGGXXGGG"
    steps[5] = step(2.0 ^ 3, {[3] = 1}, {top = 'Net.<a & "b"> linear'})
    steps[6] = step(2.0 ^ 12, {[12] = 1}, {top = 'Net.<a & "b"> linear'})
    local result = amp.simulate(steps, {
      {"dynamic", growth_interval = 2}, "megatron", {"static", init_scale = 1, label = "a <& b>"}, "deepspeed", "keras",
      "apex", "search", "fairseq", "metaseq",
    })
    local marks = 0
    for _, run in ipairs(result) do marks = marks + run.skipped end
    assert(marks > 10)
    local svg = result:to_svg {title = "scales & <steps>"}
    local counts = parse(svg)
    assert.equal(marks, counts["circle.overflow"])
    assert.equal(#result, counts["g.policy"])
    assert.equal(2, counts["path.ceiling"]) -- the line, and in the legend
    for _, part in ipairs {
      "scales &amp; &lt;steps&gt;", "a &lt;&amp; b&gt;", "Net.&lt;a &amp; &quot;b&quot;&gt; linear",
    } do
      assert.truthy(svg:find(part, 1, true), part)
    end
    assert.is_nil(svg:find("nan", 1, true) or svg:find("inf[^o]"))
    assert.is_true(result:svg(path))
    assert.equal(svg:gsub("scales &amp; &lt;steps&gt;", "loss scales"), assert(io.open(path)):read("a"))
    local ok, message = result:svg("/nowhere/x.svg")
    assert.is_nil(ok)
    assert.truthy(message:find("/nowhere/x.svg", 1, true))
    raises("option 'width' must be at least 320", result.to_svg, result, {width = 3})
  end)

  it("is replayed by the script", function()
    write(HEADER, GOOD, GOOD)
    local program = os.getenv("HALFMOON_PROGRAM") or "build/halfmoon"
    local function run(arguments)
      local pipe = assert(io.popen(("%s scripts/simulate_policies.lua %s 2>&1"):format(program, arguments)))
      local text = pipe:read("a")
      return pipe:close(), text
    end
    local svg = path .. ".svg"
    local ok, text = run(path .. " --policies dynamic:growth_interval=1,static:init_scale=2^20 --svg " .. svg)
    assert(ok, text)
    for _, part in ipairs {"2 recorded steps", "dynamic growth_interval=1", "static 2^20", "drawn to"} do
      assert.truthy(text:find(part, 1, true), text)
    end
    os.remove(svg)
    for arguments, part in pairs {
      [""] = "the first argument must be a trace", [path .. " --policies dynamc"] = "did you mean",
      [path .. " --policies dynamic:x"] = "must be NAME=VALUE", ["/nowhere"] = "No such file",
      [path .. " --policies ,"] = "names no policy", ["README.md"] = "simulate_policies.lua: README.md: line 1",
    } do
      ok, text = run(arguments)
      assert(not ok and text:find(part, 1, true), text)
    end
  end)

  -- ====== Held against real runs ======

  local STEPS = 240

  --- A network whose loss drifts by 2^8 both ways, with a spike of 2^6 now and then.  body(step, model, opt, loss): one
  --- step from the loss function on.
  local function train(body)
    hm.manual_seed(6)
    local x = hm.randn {64, 16}
    local y = x:matmul(hm.randn {16, 1}):tanh()
    local model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    local opt = optim.Adam(model:parameters(), {lr = 1e-3})
    for i = 1, STEPS do
      local factor = 2.0 ^ (8 * math.sin(4 * math.pi * i / STEPS) + (i % 37 == 0 and 6 or 0))
      opt:zero_grad()
      body(opt, function() return (model(x):float() - y):pow(2):mean() * factor end, model)
    end
  end

  local function record(scope)
    local rec
    train(function(opt, loss, model)
      rec = rec or amp.record_gradients(path, model)
      local value
      do
        local _ <close> = scope()
        value = loss()
      end
      value:backward()
      rec:step()
      opt:step()
    end)
    rec:close()
  end

  --- Steps that a real float16 run skips.
  local function skipped_by(options)
    local scaler = amp.GradScaler(options)
    train(function(opt, loss)
      scaler:scale(amp.autocast("f16", loss)):backward()
      scaler:step(opt)
      scaler:update()
    end)
    return scaler.skipped
  end

  it("predicts the skips of real float16 runs, by policy", devices.cpu_only("trainings of its own", function()
    -- from a static scale that never overflows to a rule that climbs to the edge again and again
    local entries = {
      {"static", init_scale = 2.0 ^ 6}, {"static", init_scale = 2.0 ^ 14}, {"dynamic", growth_interval = 5},
      {"megatron", init_scale = 2.0 ^ 16, growth_interval = 8}, {"auto"},
    }
    local real = {}
    for i, entry in ipairs(entries) do
      local options = {policy = entry[1], init_scale = entry.init_scale, growth_interval = entry.growth_interval}
      real[i] = skipped_by(options)
    end
    assert.equal(0, real[1])
    assert(real[2] >= 25 and real[3] >= 15 and real[4] >= 15, table.concat(real, " "))
    -- A recording in bfloat16 rounds to 8 bits where float16 rounds to 11, and a real run lacks the steps that it
    -- skips: one step in ten may differ, or two.
    for mode, scope in pairs(MODES) do
      record(scope)
      for i, run in ipairs(amp.simulate(path, entries)) do
        local allowed = math.max(2, real[i] / 10)
        assert(math.abs(run.skipped - real[i]) <= allowed,
          ("%s, recorded with %s: %d predicted, %d real"):format(run.label, mode, run.skipped, real[i]))
      end
    end
  end))
end)
