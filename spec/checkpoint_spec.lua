-- checkpoint_spec.lua -- hm.checkpoint: parts of a model that backward runs again.  Gradients must be those of a run without it,
-- to the bit.

local hm = require "halfmoon"
local core = require "halfmoon.core"
local numbers = require "spec.support.numbers"
local expect = require "spec.support.expect"
local devices = require "spec.support.devices"

local autograd, nn, amp = hm.autograd, hm.nn, hm.amp
local F = nn.functional
local same, raises = numbers.assert_same, expect.raises

local function leaf(values, dtype) return hm.tensor(values, {dtype = dtype or "f32", requires_grad = true}) end

local function plain(fn, ...) return fn(...) end

-- Runs build(call) twice, with `call` being a plain call and hm.checkpoint; both return an array of tensors, which must hold the same
-- bits, and leave the random numbers where the other did.
local function both(build)
  local function run(call)
    hm.manual_seed(7)
    local list = build(call)
    return list, core.rng_state().offset
  end
  local want, offset = run(plain)
  local got, after = run(hm.checkpoint)
  assert.equal(#want, #got)
  for i, t in ipairs(want) do same(got[i], t, "tensor " .. i) end
  assert.equal(offset, after)
end

local function gradients_of(list)
  local out = {}
  for i, t in ipairs(list) do out[i] = assert(t.grad) end
  return out
end

-- ====== The same gradients ======

describe("checkpoint gives the gradients of a plain call", function()
  it("of one function and its parameters", function()
    both(function(call)
      local x, w = hm.randn({4, 8}):requires_grad_(), hm.randn({8, 8}):requires_grad_()
      local y = call(function(t) return (t:matmul(w):gelu() * t):softmax(2) end, x);
      (y * y):sum():backward()
      return gradients_of {x, w}
    end)
  end)

  it("with dropout inside and behind it", function()
    both(function(call)
      local x = hm.randn({16, 16}):requires_grad_()
      local y = call(function(t) return F.dropout(t * t, 0.5, true):tanh() end, x)
      F.dropout(y * 2, 0.3, true):sum():backward()
      return {x.grad, hm.rand({4})}
    end)
  end)

  it("of a model whose blocks are each checkpointed", function()
    both(function(call)
      local blocks, x = {}, hm.randn({6, 8})
      for i = 1, 3 do blocks[i] = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 8), nn.LayerNorm(8)) end
      local params = {}
      for _, block in ipairs(blocks) do
        x = x + call(block, x)
        for _, p in ipairs(block:parameters()) do params[#params + 1] = p end
      end
      F.cross_entropy(x, hm.tensor({0, 1, 2, 3, 4, 5}, {dtype = "i64"})):backward()
      return gradients_of(params)
    end)
  end)

  it("nested, three deep, the inner ones without arguments of their own too", function()
    both(function(call)
      local x, w = hm.randn({5, 5}):requires_grad_(), hm.randn({5, 5}):requires_grad_()
      local function deepest(t) return F.dropout((t * t):exp(), 0.5, true) * w end
      local function middle(t)
        local u = t:sin()
        return call(deepest, u) * call(function() return (u * w):tanh() end)
      end
      local function outer(t) return call(middle, t * w):cos() * t end
      call(outer, x):sum():backward()
      return gradients_of {x, w}
    end)
  end)

  it("with a weight used in and out of it, and twice in it", function()
    both(function(call)
      local x, w = hm.randn({3, 3}), hm.randn({3, 3}):requires_grad_()
      local y = call(function(t) return t:matmul(w):tanh():matmul(w) end, x:matmul(w))
      local z = call(function(t, s) return t * s * w end, y, w);
      (z + w * w):sum():backward()
      return gradients_of {w}
    end)
  end)

  it("with several results, some unused, and arguments that are no tensors", function()
    both(function(call)
      local x, y = hm.randn({4}):requires_grad_(), hm.randn({4})
      local results = table.pack(call(function(a, factor, b, none, options, last)
        assert.is_nil(none)
        local unused = (a * 3):exp()
        return a * factor + b, "text", unused, options.list[1] * a:sigmoid(), last
      end, x, 2.5, y, nil, {list = {hm.ones({4})}}, "last"))
      assert.equal("text", results[2])
      assert.equal("last", results[5])
      assert.equal(5, results.n);
      (results[1] * results[4]):sum():backward()
      return {x.grad, results[1], results[3]}
    end)
  end)

  it("with arguments that want no gradient, views, and in-place ops inside", function()
    both(function(call)
      local x, data = hm.randn({4, 6}):requires_grad_(), hm.randn({4, 6})
      local y = call(function(a, b)
        local h = a * b
        h:mul_(2):add_(b)
        h = h:t():narrow(1, 2, 3):reshape(-1)
        return h:exp() * h
      end, (x * 1):view(6, 4):t(), data)
      y:sum():backward()
      return {x.grad}
    end)
  end)

  it("under autocast with the scaler, cached weights or not", function()
    for _, cache in ipairs {true, false} do
      both(function(call)
        local net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
        local head, scaler = nn.Linear(8, 4), amp.GradScaler {init_scale = 512}
        local params = net:parameters()
        for _, p in ipairs(head:parameters()) do params[#params + 1] = p end
        local opt = hm.optim.SGD(params, {lr = 0.5})
        for _ = 1, 3 do
          opt:zero_grad()
          local loss = amp.autocast({dtype = "float16", cache_enabled = cache}, function()
            local h = call(net, hm.randn({5, 8}))
            assert.equal("float16", h.dtype)
            return F.cross_entropy(head(h), hm.tensor({0, 1, 2, 3, 0}, {dtype = "i64"}))
          end)
          scaler:scale(loss):backward()
          scaler:step(opt)
          scaler:update()
        end
        local list = gradients_of(params)
        for i, p in ipairs(params) do list[#params + i] = p end
        return list
      end)
    end
  end)

  it("in the forward's autocast region, whatever is on at backward", function()
    both(function(call)
      local seen, x, w = {}, hm.randn({4, 4}), hm.randn({4, 4}):requires_grad_()
      local function f(t)
        local state = core.autocast_state()
        seen[#seen + 1] = state.enabled and state.dtype or "off"
        return t:matmul(w):exp()
      end
      local y = amp.autocast({dtype = "bfloat16", ops = {exp = "low"}}, function()
        return call(f, x) + amp.autocast({enabled = false}, call, f, x)
      end)
      amp.autocast("float16", function() y:sum():backward() end)
      if call == hm.checkpoint then assert.same({"bfloat16", "off", "off", "bfloat16"}, seen) end
      return gradients_of {w}
    end)
  end)

  it("by autograd.grad, with create_graph, retain_graph and hooks", function()
    both(function(call)
      local x, w = hm.randn({4}):requires_grad_(), hm.randn({4}):requires_grad_()
      local hooked = 0
      local y = call(function(t)
        local h = t * t * w
        h:register_hook(function(g)
          hooked = hooked + 1
          return g * 2
        end)
        return h:exp()
      end, x)
      local first = autograd.grad(y:sum(), {x, w}, {create_graph = true})
      assert.equal(1, hooked);
      (first[1] * first[2]):sum():backward(nil, {retain_graph = true})
      y:sum():backward(nil, {retain_graph = true})
      y:sum():backward()
      return {first[1], first[2], x.grad, w.grad}
    end)
  end)

  it("with autograd.Functions inside", function()
    local Cube = autograd.Function("Cube", {
      forward = function(ctx, t)
        local y = t * t
        ctx:save_for_backward(t, y)
        return y * t
      end,
      backward = function(ctx, g)
        local t, y = ctx:saved()
        return g * (y + 2 * t * t)
      end,
    })
    both(function(call)
      local x = hm.randn({4}):requires_grad_()
      call(function(t) return Cube(Cube(t * 0.5):tanh()) end, x):sum():backward()
      return {x.grad}
    end)
  end)

  it("of batch_norm, whose running statistics move once", function()
    both(function(call)
      local net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
      local x = hm.randn({2, 2, 5, 5})
      call(net, x):sum():backward()
      local list = gradients_of(net:parameters())
      list[#list + 1] = net[2].running_mean
      list[#list + 1] = net[2].running_var
      list[#list + 1] = net[2].num_batches_tracked
      return list
    end)
  end)

  it("on every device's own random numbers", function()
    both(function(call)
      local x = hm.randn({32}):requires_grad_()
      local y = call(function(t) return t * hm.rand({32}) * hm.rand({32}, {device = "cpu"}):to(t.device) end, x)
      hm.rand({5}, {device = "cpu"})
      y:sum():backward()
      return {x.grad, hm.rand({3}), hm.rand({3}, {device = "cpu"})}
    end)
  end)
end)

-- ====== What is run when ======

describe("checkpoint", function()
  it("runs its function once without gradients, and again for each backward that needs it", function()
    local runs, again = 0, 0
    local function f(t)
      runs = runs + 1
      if core.is_recomputing() then again = again + 1 end
      return (t * t):exp()
    end
    local x = leaf {1, 2}
    hm.no_grad(hm.checkpoint, f, x)
    assert.equal(1, runs)
    assert.is_false(hm.no_grad(hm.checkpoint, f, x).requires_grad)
    runs = 0
    local y = hm.checkpoint(f, x):sum()
    assert.equal(1, runs)
    y:backward(nil, {retain_graph = true})
    assert.equal(2, runs)
    y:backward()
    assert.equal(3, runs)
    assert.equal(2, again)
    raises("the graph was freed", function() y:backward() end)
    assert.equal(3, runs)
    hm.checkpoint(function(t)
      runs = runs + 1
      return t + 1
    end, x):sum():backward() -- nothing is kept, so nothing is needed
    assert.equal(4, runs)
    assert.is_false(core.is_recomputing())
  end)

  it("gives back what the function returns, and raises what it raises, also in backward", function()
    assert.equal(0, select("#", hm.checkpoint(function() end)))
    assert.same({1, nil, 3}, {hm.checkpoint(function() return 1, nil, 3 end)})
    raises("failed in forward", hm.checkpoint, function() error("failed in forward") end)
    local x, runs = leaf {1}, 0
    local y = hm.checkpoint(function(t)
      runs = runs + 1
      if runs == 2 then error("failed again") end
      return t:exp()
    end, x)
    raises("failed again", function() y:backward() end)
    assert.is_true(hm.is_grad_enabled())
    hm.checkpoint(function(t) return t * t end, x):backward()
    same(x.grad, {2})
  end)

  it("refuses what is no function, and options that it does not know", function()
    raises("expected a function", hm.checkpoint, 3)
    raises("expected a function", hm.checkpoint, {}, leaf {1})
    raises({"unknown option", "preserve_rng_state"}, hm.checkpoint, {preserve_rng = true}, print)
  end)

  it("without preserve_rng_state draws on", function()
    hm.manual_seed(3)
    local x = hm.ones({1000}, {requires_grad = true})
    local y = hm.checkpoint({preserve_rng_state = false}, function(t) return F.dropout(t * t, 0.5, true):exp() end, x)
    local before = core.rng_state().offset
    y:sum():backward()
    assert.is_true(core.rng_state().offset > before)
  end)

  it("sees a function that does not do the same again", function()
    local x, runs
    local function once(first, again)
      x, runs = leaf {{1, 2}, {3, 4}}, 0
      return hm.checkpoint(function(t)
        runs = runs + 1
        return (runs == 1 and first or again)(t)
      end, x):sum()
    end
    local function square(t)
      local u = t * 2
      return u * u
    end
    raises({"checkpoint: computed again", "is f32[1,2]", "was f32[2,2]", "must do the same"}, function()
      once(square, function(t) return square(t:narrow(1, 1, 1)) end):backward()
    end)
    raises({"more ops than", "of exp"}, function() once(square, function(t) return square(t):exp() end):backward() end)
    raises({"fewer ops than", "of exp", "is missing"}, function()
      once(function(t) return square(t):exp() end, square):backward()
    end)
    assert.is_nil(x.grad)
  end)

  it("sees arguments and weights that have changed since", function()
    local x, w = leaf {1, 2}, leaf {3, 4}
    local h = x * 2
    local y = hm.checkpoint(function(t) return (t * t):exp() end, h)
    h:add_(1)
    raises({"checkpoint: an argument", "changed in place", "version 1, expected 0"}, function() y:sum():backward() end)
    y = hm.checkpoint(function(t) return (t * w):tanh() end, x)
    hm.no_grad(function() w:add_(1) end)
    raises({"changed in place", "f32[2]"}, function() y:sum():backward() end)
    local lin = nn.Linear(2, 2)
    y = amp.autocast("float16", function() return hm.checkpoint(lin, (x * 2):unsqueeze(1)) end)
    hm.no_grad(function() lin.weight:add_(1) end)
    raises({"of linear", "changed in place after the forward"}, function() y:sum():backward() end)
  end)

  it("cannot be walked from inside", function()
    raises({"checkpoint: backward inside the function", "call backward outside"}, function()
      hm.checkpoint(function(t)
        local y = t:exp()
        y:sum():backward()
        return y
      end, leaf {1})
    end)
  end)

  it("may be left unused, or be collected before backward", function()
    local x = leaf {1, 2}
    local weak = setmetatable({}, {__mode = "k"})
    do
      local f = function(t) return t * t end
      weak[f] = true
      hm.checkpoint(f, x)
    end
    for _ = 1, 4 do collectgarbage() end
    x:sum():backward()
    for _ = 1, 4 do collectgarbage() end
    hm.checkpoint(function(t) return t end, x)
    assert.is_nil(next(weak))
  end)

  it("works in a coroutine and under detect_anomaly", function()
    local x = leaf {0}
    raises({"the backward of sqrt", "checkpoint_spec.lua"}, function()
      autograd.detect_anomaly(function()
        hm.checkpoint(function(t) return (t * t):sqrt() * 0 end, x):sum():backward()
      end)
    end)
    local y = coroutine.wrap(function() return hm.checkpoint(function(t) return (t * t):exp() end, leaf {1, 2}):sum() end)()
    y:backward()
  end)
end)

-- ====== Memory ======

describe("checkpoint's memory", function()
  -- bytes held by the graph after the forward, and the peak of a whole step, beyond what was there before
  local function measure(call)
    local blocks = {}
    for i = 1, 8 do
      blocks[i] = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 64))
    end
    local x = hm.randn({devices.pick(2048, 256), 64})
    for _, b in ipairs(blocks) do
      for _, p in ipairs(b:parameters()) do p.grad = hm.zeros(p.shape) end
    end
    for _ = 1, 2 do collectgarbage() end
    devices.memory.reset_peak()
    local before = devices.memory.memory_stats().live
    for _, b in ipairs(blocks) do
      x = call(b, x)
      for _ = 1, 2 do collectgarbage() end
    end
    local held = devices.memory.memory_stats().live - before
    x:sum():backward()
    return held, devices.memory.memory_stats().peak - before
  end

  it("holds the blocks' inputs alone, and one block at a time in backward", devices.cpu_only("the peak is about sizes", function()
    local held, peak = measure(plain)
    local less, lower = measure(hm.checkpoint)
    assert.is_true(less < held / 5, ("held: %d of %d"):format(less, held))
    assert.is_true(lower < peak / 2, ("peak: %d of %d"):format(lower, peak))
  end))

  it("is given back after backward, and after a graph that nobody walks", function()
    local x = hm.randn({64, 64}):requires_grad_()
    local function step(walk)
      local y = hm.checkpoint(function(t) return hm.checkpoint(function(u) return (u * u):exp() end, t * 2) * t end, x):sum()
      if walk then y:backward() end
    end
    step(true)
    for _ = 1, 3 do collectgarbage() end
    local before = devices.memory.memory_stats().live
    for _ = 1, 5 do
      step(true)
      step(false)
    end
    for _ = 1, 3 do collectgarbage() end
    assert.equal(before, devices.memory.memory_stats().live)
  end)
end)
