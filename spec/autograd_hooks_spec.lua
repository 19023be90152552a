-- autograd_hooks_spec.lua -- the user's own code in the backward walk: hooks, functions with a backward in Lua, and gradcheck.

local hm = require "halfmoon"
local core = require "halfmoon.core"
local numbers = require "spec.support.numbers"
local expect = require "spec.support.expect"

local autograd = hm.autograd
local same, near, raises = numbers.assert_same, numbers.assert_near, expect.raises

local function leaf(values, dtype) return hm.tensor(values, {dtype = dtype or "f64", requires_grad = true}) end

-- ====== Hooks ======

describe("hooks", function()
  it("see a leaf's gradient once, whole, and may replace it", function()
    local x, calls = leaf {1, 2}, 0
    x:register_hook(function(g)
      calls = calls + 1
      same(g, {2, 4})
      return g * 100
    end);
    (x * x):sum():backward()
    assert.equal(1, calls)
    same(x.grad, {200, 400});
    (x * x):sum():backward() -- the hook sees what arrives now, not what had been there
    assert.equal(2, calls)
    same(x.grad, {400, 800})
  end)

  it("see a result's gradient before the ops below", function()
    local x = leaf {1, 2}
    local h = x * x
    h:register_hook(function(g) return g + 1 end)
    h:sum():backward()
    same(x.grad, {4, 8})
  end)

  it("run in order of registration and may be removed, also from inside, also twice", function()
    local x, seen = leaf {1}, {}
    local first = x:register_hook(function(g)
      seen[#seen + 1] = "first"
      return g * 2
    end)
    local second
    second = x:register_hook(function(g)
      seen[#seen + 1] = "second " .. g:item()
      second:remove()
    end)
    x:register_hook(function(g)
      seen[#seen + 1] = "third " .. g:item()
      return g + 1
    end)
    x:sum():backward()
    assert.same({"first", "second 2.0", "third 2.0"}, seen)
    same(x.grad, {3})
    first:remove()
    first:remove()
    x.grad = nil
    x:sum():backward()
    assert.same({"first", "second 2.0", "third 2.0", "third 1.0"}, seen)
    same(x.grad, {2})
  end)

  it("that raise end backward with their message; gradients made so far stay, the graph is dead", function()
    local a, b = leaf {1, 2}, leaf {3, 4}
    local h = a:exp()
    h:register_hook(function() error("the hook said no") end)
    local y = (h * b):sum()
    raises("the hook said no", function() y:backward() end)
    same(b.grad, a:exp())
    assert.is_nil(a.grad)
    raises("the graph was freed", function() y:backward() end)
    b:sum():backward() -- autograd goes on
    near(b.grad, {math.exp(1) + 1, math.exp(2) + 1}, 1e-12)
  end)

  it("that raise a value keep it", function()
    local x = leaf {1}
    x:register_hook(function() error({code = 7}) end)
    local ok, value = pcall(function() x:sum():backward() end)
    assert.is_false(ok)
    assert.same({code = 7}, value)
  end)

  it("that raise leave modes as they were", function()
    local x = leaf {1}
    x:register_hook(function()
      local _ <close> = hm.no_grad()
      error("no")
    end)
    raises("no", function() x:sum():backward() end)
    assert.is_true(hm.is_grad_enabled())
  end)

  it("must give back a gradient of the same shape and dtype", function()
    local x = leaf {1, 2}
    local hook = x:register_hook(function() return hm.ones({3}, {dtype = "f64"}) end)
    raises("hook", function() x:sum():backward() end)
    hook:remove()
    hook = x:register_hook(function() return hm.ones({2}) end)
    raises("hook", function() x:sum():backward() end)
    hook:remove()
    x:register_hook(function() return 5 end)
    raises({"register_hook", "the hook's result"}, function() x:sum():backward() end)
    raises("register_hook: argument 1 must be a function", function() x:register_hook(3) end)
  end)

  it("may call backward themselves", function()
    local x, other = leaf {1, 2}, leaf {5}
    x:register_hook(function() hm.enable_grad(function() (other * other):backward() end) end);
    (x * x):sum():backward()
    same(other.grad, {10})
    same(x.grad, {2, 4})
  end)

  it("run in backward's mode, whatever was on at the call; scopes inside act and end", function()
    local x, modes = leaf {1, 2}, {}
    local h = x * x
    h:register_hook(function(g)
      modes[#modes + 1] = hm.is_grad_enabled()
      modes[#modes + 1] = hm.amp.autocast_state().enabled
      hm.enable_grad(function() modes[#modes + 1] = hm.is_grad_enabled() end)
      hm.amp.autocast("f16", function() modes[#modes + 1] = g:view(1, 2):float():matmul(hm.ones({2, 1})).dtype end)
      modes[#modes + 1] = hm.is_grad_enabled()
    end)
    hm.amp.autocast("f16", function()
      h:sum():backward()
      assert.is_true(hm.amp.autocast_state().enabled)
    end)
    assert.same({false, false, true, "float16", false}, modes)
    assert.is_false(hm.amp.autocast_state().enabled)
    assert.is_true(hm.is_grad_enabled())
    same(x.grad, {2, 4})
  end)

  it("may run coroutines: the walk goes on in its own mode", function()
    local x = leaf({1, 2}, "f32")
    local h = x * 2
    local y = core.call("linear", h:view(1, 2), hm.ones({1, 2}))
    y:register_hook(function(g)
      local inner = coroutine.wrap(function() coroutine.yield((leaf {1} * 2).requires_grad) end)
      assert.is_true(inner())
      assert.is_false((g * 2).requires_grad)
    end)
    hm.amp.autocast("f16", function() y:backward() end)
    same(x.grad, {2, 2})
    assert.is_false(x.grad.requires_grad)
    assert.equal("float32", x.grad.dtype)
  end)

  it("are refused where no gradient is wanted", function()
    raises("register_hook: expected a tensor that requires a gradient", function() hm.ones({1}):register_hook(print) end)
  end)

  it("may walk the same graph themselves", function()
    local x = leaf {1, 2}
    local h = x * x
    local y = (h * h):sum()
    local inner, inside
    h:register_hook(function()
      if inside then return end
      inside = true
      inner = autograd.grad(y, x, {retain_graph = true})[1]
    end)
    y:backward(nil, {retain_graph = true})
    same(inner, {4, 32})
    same(x.grad, {4, 32})
  end)

  it("may collect garbage, keep what they saw, and give back the same tensor each time", function()
    local x, kept = leaf {1, 2}, {}
    local answer = hm.tensor({5, 5}, {dtype = "f64"})
    local h = x
    for _ = 1, 20 do
      h = h * 1
      h:register_hook(function(g)
        kept[#kept + 1] = g
        collectgarbage()
      end)
    end
    x:register_hook(function() return answer end)
    h:sum():backward()
    same(x.grad, {5, 5})
    x:sum():backward()
    same(x.grad, {10, 10})
    same(answer, {5, 5})
    for _, g in ipairs(kept) do same(g, {1, 1}) end
    assert.equal(20, #kept)
  end)

  it("that yield are refused by Lua, and autograd goes on", function()
    local x = leaf {1, 2}
    local co = coroutine.create(function()
      local h = x * x
      h:register_hook(function() coroutine.yield() end)
      h:sum():backward()
    end)
    local ok, message = coroutine.resume(co)
    assert.is_false(ok)
    assert.matches("yield", message);
    (x * x):sum():backward()
    same(x.grad, {2, 4})
  end)

  it("that raise leak nothing", function()
    local x = hm.ones({100}):requires_grad_()
    local function step()
      local h = (x * x):exp()
      h:register_hook(function() error("no") end)
      assert.is_false((pcall(function() (h * h):sum():backward() end)))
      x.grad = nil
    end
    step()
    collectgarbage()
    collectgarbage()
    local before = core.memory_stats().live
    for _ = 1, 5 do step() end
    collectgarbage()
    collectgarbage()
    assert.equal(before, core.memory_stats().live)
  end)

  it("on a leaf do not keep it alive", function()
    local box = setmetatable({}, {__mode = "v"})
    do
      local x = leaf {1}
      x:register_hook(function() return x end)
      box.x = x
    end
    collectgarbage()
    collectgarbage()
    assert.is_nil(box.x)
  end)
end)

-- ====== Functions in Lua ======

describe("autograd.Function", function()
  local Cube = autograd.Function("Cube", {
    forward = function(ctx, x)
      ctx:save_for_backward(x)
      return x * x * x
    end,
    backward = function(ctx, g) return g * 3 * ctx:saved() * ctx:saved() end,
  })

  it("computes forward without recording and backward as written", function()
    local x = leaf {1, 2}
    local y = Cube(x) * 2
    assert.is_true(y.requires_grad)
    y:sum():backward()
    same(x.grad, {6, 24})
    assert.is_false(Cube(hm.ones({1})).requires_grad)
    assert.is_false(hm.no_grad(Cube, x).requires_grad)
  end)

  it("with several inputs and outputs, numbers among the arguments, nil gradients", function()
    local f = autograd.Function("Mix", {
      forward = function(ctx, x, factor, y)
        ctx.factor = factor
        return x * factor, x + y
      end,
      backward = function(ctx, g1, g2)
        local gx = g1 and g1 * ctx.factor or nil
        if g2 then gx = gx and gx + g2 or g2 end
        return gx, nil, g2
      end,
    })
    local x, y = leaf {1, 2}, leaf {3, 4}
    local a, b = f(x, 10, y);
    (a + b):sum():backward()
    same(x.grad, {11, 11})
    same(y.grad, {1, 1})
    x.grad, y.grad = nil, nil
    local c = f(x, 10, y)
    c:sum():backward()
    same(x.grad, {10, 10})
    assert.is_nil(y.grad)
  end)

  it("that returns its input does not tie a knot", function()
    local id = autograd.Function("Id", {forward = function(_, x) return x end, backward = function(_, g) return g * 7 end})
    local x = leaf {1}
    id(x):backward()
    same(x.grad, {7})
  end)

  it("an error in backward ends backward with its message and keeps what was done", function()
    local bad = autograd.Function("Bad", {
      forward = function(_, x) return x * 1 end, backward = function() error("backward of Bad failed") end,
    })
    local x, y = leaf {1}, leaf {2};
    raises("backward of Bad failed", function() (bad(x) * y):backward() end)
    same(y.grad, {1})
    assert.is_nil(x.grad)
  end)

  it("an error in forward restores the mode", function()
    local bad = autograd.Function("Bad", {forward = function() error("forward failed") end, backward = function() end})
    raises("forward failed", bad, leaf {1})
    assert.is_true(hm.is_grad_enabled())
  end)

  it("names what backward returned that does not fit", function()
    local shape = autograd.Function("WrongShape", {
      forward = function(_, x) return x * 1 end, backward = function() return hm.ones({7}, {dtype = "f64"}) end,
    })
    raises({"WrongShape", "wrong shape"}, function() shape(leaf {1, 2}):sum():backward() end)
    local kind = autograd.Function("WrongKind", {forward = function(_, x) return x * 1 end, backward = function() return "no" end})
    raises("gradient 1 of a Function", function() kind(leaf {1, 2}):sum():backward() end)
    raises("forward returned", autograd.Function("Odd", {forward = function() return 3 end, backward = function() end}), leaf {1})
    raises("needs forward and backward", autograd.Function, "Half", {forward = function() end})
    raises({"unknown option", "backward"}, autograd.Function, "Typo", {forward = function() end, backwards = function() end})
  end)

  it("twice backward without retain_graph is refused", function()
    local y = Cube(leaf {1})
    y:backward()
    raises({"the graph was freed", "Cube"}, function() y:backward() end)
  end)

  it("works under create_graph where its backward is made of ops", function()
    local x = leaf {2}
    local g = autograd.grad(Cube(x), x, {create_graph = true})[1]
    near(autograd.grad(g, x)[1], {12}, 1e-14)
  end)
end)

describe("gradcheck", function()
  it("accepts right derivatives and refuses wrong ones with the place", function()
    local x = hm.randn({2, 3}, {dtype = "f64", requires_grad = true})
    assert.is_true(autograd.gradcheck(function(t) return t:tanh() * t end, {x}))
    local wrong = autograd.Function("Wrong", {forward = function(_, t) return t * t end, backward = function(_, g) return g end})
    raises({"gradcheck: input 1, element 1", "finite differences"}, autograd.gradcheck, wrong, {x})
    raises("must be float64", autograd.gradcheck, function(t) return t end, {hm.ones({1}, {requires_grad = true})})
    raises("no input wants a gradient", autograd.gradcheck, function(t) return t end, {hm.ones({1})})
  end)
end)
