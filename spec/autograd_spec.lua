-- autograd_spec.lua -- the tape: what backward() adds up, what it refuses, modes, in-place changes, higher derivatives.  Hooks and
-- functions written in Lua: autograd_hooks_spec.lua.

local hm = require "halfmoon"
local core = require "halfmoon.core"
local devices = require "spec.support.devices"
local numbers = require "spec.support.numbers"
local gradients = require "spec.support.gradients"
local expect = require "spec.support.expect"

local autograd = hm.autograd
local same, near, raises = numbers.assert_same, numbers.assert_near, expect.raises

local function leaf(values, dtype) return hm.tensor(values, {dtype = dtype or "f64", requires_grad = true}) end

-- ====== Accumulation ======

describe("backward adds up", function()
  it("over two backwards, until the gradient is set to nil", function()
    local x = leaf {1, 2, 3};
    (x * x):sum():backward()
    same(x.grad, {2, 4, 6});
    (x * 3):sum():backward()
    same(x.grad, {5, 7, 9})
    x.grad = nil
    assert.is_nil(x.grad);
    (x * x):sum():backward()
    same(x.grad, {2, 4, 6})
  end)

  it("into the same tensor, so that who holds .grad sees it grow", function()
    local x = leaf {1, 2}
    x:sum():backward()
    local grad = x.grad
    x:sum():backward()
    assert.equal(grad, x.grad)
    same(grad, {2, 2})
  end)

  it("over a diamond", function()
    local x = leaf {2, 3}
    local a = x * x
    local b, c = a * 2, a:exp();
    ((b + c) * a):sum():backward()
    local function want(v) return 8 * v ^ 3 + (2 * v ^ 3 + 2 * v) * math.exp(v * v) end
    near(x.grad, {want(2), want(3)}, 1e-12)
  end)

  it("over a leaf used twice in one op, and over many uses", function()
    local x = leaf {3, -1};
    (x * x + x + x):sum():backward()
    same(x.grad, {8, 0})
    local y, total = leaf {1}, nil
    for _ = 1, 100 do total = total and total + y or y * 1 end
    total:backward()
    same(y.grad, {100})
  end)

  it("for leaves of two outputs that share a graph", function()
    local x = leaf {1, 2}
    local h = x * x
    h:sum():backward(nil, {retain_graph = true});
    (h * 2):sum():backward()
    same(x.grad, {6, 12})
  end)

  it("does not hand one memory to two leaves, nor the seed to a leaf", function()
    local a, b = leaf {1, 2}, leaf {3, 4}
    local seed = hm.tensor({5, 6}, {dtype = "f64"});
    (a + b):backward(seed)
    a.grad:fill_(0)
    same(b.grad, {5, 6})
    same(seed, {5, 6})
    local c = leaf {1, 2}
    c:backward(seed)
    c.grad:fill_(0)
    same(seed, {5, 6})
  end)

  it("sums over broadcast dims", function()
    gradients.check(function(x, y) return x * y end, {hm.randn({3, 1}, {dtype = "f64"}), hm.randn({4}, {dtype = "f64"})})
    gradients.check(function(x, y) return x + y:exp() end, {hm.randn({2, 1, 3}, {dtype = "f64"}), hm.randn({}, {dtype = "f64"})})
    gradients.check(function(x) return x:expand({3, 2, 4}) * 2 end, {hm.randn({2, 1}, {dtype = "f64"})})
    local x = leaf {1, 2};
    (x + hm.zeros({0, 2}, {dtype = "f64"})):sum():backward()
    same(x.grad, {0, 0})
  end)

  it("for tensors of no elements", function()
    local x = hm.zeros({0, 3}, {dtype = "f64", requires_grad = true})
    local w = hm.ones({3, 2}, {dtype = "f64", requires_grad = true})
    x:matmul(w):exp():sum():backward()
    assert.same({0, 3}, x.grad.shape)
    same(w.grad, {{0, 0}, {0, 0}, {0, 0}})
    local y = hm.zeros({2, 0}, {dtype = "f64", requires_grad = true})
    y:sum(2):sum():backward()
    assert.same({2, 0}, y.grad.shape)
    local z = hm.zeros({0}, {requires_grad = true})
    z:backward(hm.zeros({0}))
    assert.same({0}, z.grad.shape)
  end)

  it("leaves that no gradient reaches keep none", function()
    local x, y = leaf {1}, leaf {2}
    x:sum():backward()
    assert.is_nil(y.grad)
    local a = leaf {1, 2}
    a:narrow(1, 1, 1):sum():backward()
    same(a.grad, {1, 0})
  end)
end)

-- ====== dtypes ======

describe("the dtype of a gradient", function()
  for short, long in pairs {f16 = "float16", bf16 = "bfloat16", f32 = "float32", f64 = "float64"} do
    it("is the tensor's: " .. long, function()
      local x = hm.tensor({1, 2, 3}, {dtype = short, requires_grad = true})
      local w = hm.tensor({{1, 2, 3}}, {dtype = short, requires_grad = true})
      local h = core.call("linear", x:view(1, 3), w):relu()
      h:retain_grad()
      h:float():sum():backward()
      assert.equal(long, x.grad.dtype)
      assert.equal(long, w.grad.dtype)
      assert.equal(long, h.grad.dtype)
      same(w.grad, {{1, 2, 3}})
    end)
  end

  it("through a cast is the dtype on the other side of it", function()
    local x = leaf({1.0009765625, 2}, "f32")
    local half = x:half()
    half:retain_grad()
    half:double():sum():backward()
    assert.equal("float16", half.grad.dtype)
    assert.equal("float32", x.grad.dtype)
  end)

  it("cannot be an integer", function()
    for _, dtype in ipairs {"i64", "i32", "u8", "bool"} do
      raises("requires_grad: expected a floating dtype", function() hm.zeros({2}, {dtype = dtype}):requires_grad_() end)
      raises("requires_grad: expected a floating dtype", hm.zeros, {2}, {dtype = dtype, requires_grad = true})
      raises("requires_grad: expected a floating dtype", function() hm.zeros({2}, {dtype = dtype}).requires_grad = true end)
    end
    local y = leaf({1.5, 2.5}):to("i64")
    assert.is_false(y.requires_grad)
    assert.is_false((leaf {1, 2}):lt(2).requires_grad)
  end)
end)

-- ====== Seeds and assignments ======

describe("backward(gradient)", function()
  it("starts with the gradient; one element starts with 1", function()
    local x = leaf {1, 2, 3};
    (x * x):backward(hm.tensor({1, 10, 100}, {dtype = "f64"}))
    same(x.grad, {2, 40, 600})
    local y = leaf {{4}};
    (y * 2):backward()
    same(y.grad, {{2}})
  end)

  it("needs one for several elements and names the way out", function()
    local wanted = {"backward: a tensor of several elements needs a gradient", "f64[2]", "hint: reduce it"}
    raises(wanted, function() (leaf {1, 2} * 2):backward() end)
  end)

  it("must have the tensor's shape", function()
    local message = raises("backward: the gradient must have the tensor's shape", function()
      (leaf {1, 2, 3} * 2):backward(hm.ones({3, 1}, {dtype = "f64"}))
    end)
    assert.matches("f64[3]", message, 1, true)
    assert.matches("f64[3,1]", message, 1, true)
  end)

  it("is converted to the tensor's dtype", function()
    local x = leaf({1, 2}, "f16");
    (x * 2):backward(hm.ones({2}, {dtype = "f64"}))
    assert.equal("float16", x.grad.dtype)
  end)

  it("refuses tensors without a graph, unknown options and other arguments", function()
    raises({"backward: the tensor has no graph", "hint:"}, function() hm.ones({1}):backward() end)
    raises({"backward: unknown option", "retain_graph"}, function() (leaf {1} * 2):backward(nil, {retain_grph = true}) end)
    raises({"backward: unknown option", "retain_graph"}, function() (leaf {1} * 2):backward {retain_grap = true} end)
    raises("backward", function() (leaf {1} * 2):backward("f16") end)
    raises("no_grad", function() hm.no_grad(function() return leaf {1} * 2 end):backward() end)
  end)
end)

describe("assigning .grad", function()
  it("takes nil and tensors that fit", function()
    local x = leaf {1, 2}
    x.grad = hm.tensor({3, 4}, {dtype = "f64"})
    x:sum():backward()
    same(x.grad, {4, 5})
    x.grad = nil
    assert.is_nil(x.grad)
  end)

  it("refuses other shapes, dtypes, integers, itself and things that are no tensor", function()
    local x = leaf {1, 2}
    raises({"grad: expected a tensor like its owner", "f64[2]", "f64[3]"}, function() x.grad = hm.zeros({3}, {dtype = "f64"}) end)
    raises({"grad: expected a tensor like its owner", "f32[2]"}, function() x.grad = hm.zeros({2}) end)
    raises("grad: expected a tensor like its owner", function() hm.zeros({2}, {dtype = "i64"}).grad = hm.zeros({2}, {dtype = "i64"}) end)
    raises("its own gradient", function() x.grad = x end)
    raises("grad", function() x.grad = 3 end)
    assert.is_nil(x.grad)
  end)

  it("requires_grad of a result cannot be switched off, of a leaf it can", function()
    local x = leaf {1, 2}
    raises({"requires_grad: expected a leaf", "detach"}, function() (x * 2).requires_grad = false end)
    x.requires_grad = false
    assert.is_false((x * 2).requires_grad)
    x.requires_grad = true
    assert.is_true((x * 2).requires_grad)
    raises("requires_grad must be true or false", function() x.requires_grad = 1 end)
  end)
end)

-- ====== Graphs ======

describe("a graph", function()
  it("is walked once: the second backward is an error that names the op and the way out", function()
    local x = leaf {1, 2}
    local y = x:exp():sum()
    y:backward()
    raises({"the graph was freed", "exp", "retain_graph = true"}, function() y:backward() end)
    same(x.grad, (leaf {1, 2}):exp())
  end)

  it("may be walked again with retain_graph", function()
    local x = leaf {1, 2}
    local y = (x * x):sum()
    y:backward(nil, {retain_graph = true})
    y:backward {retain_graph = true}
    y:backward()
    same(x.grad, {6, 12})
    raises("the graph was freed", function() y:backward() end)
  end)

  it("keeps nothing alive after backward: memory is back where it was", function()
    local x = hm.randn({64, 64}):requires_grad_()
    local function step()
      local y = x
      for _ = 1, 10 do y = y:matmul(x):tanh() end
      y:sum():backward()
    end
    step()
    collectgarbage()
    collectgarbage()
    local before = core.memory_stats().live
    for _ = 1, 3 do step() end
    collectgarbage()
    collectgarbage()
    assert.equal(before, core.memory_stats().live)
  end)

  it("of great depth is walked and freed without recursion", function()
    local depth = devices.pick(100000, 20000)
    local x = leaf {1}
    local y = x * 1
    for _ = 1, depth do y = y + 1 end
    y:backward()
    same(x.grad, {1})
    y = x * 1
    for _ = 1, depth do y = y * 1.0 end
    assert.is_true(y.requires_grad)
    y = nil -- luacheck: ignore 311 (freed without backward)
    collectgarbage()
    collectgarbage()
    y = x * 1
    for _ = 1, depth do y = y + x end
    y:backward()
    same(x.grad, {1 + depth + 1})
  end)

  it("survives the release of its operands and results", function()
    local x = leaf {1, 2}
    local h = x * x
    local y = h:exp()
    h:release()
    collectgarbage()
    y:sum():backward()
    near(x.grad, {2 * math.exp(1), 4 * math.exp(4)}, 1e-12)
  end)

  it("detach cuts it, and shares the memory", function()
    local x = leaf {1, 2}
    local h = x * x
    local d = h:detach()
    assert.is_false(d.requires_grad)
    assert.is_true(d.is_leaf);
    (h * d):sum():backward()
    same(x.grad, {2, 16})
    local z = hm.zeros({2})
    z:detach():fill_(7)
    same(z, {7, 7})
  end)

  it("is_leaf tells leaves from results", function()
    local x = leaf {1}
    assert.is_true(x.is_leaf)
    assert.is_false((x * 2).is_leaf)
    assert.is_true((hm.ones({1}) * 2).is_leaf)
  end)
end)

describe("retain_grad", function()
  it("keeps the gradient of a result, adds up, does nothing on a leaf", function()
    local x = leaf {1, 2}
    x:retain_grad()
    local h = x * x
    h:retain_grad()
    h:retain_grad()
    local y = (h * 3):sum()
    y:backward(nil, {retain_graph = true})
    same(h.grad, {3, 3})
    y:backward()
    same(h.grad, {6, 6})
    same(x.grad, {12, 24})
  end)

  it("without it a result has no gradient", function()
    local x = leaf {1, 2}
    local h = x * x
    h:sum():backward()
    assert.is_nil(h.grad)
  end)

  it("is refused where no gradient is wanted", function()
    raises("retain_grad: expected a tensor that requires a gradient", function() hm.ones({1}):retain_grad() end)
  end)

  it("holds the gradient after hooks", function()
    local x = leaf {1, 2}
    local h = x * x
    h:retain_grad()
    h:register_hook(function(g) return g * 10 end)
    h:sum():backward()
    same(h.grad, {10, 10})
    same(x.grad, {20, 40})
  end)
end)

-- ====== Modes ======

describe("no_grad and enable_grad", function()
  it("as guards", function()
    local x = leaf {1}
    do
      local _ <close> = hm.no_grad()
      assert.is_false(hm.is_grad_enabled())
      assert.is_false((x * 2).requires_grad)
      do
        local _ <close> = hm.enable_grad()
        assert.is_true((x * 2).requires_grad)
      end
      assert.is_false((x * 2).requires_grad)
    end
    assert.is_true((x * 2).requires_grad)
  end)

  it("as functions, with arguments and all results", function()
    local x = leaf {1}
    local a, b, c = hm.no_grad(function(p, q) return p, q, (x * 2).requires_grad end, "p", nil)
    assert.equal("p", a)
    assert.is_nil(b)
    assert.is_false(c)
    assert.is_true(hm.no_grad(function() return hm.enable_grad(function() return (x * 2).requires_grad end) end))
    assert.equal(0, select("#", hm.no_grad(function() end)))
  end)

  it("an error inside restores", function()
    raises("inside", hm.no_grad, function() error("inside") end)
    assert.is_true(hm.is_grad_enabled())
    raises("inside", function()
      local _ <close> = hm.no_grad()
      error("inside")
    end)
    assert.is_true(hm.is_grad_enabled())
  end)

  it("belong to a coroutine: a new one starts with gradients on, and yields leak nothing", function()
    local _ <close> = hm.no_grad()
    local inside = coroutine.wrap(function()
      coroutine.yield(hm.is_grad_enabled())
      hm.no_grad(function() coroutine.yield(hm.is_grad_enabled()) end)
      coroutine.yield(hm.is_grad_enabled())
    end)
    assert.is_true(inside())
    local enabled <close> = hm.enable_grad()
    assert.is_false(inside())
    assert.is_true(hm.is_grad_enabled())
    assert.is_true(inside())
    enabled:close()
    assert.is_false(hm.is_grad_enabled())
  end)

  it("a leaf made inside wants its gradient outside", function()
    local x = hm.no_grad(function() return leaf {1, 2} end);
    (x * x):sum():backward()
    same(x.grad, {2, 4})
  end)

  it("a coroutine may call backward, also on a graph of another", function()
    local x = leaf {1, 2}
    local y = coroutine.wrap(function() return (x * x):sum() end)()
    coroutine.wrap(function() y:backward() end)()
    same(x.grad, {2, 4})
  end)
end)

-- ====== In place ======

describe("in-place changes", function()
  it("of a leaf that wants a gradient are refused with a hint, and allowed under no_grad", function()
    local x = leaf {1, 2}
    raises({"add: a leaf that wants a gradient cannot be changed in place", "f64[2]", "hm.no_grad"}, function() x:add_(1) end)
    raises("a leaf that wants a gradient", function() x:copy_(hm.zeros({2})) end)
    raises("a leaf that wants a gradient", function() x:fill_(1) end)
    raises("a leaf that wants a gradient", function() x:zero_() end)
    raises("a leaf that wants a gradient", function() x:uniform_() end)
    hm.no_grad(function() x:add_(1) end)
    same(x, {2, 3})
  end)

  it("of a view are refused with a hint", function()
    local x = leaf {1, 2, 3}
    local h = x * 1
    raises({"a view cannot be changed in place while gradients are recorded", "clone()"}, function() h:view(3, 1):mul_(2) end)
    raises("a view cannot be changed in place", function() h[1]:fill_(0) end)
    raises("cannot be changed in place", function() x[1]:fill_(0) end)
    raises("cannot be changed in place", function() x[1] = 0 end)
    hm.no_grad(function() x[1] = 10 end)
    same(x, {10, 2, 3})
  end)

  it("of a result replace its node", function()
    local x = leaf {1, 2}
    local h = x * 2
    h:add_(1)
    h:mul_(h)
    h:sum():backward()
    same(x.grad, {4 * 3, 4 * 5})
    local y = leaf {0.5, 2}
    local e = y * 1
    e:exp_()
    e:sum():backward()
    near(y.grad, {math.exp(0.5), math.exp(2)}, 1e-14)
  end)

  it("of a result that reads its old value keep it", function()
    local x = leaf {1, 2}
    local h = x * 1
    h:pow_(3)
    h:sum():backward()
    near(x.grad, {3, 12}, 1e-12)
    local z = leaf {1, 4}
    local k = z * 1
    k:log_()
    k:sum():backward()
    same(z.grad, {1, 0.25})
  end)

  it("bring a gradient into a tensor that had none", function()
    local x, y = leaf {1, 2}, hm.zeros({2}, {dtype = "f64"})
    y:add_(x * x)
    assert.is_true(y.requires_grad)
    y:sum():backward()
    same(x.grad, {2, 4})
    local z = hm.zeros({2, 2}, {dtype = "f64"})
    z:copy_(x)
    z:sum():backward()
    same(x.grad, {4, 6})
  end)

  it("of a view of a plain tensor by something that wants a gradient are refused", function()
    local x, y = leaf {1, 2}, hm.zeros({2, 2}, {dtype = "f64"})
    raises("a view cannot be changed in place", function() y[1]:copy_(x) end)
  end)

  it("of a saved tensor are found by backward, which names it", function()
    local x = leaf {1, 2}
    local h = x * 1
    local y = (h * h):sum()
    h:add_(1)
    raises({"operand", "of mul", "f64[2]", "was changed in place", "hint"}, function() y:backward() end)
    local e = x:exp()
    local s = e:sum()
    e:mul_(2)
    raises({"result", "of exp", "was changed in place"}, function() s:backward() end)
    local w = leaf {1, 2}
    local p = (w * w):sum()
    hm.no_grad(function() w:add_(1) end)
    raises({"operand", "of mul", "was changed in place"}, function() p:backward() end)
  end)

  it("of what backward does not read are free", function()
    local x = leaf {1, 2}
    local h = x * 1
    local y = (h + 1):sum()
    h:add_(5)
    y:backward()
    same(x.grad, {1, 1})
  end)

  it("through detach and views are found too", function()
    local x = leaf {1, 2}
    local h = x * 1
    local y = (h * h):sum()
    h:detach():fill_(3)
    raises("was changed in place", function() y:backward() end)
  end)

  it("of a result with views: a view taken before is refused from then on, one taken after is right", function()
    local x = leaf {1, 2}
    local h = x * 1
    local before = h:view(2, 1)
    local used = before:sum()
    h:mul_(3)
    raises({"has been changed in place since", "f64[2,1]", "take the view again"}, function() return before:sum() end)
    raises("has been changed in place since", function() before:backward(hm.ones({2, 1}, {dtype = "f64"})) end)
    used:backward(nil, {retain_graph = true})
    same(x.grad, {1, 1})
    x.grad = nil
    h:view(2, 1):sum():backward()
    same(x.grad, {3, 3})
  end)

  it("of another shape, or what would not fit, are refused and change nothing", function()
    local x = leaf {1, 2}
    local h = x * 1
    raises("add", function() h:add_(hm.ones({3, 2}, {dtype = "f64"})) end)
    raises("copy_", function() h:copy_(hm.ones({3}, {dtype = "f64"})) end)
    h:sum():backward()
    same(x.grad, {1, 1})
  end)

  it("of an expanded tensor are refused, unless every element gets the same number", function()
    local x = hm.zeros({1})
    local wide = x:expand({3})
    local wanted = {"elements of the tensor share memory", "f32[3]", "clone()"}
    raises(wanted, function() wide:add_(1) end)
    raises(wanted, function() wide:copy_(hm.tensor {1, 2, 3}) end)
    raises(wanted, function() wide:uniform_() end)
    same(x, {0})
    wide:fill_(4)
    same(x, {4})
    wide:clone():add_(1)
  end)

  it("of a result that retains its gradient: overwriting ends that, too", function()
    local x = leaf {1, 2}
    local h = x * 2
    h:retain_grad()
    h:fill_(1)
    assert.is_nil(h.grad)
    h:requires_grad_();
    (h * x):sum():backward()
    same(h.grad, {1, 2})
    same(x.grad, {1, 1})
  end)

  it("that overwrite a result cut it off", function()
    for _, write in ipairs {
      function(t) t:fill_(7) end, function(t) t:zero_() end, function(t) t:copy_(hm.ones({2})) end, function(t) t:normal_() end,
    } do
      local x = leaf {1, 2}
      local h = x * 2
      write(h)
      assert.is_false(h.requires_grad)
      assert.is_true(h.is_leaf);
      (h + x):sum():backward()
      same(x.grad, {1, 1})
    end
  end)

  it("with the same tensor on both sides keep its old value", function()
    local x = leaf {1, 2}
    local h = x * 1
    h:mul_(h)
    h:sum():backward()
    same(x.grad, {2, 4})
    local y = leaf {1, 2}
    local k = y * 1
    k:div_(y * y)
    k:sum():backward()
    near(y.grad, {-1, -0.25}, 1e-14)
  end)

  it("keep retain_grad with the tensor", function()
    local x = leaf {1, 2}
    local h = x * 1
    h:retain_grad()
    h:mul_(3);
    (h * 2):sum():backward()
    same(h.grad, {2, 2})
    same(x.grad, {6, 6})
  end)
end)

-- ====== autograd.grad ======

describe("autograd.grad", function()
  it("always gives an array and leaves .grad alone", function()
    local x, y = leaf {1, 2}, leaf {3, 4}
    local g = autograd.grad((x * y):sum(), x)
    assert.equal(1, #g)
    same(g[1], {3, 4})
    local both = autograd.grad({(x * y):sum()}, {x, y})
    same(both[2], {1, 2})
    assert.is_nil(x.grad)
    assert.is_nil(y.grad)
  end)

  it("with respect to results, with grad_outputs, over several outputs", function()
    local x = leaf {1, 2}
    local h = x * x
    local y = h * h
    same(autograd.grad(y, h, {grad_outputs = hm.tensor({1, 10}, {dtype = "f64"})})[1], {2, 80})
    local a = leaf {1, 2}
    local b = a * 3
    same(autograd.grad({b, (a * a):sum()}, {a}, {grad_outputs = {hm.tensor({1, 1}, {dtype = "f64"})}})[1], {5, 7})
    same(autograd.grad({a:sum(), (a * 2):sum()}, {a}, {grad_outputs = {nil, hm.tensor(10, {dtype = "f64"})}})[1], {21, 21})
  end)

  it("of an output that is an input is the seed", function()
    local x = leaf {1}
    same(autograd.grad(x, x)[1], {1})
    local h = x * 2
    same(autograd.grad({h}, {h, x})[2], {2})
  end)

  it("the same input twice, or a view", function()
    local x = leaf {{1, 2}, {3, 4}}
    local g = autograd.grad((x * x):sum(), {x, x})
    same(g[1], {{2, 4}, {6, 8}})
    same(g[2], {{2, 4}, {6, 8}})
    local row = x[1]
    same(autograd.grad((row * row):sum(), {row, x})[2], {{2, 4}, {0, 0}})
  end)

  it("names an input that was not used; allow_unused gives nil", function()
    local x, y = leaf {1}, leaf {2}
    raises({"grad: input 2 was not used", "allow_unused"}, function() autograd.grad(x:sum(), {x, y}) end)
    local g = autograd.grad(x:sum(), {y, x}, {allow_unused = true})
    assert.is_nil(g[1])
    same(g[2], {1})
    raises("grad: input 1 does not want a gradient", autograd.grad, x:sum(), {hm.ones({1})})
    raises({"grad: unknown option", "create_graph"}, autograd.grad, x:sum(), {x}, {creat_graph = true})
  end)

  it("goes only where it must: other branches keep what they saved", function()
    local x, y = leaf {2}, leaf {3}
    local side = y:exp()
    local z = x * x * side
    same(autograd.grad(z:sum(), x, {retain_graph = true})[1], (leaf {4}) * side)
    near(autograd.grad(z:sum(), y)[1], {4 * math.exp(3)}, 1e-14)
  end)

  it("runs hooks", function()
    local x = leaf {1}
    x:register_hook(function(g) return g * 5 end)
    same(autograd.grad(x * 2, x)[1], {10})
  end)
end)

describe("higher derivatives", function()
  it("a product of itself, three times", function()
    local x = leaf {2}
    local y = x * x * x * x
    local g1 = autograd.grad(y, x, {create_graph = true})[1]
    local g2 = autograd.grad(g1, x, {create_graph = true})[1]
    local g3 = autograd.grad(g2, x)[1]
    near(g1, {32}, 1e-12)
    near(g2, {48}, 1e-12)
    near(g3, {48}, 1e-12)
  end)

  it("where an op has no derivative are refused, not left out", function()
    local x = leaf {2}
    local y = x ^ 4
    local g1 = autograd.grad(y, x, {create_graph = true})[1]
    local g2 = autograd.grad(g1, x, {create_graph = true})[1]
    raises({"has no derivative", "once more"}, function() autograd.grad(g2 + x * x, x) end)
    local p = leaf {{{{1, 2}, {3, 4}}}}
    local function largest(t) return (core.call("adaptive_max_pool2d", t, {output_size = {1}})) end
    local top = largest(p * p)
    local g = autograd.grad(top:sum(), p, {create_graph = true})[1]
    same(autograd.grad(g:sum(), p)[1], {{{{0, 0}, {0, 2}}}})
    top = largest(p * p)
    g = autograd.grad((top * top):sum(), p, {create_graph = true})[1]
    same(g, {{{{0, 0}, {0, 256}}}})
    raises("has no derivative", function() g:sum():backward() end)
  end)

  it("backward with create_graph, then backward through .grad", function()
    local x = leaf {1, 2};
    (x * x * x):sum():backward(nil, {create_graph = true})
    local first = x.grad
    same(first, {3, 12})
    x.grad = nil
    first:sum():backward()
    same(x.grad, {6, 12})
  end)

  it("without create_graph the gradient has no graph", function()
    local x = leaf {1}
    assert.is_false(autograd.grad(x * x, x)[1].requires_grad)
    assert.is_true(autograd.grad(x * x, x, {create_graph = true})[1].requires_grad)
  end)

  it("of a small MLP against differences", function()
    hm.manual_seed(3)
    local options = {dtype = "f64"}
    local inputs = {}
    for k, shape in ipairs {{3, 4}, {5, 4}, {5}, {2, 5}, {2}} do inputs[k] = hm.randn(shape, options) * (k == 1 and 1 or 0.4) end
    local function mlp(x, w1, b1, w2, b2)
      return core.call("linear", core.call("linear", x, w1, b1):tanh(), w2, b2):sigmoid()
    end
    gradients.check(mlp, inputs)
    gradients.check_second(mlp, inputs)
    gradients.check_second(function(x, w) return x:matmul(w):gelu():softmax(2):log():mean(1) end, {inputs[1], inputs[2]:t():contiguous()})
  end)

  it("a gradient penalty", function()
    local x, w = hm.randn({4, 3}, {dtype = "f64"}), hm.randn({1, 3}, {dtype = "f64"})
    gradients.check(function(p, q)
      if not q.requires_grad then q = q:clone():requires_grad_() end
      local y = core.call("linear", p, q):tanh():sum()
      local g = autograd.grad(y, q, {create_graph = true})[1]
      return y + (g * g):sum():sqrt()
    end, {x, w}, 1e-5)
  end)
end)
