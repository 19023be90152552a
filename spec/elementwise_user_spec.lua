-- elementwise_user_spec.lua -- hm.elementwise: values against the ops that a formula is made of, gradients, dtypes, layouts,
-- autocast, errors; and the same on cuda, to the bit.
--
-- One case alone:  build/halfmoon spec/run.lua --filter='second derivative' spec/elementwise_user_spec.lua

local hm = require "halfmoon"
local core = require "halfmoon.core"
local amp = hm.amp
local devices = require "spec.support.devices"
local gradients = require "spec.support.gradients"
local numbers = require "spec.support.numbers"
local raises = require "spec.support.raises"

local inf, nan = math.huge, 0 / 0
local SPECIAL = {nan, inf, -inf, 0.0, -0.0, 1.0, -1.0, 65504.0, 1e-40, 3e38, -88.7, 0.5, -2.5, 104.2, 7.25}
local MISH = "y = x * tanhf(log1pf(expf(x)))"

local function randn(shape, dtype)
  local t = hm.randn(shape):to(dtype or "f32")
  return t
end

-- Equal to the bit, but that any NaN is any other.
local function assert_same(got, want, what)
  assert.equal(want.dtype, got.dtype, what)
  assert.same(want.shape, got.shape, what)
  numbers.assert_same(numbers.flat(got), numbers.flat(want), what)
end

-- Formulas and what they are in ops, for floating inputs.
local PAIRS = {
  {MISH, function(x) return x * x:exp():log1p():tanh() end},
  {"y = x", function(x) return x:clone() end},
  {"y = -x * 2.5 + 1", function(x) return -x * 2.5 + 1 end},
  {"y = x * w + w / x", function(x, w) return x * w + w / x end},
  {"y = x < w ? x : w * 2", function(x, w) return hm.where(x:lt(w), x, w * 2) end},
  {"y = sqrt(fabsf(x)) - floor(w)", function(x, w) return x:abs():sqrt() - core.call("floor", w) end},
  {"z = erff(x) + erf(w) * sinf(x) - cos(w);", function(x, w) return x:erf() + w:erf() * x:sin() - w:cos() end},
  {"y = pow(fabs(x), w)", function(x, w) return x:abs():pow(w) end},
  {"y = fmaxf(x, w) - min(x, w)", function(x, w) return x:maximum(w) - x:minimum(w) end},
  {"y = relu(x) * sigmoid(w)", function(x, w) return x:relu() * w:sigmoid() end},
  {"y = (x > 0 && w > 0) || !(x >= -1) ? 1.0f : -1.",
    function(x, w)
      local c = hm.logical_or(hm.logical_and(x:gt(0), w:gt(0)), hm.logical_not(x:ge(-1)))
      return hm.where(c, hm.ones({}, {dtype = x.dtype}), hm.full({}, -1, {dtype = x.dtype}))
    end},
}

describe("hm.elementwise: values", function()
  for _, pair in ipairs(PAIRS) do
    local f = hm.elementwise(pair[1])
    it("the bits of the ops: " .. pair[1], function()
      for _, dtype in ipairs {"f32", "f64"} do
        local x, w = randn({7, 33}, dtype), randn({7, 33}, dtype)
        local a = {x, w}
        assert_same(f(table.unpack(a, 1, #f.inputs)), pair[2](x, w), dtype)
        x = hm.tensor(SPECIAL, {dtype = dtype}):view(#SPECIAL, 1)
        w = hm.tensor(SPECIAL, {dtype = dtype})
        a = {x, w}
        local want = #f.inputs == 1 and pair[2](x) or pair[2](x, w)
        assert_same(f(table.unpack(a, 1, #f.inputs)), want, dtype .. " special")
      end
    end)
  end

  it("half types are computed in float32 and rounded once", function()
    local f = hm.elementwise(MISH)
    for _, dtype in ipairs {"f16", "bf16"} do
      local x = randn({9, 65}, dtype)
      local y = x:float()
      assert_same(f(x), (y * y:exp():log1p():tanh()):to(dtype), dtype)
    end
  end)

  it("integers stay integers where the formula keeps them", function()
    local f, g = hm.elementwise("y = 3 * x * x - x"), hm.elementwise("y = x / 2 + 0.5")
    for _, dtype in ipairs {"i64", "i32", "u8"} do
      local x = hm.tensor({1, 2, 3, 7}, {dtype = dtype})
      assert_same(f(x), hm.tensor({2, 10, 24, 140}, {dtype = dtype}))
      assert_same(g(x), hm.tensor({1, 1.5, 2, 4}))
    end
    assert_same(f(hm.tensor({2 ^ 40 // 1 | 0}, {dtype = "i64"})),
      hm.tensor({3 * (1 << 80) - (1 << 40)}, {dtype = "i64"})) -- wraps
    local flags = hm.tensor({1, 0}):ne(0)
    assert_same(hm.elementwise("y = c ? x : 0")(flags, hm.tensor {5, 6}), hm.tensor {5, 0})
  end)

  it("a comparison gives bools", function()
    local x = hm.tensor {1, 2, nan}
    assert_same(hm.elementwise("y = x < 2 || x != x")(x), hm.tensor({1, 0, 1}):ne(0))
    assert_same(hm.elementwise("y = !x")(hm.tensor {0, 2}), hm.tensor({1, 0}):ne(0))
  end)

  it("dtypes are promoted as the ops promote them", function()
    local f = hm.elementwise("y = a + b")
    for _, pair in ipairs {{"f16", "f32"}, {"f16", "bf16"}, {"i64", "f16"}, {"u8", "i32"}, {"f64", "f32"}} do
      local a, b = hm.tensor({1, 2}, {dtype = pair[1]}), hm.tensor({3, 4}, {dtype = pair[2]})
      assert_same(f(a, b), a + b)
    end
    assert_same(f(hm.tensor({1, 2}, {dtype = "f16"}), 2.5), hm.tensor({3.5, 4.5}, {dtype = "f16"}))
    assert_same(f(hm.tensor({1, 2}, {dtype = "i64"}), 2), hm.tensor({3, 4}, {dtype = "i64"}))
    assert_same(f(hm.tensor({1, 2}, {dtype = "i64"}), 2.5), hm.tensor({3.5, 4.5}))
  end)

  it("broadcasts and takes any strides", function()
    local f = hm.elementwise("y = x * w + v")
    local x, w, v = randn {4, 6, 5}, randn {6, 1}, randn {}
    assert_same(f(x, w, v), x * w + v)
    assert_same(f(w, x, v), w * x + v)
    local t, s = x:transpose(1, 3), x:narrow(2, 2, 3)
    assert_same(f(t, t, v), t * t + v)
    assert_same(f(s, w:narrow(1, 1, 3), s:half()), s * w:narrow(1, 1, 3) + s:half())
    local e = randn({1, 5}):expand(300, 5)
    assert_same(f(e, e, randn({300, 1}):zero_()), e * e + 0.0)
    assert.same(t:stride(), f(t, t, v):stride()) -- the first operand's layout
    local eight = randn {2, 1, 3, 1, 2, 1, 2, 3}
    local other = randn {1, 2, 1, 3, 1, 2, 1, 1}
    assert_same(f(eight, other, v), eight * other + v)
  end)

  it("takes empty tensors and long ones", function()
    local f = hm.elementwise(MISH)
    assert.same({0, 3}, f(hm.zeros {0, 3}).shape)
    local n = devices.pick(100003, 5003)
    local x = randn {n}
    assert_same(f(x), x * x:exp():log1p():tanh())
  end)

  it("parameters have defaults and are set by a call", function()
    local f = hm.elementwise("y = a * x + b", {params = {a = 2, b = 0.5}})
    local x = hm.tensor {1, 2}
    assert_same(f(x), hm.tensor {2.5, 4.5})
    assert_same(f(x, {a = -1}), hm.tensor {-0.5, -1.5})
    assert_same(f(x, {a = 3, b = 0}), hm.tensor {3, 6})
    assert_same(f(x), hm.tensor {2.5, 4.5})
  end)

  it("inputs come in the order given", function()
    assert_same(hm.elementwise("y = a - b")(hm.tensor {5}, hm.tensor {3}), hm.tensor {2})
    assert_same(hm.elementwise("y = a - b", {inputs = {"b", "a"}})(hm.tensor {5}, hm.tensor {3}), hm.tensor {-2})
    assert.same({"b", "x", "a"}, hm.elementwise("y = b < 0 ? x : tanh(a) * x").inputs)
  end)

  it("a long formula needs no more registers than it has live values", function()
    local text = "x"
    for i = 1, 300 do text = ("(%s) * 0.5 + %d"):format(text, i % 7) end
    local x = randn {40}
    local want = x
    for i = 1, 300 do want = want * 0.5 + i % 7 end
    assert_same(hm.elementwise("y = " .. text)(x), want)
  end)

  it("runs as one op", function()
    local names = {}
    core.op_log(function(r) names[#names + 1] = r.op end)
    hm.elementwise(MISH, {name = "mish"})(hm.ones {3})
    core.op_log(nil)
    assert.equal("mish", names[#names])
    local count = 0
    for _, name in ipairs(names) do if name == "mish" or name == "exp" or name == "mul" then count = count + 1 end end
    assert.equal(1, count)
  end)
end)

-- ====== Gradients ======

local function positive(shape) return hm.rand(shape, {dtype = "f64"}) * 2 + 0.3 end

describe("hm.elementwise: gradients", function()
  local DERIVED = {
    MISH, "y = x * w + w / x", "y = pow(x, w)", "y = log(x) * sqrt(w) - erf(x) + erfc(w)", "y = x > w ? x * x : sin(w)",
    "y = fabs(x - w) * cos(x)", "y = exp(-x * x) / (1 + g * g)", "y = sigmoid(x) * relu(w)", "y = tan(x / 4) + asin(w / 4)",
    "y = log2(x) + expm1(w) * atan(x) - sinh(w) / cosh(x)", "y = pow(x, 3) + pow(2, w)",
  }
  for i = 1, devices.pick(#DERIVED, 2) do -- on the test double every function is compiled
    local text = DERIVED[i]
    local f = hm.elementwise(text)
    it("derived: " .. text, function()
      local inputs = {}
      for k = 1, #f.inputs do inputs[k] = positive {2, 3} end
      gradients.check(f, inputs)
      gradients.check_second(f, inputs)
    end)
  end

  local function same_gradients(f, ref, inputs, what)
    local a, b = {}, {}
    for i, x in ipairs(inputs) do
      a[i] = x:detach():clone():requires_grad_()
      b[i] = x:detach():clone():requires_grad_()
    end
    f(table.unpack(a)):sum():backward()
    ref(table.unpack(b)):sum():backward()
    for i = 1, #inputs do
      assert.equal(a[i].dtype, a[i].grad.dtype, what)
      numbers.assert_near(numbers.flat(a[i].grad), numbers.flat(b[i].grad), 1e-5, 1e-6, what)
    end
  end

  it("sums over broadcast dims and has the inputs' dtypes", function()
    local f = hm.elementwise("y = x * w + v")
    same_gradients(f, function(x, w, v) return x * w + v end, {randn {4, 5}, randn {5}, randn {4, 1}})
    local x = hm.ones({3}, {dtype = "f16", requires_grad = true})
    local w = hm.ones({3}, {requires_grad = true})
    f(x, w, 2):sum():backward()
    assert.equal("float16", x.grad.dtype)
    assert.equal("float32", w.grad.dtype)
  end)

  it("given formulas are used, and may read the result", function()
    local x = hm.tensor({0.5, -1}, {requires_grad = true})
    hm.elementwise("y = x * x", {grad = "gx = g * 7"})(x):sum():backward()
    assert_same(x.grad, hm.tensor {7, 7})
    local f = hm.elementwise("y = tanh(x)", {grad = {x = "g * (1 - y * y)"}})
    local inputs = {positive {5}}
    gradients.check(f, inputs)
    gradients.check_second(f, inputs)
    local h = hm.elementwise("y = tanh(x) * w", {grad = "gx = g * (w - y * y / w)"}) -- by w: derived
    inputs = {positive {5}, positive {5}}
    gradients.check(h, inputs)
    gradients.check_second(h, inputs)
  end)

  it("a third derivative", function()
    local x = hm.tensor({0.7}, {dtype = "f64", requires_grad = true})
    local y = hm.elementwise("y = exp(2 * x)")(x)
    for _ = 1, 3 do y = core.grad({y}, {x}, {create_graph = true})[1] end
    numbers.assert_near({y:item()}, {8 * math.exp(1.4)}, 1e-12, 0)
  end)

  it("grad = false, or false for an input, wants none", function()
    local x = hm.ones({2}, {requires_grad = true})
    local w = hm.ones({2}, {requires_grad = true})
    assert.is_false(hm.elementwise("y = x * x", {grad = false})(x).requires_grad)
    hm.elementwise("y = x * w", {grad = {w = false}})(x, w):sum():backward()
    assert.truthy(x.grad)
    assert.is_nil(w.grad)
    assert.is_false(hm.no_grad(function() return hm.elementwise("y = x * x")(x) end).requires_grad)
    assert.is_false(hm.elementwise("y = x > 0")(x).requires_grad)
  end)

  it("a flat formula has a gradient of zeros", function()
    local x = hm.tensor({0.5, nan}, {requires_grad = true})
    hm.elementwise("y = floor(x)")(x):sum():backward()
    assert_same(x.grad, hm.tensor {0, 0})
  end)

  it("parameters of the call reach the gradient", function()
    local f = hm.elementwise("y = a * x * x", {params = {a = 1}})
    local x = hm.tensor({3}, {requires_grad = true})
    local y = f(x, {a = 5}) + f(x)
    y:backward()
    assert_same(x.grad, hm.tensor {36})
  end)

  it("an input that was changed in place is named; one that is not read may change", function()
    local x = hm.ones({2}, {requires_grad = true})
    local h = x * 2
    local y = hm.elementwise("y = h * h", {name = "squares"})(h)
    h:add_(1)
    raises({"backward", "h of squares", "changed in place", "hint"}, function() y:sum():backward() end)
    h = x * 2
    y = hm.elementwise("y = 3 * h")(h)
    h:add_(1)
    y:sum():backward()
    assert_same(x.grad, hm.tensor {6, 6})
  end)

  it("a second backward needs retain_graph", function()
    local x = hm.ones({2}, {requires_grad = true})
    local y = hm.elementwise("y = x * x")(x):sum()
    y:backward(nil, {retain_graph = true})
    y:backward()
    assert_same(x.grad, hm.tensor {4, 4})
    raises({"graph was freed", "retain_graph"}, function() y:backward() end)
  end)
end)

-- ====== Autocast ======

describe("hm.elementwise: autocast", function()
  local x, h = hm.ones {3}, hm.ones({3}, {dtype = "f16"})
  local function dtype(cast, ...)
    local f = hm.elementwise("y = a * b", {cast = cast})
    return amp.autocast("bfloat16", f, ...).dtype
  end

  it("follow and promote: the operands' own dtype", function()
    assert.equal("float16", dtype(nil, h, h))
    assert.equal("float32", dtype("follow", h, x))
    assert.equal("float32", dtype("promote", h, x))
  end)
  it("float32: low operands give a float32 result, rounded once", function()
    assert.equal("float32", dtype("float32", h, h))
    assert.equal("float16", hm.elementwise("y = a * b", {cast = "float32"})(h, h).dtype) -- outside a region
    local f = hm.elementwise("y = exp(x)", {cast = "float32"})
    assert_same(amp.autocast("float16", f, h), h:float():exp())
  end)
  it("low: the region's dtype; float64 is left alone", function()
    assert.equal("bfloat16", dtype("low", x, x))
    assert.equal("float64", dtype("low", x:double(), x:double()))
    local w = hm.ones({3}, {requires_grad = true})
    local f = hm.elementwise("y = a * a", {cast = "low"})
    local y = amp.autocast("float16", f, w)
    assert.equal("float16", y.dtype)
    y:sum():backward()
    assert_same(w.grad, hm.tensor {2, 2, 2})
  end)
end)

-- ====== Errors ======

describe("hm.elementwise: errors", function()
  local new = hm.elementwise
  it("a formula that cannot be read is marked", function()
    local said = raises({"elementwise", "unexpected end"}, new, "y = x +")
    assert.truthy(said:find("\n  y = x +\n         ^", 1, true), said)
    said = raises("cannot read '$'", new, "y = x $ 2")
    assert.truthy(said:find("\n  y = x $ 2\n        ^", 1, true), said)
    raises("')' is wanted", new, "y = (x")
    raises("unexpected ')'", new, "y = x)")
    raises("a formula like", new, "x * x")
    raises("must be a string", new, 3)
    raises("no input", new, "y = 3")
    raises("y is the result", new, "y = y + x")
  end)
  it("functions and names are looked up, with the closest one", function()
    raises({"no function 'sigmiod'", "did you mean 'sigmoid'"}, new, "y = sigmiod(x)")
    raises("pow takes 2 arguments, got 1", new, "y = pow(x)")
    raises({"'q' is no input and no parameter"}, new, "y = x + q", {inputs = {"x"}})
    raises("input 'z' does not occur", new, "y = x", {inputs = {"x", "z"}})
    raises("parameter 'beta' does not occur", new, "y = x", {params = {beta = 1}})
    raises("parameter 'beta' must be a number", new, "y = x * beta", {params = {beta = "1"}})
    raises({"unknown option 'gard'", "did you mean 'grad'"}, new, "y = x", {gard = false})
    raises("must be one of follow", new, "y = x", {cast = "high"})
    raises("1 to 8 inputs", new, "y = a + b + c + d + e + f + h + i + j")
  end)
  it("given gradients are checked when they are given", function()
    raises("unexpected end", new, "y = x * x", {grad = "gx = g *"})
    raises("does not use g", new, "y = x * x", {grad = "gx = 2 * x"})
    raises("there is no 'w'", new, "y = x * x", {grad = "gx = g * w"})
    raises({"grad", "unknown option 'w'"}, new, "y = x * x", {grad = {w = "g"}})
    raises("formula or false", new, "y = x * x", {grad = {x = 1}})
    raises("stands for the gradient", new, "y = g * x", {grad = {x = "g * 2"}})
    raises("false", new, "y = x", {grad = true})
  end)
  it("calls", function()
    local f = new("y = x * w", {name = "scale"})
    local x = hm.ones {2}
    raises({"scale: 2 inputs are wanted (x, w), got 1", "y = x * w"}, f, x)
    raises("scale: input 2 (w) must be a tensor or a number, got \"2\"", f, x, "2")
    raises("at least one operand must be a tensor", f, 1, 2)
    raises({"scale", "do not broadcast"}, f, x, hm.ones {3})
    raises({"unknown option 'beta'"}, f, x, x, {beta = 1})
    local released = hm.ones {2}
    released:release()
    raises("released", f, x, released)
  end)
end)

-- ====== The same on cuda ======

local cases, why = devices.cases("spec/elementwise_user_spec.lua")
local function case(name, fn) it(name, function() cases:run(name, fn) end) end

describe("hm.elementwise: cuda", function()
  if not cases then return pending(why) end

  case("the bits of the CPU: every function, in float32", function()
    local terms = {}
    for _, step in ipairs(core.expression_steps()) do
      local name = step.name:match("^%a[%w]+$")
      if name and name ~= "copy" and name ~= "neg" then
        terms[#terms + 1] = ("(c == %d ? %s(%s) : 0)"):format(#terms, name, step.operands == 2 and "x, w" or "x")
      end
    end
    local values = table.move(SPECIAL, 1, #SPECIAL, 1, {})
    for i = 1, 40 do values[#values + 1] = math.tan(i) * 2 ^ (i % 9 - 4) end
    local x = hm.tensor(values, {device = "cpu"})
    local w = hm.tensor({0.3, -2, 7, inf, nan}, {device = "cpu"}):view(5, 1)
    local c = hm.arange(#terms, {device = "cpu"}):view(#terms, 1, 1)
    local f = hm.elementwise("y = " .. table.concat(terms, " + "), {inputs = {"x", "w", "c"}})
    local want = f(x, w, c)
    for k = 0, #terms - 1 do assert(want[k + 1]:ne(0):any():item(), terms[k + 1]) end -- each has its turn
    assert_same(f(x:to("cuda"), w:to("cuda"), c:to("cuda")):cpu(), want)
  end)

  case("the bits of the CPU: dtypes and layouts", function()
    local f = hm.elementwise("y = x > w ? x * w + 0.1 : w - x / 3")
    local function both(x, w, what)
      assert_same(f(x:to("cuda"), type(w) == "number" and w or w:to("cuda")):cpu(), f(x, w), what)
    end
    hm.manual_seed(3)
    local x, w = hm.randn({4, 5, 7}, {device = "cpu"}), hm.randn({5, 1}, {device = "cpu"})
    both(x, w, "broadcast")
    both(x:transpose(1, 3), x:transpose(1, 3), "transposed")
    both(x:half(), w:bfloat16(), "halves")
    both(x:bfloat16(), 0.25, "a number")
    both(x:double(), w, "f64")
    both((x * 9):to("i32"), (w * 9):to("u8"), "integers")
    both(x:narrow(3, 2, 3):half(), x:narrow(3, 1, 3):half(), "narrowed")
    both(hm.zeros({0, 3}, {device = "cpu"}), hm.zeros({3}, {device = "cpu"}), "empty")
    local k = hm.elementwise("y = c ? x * x - 3 : -x")
    local i, b = hm.arange(-5, 6, {device = "cpu"}), hm.arange(-5, 6, {device = "cpu"}):gt(1)
    assert_same(k(b:to("cuda"), i:to("cuda")):cpu(), k(b, i))
    local less = hm.elementwise("y = x < w")
    assert_same(less(x:to("cuda"), w:to("cuda")):cpu(), less(x, w))
  end)

  case("more dims than a kernel has arguments for", function()
    local f = hm.elementwise("y = a + b * c - d + e * h")
    local list, there = {}, {}
    for i = 1, 6 do
      local shape = {}
      for d = 1, 8 do shape[d] = (d + i) % 3 == 0 and 1 or 2 end
      list[i] = hm.randn(shape, {device = "cpu"})
      there[i] = list[i]:to("cuda")
    end
    assert_same(f(table.unpack(there)):cpu(), f(table.unpack(list)))
  end)

  case("one launch a call, and one kernel for calls alike", function()
    local f = hm.elementwise(MISH)
    local x = hm.ones({33}, {device = "cuda"})
    f(x)
    hm.cuda.reset_stats()
    f(x)
    local stats = hm.cuda.stats()
    assert.equal(1, stats.launches)
    assert.equal(0, stats.synchronisations)
  end)

  case("gradients, first and second, are the CPU's", function()
    local f = hm.elementwise("y = x * tanh(w * x)", {grad = {w = "g * x * x * (1 - tanh(w * x) * tanh(w * x))"}})
    local function run(device)
      hm.manual_seed(4)
      local x = hm.randn({6, 5}, {device = "cpu"}):to(device):requires_grad_()
      local w = hm.randn({5}, {device = "cpu"}):to(device):requires_grad_()
      local first = core.grad({f(x, w):sum()}, {x, w}, {create_graph = true})
      local second = core.grad({(first[1] * first[1]):sum() + first[2]:sum()}, {x, w})
      return {first[1]:detach():cpu(), second[1]:cpu()}
    end
    local here, there = run("cpu"), run("cuda")
    for i = 1, 2 do numbers.assert_near(numbers.flat(there[i]), numbers.flat(here[i]), 1e-6, 1e-6) end
  end)

  case("tensors on different devices are refused", function()
    local f = hm.elementwise("y = x + w", {name = "sum2"})
    raises({"sum2: tensors on different devices", "x is", "w is", "hint"}, f, hm.ones({2}, {device = "cuda"}),
      hm.ones({2}, {device = "cpu"}))
  end)
end)
