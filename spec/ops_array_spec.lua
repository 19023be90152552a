-- ops_array_spec.lua -- ops that are no formula (reductions, softmax, losses, matrix products, convolution, pooling,
-- copies, fills), against
-- the plain loops of spec/reference/naive.lua: values in every dtype, gradients by differences, strides, empty
-- tensors, NaN, errors.

local hm = require "halfmoon"
local core = require "halfmoon.core"
local numbers = require "spec.support.numbers"
local naive = require "spec.reference.naive"
local gradients = require "spec.support.gradients"
local devices = require "spec.support.devices"

local nan, inf = 0 / 0, math.huge

-- Values that no sum cancels badly, reproducible.
local function filled(shape, dtype, seed)
  local n = 1
  for _, s in ipairs(shape) do n = n * s end
  local list = {}
  for i = 1, n do list[i] = math.sin(i * 12.9898 + (seed or 0) * 78.233) * 2 end
  return hm.tensor(list, {dtype = dtype or "f64"}):view(shape)
end

-- Relative error allowed against doubles on the same (rounded) inputs, for results that are rounded once.
local TOLERANCE = {f64 = 1e-12, f32 = 2e-6, f16 = 6e-4, bf16 = 4.5e-3}
local DTYPES = {"f64", "f32", "f16", "bf16"}

local function assert_value(got, want, dtype, what)
  assert.same(want.shape, got.shape)
  numbers.assert_near(got, want, TOLERANCE[dtype], TOLERANCE[dtype] * 0.5, ("%s %s"):format(what, dtype))
end

local function assert_raises(pattern, fn, ...)
  local ok, message = pcall(function(...)
    fn(...)
    devices.wait()
  end, ...)
  assert.is_false(ok)
  assert.matches(pattern, tostring(message), 1, true)
end

-- The same values in other memory orders.
local function orders(t)
  local list = {t, t:transpose(1, -1):contiguous():transpose(1, -1)}
  local twice = hm.stack({t, t}, -1)
  list[3] = twice:select(-1, 2)
  return list
end

-- ====== Reductions ======

describe("reduction", function()
  local SHAPE = {3, 4, 5}
  local DIMS = {{}, {1}, {2}, {3}, {1, 3}, {2, 3}, {1, 2, 3}, {-1}}

  local function set(dims)
    if #dims == 0 then return nil end
    local s = {}
    for _, d in ipairs(dims) do s[d < 0 and d + 4 or d] = true end
    return s
  end

  for _, name in ipairs {"sum", "mean", "amax", "amin"} do
    for _, dtype in ipairs(DTYPES) do
      it(name .. ": " .. dtype .. " over every choice of dims, in any memory order", function()
        for _, x in ipairs(orders(filled(SHAPE, dtype))) do
          for _, dims in ipairs(DIMS) do
            local want = naive[name](naive.of(x), set(dims))
            local got = #dims == 0 and x[name](x) or x[name](x, dims)
            assert_value(got, want, dtype, name)
            local kept = #dims == 0 and x[name](x, {keepdim = true}) or x[name](x, dims, true)
            assert.equal(3, #kept.shape)
            numbers.assert_same(kept, got, name)
          end
        end
      end)
    end
    it(name .. ": gradient", function()
      for _, dims in ipairs {{}, {2}, {1, 3}} do
        gradients.check(function(x) return #dims == 0 and x[name](x):view(1) or x[name](x, dims) end, {filled({2, 3, 2})})
      end
    end)
  end

  it("sum and mean: second derivative", function()
    gradients.check_second(function(x) return (x * x * x):sum({1}) end, {filled({2, 3})})
    gradients.check_second(function(x) return (x * x * x):mean({2}) end, {filled({2, 3})})
  end)

  it("amax shares the gradient among ties", function()
    local x = hm.tensor({{1, 3, 3}, {2, 2, 2}}, {requires_grad = true})
    x:amax({2}):sum():backward()
    numbers.assert_near(x.grad, {{0, 0.5, 0.5}, {1 / 3, 1 / 3, 1 / 3}}, 1e-6)
  end)

  it("NaN wins, infinities count", function()
    for _, dtype in ipairs {"f32", "f16", "bf16"} do
      local x = hm.tensor({{1, nan, 3}, {inf, 2, -inf}, {inf, 1, 1}}, {dtype = dtype})
      numbers.assert_same(x:amax({2}), {nan, inf, inf})
      numbers.assert_same(x:amin({2}), {nan, -inf, 1})
      numbers.assert_same(x:sum({2}), {nan, nan, inf})
      numbers.assert_same(x:mean({2}), {nan, nan, inf})
      local v, i = x:max(2)
      numbers.assert_same(v, {nan, inf, inf})
      numbers.assert_same(i, {1, 0, 0})
      numbers.assert_same(x:argmin(2), {1, 2, 1})
    end
  end)

  it("max, min, argmax, argmin: first of equals, any dim, any order", function()
    for _, dtype in ipairs {"f32", "f16", "i64", "u8"} do
      local base = hm.tensor({{{1, 5}, {5, 2}, {0, 5}}, {{7, 7}, {7, 1}, {3, 9}}}, {dtype = dtype})
      for _, x in ipairs(orders(base)) do
        for d = 1, 3 do
          local where, best = naive.argmax(naive.of(x), {[d] = true})
          local v, i = x:max(d)
          numbers.assert_same(i, where)
          numbers.assert_same(v, best)
          assert.equal(base.dtype, v.dtype)
          assert.equal("int64", i.dtype)
          where, best = naive.argmin(naive.of(x), {[d] = true})
          v, i = x:min(d)
          numbers.assert_same(i, where)
          numbers.assert_same(v, best)
        end
        assert.equal(naive.argmax(naive.of(x))[1], x:argmax():item())
        assert.equal(9, x:max():item())
        assert.equal(0, x:min():item())
      end
    end
  end)

  it("max by dim: gradient goes to the element chosen", function()
    gradients.check(function(x) return (x:max(2)) end, {filled({3, 4})})
    gradients.check(function(x) return (x:min(1, true)) end, {filled({3, 4})})
  end)

  it("any and all", function()
    local x = hm.tensor({{0, 0, 2}, {1, 1, 1}, {0, 0, 0}})
    numbers.assert_same(x:any(2), {true, true, false})
    numbers.assert_same(x:all(2), {false, true, false})
    assert.is_true(x:any():item())
    assert.is_false((x:gt(-1)):logical_not():any():item())
  end)

  it("integers and bools sum to int64", function()
    local x = hm.tensor({200, 100, 50}, {dtype = "u8"})
    assert.equal("int64", x:sum().dtype)
    assert.equal(350, x:sum():item())
    assert.equal(2, hm.tensor({true, false, true}):sum():item())
    assert_raises("mean: needs a floating dtype", x.mean, x)
  end)

  it("empty: sum is 0, mean is NaN, a largest does not exist", function()
    local x = hm.zeros({0, 3})
    numbers.assert_same(x:sum(1), {0, 0, 0})
    assert.equal(0, x:sum():item())
    assert(x:mean():item() ~= x:mean():item())
    assert_raises("amax: nothing to choose from", x.amax, x)
    assert.same({0}, x:sum(2).shape)
  end)

  it("sums a hundred million ones and keeps small terms", function()
    local x = hm.ones({16384, 1024})
    assert.equal(16384 * 1024, x:sum():item())
    local y = hm.full({1000, 1000}, 0.1)
    assert(math.abs(y:sum():item() - 1000000 * hm.tensor(0.1):item()) < 0.02)
  end)

  it("refuses dims that are not there", function()
    local x = hm.zeros({2, 3})
    assert_raises("out of range", x.sum, x, 3)
    assert_raises("dim 2 is given twice", x.sum, x, {2, 2})
  end)
end)

-- ====== Softmax and cross entropy ======

describe("softmax", function()
  for _, name in ipairs {"softmax", "log_softmax"} do
    for _, dtype in ipairs(DTYPES) do
      it(name .. ": " .. dtype .. " along any dim, in any memory order", function()
        for _, x in ipairs(orders(filled({3, 4, 5}, dtype))) do
          for d = 1, 3 do
            assert_value(x[name](x, d), naive.softmax(naive.of(x), d, name == "log_softmax"), dtype, name)
          end
        end
      end)
    end
    it(name .. ": gradient and second derivative", function()
      for d = 1, 2 do
        gradients.check(function(x) return x[name](x, d) end, {filled({3, 4})})
        gradients.check_second(function(x) return x[name](x, d) end, {filled({2, 3})})
      end
    end)
    it(name .. ": large values do not overflow, NaN and infinity spread along the dim", function()
      local x = hm.tensor({{1000, 1001, 999}, {nan, 1, 2}, {-inf, 0, 0}})
      local y = x[name](x, 2):totable()
      for c = 1, 3 do
        assert(y[1][c] == y[1][c] and math.abs(y[1][c]) < inf)
        assert(y[2][c] ~= y[2][c])
      end
      assert.equal(name == "softmax" and 0 or -inf, y[3][1])
      local all = hm.full({1, 3}, -inf)
      assert(all[name](all, 2):totable()[1][1] ~= 0)
    end)
  end
end)

describe("cross_entropy", function()
  local function loss(x, t, o) return hm.nn.functional.cross_entropy(x, t, o) end
  local TARGET = {1, 0, 3, 2, 3, 1}

  for _, dtype in ipairs(DTYPES) do
    it(dtype .. ": every reduction, smoothing, ignored targets", function()
      local x = filled({6, 4}, dtype)
      local t = hm.tensor(TARGET, {dtype = "i64"})
      for _, reduction in ipairs {"mean", "sum", "none"} do
        for _, smoothing in ipairs {0, 0.1} do
          for _, ignore in ipairs {-100, 3} do
            local got = loss(x, t, {reduction = reduction, label_smoothing = smoothing, ignore_index = ignore})
            assert_value(got, naive.cross_entropy(naive.of(x), naive.of(t), reduction, ignore, smoothing), dtype, "cross_entropy")
          end
        end
      end
    end)
  end

  it("gradient, with more dims too", function()
    local t = hm.tensor(TARGET, {dtype = "i64"})
    local settings = {
      {}, {reduction = "sum"}, {reduction = "none"}, {label_smoothing = 0.2}, {ignore_index = 3},
      {ignore_index = 3, label_smoothing = 0.1},
    }
    for _, o in ipairs(settings) do
      gradients.check(function(x) return loss(x, t, o) end, {filled({6, 4})})
    end
    local t2 = hm.tensor({{1, 0, 2}, {2, 2, 1}}, {dtype = "i64"})
    gradients.check(function(x) return loss(x, t2, {}) end, {filled({2, 3, 3})})
    local x = filled({2, 3, 3})
    local want = naive.cross_entropy(naive.of(x), naive.of(t2), "none", -100, 0)
    assert_value(loss(x, t2, {reduction = "none"}), want, "f64", "cross_entropy")
  end)

  it("all targets ignored: mean is NaN, as in PyTorch", function()
    local y = loss(filled({2, 3}), hm.tensor({-100, -100}, {dtype = "i64"})):item()
    assert(y ~= y)
  end)

  it("refuses targets out of range and shapes that do not fit", function()
    local x = hm.zeros({2, 3})
    assert_raises("cross_entropy", loss, x, hm.tensor({0, 3}, {dtype = "i64"}))
    assert_raises("cross_entropy", loss, x, hm.tensor({0, 1, 2}, {dtype = "i64"}))
    assert_raises("cross_entropy", loss, x, hm.tensor({0, 1}))
  end)
end)

-- ====== Matrix products ======

describe("matmul", function()
  for _, dtype in ipairs(DTYPES) do
    it(dtype .. ": sizes from 1 to 65, transposed operands", function()
      for _, mkn in ipairs {{1, 1, 1}, {2, 3, 4}, {7, 5, 1}, {1, 64, 9}, {33, 65, 17}} do
        local m, k, n = table.unpack(mkn)
        local a, b = filled({m, k}, dtype, 1), filled({k, n}, dtype, 2)
        local want = naive.matmul(naive.of(a), naive.of(b))
        for _, x in ipairs {a, a:t():contiguous():t()} do
          for _, y in ipairs {b, b:t():contiguous():t()} do
            assert.same({m, n}, x:matmul(y).shape)
            numbers.assert_near(x:matmul(y), want, TOLERANCE[dtype], TOLERANCE[dtype] * 4, "matmul " .. dtype)
          end
        end
      end
    end)
  end

  it("batches broadcast, vectors are rows and columns", function()
    local a, b = filled({2, 3, 4}), filled({4, 5}, nil, 3)
    local y = a:matmul(b)
    assert.same({2, 3, 5}, y.shape)
    numbers.assert_near(y[2], naive.matmul(naive.of(a[2]), naive.of(b)), 1e-12, 1e-12)
    local c = filled({3, 1, 4, 2}, nil, 4)
    assert.same({3, 2, 3, 2}, a:matmul(c).shape)
    numbers.assert_near(a:matmul(c)[3][2], naive.matmul(naive.of(a[2]), naive.of(c[3][1])), 1e-12, 1e-12)
    local v = filled({4}, nil, 5)
    assert.same({2, 3}, a:matmul(v).shape)
    assert.same({5}, v:matmul(b).shape)
    assert.same({}, v:matmul(v).shape)
    numbers.assert_near(v:matmul(v):item(), (v * v):sum():item(), 1e-12)
  end)

  it("gradient and second derivative, with broadcasting and vectors", function()
    local mul = function(a, b) return a:matmul(b) end
    gradients.check(mul, {filled({3, 4}), filled({4, 2}, nil, 1)})
    gradients.check(mul, {filled({2, 3, 4}), filled({4, 2}, nil, 1)})
    gradients.check(mul, {filled({2, 1, 3, 2}), filled({3, 2, 2}, nil, 1)})
    gradients.check(mul, {filled({4}), filled({4, 3}, nil, 1)})
    gradients.check(mul, {filled({3, 4}), filled({4}, nil, 1)})
    gradients.check_second(mul, {filled({2, 3}), filled({3, 2}, nil, 1)})
  end)

  it("empty sizes", function()
    assert.same({0, 2}, hm.zeros({0, 3}):matmul(hm.zeros({3, 2})).shape)
    numbers.assert_same(hm.zeros({2, 0}):matmul(hm.zeros({0, 2})), {{0, 0}, {0, 0}})
  end)

  it("NaN and infinity come through", function()
    local y = hm.tensor({{nan, 1}, {inf, 1}}):matmul(hm.tensor({{1.0, 0}, {0, 1}})):totable()
    assert(y[1][1] ~= y[1][1])
    assert.equal(inf, y[2][1])
    assert(y[2][2] ~= y[2][2]) -- inf * 0
  end)

  it("names sizes, dtypes and what to do", function()
    local x = hm.zeros({2, 3})
    assert_raises(("matmul: inner sizes differ: x is f32[2,3] on %s, y is f32[2,3] on %s"):format(x.device, x.device), x.matmul, x, x)
    assert_raises("matmul: dtypes differ", x.matmul, x, hm.zeros({3, 2}, {dtype = "f16"}))
    local whole = hm.zeros({3, 3}, {dtype = "i64"})
    assert_raises("needs a floating dtype", whole.matmul, whole, whole)
  end)
end)

describe("linear", function()
  local linear = function(x, w, b) return core.call("linear", x, w, b) end

  for _, dtype in ipairs(DTYPES) do
    it(dtype .. ": with and without bias, leading dims", function()
      local x, w, b = filled({5, 7}, dtype, 1), filled({3, 7}, dtype, 2), filled({3}, dtype, 3)
      local want = naive.matmul(naive.of(x), naive.of(w:t()))
      numbers.assert_near(linear(x, w), want, TOLERANCE[dtype], TOLERANCE[dtype] * 4, "linear")
      local bias = numbers.flat(b)
      for i = 1, #want do want[i] = want[i] + bias[(i - 1) % 3 + 1] end
      numbers.assert_near(linear(x, w, b), want, TOLERANCE[dtype], TOLERANCE[dtype] * 4, "linear with bias")
      assert.same({5, 1, 3}, linear(x:view(5, 1, 7), w, b).shape)
      numbers.assert_same(linear(x:view(5, 1, 7), w, b), linear(x, w, b))
    end)
  end

  it("gradient and second derivative", function()
    gradients.check(linear, {filled({4, 3}), filled({2, 3}, nil, 1), filled({2}, nil, 2)})
    gradients.check(linear, {filled({2, 2, 3}), filled({2, 3}, nil, 1), filled({2}, nil, 2)})
    gradients.check_second(linear, {filled({2, 3}), filled({2, 3}, nil, 1), filled({2}, nil, 2)})
  end)

  it("names the sizes that differ", function()
    assert_raises("7 (dim 2 of x) must equal 8 (dim 2 of weight)", linear, hm.zeros({5, 7}), hm.zeros({3, 8}))
  end)
end)

-- ====== Convolution and pooling ======

describe("conv2d", function()
  local function conv(x, w, b, o)
    local attrs = {}
    for k, v in pairs(o or {}) do attrs[k] = v end
    return core.call("conv2d", x, w, b, attrs)
  end
  local CASES = {
    {x = {2, 1, 6, 6}, w = {4, 1, 3, 3}, o = {padding = 1}},
    {x = {2, 3, 7, 5}, w = {4, 3, 3, 3}, o = {}},
    {x = {1, 4, 8, 8}, w = {6, 4, 3, 3}, o = {stride = 2, padding = 1}},
    {x = {2, 4, 6, 6}, w = {4, 2, 3, 3}, o = {groups = 2, padding = 1}},
    {x = {1, 4, 5, 5}, w = {4, 1, 3, 3}, o = {groups = 4, padding = 1}},
    {x = {1, 2, 9, 9}, w = {3, 2, 3, 3}, o = {dilation = 2}},
    {x = {2, 8, 4, 4}, w = {16, 8, 1, 1}, o = {}},
    {x = {1, 2, 6, 8}, w = {3, 2, 2, 3}, o = {stride = {1, 2}, padding = {1, 0}}},
  }

  for i, case in ipairs(CASES) do
    for _, dtype in ipairs(DTYPES) do
      it(("case %d %s"):format(i, dtype), function()
        local x, w, b = filled(case.x, dtype, 1), filled(case.w, dtype, 2), filled({case.w[1]}, dtype, 3)
        local want = naive.conv2d(naive.of(x), naive.of(w), numbers.flat(b), case.o)
        local y = conv(x, w, b, case.o)
        assert.same(want.shape, y.shape)
        numbers.assert_near(y, want, TOLERANCE[dtype], TOLERANCE[dtype] * 8, "conv2d")
        want = naive.conv2d(naive.of(x), naive.of(w), nil, case.o)
        numbers.assert_near(conv(x, w, nil, case.o), want, TOLERANCE[dtype], TOLERANCE[dtype] * 8, "conv2d")
      end)
    end
    it(("case %d: gradients in f64, and f32, f16, bf16 against f64"):format(i), function()
      local x, w, b = filled(case.x, "f64", 1), filled(case.w, "f64", 2), filled({case.w[1]}, "f64", 3)
      local small = case.x[1] * case.x[2] * case.x[3] * case.x[4] <= 200
      if small then gradients.check(function(p, q, r) return conv(p, q, r, case.o) end, {x, w, b}) end
      local exact
      for _, dtype in ipairs(DTYPES) do
        local leaves = {}
        for k, t in ipairs {x, w, b} do leaves[k] = t:to("f16"):to(dtype):requires_grad_() end
        local y = conv(leaves[1], leaves[2], leaves[3], case.o)
        local g = filled(y.shape, "f16", 4):to(dtype)
        y:backward(g)
        if dtype == "f64" then exact = leaves
        else
          for k = 1, 3 do
            assert.equal(leaves[k].dtype, leaves[k].grad.dtype)
            local what = "conv2d gradient " .. k .. " " .. dtype
            numbers.assert_near(leaves[k].grad, exact[k].grad, TOLERANCE[dtype] * 1.5, TOLERANCE[dtype] * 40, what)
          end
        end
      end
    end)
  end

  it("second derivative", function()
    gradients.check_second(function(x, w) return conv(x, w, nil, {padding = 1}) end, {filled({1, 2, 3, 3}), filled({2, 2, 3, 3}, nil, 1)})
  end)

  it("gives channels-last memory", function()
    local y = conv(filled({2, 3, 5, 5}, "f32"), filled({4, 3, 3, 3}, "f32"))
    assert.same({4 * 3 * 3, 1, 4 * 3, 4}, y:stride())
  end)

  it("NaN stays, and stays where it is", function()
    local x = hm.zeros({1, 1, 5, 5})
    x[{1, 1, 1, 1}] = nan
    local y = conv(x, hm.ones({1, 1, 3, 3})):totable()[1][1]
    assert(y[1][1] ~= y[1][1])
    assert.equal(0, y[3][3])
  end)

  it("an empty batch gives an empty result", function()
    assert.same({0, 4, 4, 4}, conv(hm.zeros({0, 3, 4, 4}), hm.zeros({4, 3, 3, 3}), nil, {padding = 1}).shape)
  end)

  it("names what does not fit", function()
    assert_raises("conv2d: channels differ", conv, hm.zeros({1, 2, 5, 5}), hm.zeros({4, 3, 3, 3}))
    assert_raises("conv2d: the window does not fit", conv, hm.zeros({1, 3, 2, 2}), hm.zeros({4, 3, 3, 3}))
    assert_raises("conv2d: groups", conv, hm.zeros({1, 4, 5, 5}), hm.zeros({3, 2, 3, 3}), nil, {groups = 2})
  end)
end)

describe("max_pool2d", function()
  local pool = hm.nn.functional.max_pool2d
  local CASES = {{2}, {3, 2}, {3, 1, 1}, {{2, 3}, {1, 2}, {0, 1}}, {3, 3, 1}}

  for i, case in ipairs(CASES) do
    for _, dtype in ipairs(DTYPES) do
      it(("case %d %s, in both memory orders"):format(i, dtype), function()
        local x = filled({2, 5, 7, 8}, dtype)
        local want = naive.max_pool2d(naive.of(x), case[1], case[2], case[3])
        for _, t in ipairs {x, x:permute(1, 3, 4, 2):contiguous():permute(1, 4, 2, 3)} do
          local y = pool(t, case[1], {stride = case[2], padding = case[3]})
          assert.same(want.shape, y.shape)
          numbers.assert_same(y, want)
        end
      end)
    end
    it(("case %d: gradient"):format(i), function()
      gradients.check(function(x) return pool(x, case[1], {stride = case[2], padding = case[3]}) end, {filled({1, 2, 5, 6})})
    end)
  end

  it("NaN wins a window, the first of equals takes the gradient", function()
    local y = pool(hm.tensor({{{{1, nan}, {3, 2}}}}), 2)
    assert(y:item() ~= y:item())
    local x = hm.full({1, 1, 2, 2}, 5, {requires_grad = true})
    pool(x, 2):sum():backward()
    numbers.assert_same(x.grad, {1, 0, 0, 0})
  end)

  it("refuses padding past half the window", function()
    assert_raises("max_pool2d: padding", pool, hm.zeros({1, 1, 4, 4}), 2, {padding = 2})
  end)
end)

-- ====== Copies, fills, random numbers ======

describe("copies and casts", function()
  it("every pair of dtypes, in any memory order", function()
    local names = {"bool", "u8", "i32", "i64", "f16", "bf16", "f32", "f64"}
    local list = {0, 1, 2, 3, 100, 7}
    for _, from in ipairs(names) do
      for _, to in ipairs(names) do
        for _, x in ipairs(orders(hm.tensor(list, {dtype = from}):view(2, 3))) do
          local y = x:to(to)
          local want = numbers.flat(x)
          for i, v in ipairs(want) do
            if to == "bool" then want[i] = v ~= 0 and v ~= false
            elseif type(v) == "boolean" then want[i] = v and 1 or 0 end
          end
          numbers.assert_same(y, want, from .. " to " .. to)
        end
      end
    end
  end)

  it("copy_ broadcasts and converts; overlapping views are safe", function()
    local x = hm.zeros({2, 3}, {dtype = "f16"})
    x:copy_(hm.tensor({1, 2, 3}, {dtype = "i64"}))
    numbers.assert_same(x, {{1, 2, 3}, {1, 2, 3}})
    local y = hm.arange(6):to("f32"):view(2, 3)
    local square = y:narrow(2, 1, 2)
    square:copy_(square:t())
    numbers.assert_same(y, {{0, 3, 2}, {1, 4, 5}})
    assert_raises("copy_: the source does not broadcast", x.copy_, x, hm.zeros({4}))
  end)

  it("contiguous returns the tensor itself when there is nothing to do", function()
    local x = hm.zeros({2, 3})
    assert.equal(x, x:contiguous())
    assert.equal(x, x:to("f32"))
    assert.not_equal(x, x:t():contiguous())
  end)

  it("cat and stack: values, gradient, promotion, errors", function()
    local a, b = hm.tensor({{1, 2}, {3, 4}}), hm.tensor({{5, 6}})
    numbers.assert_same(hm.cat({a, b}, 1), {{1, 2}, {3, 4}, {5, 6}})
    numbers.assert_same(hm.stack({a, a}, 2), {{{1, 2}, {1, 2}}, {{3, 4}, {3, 4}}})
    assert.equal("float32", hm.cat({a, hm.zeros({1, 2}, {dtype = "f16"})}, 1).dtype)
    gradients.check(function(x, y) return hm.cat({x, y, x}, 2) end, {filled({2, 2}), filled({2, 3}, nil, 1)})
    gradients.check(function(x, y) return hm.stack({x, y}, -1) end, {filled({2, 2}), filled({2, 2}, nil, 1)})
    assert_raises("cat: sizes must agree", hm.cat, {a, hm.zeros({1, 3})}, 1)
  end)
end)

describe("views", function()
  it("share memory and carry gradients", function()
    gradients.check(function(x) return x:t():reshape(6):view(2, 3) * 2 end, {filled({2, 3})})
    gradients.check(function(x) return x:permute(3, 1, 2) * 1 end, {filled({2, 3, 2})})
    gradients.check(function(x) return x:unsqueeze(2):expand(2, 4, 3) * 1 end, {filled({2, 3})})
    gradients.check(function(x) return x:narrow(2, 2, 2) * 1 end, {filled({2, 3})})
    gradients.check(function(x) return x:select(1, 2) * 1 end, {filled({2, 3})})
    gradients.check(function(x) return x[{2, {1, 2}}] * 1 end, {filled({2, 3})})
    gradients.check(function(x) return x:flatten(2) * 1 end, {filled({2, 3, 2})})
    gradients.check(function(x) return x:squeeze() * 1 end, {filled({2, 1, 3})})
    gradients.check_second(function(x) return (x * x):narrow(2, 1, 2):transpose(1, 2) end, {filled({2, 3})})
    local x = hm.zeros({2, 3})
    x[1]:fill_(7)
    numbers.assert_same(x, {{7, 7, 7}, {0, 0, 0}})
  end)

  it("view refuses what strides forbid and names reshape", function()
    local x = hm.zeros({2, 3}):t()
    assert_raises("reshape", x.view, x, 6)
    assert.same({6}, x:reshape(6).shape)
  end)
end)

describe("fills and random numbers", function()
  it("arange, linspace, eye, full", function()
    numbers.assert_same(hm.arange(4), {0, 1, 2, 3})
    assert.equal("int64", hm.arange(4).dtype)
    assert.equal("float32", hm.arange(0.0, 1.0, 0.25).dtype)
    numbers.assert_same(hm.arange(0.0, 1.0, 0.25), {0, 0.25, 0.5, 0.75})
    numbers.assert_same(hm.arange(5, 1, -2), {5, 3})
    numbers.assert_near(hm.linspace(0, 1, 5), {0, 0.25, 0.5, 0.75, 1}, 1e-7)
    numbers.assert_same(hm.eye(2), {{1, 0}, {0, 1}})
    numbers.assert_same(hm.full({2}, true, {dtype = "bool"}), {true, true})
  end)

  it("the same numbers for the same seed, whatever the threads", function()
    for _, dtype in ipairs(DTYPES) do
      local threads = core.get_num_threads()
      core.set_num_threads(1)
      hm.manual_seed(5)
      local a, b = hm.rand({100003}, {dtype = dtype}), hm.randn({100003}, {dtype = dtype})
      core.set_num_threads(threads)
      hm.manual_seed(5)
      assert(core.call("eq", hm.rand({100003}, {dtype = dtype}), a, {}):all():item())
      assert(core.call("eq", hm.randn({100003}, {dtype = dtype}), b, {}):all():item())
      assert.is_false(core.call("eq", hm.rand({100003}, {dtype = dtype}), a, {}):all():item())
    end
  end)

  it("have the right moments and ranges", function()
    hm.manual_seed(11)
    for _, dtype in ipairs {"f64", "f32", "f16", "bf16"} do
      local u = hm.rand({200000}, {dtype = dtype}):to("f64")
      assert(u:amin():item() >= 0 and u:amax():item() < 1, dtype)
      assert(math.abs(u:mean():item() - 0.5) < 0.006, dtype)
      local n = hm.randn({200000}, {dtype = dtype}):to("f64")
      assert(math.abs(n:mean():item()) < 0.01, dtype)
      assert(math.abs((n * n):mean():item() - 1) < 0.02, dtype)
    end
    local k = hm.randint(-3, 4, {50000})
    assert.equal(-3, k:min():item())
    assert.equal(3, k:max():item())
  end)
end)
