-- policy_spec.lua -- loss-scale policies: golden traces, tables, names and files, swapping in mid-run, files that change on disk, and
-- policies that fail in every way they can, which must cost nothing but a report.

local hm = require "halfmoon"
local core = require "halfmoon.core"
local numbers = require "spec.support.numbers"
local expect = require "spec.support.expect"
local new_run = require "spec.support.policy_run"

local amp = hm.amp
local raises = expect.raises
local nan = 0 / 0

-- ====== Files ======

local folder = os.tmpname()
os.remove(folder)
os.execute("mkdir -p '" .. folder .. "'")
local count = 0

local function write(path, text)
  local f = assert(io.open(path, "w"))
  f:write(text)
  f:close()
end

--- A policy file of a name that no other test uses.
local function file(text)
  count = count + 1
  local path = ("%s/policy%d.lua"):format(folder, count)
  write(path, text)
  return path
end

--- Another version of the file, with a time of its own.
local function rewrite(path, text, second)
  write(path, text)
  os.execute(("touch -d '2030-01-01 00:00:%02d' '%s'"):format(second, path))
end

local function policy_file(body)
  return file("return {\n  name = \"probe\",\n  update = function(state, event, opts)\n" .. body .. "\n  end,\n}\n")
end

describe("policies", function()
  teardown(function() os.execute("rm -rf '" .. folder .. "'") end)

  -- ====== Golden traces ======

  describe("dynamic", function()
    local trace = "G G G G X G G G X X G G G G G G X G X G"
    local want = "64 64 128 128 64 64 64 128 64 32 32 32 64 64 64 128 64 64 32 32"

    it("follows PyTorch's trace", function()
      assert.equal(want, (new_run {init_scale = 64, growth_interval = 3}:trace(trace)))
    end)

    it("ten overflows and a clean step, down to 1", function()
      assert.equal("32 16 8 4 2 1 1 1 1 1 1", (new_run {init_scale = 64, growth_interval = 3, min_scale = 1}:trace("XXXXXXXXXXG")))
    end)

    it("is the default, and the same as a table and as a file", function()
      assert.equal("dynamic", new_run().scaler.policy.name)
      assert.equal(want, (new_run {init_scale = 64, growth_interval = 3, policy = amp.policies.dynamic}:trace(trace)))
      local path = assert(package.searchpath("halfmoon.amp.policies.dynamic", package.path))
      assert.equal(want, (new_run {init_scale = 64, growth_interval = 3, policy = path}:trace(trace)))
    end)

    it("other factors", function()
      assert.equal("64 256 64 64", (new_run {init_scale = 64, growth_interval = 2, growth_factor = 4, backoff_factor = 0.25}:trace("GGXG")))
    end)

    it("a growth interval lowered in mid-run takes effect at once", function()
      local run = new_run {init_scale = 64, growth_interval = 100}
      run:trace("GGGGG")
      run.scaler:set_growth_interval(3)
      assert.equal("128", (run:trace("G")))
    end)
  end)

  it("static keeps its scale and still skips", function()
    local run = new_run {init_scale = 64, policy = "static"}
    local record, stepped = run:go("X")
    assert.equal("hold", record.event)
    assert.is_false(stepped)
    assert.equal("64 64 64", (run:trace("GXG")))
  end)

  it("the examples load and run", function()
    for _, name in ipairs {"cautious", "flush_budget", "headroom", "spike_guard", "worst_layer"} do
      local run = new_run {policy = ("./examples/policies/%s.lua"):format(name)}
      for letter in ("GGGXGGXG"):gmatch(".") do assert.not_equal("fault", run:go(letter).event, name) end
    end
  end)

  -- ====== The three forms ======

  it("a table: state, event and options as promised", function()
    local seen = {}
    local run = new_run {init_scale = 8, mine = 5, policy = {
      name = "mine", needs = {"amax", "norm"},
      init = function(opts)
        seen.opts = opts.mine
        return {scale = opts.init_scale, n = 0}
      end,
      update = function(state, event, opts)
        state.n = state.n + 1
        seen[state.n] = event
        assert(opts.mine == 5)
        return state.scale
      end,
    }}
    run:go("G")
    run:go("X")
    assert.equal(5, seen.opts)
    assert.is_false(seen[1].found_inf)
    assert.equal(1, seen[1].step)
    assert.equal(8.0, seen[1].scale)
    assert.equal(1.0, seen[1].amax)
    assert(numbers.near(seen[1].norm, math.sqrt(2), 1e-6))
    assert.is_true(seen[2].found_inf)
    assert.equal(2, seen[2].inf_count)
    assert.equal(0, seen[2].nan_count)
    assert.equal(2, seen[2].step)
    assert.equal(2, run.scaler:state_dict().policy_state.n)
  end)

  it("statistics that were not asked for are not in the event", function()
    local seen
    local run = new_run {policy = {update = function(_, event)
      seen = event
      return 2
    end}}
    run:go("G")
    assert.is_nil(seen.amax)
    assert.is_nil(seen.norm)
  end)

  it("unknown names, tables that are none, needs and options that do not exist", function()
    raises({"GradScaler: unknown policy 'dynamik', did you mean 'dynamic'?", "static"}, amp.GradScaler, {policy = "dynamik"})
    raises("a policy needs update", amp.GradScaler, {policy = {}})
    raises("init must be a function", amp.GradScaler, {policy = {update = print, init = 3}})
    raises({"needs \"amaks\"", "amax, norm"}, amp.GradScaler, {policy = {update = print, needs = {"amaks"}}})
    raises("policy", amp.GradScaler, {policy = 3})
    raises({"GradScaler (policy 'dynamic'): unknown option 'growth'"}, amp.GradScaler, {growth = 3})
    raises({"cannot read the policy file", "absent.lua"}, amp.GradScaler, {policy = folder .. "/absent.lua"})
    raises("failed in init", amp.GradScaler, {policy = {update = print, init = function() error("not today") end}})
    raises("init returned", amp.GradScaler, {policy = {update = print, init = function() return 3 end}})
    local names = table.concat(amp.policies.names(), " ")
    for _, name in ipairs {"auto", "dynamic", "megatron", "static"} do assert.matches(name, names, 1, true) end
  end)

  it("a file that does not compile, returns no table, or has no update is refused with file and line", function()
    local path = file("return {\n  update = function(\n")
    raises({path .. ":", "set_policy"}, function() new_run().scaler:set_policy(path) end)
    raises("must return a table", amp.GradScaler, {policy = file("return 3")})
    raises("update", amp.GradScaler, {policy = file("return {}")})
    raises({":2:", "on loading"}, amp.GradScaler, {policy = file("\nerror('on loading')")})
    raises("needs", amp.GradScaler, {policy = file("return {needs = {'amaks'}, update = function() return 1 end}")})
  end)

  it("a file's state is plain data that goes into the state dict and comes back", function()
    local path = file [[return {
      init = function(opts) return {scale = opts.init_scale, n = 0, word = "a", list = {1, 2}} end,
      update = function(state) state.n = state.n + 1 state.word = state.word .. "b" return 2.0 ^ state.n end,
    }]]
    local run = new_run {init_scale = 4, policy = path}
    assert.equal("2 4 8", (run:trace("GGG")))
    local saved = run.scaler:state_dict()
    assert.equal(3, saved.policy_state.n)
    assert.equal("abbb", saved.policy_state.word)
    local other = new_run {init_scale = 4, policy = path}
    other.scaler:load_state_dict(saved)
    assert.equal("16", (other:trace("G")))
  end)

  -- ====== Swapping ======

  it("set_policy in mid-run by table, name and file keeps the scale and what both have, and says what it reset", function()
    local run = new_run {init_scale = 64, growth_interval = 3}
    run:trace("GG")
    local said, report = expect.stderr(run.scaler.set_policy, run.scaler, {
      name = "other",
      init = function() return {scale = 1, clean = 0, extra = 7} end,
      update = function(state) return state.scale * (state.clean == 2 and 2 or 1) end,
    })
    assert.same({"clean", "scale"}, report.kept)
    assert.same({"extra"}, report.reset)
    assert.matches("policy 'dynamic' -> 'other'; kept: clean, scale; reset: extra", tostring(report), 1, true)
    assert.matches("policy 'dynamic' -> 'other'", said, 1, true)
    assert.equal(64, run.scaler:get_scale())
    assert.equal("128", (run:trace("G")))
    expect.stderr(run.scaler.set_policy, run.scaler, "static")
    assert.equal("128 128", (run:trace("GX")))
    local path = policy_file("return state.scale and 16 or 16")
    expect.stderr(run.scaler.set_policy, run.scaler, path)
    assert.equal("16", (run:trace("G")))
    raises("set_policy: unknown policy", run.scaler.set_policy, run.scaler, "dinamic")
    assert.equal("probe", run.scaler.policy.name) -- a refused one changes nothing
    raises("failed in init", run.scaler.set_policy, run.scaler, {update = print, init = function() error("no") end})
    assert.equal("probe", run.scaler.policy.name)
    assert.equal("16", (run:trace("G")))
  end)

  it("set_policy takes options for the new policy and checks them", function()
    local run = new_run {init_scale = 64}
    run.scaler:set_policy("dynamic", {growth_interval = 1})
    assert.equal("128", (run:trace("G")))
    raises("growth_interval", run.scaler.set_policy, run.scaler, "dynamic", {growth_interval = 0})
    raises({"unknown option", "growth_interval"}, run.scaler.set_policy, run.scaler, "dynamic", {growth_intervall = 2})
    for name, value in pairs {max_scale = 128, init_scale = 4, async = true, trace = "run.jsonl"} do
      raises({name, "belongs to the scaler"}, run.scaler.set_policy, run.scaler, "dynamic", {[name] = value})
    end
    assert.equal(1, run.scaler:get_growth_interval())
  end)

  -- ====== Files that change ======

  it("a file that changes on disk is read again; state carries over, and what was reset is said", function()
    local path = file("return {init = function() return {n = 0} end, update = function(state) state.n = state.n + 1 return 2 end}")
    local run = new_run {init_scale = 4, policy = path}
    assert.equal("2", (run:trace("G")))
    rewrite(path, [[return {
      init = function() return {n = 0, m = 5} end,
      update = function(state) state.n = state.n + 1 return 4 * state.n + state.m end,
    }]], 1)
    local said, scales = expect.stderr(run.trace, run, "G")
    assert.equal("13", scales)
    assert.matches("read again from", said, 1, true)
    assert.matches("reset: m", said, 1, true)
    assert.equal("17", (run:trace("G")))
  end)

  it("a new version that does not load leaves the old one in use, and is reported once with file and line", function()
    local path = policy_file("return 8")
    local run = new_run {init_scale = 4, policy = path}
    assert.equal("8", (run:trace("G")))
    rewrite(path, "return {\n  update = function(\n", 2)
    local record
    local said = expect.stderr(function() record = run:go("G") end)
    assert.equal("fault", record.event)
    assert.equal(8, record.new_scale)
    assert.matches(path .. ":", record.message, 1, true)
    assert.matches("stays in use", record.message, 1, true)
    assert.matches(path .. ":", said, 1, true)
    local again = expect.stderr(function() record = run:go("G") end)
    assert.equal("", again)
    assert.equal("hold", record.event)
    assert.equal(8, record.new_scale)
    rewrite(path, "return {update = function() return 32 end}", 3)
    local _, scales = expect.stderr(run.trace, run, "G")
    assert.equal("32", scales)
  end)

  it("a new version whose init fails, or a file that is gone, leaves the old one in use", function()
    local path = policy_file("return 8")
    local run = new_run {init_scale = 4, policy = path}
    run:go("G")
    rewrite(path, "return {init = function() error('init of the new version') end, update = function() return 16 end}", 4)
    local record
    expect.stderr(function() record = run:go("G") end)
    assert.equal("fault", record.event)
    assert.matches("init of the new version", record.message, 1, true)
    expect.stderr(function() record = run:go("G") end)
    assert.equal(8, record.new_scale)
    assert.equal("hold", record.event)
    os.remove(path)
    assert.equal("8", (run:trace("G")))
  end)

  -- ====== Failures ======

  local FAILURES = {
    {"raises", "error('the policy is tired')", "the policy is tired"},
    {"raises a table", "error({})", ""},
    {"returns nothing", "return", "not"},
    {"returns nil", "return nil", "not"},
    {"returns a string", "return 'big'", "returned"},
    {"returns a boolean", "return true", "returned"},
    {"returns zero", "return 0", "positive"},
    {"returns a negative number", "return -4", "positive"},
    {"returns NaN", "return 0/0", "positive"},
    {"returns infinity", "return math.huge", "positive"},
    {"indexes nil", "return event.nothing.at_all", "index"},
    {"calls what is not there", "return os.times()", "a nil value"},
  }
  local ENDLESS = {
    {"loops for ever", "while true do end", "instructions"},
    -- Under the sanitizers an allocation costs so much that the clock may be first.
    {"allocates without end", "local t = {} while true do t[#t + 1] = {} end", os.getenv("HALFMOON_SANITIZED") and "" or "memory"},
    {"makes long strings without end", "local s = 'x' while true do s = s .. s end", "memory"},
    {"recurses for ever", "local function f() return 1 + f() end return f()", ""},
    {"makes a huge table at once", "return #table.move({1}, 1, 1000000000, 1, {})", ""},
    {"concatenates a great deal", "local t = {} for i = 1, 100000 do t[i] = 'xxxxxxxxxxxxxxxx' end while true do table.concat(t) end", ""},
  }

  local function check_failure(policy, name, says, where, once)
    local run = new_run {init_scale = 64, policy = policy}
    local record, stepped
    local said = expect.stderr(function() record, stepped = run:go("G") end)
    assert.is_true(stepped) -- training goes on
    assert.equal("fault", record.event, name)
    assert.equal(64, record.new_scale)
    assert.equal(64, record.old_scale)
    assert.is_string(record.message)
    assert.matches(says, record.message, 1, true)
    assert.matches("the scale stays 64", said, 1, true)
    assert.matches(where, said, 1, true)
    if not once then
      local again = expect.stderr(function() record, stepped = run:go("G") end)
      assert.is_true(stepped)
      assert.equal("fault", record.event)
      assert.equal("", again) -- said once
    end
    assert.equal("fault", run.scaler:record(1)[1].event)
    assert.equal(64, run.scaler:get_scale())
    expect.stderr(run.scaler.set_policy, run.scaler, "dynamic", {growth_interval = 1})
    assert.equal("128", (run:trace("G")))
  end

  for _, case in ipairs(FAILURES) do
    it("a table that " .. case[1] .. " is a fault: the scale stays, training goes on", function()
      local update = assert(load("return function(state, event, opts) " .. case[2] .. " end", "=table_policy"))()
      local line = case[1]:find("raises", 1, true) and "probe" or "table_policy:1"
      check_failure({name = "probe", update = update}, case[1], case[3], line)
    end)
    it("a file that " .. case[1] .. " is a fault: the report names policy, file and line", function()
      local path = policy_file("    " .. case[2])
      check_failure(path, case[1], case[3], path)
    end)
  end
  it("a file that is stopped is stopped with the line that ran", function()
    local path = policy_file("    while true do\n    end")
    local record
    expect.stderr(function() record = new_run {policy = path}:go("G") end)
    assert.matches(path .. ":%d: the policy ran for more than 2000000 instructions", record.message)
  end)
  it("the line is that of the failure", function()
    local path = policy_file("    local a = 1\n    error('here')")
    local record
    expect.stderr(function() record = new_run {policy = path}:go("G") end)
    assert.matches(path .. ":5: here", record.message, 1, true)
  end)
  for _, case in ipairs(ENDLESS) do
    it("a file that " .. case[1] .. " is stopped", function()
      local start = os.clock()
      local path = policy_file("    " .. case[2])
      check_failure(path, case[1], case[3], path, true)
      assert(os.clock() - start < 20)
    end)
    -- the one that is stopped by the clock is shown once
    local loads = case[1]:find("concatenates", 1, true) and function() end or it
    loads("a file that " .. case[1] .. " while it loads is refused", function()
      local path = file("local event, state = {}, {}\nlocal function run() " .. case[2] .. " end\nrun()\nreturn {update = run}")
      raises("GradScaler", amp.GradScaler, {policy = path})
    end)
  end

  it("a fault leaves the policy's state as it was before the update", function()
    for _, form in ipairs {"table", "file"} do
      local body = "state.n = state.n + 1 if event.found_inf then error('half way') end return 2.0 ^ state.n"
      local policy = {init = function() return {n = 0} end, update = load("return function(state, event) " .. body .. " end")()}
      if form == "file" then
        policy = file("return {init = function() return {n = 0} end, update = function(state, event) " .. body .. " end}")
      end
      local run = new_run {init_scale = 4, policy = policy}
      assert.equal("2", (run:trace("G")))
      expect.stderr(run.go, run, "X")
      assert.equal("4", (run:trace("G")), form)
    end
  end)

  it("a policy that calls update() of its own scaler, or set_scale, does not hang or crash", function()
    local run
    run = new_run {init_scale = 64, policy = {name = "snake", update = function()
      run.scaler:update()
      return 2
    end}}
    local record
    expect.stderr(function() record = run:go("G") end)
    assert.equal("fault", record.event)
    assert.equal(64, run.scaler:get_scale())
  end)

  -- ====== stop ======

  it("stop makes update() raise, after its state is consistent", function()
    for _, form in ipairs {"table", "file"} do
      local policy = {name = "stopper", update = function(_, event)
        if event.found_inf then return 2, {stop = "the loss is lost"} end
        return 4
      end}
      if form == "file" then
        policy = file [[return {name = 'stopper', update = function(_, event)
          if event.found_inf then return 2, {stop = 'the loss is lost'} end
          return 4
        end}]]
      end
      local run = new_run {init_scale = 8, policy = policy}
      run:go("G")
      raises({"update: loss-scale policy 'stopper' stopped the training: the loss is lost"}, run.go, run, "X")
      assert.equal(2, run.scaler:get_scale())
      local last = run.scaler:record()[2]
      assert.equal("stop", last.event)
      assert.equal(2, last.new_scale)
      assert.equal("the loss is lost", last.message)
      assert.equal("grow", run:go("G").event) -- READY again
    end
  end)

  it("a second result that is no stop is a fault", function()
    local run = new_run {init_scale = 8, policy = {update = function() return 4, "why" end}}
    local record
    expect.stderr(function() record = run:go("G") end)
    assert.equal("fault", record.event)
    assert.equal(8, record.new_scale)
  end)

  -- ====== The sandbox ======

  describe("the sandbox", function()
    local function value(body)
      local source = "return {update = function(state, event, opts) " .. body .. " end}"
      local box = assert(core.sandbox(source, "=probe", {memory = 2 ^ 22, instructions = 10 ^ 6}))
      return box:update({}, {found_inf = false}, {})
    end

    it("has math, table, string.format and the base functions that load nothing", function()
      assert.equal(7.0, (value("return math.max(3, 7)")))
      assert.equal(3.0, (value("local t = {3, 1, 2} table.sort(t) return t[3]")))
      assert.equal(2.0, (value("return tonumber(string.format('%d', 2))")))
      assert.equal(6.0, (value("local s = 0 for _, v in ipairs {1, 2, 3} do s = s + v end return s")))
      assert.equal(1.0, (value("return select('#', 1)")))
      assert.equal(3.0, (value("return #'abc'")))
    end)

    for _, name in ipairs {
      "io", "os", "require", "load", "loadstring", "loadfile", "dofile", "package", "debug", "coroutine", "collectgarbage", "pcall",
      "xpcall", "setmetatable", "getmetatable", "print", "warn", "utf8", "string.rep", "string.find", "string.match", "string.gsub",
      "string.gmatch", "string.dump", "string.char", "string.byte", "string.pack", "hm", "halfmoon",
    } do
      it("has no " .. name, function() assert.equal(1.0, (value("return " .. name .. " == nil and 1 or 2"))) end)
    end

    it("strings have no methods", function()
      local scale, message = value("return ('x'):rep(10)")
      assert.is_nil(scale)
      assert.is_string(message)
    end)

    it("_G and _ENV lead nowhere else, and what a file writes there stays there", function()
      assert.equal(1.0, (value("return _G.io == nil and _ENV.os == nil and 1 or 2")))
      value("math.pi = 3 _G.leak = 1 return 1")
      assert.is_nil(rawget(_G, "leak"))
      assert(math.pi > 3.1)
    end)

    it("bytecode is refused", function()
      local box, message = core.sandbox(string.dump(function() return {} end), "=probe")
      assert.is_nil(box)
      assert.is_string(message)
    end)

    it("only plain values cross", function()
      local scale, message = value("state.f = math.max return 1")
      assert.is_nil(scale)
      assert.matches("function", message, 1, true)
      scale, message = value("state.me = state return 1")
      assert.is_nil(scale)
      assert.is_string(message)
      local box = assert(core.sandbox("return {update = function() return 1 end}", "=probe"))
      scale, message = box:update({}, {f = print}, {})
      assert.is_nil(scale)
      assert.matches("argument 2", message, 1, true)
    end)

    it("math.random gives the same numbers in every run", function()
      assert.equal((value("return math.random()")), (value("return math.random()")))
    end)

    it("works on after a failure, and frees its memory", function()
      local box = assert(core.sandbox([[return {update = function(state, event)
        if event.found_inf then local t = {} while true do t[#t + 1] = {} end end
        return 5
      end}]], "=probe", {memory = 2 ^ 20, instructions = 10 ^ 7}))
      for _ = 1, 5 do
        local scale, message = box:update({}, {found_inf = true}, {})
        assert.is_nil(scale)
        assert.matches("memory", message, 1, true)
        assert.equal(5.0, (box:update({}, {found_inf = false}, {})))
      end
    end)

    it("limits are checked", function()
      raises("sandbox: the limits must be at least", core.sandbox, "return {}", "=x", {memory = 10})
      raises("sandbox: unknown option", core.sandbox, "return {}", "=x", {memorie = 10})
    end)
  end)

  it("in the clamp: what the policy asks for is kept within the bounds, its state follows", function()
    local run = new_run {init_scale = 64, min_scale = 16, max_scale = 128, growth_interval = 1}
    assert.equal("128 128 64 32 16 16 32", (run:trace("GGXXXXG")))
    assert.equal(32, run.scaler:state_dict().policy_state.scale)
  end)

  it("nan in the loss is an overflow too", function()
    local run = new_run {init_scale = 64}
    run.scaler:scale((run.p * nan):sum()):backward()
    local stepped, record = run.scaler:step(run.opt)
    assert.is_false(stepped)
    assert.equal(2, record.nan_count)
    assert.equal("backoff", run.scaler:update().event)
  end)
end)
