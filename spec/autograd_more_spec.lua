-- autograd_more_spec.lua -- second derivatives of every op that has them, functions with kept tensors, the search for the first NaN,
-- whole derivatives, and random graphs against finite differences.

local hm = require "halfmoon"
local core = require "halfmoon.core"
local numbers = require "spec.support.numbers"
local expect = require "spec.support.expect"
local devices = require "spec.support.devices"

local autograd, nn = hm.autograd, hm.nn
local same, near, raises = numbers.assert_same, numbers.assert_near, expect.raises

local function leaf(values, dtype) return hm.tensor(values, {dtype = dtype or "f64", requires_grad = true}) end

-- Numbers from low to high in an order of their own, at distances that differences cannot bridge.
local function spread(shape, low, high)
  local n = 1
  for _, size in ipairs(shape) do n = n * size end
  local list, step = {}, 1
  for _, s in ipairs {7, 5, 3, 11, 13} do
    if n % s ~= 0 then step = s break end
  end
  for i = 1, n do list[i] = low + (high - low) * (((i * step) % n) + 0.5) / n end
  return hm.tensor(list, {dtype = "f64"}):view(shape)
end

local function wanting(list)
  local out = {}
  for i, x in ipairs(list) do out[i] = x:detach():clone():requires_grad_() end
  return out
end

-- ====== Second derivatives ======

local function op(name, ...)
  local extra = table.pack(...)
  return function(...)
    local list = {...}
    for i = 1, extra.n do list[#list + 1] = extra[i] end
    return (core.call(name, table.unpack(list)))
  end
end

local vector, matrix = {5}, {3, 4}
local real, positive, unit = {-1.6, 1.7}, {0.4, 2.1}, {-0.8, 0.9}

-- name, function, shapes and ranges of its inputs
local SECOND = {
  {"add and sub", function(x, y) return (x + y) * (x - y) end, {matrix, real}, {{4}, real}},
  {"mul", op "mul", {matrix, real}, {{4}, real}},
  {"div", op "div", {matrix, real}, {{4}, positive}},
  {"pow", op "pow", {vector, positive}, {vector, real}},
  {"square", op "square", {vector, real}}, {"neg", function(x) return -x * x end, {vector, real}},
  {"reciprocal", op "reciprocal", {vector, positive}}, {"hypot", op "hypot", {vector, positive}, {vector, positive}},
  {"lerp", op "lerp", {vector, real}, {vector, real}, {vector, unit}},
  {"addcmul", op("addcmul", {value = 0.7}), {vector, real}, {vector, real}, {vector, real}},
  {"addcdiv", op("addcdiv", {value = 0.7}), {vector, real}, {vector, real}, {vector, positive}},
  {"maximum", function(x, y) return x:maximum(y) ^ 2 end, {vector, real}, {vector, {-0.7, 0.9}}},
  {"where", function(x, y) return hm.where(x:detach():gt(0), x * x, y * x) end, {vector, real}, {vector, real}},
  {"masked_fill", function(x) return (x * x):masked_fill(x:detach():gt(0), 2.0) end, {vector, real}},
  {"abs", function(x) return x:abs() * x end, {vector, real}},
  {"clamp", function(x) return x:clamp(0.3, 1) ^ 2 * x end, {vector, {0.1, 1.7}}},
  {"linear", op "linear", {{2, 3}, real}, {{4, 3}, real}, {{4}, real}},
  {"matmul", op "matmul", {{2, 3}, real}, {{3, 2}, real}},
  {"matmul in batches", op "matmul", {{2, 2, 3}, real}, {{3, 2}, real}},
  {"matmul of vectors", op "matmul", {{3}, real}, {{3}, real}},
  {"conv2d", op("conv2d", {padding = {1}, stride = {2}}), {{1, 2, 4, 4}, real}, {{2, 2, 3, 3}, real}, {{2}, real}},
  {"sum", function(x) return (x * x):sum(1) end, {matrix, real}},
  {"mean", function(x) return (x * x * x):mean(2, true) end, {matrix, real}},
  {"var", function(x) return x:var(2) end, {matrix, real}}, {"std", function(x) return x:std(1) end, {matrix, real}},
  {"norm", function(x) return x:norm() end, {matrix, real}},
  {"norm of p = 3", function(x) return x:norm(3, 2) end, {matrix, real}},
  {"logsumexp", function(x) return x:logsumexp(2) end, {matrix, real}},
  {"amax", function(x) return (x * x):amax(2) end, {matrix, positive}},
  {"softmax", function(x) return x:softmax(2) end, {matrix, real}},
  {"log_softmax", function(x) return x:log_softmax(2) end, {matrix, real}},
  {"cumsum", function(x) return (x * x):cumsum(2) end, {matrix, real}},
  {"prod", function(x) return x:prod(2, true) end, {matrix, real}}, {"prod of all", function(x) return x:prod() end, {matrix, real}},
  {"cumprod", function(x) return x:cumprod(2) end, {matrix, real}},
  {"gather", function(x) return (x * x):gather(1, hm.tensor({{0, 2}, {1, 1}}, {dtype = "i64"})) end, {matrix, real}},
  {"scatter_add", function(x, y) return (x:scatter_add(2, hm.tensor({{0, 0}, {1, 3}}, {dtype = "i64"}), y * y)) ^ 2 end,
    {matrix, real}, {{2, 2}, real}},
  {"index_select", function(x) return (x * x):index_select(1, hm.tensor({0, 2, 2}, {dtype = "i64"})) end, {matrix, real}},
  {"embedding", function(w) return nn.functional.embedding(hm.tensor({0, 2, 2}, {dtype = "i64"}), w) ^ 2 end, {matrix, real}},
  {"max_pool2d", function(x) return nn.functional.max_pool2d(x * x, 2) end, {{1, 1, 4, 4}, positive}},
  {"avg_pool2d", function(x) return nn.functional.avg_pool2d(x * x, 2) end, {{1, 1, 4, 4}, real}},
  {"views", function(x)
    return (x:t():reshape(2, 6):narrow(2, 2, 3):unsqueeze(1):expand(2, 2, 3) * x:sum()) ^ 2
  end, {matrix, real}},
  {"cat and stack", function(x, y)
    return hm.cat({x * x, y * x, y}, 1) ^ 2 + hm.stack({x, y, x}, 1):view(-1) ^ 2
  end, {vector, real}, {vector, real}},
  {"indexing", function(x) return (x * x)[2] * x[{{1, 2}, 3}]:sum() end, {matrix, real}},
  {"in-place ops", function(x)
    local y = x * 2
    y:mul_(x):add_(x:sum())
    return y:tanh_()
  end, {vector, unit}},
  {"casts", function(x) return (x * x):to("f64") * x:clone() end, {vector, real}},
  {"cross_entropy", function(x) return nn.functional.cross_entropy(x, hm.tensor({0, 3, 1}, {dtype = "i64"})) end, {matrix, real}},
  {"cross_entropy with smoothing", function(x)
    return nn.functional.cross_entropy(x, hm.tensor({0, 3, 1}, {dtype = "i64"}), {label_smoothing = 0.1, reduction = "sum"})
  end, {matrix, real}},
  {"nll_loss", function(x) return nn.functional.nll_loss(x:log_softmax(2), hm.tensor({0, 3, 1}, {dtype = "i64"})) end, {matrix, real}},
  {"mse_loss", function(x, y) return nn.functional.mse_loss(x, y) end, {vector, real}, {vector, real}},
  {"smooth_l1_loss", function(x, y) return nn.functional.smooth_l1_loss(x, y) end, {vector, real}, {vector, unit}},
  {"binary_cross_entropy_with_logits", function(x, y)
    return nn.functional.binary_cross_entropy_with_logits(x, y)
  end, {vector, real}, {vector, {0.1, 0.9}}},
}
for _, name in ipairs {
  "exp", "expm1", "sin", "cos", "tan", "atan", "sinh", "cosh", "tanh", "erf", "sigmoid", "relu", "gelu", "gelu_tanh", "silu", "softplus",
  "softsign", "logsigmoid", "leaky_relu", "elu", "hardtanh", "mish",
} do
  SECOND[#SECOND + 1] = {name, function(x) return core.call(name, x) * x end, {vector, {-0.9, 0.95}}}
end
for _, name in ipairs {"log", "log2", "log10", "log1p", "sqrt", "rsqrt"} do
  SECOND[#SECOND + 1] = {name, op(name), {vector, positive}}
end
for _, name in ipairs {"asin", "acos"} do SECOND[#SECOND + 1] = {name, op(name), {vector, unit}} end

local function plain(fn, ...) return fn(...) end

local function on_cpu(fn) return devices.cpu_only("differences of float64 values take long elsewhere", fn) end

describe("the second derivative of", function()
  for _, case in ipairs(SECOND) do
    it(case[1], on_cpu(function()
      local inputs = {}
      for i = 3, #case do inputs[i - 2] = spread(case[i][1], case[i][2][1], case[i][2][2]) end
      inputs = wanting(inputs)
      assert.is_true(autograd.gradcheck(case[2], inputs, {atol = 1e-7, rtol = 1e-5}))
      assert.is_true(autograd.gradgradcheck(case[2], inputs, nil, {atol = 1e-6, rtol = 1e-5}))
    end))
  end
end)

describe("a result of very many tensors", function()
  it("gives each its gradient (cat and stack of 1,000)", function()
    local parts = {}
    for i = 1, 1000 do parts[i] = hm.full({2}, i):requires_grad_() end
    local stacked = hm.stack(parts, 1) * hm.arange(1000):float():unsqueeze(2)
    stacked:sum():backward()
    same(parts[1].grad, {0, 0})
    same(parts[1000].grad, {999, 999})
    hm.cat(parts, 1):sum():backward()
    same(parts[1000].grad, {1000, 1000})
  end)
end)

describe("an op whose gradient cannot be differentiated", function()
  it("names itself when its gradient is differentiated, and is no hindrance before", function()
    local x = leaf {{1, 3, 2}}
    local g = autograd.grad(((x * x):max(2) ^ 2):sum(), x, {create_graph = true})[1]
    same(g, {{0, 108, 0}})
    same(autograd.grad(g:sum(), x)[1], {{0, 108, 0}})
    g = autograd.grad((nn.functional.layer_norm(x, {3}) ^ 2):sum(), x, {create_graph = true})[1]
    raises({"layer_norm_backward", "has no derivative", "once more"}, function() g:sum():backward() end)
    local w = leaf {0.3, -0.4}
    local third = w:tanh()
    for _ = 1, 2 do third = autograd.grad(third:sum(), w, {create_graph = true})[1] end
    local message = raises({"tanh_backward", "has no derivative"}, function() third:sum():backward() end)
    assert.is_nil(message:find("\n  in "))
  end)
end)

-- ====== Whole derivatives ======

describe("jacobian, hessian, vjp and jvp", function()
  local a = hm.tensor({{1, 2}, {3, 4}, {5, 6}}, {dtype = "f64"})
  local function f(x) return a:matmul(x * x) end

  it("of one input and of several", function()
    local x = hm.tensor({1, 2}, {dtype = "f64"})
    same(autograd.jacobian(f, x), {{2, 8}, {6, 16}, {10, 24}})
    local j = autograd.jacobian(function(p, q) return p * q:sum() end, {x, hm.tensor({3}, {dtype = "f64"})})
    same(j[1], {{3, 0}, {0, 3}})
    same(j[2], {{1}, {2}})
    assert.same({2, 1}, j[2].shape)
    same(autograd.jacobian(function(p) return p:detach() end, x), {{0, 0}, {0, 0}})
    raises("must return one tensor", autograd.jacobian, function() return 3 end, x)
  end)

  it("hessian: also of inputs that do not meet", function()
    local x, y = hm.tensor({1, 2}, {dtype = "f64"}), hm.tensor({3}, {dtype = "f64"})
    same(autograd.hessian(function(p) return (p * p * p):sum() end, x), {{6, 0}, {0, 12}})
    local h = autograd.hessian(function(p, q) return (p * p):sum() * q + q:exp() end, {x, y})
    same(h[1][1], {{6, 0}, {0, 6}})
    same(h[1][2], {{2}, {4}})
    near(h[2][2], {{math.exp(3)}}, 1e-14)
    same(autograd.hessian(function(p) return p:sum() end, x), {{0, 0}, {0, 0}})
    raises("must return one value", autograd.hessian, f, x)
  end)

  it("vjp and jvp are the two products with the jacobian", function()
    local x = hm.tensor({1, 2}, {dtype = "f64"})
    local y, back = autograd.vjp(f, x, hm.tensor({1, 0, 2}, {dtype = "f64"}))
    same(y, {9, 19, 29})
    same(back, {22, 56})
    local _, forth = autograd.jvp(f, x, hm.tensor({1, -1}, {dtype = "f64"}))
    same(forth, {-6, -10, -14})
    _, forth = autograd.jvp(function(p) return p * 3 end, {x}, {hm.tensor({1, -1}, {dtype = "f64"})})
    same(forth, {3, -3})
    assert.is_false(y.requires_grad)
  end)

  it("jacobian with create_graph goes on", function()
    local x = leaf {1, 2}
    autograd.jacobian(function(p) return p * p * p end, x, {create_graph = true}):sum():backward()
    same(x.grad, {6, 12})
  end)
end)

describe("gradcheck and gradgradcheck", function()
  it("look at every value of every output", function()
    local x = leaf {0.3, 0.6}
    assert.is_true(autograd.gradcheck(function(t) return t * t, t:sum(), t:argmax() end, {x}))
    -- the errors of both values cancel in their sum
    local swapped = autograd.Function("Swapped", {
      forward = function(_, t) return t * 2 end,
      backward = function(_, g) return g:flip({1}) * 2 end,
    })
    local ok, message = autograd.gradcheck(swapped, {x}, {raise_exception = false})
    assert.is_false(ok)
    assert.truthy(message:find("input 1, element 1, by output 1, element 1: backward gives 0, finite", 1, true))
  end)

  it("gradgradcheck finds a wrong second derivative where the first is right", function()
    local x = leaf {0.3, 0.6}
    local half = autograd.Function("Half", {
      forward = function(ctx, t)
        ctx:save_for_backward(t)
        return t * t
      end,
      backward = function(ctx, g) return g * ctx:saved():detach() * 2 end,
    })
    assert.is_true(autograd.gradcheck(half, {x}))
    raises({"gradgradcheck: input 1, element 1"}, autograd.gradgradcheck, half, {x})
    assert.is_true(autograd.gradgradcheck(function(t) return t * t * t end, {x}, {hm.tensor({2, -1}, {dtype = "f64"})}))
    raises("must be contiguous", autograd.gradcheck, function(t) return t end, {hm.zeros({3, 2}, {dtype = "f64"}):t():requires_grad_()})
  end)
end)

-- ====== Functions in Lua ======

describe("what an autograd.Function keeps", function()
  local Exp = autograd.Function("Exp", {
    forward = function(ctx, x)
      local y = x:exp()
      ctx:save_for_backward(y)
      return y
    end,
    backward = function(ctx, g) return g * ctx:saved() end,
  })

  it("may be its own result, which then can be collected", function()
    local x = leaf {1, 2}
    local weak = setmetatable({}, {__mode = "k"})
    do
      local y = Exp(x)
      weak[y] = true
    end
    for _ = 1, 3 do collectgarbage() end
    assert.is_nil(next(weak))
    Exp(x):sum():backward()
    near(x.grad, {math.exp(1), math.exp(2)}, 1e-15)
  end)

  it("carries its graph under create_graph: operands, results", function()
    local x = leaf {0.3, -0.6}
    assert.is_true(autograd.gradcheck(Exp, {x}))
    assert.is_true(autograd.gradgradcheck(Exp, {x}))
    local Mul = autograd.Function("Mul", {
      forward = function(ctx, a, b)
        ctx:save_for_backward(a, nil, b)
        return a * b, a + b
      end,
      backward = function(ctx, g1, g2)
        local a, none, b = ctx:saved()
        assert.is_nil(none)
        return g1 * b + g2, g1 * a + g2
      end,
    })
    local function both(a, b)
      local p, q = Mul(a * a, b)
      return p * q
    end
    assert.is_true(autograd.gradcheck(both, {x, leaf {2, 0.5}}))
    assert.is_true(autograd.gradgradcheck(both, {x, leaf {2, 0.5}}))
  end)

  it("must not be changed in place before backward", function()
    local x = leaf {1, 2}
    local h = x * 1
    local y = Exp(h)
    y:mul_(2)
    raises({"saved tensor 1 of Exp", "changed in place", "expected 0"}, function() y:sum():backward() end)
  end)

  it("is gone after backward, and with retain_graph is not", function()
    local x = leaf {1}
    local y = Exp(x)
    y:backward(nil, {retain_graph = true})
    y:backward()
    near(x.grad, {2 * math.exp(1)}, 1e-15)
    raises({"the graph was freed", "Exp"}, function() y:backward() end)
  end)

  it("may be many tensors, asked for many times", function()
    local Many = autograd.Function("Many", {
      forward = function(ctx, x)
        local list = {}
        for i = 1, 150 do list[i] = i % 2 == 0 and x or x * i end
        ctx:save_for_backward(table.unpack(list))
        return x * 1
      end,
      backward = function(ctx, g)
        for _ = 1, 3 do assert.equal(150, select("#", ctx:saved())) end
        return g * (select(149, ctx:saved())) * (select(150, ctx:saved()))
      end,
    })
    for _, call in ipairs {plain, hm.checkpoint} do
      local x = leaf {2}
      local g = autograd.grad(call(function(t) return Many(t * 1) end, x), x, {create_graph = true})[1]
      same(g, {149 * 4})
      same(autograd.grad(g, x)[1], {149 * 2})
    end
  end)

  it("can be tensors only; saved() is for backward", function()
    raises({"save_for_backward takes tensors", "as fields"}, autograd.Function("Keeps", {
      forward = function(ctx, x)
        ctx:save_for_backward(x, 3)
        return x
      end,
      backward = function() end,
    }), leaf {1})
    local held
    local y = autograd.Function("Held", {
      forward = function(ctx, x)
        held = ctx
        ctx:save_for_backward(x)
        return x * 1, ctx:saved() * 2
      end,
      backward = function(_, g) return g end,
    })(leaf {1})
    raises("inside the function's backward", held.saved, held)
    assert.is_true(y.requires_grad)
  end)
end)

describe("an autograd.Function", function()
  it("tells which arguments want a gradient", function()
    local seen
    local f = autograd.Function("Seen", {
      forward = function(ctx, ...)
        seen = ctx.needs_input_grad
        return (...) * 1
      end,
      backward = function(_, g) return g end,
    })
    f(leaf {1}, 3, hm.ones({1}), nil, leaf {2}, "text")
    assert.same({true, false, false, false, true, false}, seen)
    hm.no_grad(f, leaf {1})
    assert.same({false}, seen)
  end)

  it("may have outputs that carry no gradient", function()
    local f = autograd.Function("Top", {
      forward = function(ctx, x)
        local mask = x:gt(0):to("f64")
        ctx:mark_non_differentiable(mask)
        ctx:save_for_backward(mask)
        return x * mask, mask, x:argmax()
      end,
      backward = function(ctx, g) return g * ctx:saved() end,
    })
    local x = leaf {-1, 2}
    local y, mask, place = f(x)
    assert.is_true(y.requires_grad)
    assert.is_false(mask.requires_grad)
    assert.is_false(place.requires_grad)
    y:sum():backward()
    same(x.grad, {0, 1})
  end)

  it("declared once_differentiable says so under create_graph", function()
    local f = autograd.Function("Once", {
      forward = function(ctx, x)
        ctx:save_for_backward(x)
        return x * x
      end,
      backward = function(ctx, g)
        assert.is_false(hm.is_grad_enabled())
        return 2 * ctx:saved() * g
      end,
      once_differentiable = true,
    })
    local x = leaf {3}
    local g = autograd.grad(f(x), x, {create_graph = true})[1]
    same(g, {6})
    raises({"Once was declared once_differentiable"}, function() autograd.grad(g, x) end)
    f(x):backward()
    same(x.grad, {6})
  end)

  it("must not return more gradients than forward took arguments", function()
    local f = autograd.Function("More", {forward = function(_, x) return x * 1 end, backward = function(_, g) return g, g end})
    raises({"More", "2 gradients", "1 arguments"}, function() f(leaf {1}):backward() end)
  end)

  it("names itself in grad_fn, as ops do", function()
    local x = leaf {1}
    assert.is_nil(x.grad_fn)
    assert.is_nil((hm.ones({1}) * 2).grad_fn)
    assert.equal("mul", (x * 2).grad_fn)
    local f = autograd.Function("Named", {forward = function(_, t) return t * 1 end, backward = function(_, g) return g end})
    assert.equal("Named", f(x).grad_fn)
    raises("cannot be assigned", function() x.grad_fn = "add" end)
  end)
end)

-- ====== Modes ======

describe("set_grad_enabled", function()
  it("as a guard and as a function", function()
    local x = leaf {1}
    do
      local _ <close> = hm.set_grad_enabled(false)
      assert.is_false((x * 2).requires_grad)
      assert.is_true(hm.set_grad_enabled(true, function(t) return (t * 2).requires_grad end, x))
    end
    assert.is_true(hm.is_grad_enabled())
    assert.is_false(hm.set_grad_enabled(false, hm.is_grad_enabled))
    raises("set_grad_enabled", hm.set_grad_enabled, "yes")
    raises("must be a function", hm.set_grad_enabled, true, 3)
  end)
end)

describe("a full copy over a result", function()
  it("leaves the leaf behind the old value without a gradient", function()
    local x, y = leaf {1, 2}, leaf {3, 4}
    local h = x * 2
    h:copy_(y)
    h:sum():backward()
    assert.is_nil(x.grad)
    same(y.grad, {1, 1})
  end)
end)

-- ====== detect_anomaly ======

describe("detect_anomaly", function()
  local detect = autograd.detect_anomaly
  local function line() return debug.getinfo(2, "l").currentline end

  it("names the op, its line and the operand whose gradient became NaN", function()
    local x, at = leaf {0, 1, 4}
    raises({"detect_anomaly: the backward of sqrt made the gradient of its x, f64[3]", "hold 1 nan", "recorded at",
      "autograd_more_spec.lua:"}, function()
      detect(function()
        at = line() + 1
        local y = x:sqrt() * 0
        y:sum():backward()
      end)
    end)
    local ok, message = pcall(detect, function()
      at = line() + 1
      local y = x:sqrt() * 0
      y:sum():backward()
    end)
    assert.is_false(ok)
    assert.truthy(message:find("autograd_more_spec.lua:" .. at, 1, true))
    assert.is_nil(x.grad)
  end)

  it("as a guard; and is off behind it", function()
    local x = leaf {0}
    do
      local _ <close> = detect()
      local y = (x:sqrt() * 0):sum()
      raises("the backward of sqrt", function() y:backward() end)
    end
    (x:sqrt() * 0):sum():backward()
    assert.is_true(x.grad:isnan():item())
  end)

  it("tells the module path, and a value that was NaN in the forward already", function()
    local Net = nn.class("Net")
    function Net:init() self.fc = nn.Linear(2, 2) end
    function Net:forward(t, bare)
      local y = self.fc(t)
      return bare and y or y:log()
    end
    local net = Net()
    net.fc.weight:detach():fill_(0)
    net.fc.bias:detach():fill_(-1)
    local x = hm.ones({1, 2}, {requires_grad = true})
    raises({"the backward of mul", "its operand x held 2 nan in the forward already"}, function()
      detect(function() (net(x):exp() * x):sum():backward() end)
    end)
    net.fc.bias:detach():fill_(0)
    raises({"the backward of linear", "made the gradient of its weight", "in Net.fc (Linear"}, function()
      detect(function()
        net(x * 0 / 0, true):sum():backward()
      end)
    end)
  end)

  it("looks for infinities where asked", function()
    local function run() leaf({0}):log():sum():backward() end
    detect(run)
    raises({"the backward of log", "1 inf"}, detect, {inf = true}, run)
    raises({"unknown option", "inf"}, detect, {info = true}, run)
    raises("must be a function", detect, 3)
  end)

  it("tells a NaN that no backward made", function()
    local x = leaf {1, 2}
    local y = detect(function() return x * 2 end)
    raises({"that came in to mul", "1 nan", "what backward began with"}, function()
      detect(function() y:backward(hm.tensor({0 / 0, 1}, {dtype = "f64"})) end)
    end)
    raises({"came in to neg"}, function()
      detect(function()
        local h = -x
        h:register_hook(function(g) return g * (0 / 0) end)
        h:sum():backward()
      end)
    end)
  end)

  it("says so where the forward ran outside", function()
    local y = (leaf({0}):sqrt() * 0):sum()
    raises({"the backward of sqrt", "run the forward inside detect_anomaly, too"}, function()
      detect(function() y:backward() end)
    end)
  end)

  it("names functions in Lua, and ops of a second derivative with the op whose backward recorded them", function()
    local bad = autograd.Function("Bad", {forward = function(_, t) return t * 1 end, backward = function(_, g) return g / 0 * 0 end})
    raises({"the backward of Bad made the gradient of its input 1", "recorded at"}, function()
      detect(function() bad(leaf {1}):backward() end)
    end)
    local x = leaf {0}
    raises({"in the backward of"}, function()
      detect(function()
        local g = autograd.grad((x ^ 1.5):sum(), x, {create_graph = true})[1];
        (g * 0):sum():backward()
      end)
    end)
  end)

  it("belongs to a coroutine, nests, and leaves nothing behind after an error", function()
    local x = leaf {0}
    local function bad() (x:sqrt() * 0):sum():backward() end
    detect(function()
      coroutine.wrap(function() bad() end)()
      raises("the backward of sqrt", function() detect({inf = true}, function() hm.no_grad(function() hm.enable_grad(bad) end) end) end)
      raises("the backward of sqrt", bad)
    end)
    bad()
  end)

  it("changes no gradient", function()
    local function run()
      hm.manual_seed(4)
      local net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
      nn.functional.cross_entropy(net(hm.randn({5, 4})), hm.tensor({0, 1, 2, 0, 1}, {dtype = "i64"})):backward()
      return net:parameters()
    end
    local want, watched = run(), detect(run)
    for i, p in ipairs(want) do same(watched[i].grad, p.grad) end
  end)
end)

-- ====== The gradient penalty of PyTorch's examples ======

describe("a gradient penalty with the scaler", function()
  -- https://pytorch.org/docs/stable/notes/amp_examples.html#gradient-penalty
  it("gives the gradients of a run in float32", function()
    local function run(scaled)
      hm.manual_seed(11)
      local net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
      local x, target = hm.randn({8, 6}), hm.randn({8, 3})
      local opt = hm.optim.SGD(net:parameters(), {lr = 0.1})
      local scaler = hm.amp.GradScaler {enabled = scaled, init_scale = 1024}
      local function autocast(fn) return hm.amp.autocast({dtype = "float16", enabled = scaled}, fn) end
      local loss = autocast(function() return nn.functional.mse_loss(net(x), target) end)
      local grads = autograd.grad(scaler:scale(loss), net:parameters(), {create_graph = true})
      local inverse, norm = 1 / scaler:get_scale(), nil
      autocast(function()
        for _, g in ipairs(grads) do
          local part = (g * inverse):pow(2):sum()
          norm = norm and norm + part or part
        end
        loss = loss + norm:sqrt()
      end)
      scaler:scale(loss):backward()
      scaler:step(opt)
      scaler:update()
      return net:parameters()
    end
    local want, got = run(false), run(true)
    for i, p in ipairs(want) do
      assert.equal("float32", got[i].grad.dtype)
      near(got[i].grad, p.grad, 2e-2, 3e-3)
      near(got[i], p, 2e-2, 3e-3)
    end
  end)
end)

-- ====== Random graphs ======

-- A small generator of its own, so that a graph is the same each time its function runs.
local function dice(seed)
  local state = seed * 7919 + 13
  return function(n)
    state = (state * 1103515245 + 12345) & 0x7fffffff
    return (state >> 8) % n + 1
  end
end

local function pick_dim(roll, x) return roll(x:dim()) end

local index = {} -- by size: [size] -> ids
for n = 1, 12 do index[n] = hm.tensor({0, n - 1, (n - 1) // 2}, {dtype = "i64"}) end

-- Each makes a tensor of those that are there.  x has at least one dim; y is any other.
local STEPS = {
  function(x) return x:tanh() end, function(x) return x:sin() * 0.5 end, function(x) return x:sigmoid() end,
  function(x) return x:gelu() end, function(x) return (x * 0.3):exp() end, function(x) return -x end,
  function(x) return x:softplus() end, function(x) return x * x * 0.5 end, function(x) return 1 / (x * x + 1) end,
  function(x) return (x * x + 0.5):sqrt() end, function(x) return x:silu() end,
  function(x, roll) return x:softmax(pick_dim(roll, x)) end, function(x, roll) return x:log_softmax(pick_dim(roll, x)) end,
  function(x, roll) return x:cumsum(pick_dim(roll, x)) * 0.3 end, function(x, roll) return x:flip({pick_dim(roll, x)}) end,
  function(x, roll) return x:sum(pick_dim(roll, x), true) * 0.3 end, function(x, roll) return x:mean(pick_dim(roll, x), true) end,
  function(x, roll) return x:logsumexp(pick_dim(roll, x), true) end, function(x) return x:sum() * 0.1 * x end,
  function(x) return x:mean() end, function(x) return x:clone() end, function(x) return x:erf() end,
  function(x) return x:transpose(1, -1) end, function(x) return x:reshape(-1) end, function(x) return x:unsqueeze(1) end,
  function(x) return x:contiguous() end, function(x) return x:squeeze() end,
  function(x, roll) return x:transpose(1, pick_dim(roll, x)) end,
  function(x, roll)
    local dim = pick_dim(roll, x)
    return x:narrow(dim, 1, math.max(1, x:size(dim) - 1))
  end,
  function(x, roll)
    local dim = pick_dim(roll, x)
    return x:index_select(dim, index[x:size(dim)])
  end,
  function(x) return x[-1] end, function(x) return x[{{1, 1}}] end,
  function(x)
    local shape = x.shape
    table.insert(shape, 1, 2)
    return x:unsqueeze(1):expand(shape)
  end,
  function(x, _, y) return x + y end, function(x, _, y) return x * y end, function(x, _, y) return x - y * 0.5 end,
  function(x, _, y) return x / (y * y + 1) end, function(x, _, y) return hm.where(index[1]:eq(0)[1], x, y) end,
  function(x, roll) return hm.cat({x, x * 2}, pick_dim(roll, x)) end, function(x) return hm.stack({x, x:tanh()}, 1) end,
  function(x) return x:reshape(1, -1):matmul(x:reshape(-1, 1)):reshape(1) * 0.1 end,
  function(x) return x:reshape(-1, x:size(-1)):matmul(x:reshape(-1, x:size(-1)):t()) * 0.1 end,
  function(x) return x:reshape(x:size(1), -1):tril(-1) end,
  function(x) -- in place on a copy
    local h = x * 1
    h:mul_(x)
    h:add_(0.5):tanh_()
    return h
  end,
  function(x) -- in place on what may be a view, be kept, or have views: must be right or refused
    x:mul_(1.25)
    return x
  end,
  function(x, _, y)
    x:add_(y)
    return x
  end,
  function(x)
    x:tanh_()
    return x
  end,
}

-- Does a shape broadcast to another?
local function broadcasts(from, to)
  for i = 0, #from - 1 do
    local size = from[#from - i]
    if size ~= 1 and size ~= to[#to - i] then return false end
  end
  return #from <= #to
end

-- A function of three tensors: the graph of a seed.  call(step, ...) runs a step, if given.
local function graph(seed, steps, call)
  return function(...)
    local roll, pool = dice(seed), {...}
    for _ = 1, steps do
      local step, x, y = STEPS[roll(#STEPS)], pool[roll(#pool)], pool[roll(#pool)]
      if x:dim() == 0 then x = x:reshape(1) end
      if not broadcasts(y.shape, x.shape) then y = y:mean() end
      local number = roll(5040)
      local function chosen(n) return number % n + 1 end
      local z = (call or plain)(step, x, chosen, y)
      if z:numel() <= 24 and z:dim() <= 4 then pool[#pool + 1] = z end
    end
    local total
    for i = 4, #pool do
      local part = (pool[i] * (0.3 + 0.1 * i)):sum()
      total = total and total + part or part
    end
    return total or pool[1]:sum()
  end
end

local REFUSALS = {
  "was changed in place after it was saved", "has been changed in place since", "a view cannot be changed in place",
  "a leaf that wants a gradient cannot be changed", "elements of the tensor share memory", "expects a matrix", "does not broadcast",
  "changed in place after the forward",
}

describe("random graphs", function()
  local function inputs_of(seed)
    hm.manual_seed(seed)
    return {hm.randn({3, 2}, {dtype = "f64"}):requires_grad_(), hm.randn({2}, {dtype = "f64"}):requires_grad_(),
      hm.randn({1, 2}, {dtype = "f64"}):requires_grad_()}
  end

  local function refused(message)
    for _, text in ipairs(REFUSALS) do
      if message:find(text, 1, true) then return true end
    end
  end

  local function each(from, to, check)
    local right = 0
    for seed = from, to do
      local ok, message = pcall(check, seed)
      if ok then right = right + 1
      elseif not refused(message) then error(("graph %d: %s"):format(seed, message), 0) end
    end
    return right
  end

  it("have the gradients that differences say, or say which change in place is in the way", on_cpu(function()
    local right = each(1, 300, function(seed)
      autograd.gradcheck(graph(seed, 10), inputs_of(seed), {rtol = 1e-4, atol = 1e-6})
    end)
    assert.is_true(right > 150, ("only %d graphs were not refused"):format(right))
  end))

  it("have the second derivatives that differences say", on_cpu(function()
    local right = each(301, 400, function(seed)
      autograd.gradgradcheck(graph(seed, 6), inputs_of(seed), nil, {rtol = 1e-4, atol = 1e-5})
    end)
    assert.is_true(right > 50, ("only %d graphs were not refused"):format(right))
  end))

  -- The gradients of a graph, and what the walk was asked for on the way.
  local function walk(seed, wrap, call)
    local inputs = inputs_of(seed)
    local y = wrap(graph(seed, 12, call), table.unpack(inputs))
    local grads = autograd.grad(y, inputs, {allow_unused = true, retain_graph = true})
    y:backward()
    for i, x in ipairs(inputs) do
      if grads[i] then same(x.grad, grads[i]) end
      assert.equal(grads[i] == nil, x.grad == nil)
    end
    return grads
  end

  it("have the same gradients to the bit under checkpoint: whole, in single steps, and both", function()
    local compared = 0
    local right = each(401, 401 + devices.pick(150, 20), function(seed)
      local want = walk(seed, plain)
      for _, how in ipairs {{hm.checkpoint}, {plain, hm.checkpoint}, {hm.checkpoint, hm.checkpoint}} do
        local got = walk(seed, how[1], how[2])
        for i = 1, 3 do
          assert.equal(want[i] == nil, got[i] == nil)
          if want[i] then same(got[i], want[i], ("gradient %d"):format(i)) end
          compared = compared + 1
        end
      end
    end)
    assert.is_true(right > devices.pick(60, 8), ("only %d graphs were not refused"):format(right))
    assert.is_true(compared >= 9 * right)
  end)
end)
