-- Whole training states: what a checkpoint holds, and runs that are killed and go on to the same bits.

local hm = require "halfmoon"
local devices = require "spec.support.devices"
local files = require "spec.support.files"
local numbers = require "spec.support.numbers"
local process = require "spec.support.process"
local raises = require "spec.support.raises"

local nn, optim, amp, data = hm.nn, hm.optim, hm.amp, hm.data
local path_of, read = files.folder(setup, teardown).path_of, files.read

describe("a run that is killed and goes on", function()
  local outside = devices.cpu_cases("the program from outside", it)

  local function run(kind, checkpoint, out, kill)
    local device = kind == "f16" and devices.has_double() and "HALFMOON_CUDA=emu RESUME_DEVICE=cuda " or ""
    return process.shell(("HALFMOON_THREADS=1 " .. device .. "%s spec/support/resume_run.lua %s %s %s %d"):format(process.program, kind,
      path_of(checkpoint), path_of(out), kill))
  end

  -- float16 runs on the CUDA test double where that is built
  for kind, what in pairs {
    f32 = "float32, SGD with momentum, StepLR", f16 = "float16 with a scaler, Adam, OneCycleLR",
    bf16 = "bfloat16 with stochastic rounding, AdamW, CosineAnnealingLR", policy = "a policy that grows its state",
  } do
    outside("ends with the bits of one that was not: " .. what, function()
      local said, status = run(kind, kind .. ".whole", kind .. ".want", 0)
      assert(status == 0, said)
      for _, step in ipairs {13, 20} do -- within the second epoch; on its last batch
        said, status = run(kind, kind .. ".saved", kind .. ".got", step)
        assert(status == 137, said)
        assert.is_nil(io.open(path_of(kind .. ".got")))
      end
      said, status = run(kind, kind .. ".saved", kind .. ".got", 0)
      assert(status == 0, said)
      assert.is_nil(said:find("other settings", 1, true), said)
      assert(read(path_of(kind .. ".want")) == read(path_of(kind .. ".got")), "the final states differ: " .. said)
    end)
  end

  outside("warns when settings that decide bits have changed", function()
    hm.save(path_of("settings"), {step = 1, x = hm.ones({1})})
    local said = process.script(([[
      local hm = require "halfmoon"
      local run = {step = 0}
      assert(hm.load(%q, {into = run}))
      print("step", run.step)]]):format(path_of("settings")), {HALFMOON_THREADS = 1, HALFMOON_ISA = "baseline"})
    assert.truthy(said:find("goes on under other settings", 1, true), said)
    assert.truthy(said:find("isa was %w+ and is baseline"), said)
    assert.truthy(said:find("step\t1", 1, true), said)
  end)
end)

describe("hm.load into live objects", function()
  local function objects(seed)
    hm.manual_seed(seed)
    local model = nn.Linear(3, 2)
    local opt = optim.Adam(model:parameters(), {lr = 0.1})
    return {model = model, optimizer = opt, schedule = optim.lr_scheduler.ExponentialLR(opt, {gamma = 0.5}),
      scaler = amp.GradScaler {init_scale = 1024.0}, rng = true, epoch = 0, note = "", inner = {best = 0.0, t = hm.zeros({2})}}
  end

  local function step(run)
    run.optimizer:zero_grad()
    run.scaler:scale(run.model(hm.ones({1, 3})):sum()):backward()
    run.scaler:step(run.optimizer)
    run.scaler:update()
    run.schedule:step()
  end

  it("gives each its state, sets plain values, and the random state", function()
    local a, b = objects(1), objects(2)
    step(a)
    a.epoch, a.note, a.inner.best = 7, "x", 0.25
    a.inner.t:fill_(3)
    assert.is_true(hm.save(path_of("whole"), a))
    local expected = hm.randn({4})
    local saved = assert(hm.load(path_of("whole"), {into = b}))
    numbers.assert_same(hm.randn({4}), expected)
    numbers.assert_same(b.model.weight, a.model.weight)
    assert.same({7, "x", 0.25, {3, 3}}, {b.epoch, b.note, b.inner.best, b.inner.t:totable()})
    assert.equal(a.optimizer.param_groups[1].lr, b.optimizer.param_groups[1].lr)
    assert.same(a.scaler:state_dict(), b.scaler:state_dict())
    assert.equal(7, saved.epoch)
    step(a)
    step(b)
    numbers.assert_same(b.model.weight, a.model.weight)
  end)

  it("tells what is missing or does not fit, by its name", function()
    local a = objects(1)
    assert.is_true(hm.save(path_of("part"), {model = a.model, inner = {n = 1}}))
    raises({"'optimizer' is not in the file", "hint"}, hm.load, path_of("part"), {into = {model = a.model, optimizer = a.optimizer}})
    raises("'inner.k' is not in the file", hm.load, path_of("part"), {into = {inner = {k = 1}}})
    raises({"'model'", "wrong shape"}, hm.load, path_of("part"), {into = {model = nn.Linear(4, 2)}})
    raises("'inner'", hm.load, path_of("part"), {into = {inner = hm.ones({2})}})
    raises("a table was expected", hm.load, path_of("part"), {into = {inner = {n = {deep = 1}}}})
    local nothing, _, code = hm.load(path_of("absent"), {into = a})
    assert.is_nil(nothing)
    assert.equal("ENOENT", code)
  end)

  it("refuses keys and tables that no file can hold", function()
    local loop = {}
    loop.inner = {loop}
    raises({"leads back"}, hm.save, path_of("x"), loop)
    raises("begins with $", hm.save, path_of("x"), {n = 1, a = {["$tensor"] = "b"}})
    raises("is taken", hm.save, path_of("x"), {a = hm.ones({1})}, {["halfmoon.settings"] = "x"})
    assert.is_true(hm.save(path_of("twice"), {n = 1, a = loop.inner[2], b = {1}, c = {1}}))
  end)

  it("refuses a file whose tree names a tensor that is not there", function()
    assert.is_true(hm.save(path_of("tree"), {x = hm.ones({1})}, {halfmoon_ = '{"y": {"$tensor": "z"}}'}))
    local bytes = read(path_of("tree")):gsub("halfmoon_", "halfmoon\"", 1)
    bytes = bytes:gsub('"halfmoon"":', '"halfmoon" :', 1)
    local f = assert(io.open(path_of("tree"), "wb"))
    f:write(bytes)
    f:close()
    local state, message, code = hm.load(path_of("tree"))
    assert.is_nil(state)
    assert.truthy(message:find("'z' is not in the file", 1, true), message)
    assert.equal("EFORMAT", code)
  end)
end)

describe("the place of a loader", function()
  local function loader(opts)
    local all = {data.TensorDataset(hm.arange(10, {device = "cpu"})), batch_size = 3, shuffle = true, seed = 4}
    for name, value in pairs(opts or {}) do all[name] = value end
    return data.DataLoader(all)
  end

  --- The next epochs as text, from the k-th of n batches on.
  local function epoch(l)
    local seen = {}
    for x in l:batches() do seen[#seen + 1] = table.concat(x:totable(), ",") end
    return seen
  end

  it("goes on in the middle of an epoch, for every batch and prefetch", function()
    for _, prefetch in ipairs {0, 1, 2, 5} do
      local whole = loader()
      epoch(whole)
      local second, third = epoch(whole), epoch(whole)
      for k = 1, 4 do
        local a = loader()
        epoch(a)
        local next_batch = a:batches()
        for _ = 1, k do next_batch() end
        local state = a:state_dict()
        assert.same({1, k}, {state.epoch, state.batch})
        local b = loader {prefetch = prefetch}
        b:load_state_dict(state)
        assert.equal(1, b.epoch)
        assert.same(state, b:state_dict())
        assert.same(table.move(second, k + 1, 4, 1, {}), epoch(b))
        assert.same(third, epoch(b))
      end
    end
  end)

  it("is between epochs before the first batch, at the end, and after end_epoch", function()
    local l = loader()
    assert.same({0, 0}, {l:state_dict().epoch, l:state_dict().batch})
    epoch(l)
    assert.same({1, 0}, {l:state_dict().epoch, l:state_dict().batch})
    l:batches()()
    assert.same({1, 1}, {l:state_dict().epoch, l:state_dict().batch})
    l:end_epoch()
    assert.same({2, 0}, {l:state_dict().epoch, l:state_dict().batch})
  end)

  it("is refused by a loader with another order, unless an epoch begins there", function()
    local a = loader()
    a:batches()()
    local state = a:state_dict()
    for name, other in pairs {seed = 5, batch_size = 2, shuffle = false, drop_last = true} do
      raises(name .. " must be as it was", function() loader({[name] = other}):load_state_dict(state) end)
    end
    a:end_epoch()
    loader({seed = 5}):load_state_dict(a:state_dict())
    raises("state_dict()", function() a:load_state_dict({}) end)
    raises("4 batches", function()
      state.batch = 5
      loader():load_state_dict(state)
    end)
  end)
end)

describe("the state of a scaler", function()
  it("has the counters and all that its policy keeps", function()
    local policy = {
      name = "late", needs = {}, init = function() return {scale = 8.0} end,
      update = function(state, event)
        state.steps = event.step
        return state.scale
      end,
    }
    local p = hm.ones({1}, {requires_grad = true})
    local opt = optim.SGD({p}, {lr = 0.1})
    local function use(s, factor)
      opt:zero_grad()
      s:scale((p * factor):sum()):backward()
      s:step(opt)
      s:update()
    end
    local a = amp.GradScaler {policy = policy}
    use(a, 1)
    use(a, math.huge)
    local saved = a:state_dict()
    assert.equal(2, saved.policy_state.steps)
    assert.equal(2, saved.counters.step)
    assert.equal(1, saved.counters.skipped)
    local b = amp.GradScaler {policy = policy}
    b:load_state_dict(saved)
    assert.same(saved, b:state_dict())
    assert.equal(tostring(a), tostring(b))
    use(b, 1)
    assert.equal(3, b:state_dict().policy_state.steps)
    assert.equal(3, b:record(1)[1].step)
    raises("counters.step", b.load_state_dict, b, {scale = 1.0, counters = {step = -1}})
  end)
end)
