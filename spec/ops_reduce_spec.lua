-- ops_reduce_spec.lua -- prod, var, std, norm, logsumexp, the scans along a dim, nll_loss, and second derivatives of cross_entropy:
-- values against plain loops in float64, gradients by differences, memory orders, half types, integers, special values,
-- empty tensors, what is refused, and the same bits for any number of threads.
--
-- One case alone:  build/halfmoon spec/run.lua --filter='where elements are zero' spec/ops_reduce_spec.lua

local hm = require "halfmoon"
local core = require "halfmoon.core"
local fixed = require "spec.support.inputs"
local numbers = require "spec.support.numbers"
local gradients = require "spec.support.gradients"
local expect = require "spec.support.expect"
local devices = require "spec.support.devices"

local raises = expect.raises
local inf, nan = math.huge, 0 / 0
local FLOATS = {"f64", "f32", "f16", "bf16"}

-- ====== Inputs ======

local count = fixed.count

--- Numbers without a pattern, of both signs.
local function list_of(n, seed, scale)
  local half = (scale or 4) / 2
  return fixed.spread(n, seed or 1, 0.3 - half, 0.3 + half)
end

local function sample(shape, seed, dtype, scale)
  return hm.tensor(list_of(count(shape), seed, scale), {dtype = dtype or "f64"}):view(shape)
end

--- A list for a matrix of 2, 0.5 and their negatives, whose products neither overflow nor vanish along a dim.
local function powers_of_two(shape)
  local list = list_of(count(shape), 8)
  for i, v in ipairs(list) do
    local even = ((i - 1) // shape[2] + (i - 1) % shape[2]) % 2 == 0
    list[i] = (v < 0 and -1 or 1) * (even and 2 or 0.5)
  end
  return list
end

--- The same values in memory with its dims reversed.
local function reversed(t)
  local order = {}
  for d = 1, t:dim() do order[d] = t:dim() + 1 - d end
  return t:permute(order):contiguous():permute(order)
end

--- The same values, every second element of a wider memory.
local function gapped(t) return hm.stack({t, t}, t:dim() + 1):select(t:dim() + 1, 2) end

local function as_is(t) return t end
local LAYOUTS = {contiguous = as_is, reversed = reversed, gapped = gapped}

local call = core.call

-- ====== References: one number at a time ======

--- Calls fn with the elements of each result of a reduction of x over dims (from 1; nil: all); returns what it gives, as a list.
local function each_result(x, dims, fn)
  local shape, flat, reduced, groups, order = x.shape, numbers.flat(x), {}, {}, {}
  for _, d in ipairs(dims or {}) do reduced[d] = true end
  for i = 0, #flat - 1 do
    local rest, key, step = i, 0, 1
    for d = #shape, 1, -1 do
      local at = rest % shape[d]
      rest = rest // shape[d]
      if dims and not reduced[d] then key, step = key + at * step, step * shape[d] end
    end
    if not groups[key] then
      groups[key] = {}
      order[#order + 1] = key
    end
    table.insert(groups[key], flat[i + 1])
  end
  table.sort(order)
  local out = {}
  for k, key in ipairs(order) do out[k] = fn(groups[key]) end
  return out
end

--- Applies fn to each line of x along a dim (from 1), a list that it changes; returns all elements.
local function each_line(x, dim, fn)
  local shape, flat = x.shape, numbers.flat(x)
  local length, inner = shape[dim] or 1, 1
  for d = dim + 1, #shape do inner = inner * shape[d] end
  for outer = 0, #flat // (length * inner) - 1 do
    for c = 1, inner do
      local line = {}
      for l = 1, length do line[l] = flat[(outer * length + l - 1) * inner + c] end
      fn(line)
      for l = 1, length do flat[(outer * length + l - 1) * inner + c] = line[l] end
    end
  end
  return flat
end

local function sum(list)
  local s = 0.0
  for _, v in ipairs(list) do s = s + v end
  return s
end

local function product(list)
  local s = 1
  for _, v in ipairs(list) do s = s * v end
  return s
end

local function variance(list, correction)
  local mean, s = sum(list) / #list, 0.0
  for _, v in ipairs(list) do s = s + (v - mean) ^ 2 end
  return s / (#list - correction)
end

local function p_norm(list, p)
  local s = 0.0
  for _, v in ipairs(list) do
    if p == 0 then s = s + (v ~= 0 and 1 or 0) else s = s + math.abs(v) ^ p end
  end
  return p == 0 and s or s ^ (1 / p)
end

local function log_sum_exp(list)
  local top, s = -inf, 0.0
  for _, v in ipairs(list) do top = math.max(top, v) end
  for _, v in ipairs(list) do s = s + math.exp(v - top) end
  return top + math.log(s)
end

-- Tolerances: f64 by its own rounding, f32 within the rows' bound, halves by one rounding of the result.
local RTOL = {f64 = 1e-12, f32 = 8 * 2 ^ -24, f16 = 2 ^ -11 * 1.02, bf16 = 2 ^ -8 * 1.02}
local ATOL = {f64 = 1e-13, f32 = 1e-6, f16 = 1e-6, bf16 = 1e-6}

local function near(got, want, dtype, what)
  local list = {}
  for i, v in ipairs(numbers.flat(want)) do list[i] = dtype == "f16" and v > 65520 and inf or v end
  numbers.assert_near(got, list, RTOL[dtype], ATOL[dtype], what)
end

-- {shape, dims from 1, or nil}
local CASES = {
  {{7}}, {{3, 5}}, {{3, 5}, {1}}, {{3, 5}, {2}}, {{4, 3, 6}, {2}}, {{4, 3, 6}, {1, 3}}, {{4, 3, 6}, {3}},
  {{2, 3, 4, 5}, {2, 4}},
  {{1}}, {{}}, {{1200, 3}, {1}}, {{3, 1200}, {2}}, {{2, 70, 33}, {2}}, {{1, 9}, {1}},
}
local BIG = {{{70001}}, {{3, 70001}, {2}}, {{900, 150}, {1}}, {{140, 520, 2}, {1, 2}}}
if not devices.is_cpu then BIG = {{{20001}}, {{900, 40}, {1}}} end

local function dims_text(dims) return dims and "over " .. table.concat(dims, ",") or "over all" end

--- Dims as core.call takes them: from 0.
local function from_zero(dims)
  if not dims then return nil end
  local out = {}
  for i, d in ipairs(dims) do out[i] = d - 1 end
  return out
end

local function every_dim(x)
  local dims = {}
  for d = 1, math.max(1, x:dim()) do dims[d] = d end
  return dims
end

--- A reduction as a function of x, dims from 1 and keepdim.
local function reduce_by(name, attrs)
  return function(x, dims, keep)
    local all = {dim = from_zero(dims or name == "logsumexp" and every_dim(x)), keepdim = keep}
    for k, v in pairs(attrs or {}) do all[k] = v end
    return call(name, x, all)
  end
end

-- name -> {op(x, dims, keepdim), reference(list)}
local REDUCTIONS = {
  ["var"] = {reduce_by("var"), function(list) return variance(list, 1) end},
  ["var with correction 0"] = {reduce_by("var", {correction = 0}), function(list) return variance(list, 0) end},
  ["std with correction 0.5"] = {reduce_by("std", {correction = 0.5}), function(list) return math.sqrt(variance(list, 0.5)) end},
  ["logsumexp"] = {reduce_by("logsumexp"), log_sum_exp},
}
for _, p in ipairs {0, 1, 2, 3, 0.5, 2.5} do
  REDUCTIONS["norm with p = " .. p] = {reduce_by("norm", {p = p}), function(list) return p_norm(list, p) end}
end

local function reduce_names()
  local names = {}
  for name in pairs(REDUCTIONS) do names[#names + 1] = name end
  table.sort(names)
  return names
end

for _, name in ipairs(reduce_names()) do
  local op, reference = table.unpack(REDUCTIONS[name])
  describe(name, function()
    for _, c in ipairs(CASES) do
      local shape, dims = c[1], c[2]
      it(("gives what a plain loop gives: {%s} %s"):format(table.concat(shape, ","), dims_text(dims)), function()
        for _, dtype in ipairs(FLOATS) do
          local x = sample(shape, 3, dtype)
          local want = each_result(x, dims, reference)
          for layout, lay in pairs(LAYOUTS) do near(op(lay(x), dims), want, dtype, dtype .. " " .. layout) end
          local kept = op(x, dims, true)
          assert.equal(#shape, kept:dim())
          near(kept, want, dtype, dtype .. " with its dims kept")
          assert.equal(x.dtype, kept.dtype)
        end
      end)
    end
    it("cuts many elements into chunks", function()
      for _, c in ipairs(BIG) do
        local x = sample(c[1], 5, "f32")
        local want = each_result(x, c[2], reference)
        numbers.assert_near(op(x, c[2]), want, 2e-6, 1e-6, table.concat(c[1], ","))
        numbers.assert_near(op(reversed(x), c[2]), want, 2e-6, 1e-6, table.concat(c[1], ",") .. " reversed")
      end
    end)
    local it = name:find "p = 0$" and function() end or it -- luacheck: ignore 431 -- p = 0: a step function
    it("has the derivative that differences give", function()
      for _, case in ipairs {{{5}}, {{3, 4}, {1}}, {{3, 4}, {2}}, {{2, 3, 2}, {1, 3}}} do
        local x = sample(case[1], 7)
        gradients.check(function(v) return op(v, case[2]) end, {x})
        gradients.check(function(v) return op(v, case[2], true) end, {x})
      end
    end)
    it("has the second derivative that differences give", function()
      gradients.check_second(function(v) return op(v, {2}) end, {sample({2, 3}, 9)})
    end)
  end)
end

-- ====== var, std, norm, logsumexp: particular values ======

describe("var", function()
  it("keeps its digits where the mean is large", function()
    local list = {}
    for i = 1, 4000 do list[i] = 1e6 + i % 5 end
    local x = hm.tensor(list)
    numbers.assert_near(x:var(), {variance(list, 1)}, 1e-6, 0, "one row")
    numbers.assert_near(x:view({2000, 2}):var({1}), each_result(x:view({2000, 2}), {1}, function(l) return variance(l, 1) end),
      1e-6, 0, "columns")
  end)
  it("divides by what is left, even nothing", function()
    local one = hm.tensor({3.0})
    assert.is_true(one:var():item() ~= one:var():item())
    assert.equal(0, call("var", one, {correction = 0}):item())
    assert.equal(inf, call("var", hm.tensor({1.0, 2.0}), {correction = 2}):item())
    assert.equal(inf, call("std", hm.tensor({1.0, 2.0}), {correction = 5}):item())
  end)
  it("spreads NaN and infinity, and has no value for nothing", function()
    for _, v in ipairs {nan, inf, -inf} do
      local y = hm.tensor({1, v, 3, 4, 5, 6}):view({2, 3}):var(2)
      assert.is_true(y[1]:item() ~= y[1]:item())
      assert.equal(1, y[2]:item())
    end
    numbers.assert_same(hm.zeros({2, 0}):var(2), {nan, nan})
    numbers.assert_same(hm.zeros({0}):std(), {nan})
    assert.same({0}, hm.zeros({0, 3}):var(2).shape)
  end)
  it("refuses integers, and a correction that is no number", function()
    raises({"var", "float"}, function() return hm.tensor({1, 2}, {dtype = "i64"}):var() end)
    raises({"std", "correction must be a finite number"}, function() return call("std", hm.ones({3}), {correction = nan}) end)
    raises({"var", "dim 1 is given twice"}, function() return hm.ones({3}):var({1, 1}) end)
  end)
end)

describe("norm", function()
  local function norm(x, p, dims) return call("norm", x, {p = p, dim = dims}) end
  it("does not overflow or vanish on the way", function()
    numbers.assert_near(norm(hm.tensor({3e30, 4e30}), 2), {5e30}, 1e-6)
    numbers.assert_near(norm(hm.tensor({3e-30, 4e-30}), 2), {5e-30}, 1e-6)
    numbers.assert_near(norm(hm.tensor({3e200, 4e200}, {dtype = "f64"}), 2), {5e200}, 1e-14)
    numbers.assert_near(norm(hm.tensor({3e-200, 4e-200}, {dtype = "f64"}), 2), {5e-200}, 1e-14)
    numbers.assert_near(norm(hm.tensor({1e30, 1e30}), 12), {1e30 * 2 ^ (1 / 12)}, 1e-6)
  end)
  it("counts what is not zero for p = 0, NaN too", function()
    assert.equal(3, norm(hm.tensor({0, 1, nan, -inf, 0, -0.0}), 0):item())
  end)
  it("spreads NaN, is infinite with an infinity, and 0 of nothing", function()
    for _, p in ipairs {1, 2, 3, 0.5} do
      for _, dtype in ipairs {"f32", "f64"} do
        local function of(list) return norm(hm.tensor(list, {dtype = dtype}), p):item() end
        assert.is_true(of {1, nan, inf} ~= of {1, nan, inf})
        assert.equal(inf, of {1, -inf})
        assert.equal(0, of {0, 0, -0.0})
        assert.equal(0, of {})
      end
    end
    numbers.assert_same(norm(hm.zeros({2, 0}), 2, {1}), {0, 0})
  end)
  it("refuses a p that is negative or infinite", function()
    raises({"norm", "p must be finite and not negative, got -1", "amax of abs(x)"}, function() return norm(hm.ones({3}), -1) end)
    raises({"norm", "amin"}, function() return norm(hm.ones({3}), -inf) end)
    raises({"norm", "p must be finite"}, function() return norm(hm.ones({3}), nan) end)
    raises({"norm"}, function() return norm(hm.tensor({1}, {dtype = "i64"}), 2) end)
  end)
end)

describe("logsumexp", function()
  local function lse(x, dims) return call("logsumexp", x, {dim = dims or {0}}):item() end
  it("does not overflow", function()
    numbers.assert_near({lse(hm.tensor({1000, 1000}))}, {1000 + math.log(2)}, 1e-7)
    numbers.assert_near({lse(hm.tensor({-1000, -1000}))}, {-1000 + math.log(2)}, 1e-7)
    numbers.assert_near({lse(hm.tensor({60000, -60000}, {dtype = "f16"}))}, {60000}, 1e-3)
  end)
  it("takes infinities and NaN as its formula means them", function()
    for _, dtype in ipairs {"f32", "f64"} do
      local function of(...) return lse(hm.tensor({...}, {dtype = dtype})) end
      assert.equal(-inf, of(-inf, -inf))
      assert.equal(2, of(-inf, 2))
      assert.equal(inf, of(1, inf))
      assert.equal(inf, of(-inf, inf))
      assert.is_true(of(1, nan) ~= of(1, nan))
      assert.is_true(of(inf, nan) ~= of(inf, nan))
    end
    numbers.assert_same(call("logsumexp", hm.zeros({2, 0}), {dim = {1}}), {-inf, -inf})
  end)
  it("joins chunks without a number with those that have one", function()
    local n = devices.pick(140000, 40000)
    for _, value in ipairs {3, -500, -inf, inf, nan} do
      local x = hm.full({n}, -inf)
      x[n - 1] = value
      numbers.assert_near({lse(x)}, {value}, 1e-6)
    end
  end)
  it("of a half inside autocast is float32", function()
    local x = sample({4, 9}, 2, "f16")
    local y = hm.amp.autocast("f16", function() return call("logsumexp", x, {dim = {1}}) end)
    assert.equal("float32", y.dtype)
    near(y, each_result(x, {2}, log_sum_exp), "f32")
  end)
end)

-- ====== A dtype of the caller's choice ======

describe("sums, means and products", function()
  it("of integers are made and given in the dtype that is asked for", function()
    for _, dtype in ipairs {"i64", "i32", "u8", "bool"} do
      local x = hm.tensor({{1, 0, 1}, {1, 1, 1}}):to(dtype)
      for _, want in ipairs {"float32", "float64", "float16", "bfloat16"} do
        local function check(got, values)
          assert.equal(want, got.dtype)
          numbers.assert_same(got, values, dtype .. " as " .. want)
        end
        check(x:sum {dtype = want}, {5})
        check(x:sum {dim = 2, dtype = want}, {2, 3})
        check(x:mean {dim = 1, dtype = want}, {1, 0.5, 1})
        check(x:prod {dim = 2, dtype = want}, {0, 1})
        check(x:cumsum {dim = 2, dtype = want}, {1, 1, 2, 1, 2, 3})
        check(x:cumprod {dim = 2, dtype = want}, {1, 0, 0, 1, 1, 1})
        check(x:var {dim = 1, dtype = want}, {0, 0.5, 0})
      end
      assert.equal("int32", x:sum {dtype = "i32"}.dtype)
      assert.equal("int32", x:cumsum {dim = 1, dtype = "i32"}.dtype)
      assert.equal(0, x:prod {dtype = "i32"}:item())
    end
    local powers = hm.full({64}, 3, {dtype = "i64"})
    numbers.assert_near(powers:prod {dtype = "f64"}, {3.0 ^ 64}, 1e-12)
    numbers.assert_near(powers:prod {dtype = "f32"}, {3.0 ^ 64}, 1e-6)
    raises({"mean", "floating dtype"}, function() return powers:mean {dtype = "i64"} end)
  end)
  it("leave the place of the largest exact, whatever the dtype of the answer", function()
    local x = hm.tensor({1 << 53, (1 << 53) + 1}, {dtype = "i64"})
    assert.equal(1.0, x:argmax {dtype = "f32"}:item())
  end)
  it("of float32 in float64 are added up in float64", function()
    local x = hm.tensor({2 ^ 24, 1, 1, 1})
    assert.equal(2.0 ^ 24 + 3, x:sum {dtype = "f64"}:item())
    assert.equal(2.0 ^ 22 + 0.75, x:mean {dtype = "f64"}:item())
    assert.same({2.0 ^ 24, 2.0 ^ 24 + 1, 2.0 ^ 24 + 2, 2.0 ^ 24 + 3}, x:cumsum {dim = 1, dtype = "f64"}:totable())
    assert.equal((2.0 ^ 24 - 1) * (2.0 ^ 24 - 3), hm.tensor({2 ^ 24 - 1, 2 ^ 24 - 3}):prod {dtype = "f64"}:item())
  end)
end)

-- ====== prod ======

describe("prod", function()
  for _, c in ipairs {{{7}}, {{3, 5}, 1}, {{3, 5}, 2}, {{4, 3, 6}, 2}, {{3, 70, 5}, 2}, {{}}, {{3, 5}, -1}} do
    it(("gives what a plain loop gives: {%s} along %s"):format(table.concat(c[1], ","), c[2] or "all"), function()
      local dims = c[2] and {c[2] > 0 and c[2] or #c[1] + 1 + c[2]}
      for _, dtype in ipairs(FLOATS) do
        local x = sample(c[1], 4, dtype, 2)
        local want = each_result(x, dims, product)
        for layout, lay in pairs(LAYOUTS) do
          numbers.assert_near(lay(x):prod(c[2]), want, RTOL[dtype], 1e-7, dtype .. " " .. layout)
        end
      end
    end)
  end
  it("of integers is int64 and wraps", function()
    for _, dtype in ipairs {"i64", "i32", "u8", "bool"} do
      local x = hm.tensor({{1, 1}, {0, 1}, {1, 1}}, {dtype = "f32"}):to(dtype)
      assert.equal("int64", x:prod().dtype)
      assert.same({0, 1}, x:prod(1):totable())
    end
    local powers = {}
    for i = 1, 64 do powers[i] = 3 end
    assert.equal(product(powers), hm.full({64}, 3, {dtype = "i64"}):prod():item())
  end)
  it("is 1 of nothing, comes back from overflow on the way, and spreads NaN", function()
    numbers.assert_same(hm.zeros({2, 0}):prod(2), {1, 1})
    assert.equal(1, hm.zeros({0}):prod():item())
    assert.equal(1, hm.zeros({0}, {dtype = "i64"}):prod():item())
    numbers.assert_near(hm.tensor({1e30, 1e30, 1e-30, 1e-30}):prod(), {1}, 1e-5)
    assert.equal(0, hm.tensor({0, 1e30, 1e30, 1e30}):prod():item())
    numbers.assert_same(hm.tensor({{1, nan}, {0, inf}}):prod(2), {nan, nan})
    assert.equal(-inf, hm.tensor({-2, inf}):prod():item())
  end)
  it("has the derivative that differences give, where elements are zero, too", function()
    local zeros = {{}, {2}, {2, 3}, {1, 2, 3, 4}, {1, 4}}
    for _, places in ipairs(zeros) do
      for _, dim in ipairs {1, 2, "all"} do
        local list = list_of(12, 3)
        for _, i in ipairs(places) do list[i], list[i + 4] = 0, 0 end
        local x = hm.tensor(list, {dtype = "f64"}):view({3, 4})
        for _, keep in ipairs {false, true} do
          gradients.check(function(v) return v:prod(dim ~= "all" and dim or nil, keep) end, {x})
        end
        gradients.check(function(v) return reversed(v):prod(dim ~= "all" and dim or nil) end, {x})
      end
    end
  end)
  it("has the second derivative that differences give, where elements are zero, too", function()
    for _, places in ipairs {{}, {2}, {2, 3}, {1, 2, 3, 4}} do
      local list = list_of(12, 3)
      for _, i in ipairs(places) do list[i], list[i + 4] = 0, 0 end
      local x = hm.tensor(list, {dtype = "f64"}):view({3, 4})
      gradients.check_second(function(v) return v:prod(2) end, {x}, 1e-5)
      gradients.check_second(function(v) return reversed(v):prod(1, true) end, {x}, 1e-5)
      gradients.check_second(function(v) return v:prod() end, {x}, 1e-5)
    end
    gradients.check_second(function(v) return v:prod() end, {hm.tensor(3, {dtype = "f64"})})
  end)
  it("has a third derivative, and others of nothing", function()
    local x = hm.tensor({2, 0, 5, 7}):requires_grad_()
    local g = hm.autograd.grad(x:prod(), x, {create_graph = true})[1]
    g = hm.autograd.grad(g[2], x, {create_graph = true})[1]
    numbers.assert_same(g, {35, 0, 14, 10})
    numbers.assert_same(hm.autograd.grad(g[1], x)[1], {0, 0, 7, 5})
    for _, shape in ipairs {{3, 0}, {0, 3}} do
      local nothing = hm.zeros(shape):requires_grad_()
      local first = hm.autograd.grad(nothing:prod(2):sum(), nothing, {create_graph = true})[1]
      assert.same(shape, hm.autograd.grad((first * nothing):sum(), nothing)[1].shape)
    end
  end)
  it("has an exact gradient along lines of any length", function()
    for _, shape in ipairs {{2, 600}, {600, 2}, {70, 40}, {3, devices.pick(2600, 1400)}, {130, 65}} do
      for dim = 1, 2 do
        local list = powers_of_two(shape)
        list[5] = 0
        list[#list - 1] = 0
        local x, g = hm.tensor(list):view(shape), sample({shape[3 - dim]}, 2, "f32")
        local gl, line = numbers.flat(g), 0
        local want = each_line(x, dim, function(l)
          line = line + 1
          local left, right = {[0] = 1}, {[#l + 1] = 1}
          for i = 1, #l do left[i] = left[i - 1] * l[i] end
          for i = #l, 1, -1 do right[i] = right[i + 1] * l[i] end
          for i = 1, #l do l[i] = gl[line] * (left[i - 1] * right[i + 1]) end
        end)
        numbers.assert_near(call("prod_backward", g, x, {dim = dim - 1}), want, 1e-6, 1e-30, ("{%d,%d} along %d"):format(
          shape[1], shape[2], dim))
        numbers.assert_near(call("prod_backward", g, gapped(x), {dim = dim - 1}), want, 1e-6, 1e-30, "gapped")
      end
    end
  end)
  it("refuses a dim that is not there, and a gradient of another shape", function()
    raises({"prod", "dim 2 is out of range"}, function() return hm.ones({3}):prod(2) end)
    raises({"prod", "dim out of range"}, function() return call("prod", hm.ones({3}), {dim = 1}) end)
    raises({"prod_backward", "g must have the shape"}, function()
      return call("prod_backward", hm.ones({2}), hm.ones({3, 4}), {dim = 1})
    end)
  end)
end)

-- ====== Scans ======

local function running(join, start)
  return function(line)
    local v = start
    for i = 1, #line do
      v = join(v, line[i])
      line[i] = v
    end
  end
end

local function add(a, b) return a + b end
local function times(a, b) return a * b end
local function from_the_end(line)
  local v = 0
  for i = #line, 1, -1 do
    v = v + line[i]
    line[i] = v
  end
end

local SCANS = {cumsum = running(add, 0), cumprod = running(times, 1), cumsum_reverse = from_the_end}
local LINES = {{{7}, 1}, {{3, 5}, 1}, {{3, 5}, 2}, {{4, 3, 6}, 2}, {{2, 1030}, 2}, {{1030, 2}, 1}, {{130, 70}, 1},
  {{2, 65, 3}, 2}, {{1, 4}, 1}, {{2, 300, 40}, 2}, {{}, 1}, {{3, 513}, 2}}

for _, name in ipairs {"cumsum", "cumprod", "cumsum_reverse"} do
  describe(name, function()
    local function op(x, dim) return call(name, x, {dim = dim - 1}) end
    for _, c in ipairs(LINES) do
      local shape, dim = c[1], c[2]
      it(("gives what a plain loop gives: {%s} along %d"):format(table.concat(shape, ","), dim), function()
        for _, dtype in ipairs(FLOATS) do
          local x = sample(shape, 6, dtype, name == "cumprod" and 1.5 or 4)
          if name == "cumprod" then x = x + 0.7 end
          local want = each_line(x, dim, SCANS[name])
          for layout, lay in pairs(LAYOUTS) do
            local y = op(lay(x), dim)
            numbers.assert_near(y, want, RTOL[dtype], dtype == "f64" and 1e-12 or 1e-6, dtype .. " " .. layout)
            assert.equal(x.dtype, y.dtype)
          end
        end
      end)
    end
    it("of integers is int64", function()
      for _, dtype in ipairs {"i64", "i32", "u8", "bool"} do
        local x = hm.tensor({1, 1, 0, 1, 1, 1}):to(dtype):view({2, 3})
        for dim = 1, 2 do
          assert.equal("int64", op(x, dim).dtype)
          numbers.assert_same(op(x, dim), each_line(x:to("i64"), dim, SCANS[name]))
        end
      end
      local big = hm.full({3, 400}, 7, {dtype = "i64"})
      numbers.assert_same(op(big, 2), each_line(big, 2, SCANS[name]))
    end)
    it("spreads NaN and infinity along its line alone", function()
      for _, v in ipairs {nan, inf, -inf} do
        for _, shape in ipairs {{2, 600}, {600, 2}} do
          local x = hm.ones(shape)
          local dim = shape[1] == 2 and 2 or 1
          if dim == 2 then x[{1, 300}] = v else x[{300, 1}] = v end
          numbers.assert_same(op(x, dim), each_line(x, dim, SCANS[name]))
        end
      end
      numbers.assert_same(op(hm.tensor({inf, 1, -inf, 1}), 1), each_line(hm.tensor({inf, 1, -inf, 1}), 1, SCANS[name]))
    end)
    it("of nothing is nothing", function()
      assert.same({0}, op(hm.zeros({0}), 1).shape)
      assert.same({2, 0, 3}, op(hm.zeros({2, 0, 3}), 2).shape)
      assert.same({0, 3}, op(hm.zeros({0, 3}), 2).shape)
    end)
    it("has the derivatives that differences give", function()
      for _, case in ipairs {{{5}, 1}, {{3, 4}, 1}, {{3, 4}, 2}, {{2, 3, 2}, 2}} do
        gradients.check(function(v) return op(v, case[2]) end, {sample(case[1], 7)})
        gradients.check(function(v) return op(reversed(v), case[2]) end, {sample(case[1], 7)})
      end
      gradients.check_second(function(v) return op(v * v, 1) end, {sample({4}, 7)}, 1e-5)
    end)
    it("refuses a dim that is not there", function()
      raises({name, "dim out of range"}, function() return op(hm.ones({3, 2}), 3) end)
    end)
  end)
end

describe("cumsum", function()
  it("keeps its digits on a long line, in one piece or in many", function()
    local n = devices.pick(200000, 30000)
    local list = list_of(n, 4, 1)
    local want = table.move(list, 1, n, 1, {})
    SCANS.cumsum(want)
    numbers.assert_near(hm.tensor(list, {dtype = "f64"}):cumsum(1), want, 1e-10, 1e-9)
    local x = hm.tensor(list)
    local rounded = numbers.flat(x)
    SCANS.cumsum(rounded)
    numbers.assert_near(x:cumsum(1), rounded, 2 ^ -23, 1e-6)
  end)
  it("has the same bits for any number of threads", devices.cpu_only("counts threads of the CPU", function()
    local threads = hm.cpu.features().threads
    for _, shape in ipairs {{300000}, {3, 100000}, {100000, 3}, {2000, 200}} do
      local x, results = sample(shape, 3, "f32"), {}
      for i, n in ipairs {1, 2, 3} do
        hm.set_num_threads(n)
        results[i] = {x:cumsum(1), x:cumprod(1), x:var(), x:var(1), call("norm", x), call("logsumexp", x, {dim = {0}}), x:prod()}
      end
      hm.set_num_threads(threads)
      for i = 2, 3 do
        for k = 1, #results[1] do
          assert.is_true(results[1][k]:eq(results[i][k]):logical_or(results[1][k]:isnan()):all():item(), "result " .. k)
        end
      end
    end
  end))
end)

describe("cumprod", function()
  it("has the derivative that differences give, where elements are zero", function()
    for _, places in ipairs {{1}, {2}, {4}, {1, 2}, {2, 3}, {1, 2, 3, 4}, {1, 4}} do
      local list = list_of(12, 3)
      for _, i in ipairs(places) do list[i], list[i + 4] = 0, 0 end
      local x = hm.tensor(list, {dtype = "f64"}):view({3, 4})
      gradients.check(function(v) return v:cumprod(2) end, {x})
      gradients.check(function(v) return v:cumprod(1) end, {x})
      gradients.check_second(function(v) return v:cumprod(2) end, {x}, 1e-5)
      gradients.check_second(function(v) return reversed(v):cumprod(2) end, {x}, 1e-5)
    end
  end)
  it("has an exact gradient along lines of any length", function()
    for _, shape in ipairs {{2, 600}, {600, 2}, {70, 40}, {3, devices.pick(2600, 1100)}, {130, 65}} do
      for dim = 1, 2 do
        local list = powers_of_two(shape)
        list[5] = 0
        local x, g = hm.tensor(list):view(shape), sample(shape, 2, "f32")
        local gl, at = {}, 0
        each_line(g, dim, function(l) gl[#gl + 1] = table.move(l, 1, #l, 1, {}) end)
        local want = each_line(x, dim, function(l)
          at = at + 1
          local own, before, behind = gl[at], {}, 0
          local p = 1
          for i = 1, #l do
            before[i] = p
            p = p * l[i]
          end
          for i = #l, 1, -1 do
            local s = own[i] + behind
            behind = l[i] * s
            l[i] = before[i] * s
          end
        end)
        numbers.assert_near(call("cumprod_backward", g, x, x:cumprod(dim), {dim = dim - 1}), want, 2e-6, 1e-30)
        numbers.assert_near(call("cumprod_backward", reversed(g), gapped(x), x:cumprod(dim), {dim = dim - 1}), want, 2e-6, 1e-30)
      end
    end
  end)
  it("refuses a gradient of another shape", function()
    raises({"cumprod_backward", "one shape"}, function()
      return call("cumprod_backward", hm.ones({2}), hm.ones({3}), hm.ones({3}), {dim = 0})
    end)
  end)
end)

-- ====== nll_loss ======

--- The loss by a plain loop: what it is, the total weight.
local function nll_reference(x, target, weight, reduction, ignore)
  local shape, flat, ts = x.shape, numbers.flat(x), numbers.flat(target)
  local classes, inner = shape[2], count(shape) // (shape[1] * shape[2])
  local losses, loss, total = {}, 0.0, 0.0
  for i, t in ipairs(ts) do
    local n, d = (i - 1) // inner, (i - 1) % inner
    losses[i] = 0
    if t ~= ignore then
      local w = weight and weight[t + 1] or 1
      losses[i] = -flat[(n * classes + t) * inner + d + 1] * w
      total = total + w
      loss = loss + losses[i]
    end
  end
  if reduction == "none" then return losses, total end
  return {reduction == "mean" and loss / total or loss}, total
end

local function targets(shape, classes, seed, ignored)
  local list = {}
  for i, v in ipairs(list_of(count(shape), seed or 3)) do
    list[i] = ignored and i % 4 == 2 and ignored or math.floor((v + 1.7) / 4 * classes) % classes
  end
  return hm.tensor(list, {dtype = "i64"}):view(shape)
end

describe("nll_loss", function()
  local function nll(x, t, w, attrs) return call("nll_loss", x, t, w, attrs) end
  local WEIGHT = {0.5, 2, 1, 0.25, 3}
  for _, reduction in ipairs {"mean", "sum", "none"} do
    for _, shape in ipairs {{6, 5}, {3, 5, 4}, {2, 5, 3, 2}, {devices.pick(9000, 8300), 5}} do
      it(("gives what a plain loop gives: %s of {%s}"):format(reduction, table.concat(shape, ",")), function()
        local positions = table.move(shape, 3, #shape, 2, {shape[1]})
        local t = targets(positions, 5, 2, -100)
        for _, dtype in ipairs(FLOATS) do
          local x = sample(shape, 4, dtype)
          for _, w in ipairs {false, WEIGHT} do
            local weight = w and hm.tensor(w, {dtype = dtype == "f64" and "f64" or "f32"}) or nil
            if weight and (dtype == "f16" or dtype == "bf16") then weight = weight:to(dtype) end
            local want, total = nll_reference(x, t, w, reduction, -100)
            for _, lay in pairs(LAYOUTS) do
              local loss, got_total = nll(lay(x), lay(t), weight, {reduction = reduction})
              near(loss, want, dtype)
              near(got_total, {total}, dtype == "f64" and "f64" or "f32")
              assert.equal(x.dtype, loss.dtype)
            end
          end
        end
      end)
    end
    it("has the derivatives that differences give: " .. reduction, function()
      for _, shape in ipairs {{4, 5}, {2, 5, 3}} do
        local positions = table.move(shape, 3, #shape, 2, {shape[1]})
        local t = targets(positions, 5, 2, 1)
        local w = hm.tensor(WEIGHT, {dtype = "f64"})
        gradients.check(function(x) return (nll(x, t, w, {reduction = reduction, ignore_index = 1})) end, {sample(shape, 4)})
        gradients.check_second(function(x) return (nll(x * x, t, w, {reduction = reduction, ignore_index = 1})) end, {sample(shape, 4)})
        gradients.check(function(x) return (nll(reversed(x), t, nil, {reduction = reduction})) end, {sample(shape, 4)})
      end
    end)
  end
  it("ignores all: a mean is NaN, a sum 0; of nothing as well", function()
    local x, t = hm.ones({2, 3}), hm.tensor({-100, -100}, {dtype = "i64"})
    local mean, total = nll(x, t, nil, {})
    assert.is_true(mean:item() ~= mean:item())
    assert.equal(0, total:item())
    assert.equal(0, (nll(x, t, nil, {reduction = "sum"})):item())
    local none = hm.zeros({0}, {dtype = "i64"})
    local empty = nll(hm.ones({0, 3}), none, nil, {})
    assert.is_true(empty:item() ~= empty:item())
    assert.equal(0, (nll(hm.ones({0, 3}), none, nil, {reduction = "sum"})):item())
    assert.same({0}, (nll(hm.ones({0, 3}), none, nil, {reduction = "none"})).shape)
  end)
  it("passes by NaN where it does not look, and spreads it where it does", function()
    local x = hm.tensor({{nan, 1, inf}, {2, nan, 3}})
    assert.equal(-4, (nll(x, hm.tensor({1, 2}, {dtype = "i64"}), nil, {reduction = "sum"})):item())
    numbers.assert_same((nll(x, hm.tensor({2, 1}, {dtype = "i64"}), nil, {reduction = "none"})), {-inf, nan})
  end)
  it("names a target that is no class", function()
    local x = hm.ones({2, 3})
    for _, t in ipairs {3, -1} do
      raises({"nll_loss: target " .. t, "C = 3 classes, 0 to 2", "class labels count from 0"}, function()
        local y = nll(x, hm.tensor({0, t}, {dtype = "i64"}), nil, {})
        devices.wait()
        return y
      end)
    end
  end)
  it("refuses shapes and dtypes that do not fit", function()
    local x, t = hm.ones({2, 3}), hm.tensor({0, 1}, {dtype = "i64"})
    raises({"nll_loss", "[N, C]", "not one-hot"}, function() return nll(x, hm.zeros({2, 3}, {dtype = "i64"}), nil, {}) end)
    raises({"nll_loss", "weight must be [3]"}, function() return nll(x, t, hm.ones({2}), {}) end)
    raises({"nll_loss", "target must hold integers"}, function() return nll(x, hm.ones({2}), nil, {}) end)
  end)
end)

-- ====== cross_entropy, twice ======

describe("second derivatives of cross_entropy", function()
  for _, reduction in ipairs {"mean", "sum", "none"} do
    for _, smoothing in ipairs {0, 0.2} do
      it(("are what differences give: %s, smoothing %g"):format(reduction, smoothing), function()
        for _, shape in ipairs {{3, 4}, {2, 3, 2}} do
          local positions = table.move(shape, 3, #shape, 2, {shape[1]})
          local t = targets(positions, shape[2], 5, -100)
          local function loss(x)
            return (call("cross_entropy", x, t, {reduction = reduction, label_smoothing = smoothing}))
          end
          gradients.check_second(loss, {sample(shape, 3)})
          gradients.check_second(function(x) return loss(x) * loss(x) end, {sample(shape, 3)})
        end
      end)
    end
  end
  it("keep to the logits' dtype and to float32 inside", function()
    local x = sample({3, 4}, 3, "f16"):requires_grad_()
    local t = targets({3}, 4, 5)
    local function twice(v)
      local loss = (call("cross_entropy", v, t, {}))
      local first = core.grad({loss}, {v}, {create_graph = true})[1]
      return core.grad({(first * first):sum()}, {v})[1]
    end
    local got, want = twice(x), twice(x:detach():to("f64"):requires_grad_())
    assert.equal("float16", got.dtype)
    numbers.assert_near(got, want, 4e-3, 1e-5)
  end)
end)

-- ====== softmax along a dim that is not dense ======

describe("softmax along long lines that lie side by side", function()
  it("has the bits of dense lines", devices.cpu_only("compares orders of addition on the CPU", function()
    for _, dtype in ipairs {"f32", "bf16", "f64"} do
      for _, n in ipairs {1024, 1100, 5001, 17000} do
        local x, g = sample({n, 37}, 3, dtype), sample({n, 37}, 4, dtype)
        x[{5, 3}] = nan
        x[{9, 4}] = inf
        for _, name in ipairs {"softmax", "log_softmax"} do
          local y, dense = x[name](x, 1), x:t():contiguous()
          local want = dense[name](dense, 2)
          numbers.assert_same(y:narrow(2, 1, 6), want:t():narrow(2, 1, 6), name)
          assert.is_true(y:narrow(2, 5, 33):eq(want:t():narrow(2, 5, 33)):all():item())
          local dx = call(name .. "_backward", g, y, {dim = 0}):narrow(2, 5, 33)
          local want_dx = call(name .. "_backward", g:t():contiguous(), want, {dim = 1}):t():narrow(2, 5, 33)
          assert.is_true(dx:eq(want_dx):all():item(), name .. " backward")
        end
      end
    end
  end))
end)
