-- The library as a guest of Lua: nothing put into _G, iterators that survive `break` in Lua 5.4.4, both collector
-- modes, coroutines, stock lua5.4.

local hm = require "halfmoon"
local core = require "halfmoon.core"
local devices = require "spec.support.devices"
local numbers = require "spec.support.numbers"
local process = require "spec.support.process"

local nn, data = hm.nn, hm.data

describe("leaving a loop in Lua 5.4.4", function()
  -- What `break` leaves unclosed is called later, when another value may lie in its place.
  it("forgets the iterator's closing value: why our iterators give three values at most", function()
    if not core.lua_release:find("5%.4%.4") then return pending("Lua " .. core.lua_release .. " may have this mended") end
    local chunk = assert(load([[
      local closed = false
      local closing = setmetatable({}, {__close = function() closed = true end})
      for k in next, {1}, nil, closing do
        local function f() return k end
        if f() then break end
      end
      return closed]]))
    assert.is_false(chunk())
    chunk = assert(load([[
      local closing = setmetatable({}, {__close = function() end})
      for k in next, {1}, nil, closing do
        local function f() return k end
        if f() then break end
      end
      local a, b, c, d, e, f, g
      do local z <close> = closing end
      return a, b, c, d, e, f, g]]))
    local ok, message = pcall(chunk)
    assert.is_false(ok)
    assert.truthy(message:find("metamethod 'close'", 1, true), message)
  end)

  it("works with every iterator of the library", function()
    local model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model:register_buffer("a", hm.ones {1})
    model:register_buffer("b", hm.ones {1})
    local set = data.TensorDataset(hm.zeros({4, 2}, {device = "cpu"}), hm.zeros({4}, {device = "cpu"}))
    local iterators = {
      batches = function() return data.DataLoader({set, batch_size = 1}):batches() end,
      transformed = function() return data.DataLoader({set, batch_size = 1, transforms = function(...) return ... end}):batches() end,
      named_parameters = function() return model:named_parameters() end,
      named_buffers = function() return model:named_buffers() end,
      named_modules = function() return model:named_modules() end,
      fields = function() return model:fields() end,
      pairs = function() return pairs(hm.optim.SGD(model:parameters(), {lr = 1}).param_groups[1]) end,
    }
    for name, make in pairs(iterators) do
      assert(select("#", make()) <= 3, name)
      local kept = {}
      for a, b in make() do
        local _ <close> = hm.no_grad()
        kept[#kept + 1] = function() return a, b end
        if #kept == 2 then break end
      end
      assert.equal(2, #kept, name)
      assert.is_true(hm.is_grad_enabled(), name)
      for a in make() do -- luacheck: ignore 512
        kept[#kept + 1] = function() return a end
        goto next
      end
      ::next::
      assert.equal(3, #kept, name)
    end
  end)
end)

describe("require", function()
  local it = devices.cpu_cases("the program from outside", it)

  it("changes no global and returns the same table", function()
    local said = process.script([[
      local before = {}
      for k, v in pairs(_G) do before[k] = v end
      local string_before = {}
      for k, v in pairs(string) do string_before[k] = v end
      local hm = require "halfmoon"
      for _, name in ipairs {"nn", "optim", "amp", "data", "autograd", "cpu"} do assert(hm[name], name) end
      for k, v in pairs(_G) do assert(rawequal(before[k], v), k) end
      for k, v in pairs(string) do assert(rawequal(string_before[k], v), k) end
      assert(getmetatable(_G) == nil)
      assert(require "halfmoon" == hm)
      assert(package.loaded["halfmoon.nn"] == hm.nn)
      print(collectgarbage("isrunning"), os.setlocale())
    ]])
    assert.equal("true\tC\n", said)
  end)

  it("draws no random numbers and allocates no tensors", function()
    assert.equal("0\t0\n", (process.script([[
      local hm = require "halfmoon"
      local _ = hm.nn, hm.optim, hm.amp, hm.data
      print(hm.rng_state().offset, hm.cpu.memory_stats().allocs)]])))
  end)

  it("works from stock Lua", function()
    local build = process.program:match("^(.*)/[^/]*$") or "."
    -- Stock Lua unloads the module at the end; what its pools kept for reuse then looks like a leak.
    local preload = os.getenv("HALFMOON_SANITIZED") and "LD_PRELOAD=$(gcc -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 " or ""
    local paths = [[LUA_PATH="$PWD/lua/?.lua;$PWD/lua/?/init.lua;;" LUA_CPATH="%s/?.so;;" lua5.4 -e %s]]
    local said, status = process.shell((preload .. paths):format(
      build:sub(1, 1) == "/" and build or "$PWD/" .. build, process.quote([[
        local hm = require "halfmoon"
        hm.manual_seed(1)
        local model = hm.nn.Linear(4, 2)
        local opt = hm.optim.AdamW(model:parameters(), {lr = 0.1})
        local scaler = hm.amp.GradScaler {init_scale = 8.0}
        local x, y = hm.randn {16, 4}, hm.randint(0, 2, {16})
        local first, last
        for _ = 1, 20 do
          opt:zero_grad()
          local loss = hm.amp.autocast("f16", function() return hm.nn.functional.cross_entropy(model(x), y) end)
          scaler:scale(loss):backward()
          scaler:step(opt)
          scaler:update()
          first, last = first or loss:item(), loss:item()
        end
        print(last < first, tostring(hm.ones {2}))]])))
    assert.equal("true\t1 1\n[f32 2, cpu]\n", said)
    assert.equal(0, status)
  end)
end)

describe("the collector", function()
  local training = [[
    %s
    local hm = require "halfmoon"
    hm.set_default_device "%s"
    local memory = hm.get_default_device() == "cpu" and hm.cpu or hm.cuda
    local cnn = require "spec.support.cnn"
    for _, dtype in ipairs {"f32", "f16"} do
      local run = cnn.run(dtype, %d)
      local losses = {}
      for i = 1, 8 do losses[i] = run.step():item() end
      assert(losses[8] < losses[1])
      print(("%%a"):format(losses[8]))
    end
    collectgarbage()
    memory.trim()
    print(memory.memory_stats().live)
  ]]

  it("may run in any mode and at any pace: the numbers are the same, and nothing is left", function()
    local first
    for _, setting in ipairs {
      "collectgarbage('incremental')", "collectgarbage('generational')", "collectgarbage('setpause', 0)", "collectgarbage('stop')",
      "collectgarbage('generational', 5, 10)", "collectgarbage('setpause', 1000) collectgarbage('setstepmul', 1)",
    } do
      local said, status = process.script(training:format(setting, devices.name, devices.pick(8, 2)), {HALFMOON_THREADS = 1})
      assert.equal(0, status, setting .. "\n" .. said)
      assert.truthy(said:find("\n0\n$"), setting .. "\n" .. said)
      first = first or said
      assert.equal(first, said, setting)
    end
  end)

  it("may be stopped around a step, and finds tensors in cycles", function()
    collectgarbage()
    local before = core.memory_stats().live
    do
      local a, b = {hm.zeros {1000}}, {hm.zeros {1000}} -- luacheck: ignore 241
      a.other, b.other = b, a
    end
    collectgarbage()
    collectgarbage()
    assert.equal(before, core.memory_stats().live)
  end)

  it("may finalize anything at the end of the program, in any order", function()
    local said, status = process.script([[
      local hm = require "halfmoon"
      x = hm.ones({3}, {requires_grad = true})
      y = (x * 2):sum()
      y:register_hook(function(g) return g end)
      guard = hm.no_grad()
      loader = hm.data.DataLoader {{hm.zeros {100, 2}}, batch_size = 3}
      batch = loader:batches()()
      opt = hm.optim.Adam({x}, {lr = 1})
      scaler = hm.amp.GradScaler {}
      setmetatable({}, {__gc = function() assert(tostring(x)) end})
      os.exit(0, true)
    ]], {ASAN_OPTIONS = "detect_leaks=0"}) -- Lua finalizes nothing that is made while it closes, as tostring does here
    assert.equal(0, status, said)
    assert.falsy(said:find("attempt", 1, true), said)
  end)
end)

describe("coroutines", function()
  it("have modes of their own", function()
    local co = coroutine.wrap(function()
      assert.is_true(hm.is_grad_enabled())
      assert.is_false(core.autocast_state().enabled)
      local _ <close> = hm.no_grad()
      coroutine.yield()
      assert.is_false(hm.is_grad_enabled())
    end)
    local _ <close> = hm.amp.autocast("bf16")
    co()
    assert.is_true(hm.is_grad_enabled())
    assert.is_true(core.autocast_state().enabled)
    co()
    assert.equal("bfloat16", core.autocast_state().dtype)
  end)

  it("may hold tensors, train, and be dropped in the middle", function()
    collectgarbage()
    local before = core.memory_stats().live
    local function trainer(seed)
      return coroutine.wrap(function()
        hm.manual_seed(seed)
        local model = nn.Linear(4, 2)
        local opt = hm.optim.SGD(model:parameters(), {lr = 0.1})
        local x = hm.ones {2, 4}
        while true do
          opt:zero_grad()
          local loss = model(x):pow(2):sum()
          loss:backward()
          opt:step()
          coroutine.yield(loss:item())
        end
      end)
    end
    local a, b, alone = trainer(1), trainer(2), trainer(1)
    local mixed = {}
    for i = 1, 5 do
      mixed[i] = a()
      b()
    end
    for i = 1, 5 do assert.equal(mixed[i], alone()) end
    a, b, alone = nil, nil, nil -- luacheck: ignore 311
    hm.ones({1}):item() -- the coroutine that used the engine last is held until another one does
    collectgarbage()
    collectgarbage()
    assert.equal(before, core.memory_stats().live)
  end)

  it("may run a module across yields, in backward too", function()
    local x = hm.tensor({1, 2}, {requires_grad = true})
    local co = coroutine.wrap(function()
      local y = (x * x):sum()
      coroutine.yield()
      y:backward()
      return x.grad
    end)
    co()
    numbers.assert_same(co(), {2, 4})
  end)

  it("raise across their border with the position of the error", function()
    local co = coroutine.create(function() hm.zeros {2}:view(3) end)
    local ok, message = coroutine.resume(co)
    assert.is_false(ok)
    assert.truthy(message:find("lua_spec.lua:%d+: view"), message)
    assert.is_false(coroutine.close(co))
  end)
end)
