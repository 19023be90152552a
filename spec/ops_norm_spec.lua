-- ops_norm_spec.lua -- batch_norm, layer_norm, rms_norm and group_norm: values against plain sums in float64, gradients by differences,
-- running statistics, memory orders, half types, autocast, special values, empty tensors, and what is refused.
--
-- One case alone:  build/halfmoon spec/run.lua --filter='running statistics' spec/ops_norm_spec.lua

local hm = require "halfmoon"
local core = require "halfmoon.core"
local fixed = require "spec.support.inputs"
local numbers = require "spec.support.numbers"
local gradients = require "spec.support.gradients"
local expect = require "spec.support.expect"

local raises = expect.raises
local inf, nan = math.huge, 0 / 0

-- ====== Inputs ======

local function count(shape, from, to)
  local n = 1
  for d = from or 1, to or #shape do n = n * shape[d] end
  return n
end

--- Numbers without a pattern, about 0.7 with a spread of 2.
local function sample(shape, seed, dtype) return fixed.sample(shape, seed, dtype, -2.8, 4.2) end

--- The same values with the channels innermost in memory.
local function inner(t)
  local n, order, back = t:dim(), {1}, {1}
  for d = 3, n do order[#order + 1] = d end
  order[n] = 2
  for at, d in ipairs(order) do back[d] = at end
  return t:permute(order):contiguous():permute(back)
end

local function call(name, ...) return core.call(name, ...) end

-- ====== References: one number at a time ======

--- Mean and variance of values of a list at the given places.
local function moments(x, places)
  local mean, var = 0, 0
  for _, i in ipairs(places) do mean = mean + x[i] end
  mean = mean / #places
  for _, i in ipairs(places) do var = var + (x[i] - mean) ^ 2 end
  return mean, var / #places
end

--- Places that share a statistic, by a function of sample, channel and pixel (all from 0).
local function places_by(shape, key)
  local n, c, s, sets = shape[1], shape[2], count(shape, 3), {}
  for i = 0, n - 1 do
    for k = 0, c - 1 do
      for p = 0, s - 1 do
        local at = key(i, k)
        sets[at] = sets[at] or {}
        table.insert(sets[at], (i * c + k) * s + p + 1)
      end
    end
  end
  return sets
end

local function channel_of(place, shape) return (place - 1) // count(shape, 3) % shape[2] + 1 end

--- Normalizes each set; weight and bias by channel.
local function reference(x, shape, sets, w, b, eps, relu)
  local list, y, means, rstds = numbers.flat(x), {}, {}, {}
  for k = 1, #sets do
    local mean, var = moments(list, sets[k])
    local rstd = 1 / math.sqrt(var + eps)
    means[k], rstds[k] = mean, rstd
    for _, i in ipairs(sets[k]) do
      local c = channel_of(i, shape)
      local v = (list[i] - mean) * rstd * (w and w[c] or 1) + (b and b[c] or 0)
      y[i] = relu and v < 0 and 0 or v
    end
  end
  return y, means, rstds
end

local function batch_sets(shape) return places_by(shape, function(_, c) return c + 1 end) end
local function group_sets(shape, groups)
  local wide = shape[2] // groups
  return places_by(shape, function(n, c) return n * groups + c // wide + 1 end)
end

--- Rows over the last dims.  rms: without the mean.
local function row_reference(x, length, w, b, eps, rms)
  local list, y, means, rstds = numbers.flat(x), {}, {}, {}
  for r = 0, #list // length - 1 do
    local mean, var = 0, 0
    for i = 1, length do mean = mean + list[r * length + i] / length end
    if rms then mean = 0 end
    for i = 1, length do var = var + (list[r * length + i] - mean) ^ 2 / length end
    local rstd = 1 / math.sqrt(var + eps)
    means[#means + 1], rstds[#rstds + 1] = mean, rstd
    for i = 1, length do
      y[r * length + i] = (list[r * length + i] - mean) * rstd * (w and w[i] or 1) + (b and b[i] or 0)
    end
  end
  return y, means, rstds
end

-- Tolerances: f64 by its own rounding, f32 within the rows' bound of the largest values, halves by one rounding of the result.
local RTOL = {f64 = 1e-12, f32 = 4e-6, f16 = 2 ^ -11 * 1.02, bf16 = 2 ^ -8 * 1.02}
local ATOL = {f64 = 1e-12, f32 = 4e-6, f16 = 4e-6, bf16 = 4e-6}

local function near(got, want, dtype, what) numbers.assert_near(got, want, RTOL[dtype], ATOL[dtype], what) end

local SHAPES = {{4, 3}, {5, 3, 7}, {2, 6, 3, 5}, {3, 4, 16, 16}, {2, 4, 2, 3, 2}, {300, 2}, {2, 40, 9, 8}, {3, 1, 4, 4},
  {2, 2, 4200}, {7, 1030, 1, 1}}

-- ====== batch_norm ======

describe("batch_norm", function()
  for _, shape in ipairs(SHAPES) do
    for _, order in ipairs {"row-major", "channels innermost"} do
      it(("gives what plain sums give: {%s} %s"):format(table.concat(shape, ","), order), function()
        local c = shape[2]
        for _, dtype in ipairs {"f64", "f32", "f16", "bf16"} do
          local x, w, b = sample(shape, 1, dtype), sample({c}, 2, "f32"), sample({c}, 3, "f32")
          local want, means, rstds = reference(x, shape, batch_sets(shape), numbers.flat(w), numbers.flat(b), 1e-3)
          if order ~= "row-major" then x = inner(x) end
          local y, mean, rstd = call("batch_norm", x, w, b, nil, nil, {eps = 1e-3})
          assert.equal(x.dtype, y.dtype)
          near(y, want, dtype, dtype)
          local own = dtype == "f64" and "f64" or "f32"
          near(mean, means, own, "mean")
          near(rstd, rstds, own, "rstd")
          assert.equal(dtype == "f64" and "float64" or "float32", mean.dtype)
        end
      end)
    end
  end

  it("works without weight and bias, and with one of them", function()
    local shape = {4, 5, 6}
    local x, w, b = sample(shape, 4, "f32"), sample({5}, 5, "f32"), sample({5}, 6, "f32")
    for mask = 0, 3 do
      local use_w, use_b = mask % 2 == 1 and w or nil, mask // 2 == 1 and b or nil
      local want = reference(x, shape, batch_sets(shape), use_w and numbers.flat(w), use_b and numbers.flat(b), 1e-5)
      near((call("batch_norm", x, use_w, use_b, nil, nil, {})), want, "f32", "mask " .. mask)
    end
  end)

  it("gives channels-last for 4 dims and x's order otherwise", function()
    local y = call("batch_norm", sample({2, 3, 4, 5}, 1, "f32"), nil, nil, nil, nil, {})
    assert.same({60, 1, 15, 3}, y:stride())
    y = call("batch_norm", inner(sample({2, 3, 4}, 1, "f32")), nil, nil, nil, nil, {})
    assert.same({12, 1, 3}, y:stride())
    y = call("batch_norm", sample({2, 3, 4}, 1, "f32"), nil, nil, nil, nil, {})
    assert.same({12, 4, 1}, y:stride())
    y = call("batch_norm", sample({4, 3, 2}, 1, "f32"):transpose(1, 3), nil, nil, nil, nil, {})
    assert.same({12, 4, 1}, y:stride())
  end)

  it("takes any strides", function()
    local base = sample({4, 5, 6}, 8, "f32")
    for _, x in ipairs {base:transpose(1, 3), base:transpose(1, 2), base:narrow(3, 2, 3), base:select(1, 2),
      sample({2, 3, 8, 9}, 1, "f32"):narrow(4, 3, 4), sample({5}, 1, "f32"):unsqueeze(2):expand({5, 4})} do
      local shape = x.shape
      near((call("batch_norm", x, nil, nil, nil, nil, {})), reference(x, shape, batch_sets(shape), nil, nil, 1e-5), "f32", "y")
    end
  end)

  it("moves running statistics in place, by the unbiased variance", function()
    local shape = {3, 4, 2, 5}
    local x = sample(shape, 9, "f16")
    local rm, rv = sample({4}, 10, "f32"), sample({4}, 11, "f32"):abs()
    local before_m, before_v = numbers.flat(rm), numbers.flat(rv)
    local list, sets = numbers.flat(x), batch_sets(shape)
    call("batch_norm", x, nil, nil, rm, rv, {momentum = 0.3})
    local want_m, want_v = {}, {}
    for c = 1, 4 do
      local mean, var = moments(list, sets[c])
      want_m[c] = 0.7 * before_m[c] + 0.3 * mean
      want_v[c] = 0.7 * before_v[c] + 0.3 * var * 30 / 29
    end
    near(rm, want_m, "f32", "running_mean")
    near(rv, want_v, "f32", "running_var")
  end)

  it("tells autograd that running statistics were written to", function()
    local rm, rv = hm.zeros({3}), hm.ones({3})
    local a = hm.ones({3}):requires_grad_()
    local y = (a * rm):sum() -- saves rm
    call("batch_norm", sample({4, 3}, 1, "f32"), nil, nil, rm, rv, {})
    raises({"changed"}, function() y:backward() end)
  end)

  it("uses running statistics when not training, and leaves them alone", function()
    local shape = {1, 3, 2, 2}
    local x, rm, rv = sample(shape, 12, "f32"), sample({3}, 13, "f32"), sample({3}, 14, "f32"):abs()
    local w, b = sample({3}, 15, "f32"), sample({3}, 16, "f32")
    local m, v = numbers.flat(rm), numbers.flat(rv)
    local y, mean, rstd = call("batch_norm", x, w, b, rm, rv, {training = false, eps = 1e-4})
    local want, list, ws, bs = {}, numbers.flat(x), numbers.flat(w), numbers.flat(b)
    for i = 1, #list do
      local c = channel_of(i, shape)
      want[i] = (list[i] - m[c]) / math.sqrt(v[c] + 1e-4) * ws[c] + bs[c]
    end
    near(y, want, "f32", "y")
    numbers.assert_same(mean, m, "mean")
    near(rstd, {1 / math.sqrt(v[1] + 1e-4), 1 / math.sqrt(v[2] + 1e-4), 1 / math.sqrt(v[3] + 1e-4)}, "f32", "rstd")
    numbers.assert_same(rm, m, "running_mean")
    numbers.assert_same(rv, v, "running_var")
  end)

  it("keeps its accuracy far from zero and behind an outlier", function()
    local shape = {4096, 3}
    for _, first in ipairs {300, -1e4} do
      local x = sample(shape, 17, "f32") + 200
      x:select(1, 1):fill_(first)
      local _, means, rstds = reference(x, shape, batch_sets(shape), nil, nil, 0)
      local _, mean, rstd = call("batch_norm", x, nil, nil, nil, nil, {eps = 0})
      numbers.assert_near(mean, means, 5e-7, 0, "mean")
      numbers.assert_near(rstd, rstds, 3e-6, 0, "rstd")
      local planes = hm.stack({x:transpose(1, 2):contiguous():view({3, 1, 64, 64})}, 1):view({1, 3, 4096})
      _, mean, rstd = call("batch_norm", planes, nil, nil, nil, nil, {eps = 0})
      numbers.assert_near(mean, means, 5e-7, 0, "mean of planes")
      numbers.assert_near(rstd, rstds, 3e-6, 0, "rstd of planes")
    end
  end)

  it("with relu gives zeros for negative results and keeps NaN", function()
    local shape = {6, 3, 5}
    local x, w, b = sample(shape, 18, "f32"), sample({3}, 19, "f32"), sample({3}, 20, "f32")
    local plain = call("batch_norm", x, w, b, nil, nil, {})
    numbers.assert_same((call("batch_norm", x, w, b, nil, nil, {relu = true})), plain:relu(), "relu")
    numbers.assert_same((call("batch_norm", inner(x), w, b, nil, nil, {relu = true})),
      (call("batch_norm", inner(x), w, b, nil, nil, {})):relu(), "relu of rows")
    x[{1, 2, 1}] = nan
    local y = numbers.flat((call("batch_norm", x, w, b, nil, nil, {relu = true})))
    for i = 1, #y do assert.equal(channel_of(i, shape) == 2, y[i] ~= y[i], "place " .. i) end
  end)

  it("an infinite or NaN value spoils its channel and no other", function()
    for _, bad in ipairs {inf, -inf, nan} do
      for _, make in ipairs {function(t) return t end, inner} do
        local x = sample({4, 3, 6}, 21, "f32")
        x[{2, 2, 3}] = bad
        local y, _, rstd = call("batch_norm", make(x), nil, nil, nil, nil, {})
        local list, r = numbers.flat(y), numbers.flat(rstd)
        for i = 1, #list do assert.equal(channel_of(i, {4, 3, 6}) == 2, list[i] ~= list[i]) end
        assert.is_true(r[2] ~= r[2] and r[1] == r[1] and r[3] == r[3])
      end
    end
  end)

  it("takes empty tensors", function()
    local rm, rv = hm.ones({3}), hm.ones({3})
    local x = hm.empty({0, 3, 4}):requires_grad_()
    local w = hm.ones({3}):requires_grad_()
    local y = call("batch_norm", x, w, nil, rm, rv, {})
    assert.same({0, 3, 4}, y.shape)
    y:sum():backward()
    numbers.assert_same(w.grad, {0, 0, 0}, "gradient of weight")
    numbers.assert_same(rm, {1, 1, 1}, "running_mean")
    assert.same({2, 0, 4}, call("batch_norm", hm.empty({2, 0, 4}), nil, nil, nil, nil, {}).shape)
    assert.same({0, 3}, call("batch_norm", hm.empty({0, 3}), nil, nil, rm, rv, {training = false}).shape)
  end)

  it("refuses what does not fit, and says why", function()
    local x = sample({4, 3, 2}, 1, "f32")
    raises({"batch_norm", "[N, C]", "f32[4]"}, call, "batch_norm", sample({4}, 1, "f32"), nil, nil, nil, nil, {})
    raises({"Expected more than 1 value per channel", "hint"}, call, "batch_norm", sample({1, 3}, 1, "f32"), nil, nil, nil, nil, {})
    raises({"weight must be [3]", "f32[4]"}, call, "batch_norm", x, hm.ones({4}), nil, nil, nil, {})
    raises({"bias must be [3]"}, call, "batch_norm", x, nil, hm.ones({3, 1}), nil, nil, {})
    raises({"weight must have a floating dtype"}, call, "batch_norm", x, hm.ones({3}, {dtype = "i64"}), nil, nil, nil, {})
    raises({"training = false needs running_mean"}, call, "batch_norm", x, nil, nil, nil, nil, {training = false})
    raises({"go together"}, call, "batch_norm", x, nil, nil, hm.zeros({3}), nil, {})
    raises({"running_mean must be float32"}, call, "batch_norm", x, nil, nil, hm.zeros({3}, {dtype = "f16"}), hm.ones({3}), {})
    raises({"running_var must be float32, contiguous"}, call, "batch_norm", x, nil, nil, hm.zeros({3}),
      hm.ones({6}):view({3, 2}):select(2, 1), {})
    raises({"eps"}, call, "batch_norm", x, nil, nil, nil, nil, {eps = -1})
    raises({"floating"}, call, "batch_norm", x:to("i64"), nil, nil, nil, nil, {})
    raises({"one shape"}, call, "batch_norm_backward", sample({4, 3}, 1, "f32"), x, nil, nil, hm.zeros({3}), hm.ones({3}), {})
  end)

  for _, shape in ipairs {{4, 3}, {3, 2, 5}, {2, 3, 2, 2}} do
    for _, order in ipairs {"row-major", "channels innermost"} do
      it(("has the gradients that differences give: {%s} %s"):format(table.concat(shape, ","), order), function()
        local c = shape[2]
        local look = order == "row-major" and function(t) return t end or inner
        local rm, rv = sample({c}, 5), sample({c}, 6):abs()
        for _, attrs in ipairs {{}, {relu = true}, {training = false}, {training = false, relu = true}} do
          gradients.check(function(x, w, b)
            return (call("batch_norm", look(x), w, b, rm:clone(), rv:clone(), attrs))
          end, {sample(shape, 1), sample({c}, 2), sample({c}, 3)}, 2e-6)
        end
        gradients.check(function(x) return (call("batch_norm", look(x), nil, nil, nil, nil, {})) end, {sample(shape, 4)}, 2e-6)
      end)
    end
  end
end)

-- ====== Gradients in every dtype ======

-- name, shape of x, arguments behind x (shapes), attributes
local GRADIENTS = {
  {"batch_norm", {6, 5, 9, 7}, {{5}, {5}}, {}}, {"batch_norm", {6, 5, 9, 7}, {{5}, {5}}, {relu = true}},
  {"batch_norm", {700, 36}, {{36}, {36}}, {relu = true}}, {"batch_norm", {3, 5, 130}, {{5}, {5}}, {relu = true}},
  {"batch_norm", {3, 1100}, {{1100}, {1100}}, {}},
  {"layer_norm", {70, 37}, {{37}, {37}}, {}}, {"layer_norm", {2, 3, 65, 70}, {{65, 70}, {65, 70}}, {dims = 2}},
  {"rms_norm", {70, 37}, {{37}}, {}}, {"rms_norm", {2, 4, 3, 130}, {{3, 130}}, {dims = 2}},
  {"group_norm", {3, 6, 9, 7}, {{6}, {6}}, {groups = 3}}, {"group_norm", {2, 6, 130}, {{6}, {6}}, {groups = 2}},
  {"group_norm", {4, 6}, {{6}, {6}}, {groups = 2}},
}

local function run_gradients(case, dtype, look)
  local name, shape, behind, attrs = table.unpack(case)
  local args = {look(sample(shape, 1, "bf16"):to(dtype)):detach():requires_grad_()}
  for k, s in ipairs(behind) do
    args[k + 1] = sample(s, k + 1, "bf16"):to(dtype == "f64" and "f64" or "f32"):requires_grad_()
  end
  if name == "batch_norm" then args[5] = nil end
  local n = name == "batch_norm" and 5 or #behind + 1
  args[n + 1] = attrs
  local y = call(name, table.unpack(args, 1, n + 1))
  y:backward(sample(shape, 9, "bf16"):to(y.dtype))
  local out = {args[1].grad}
  for k = 1, #behind do out[k + 1] = args[k + 1].grad end
  return out
end

local function largest(list)
  local top = 0
  for _, v in ipairs(list) do top = math.max(top, math.abs(v)) end
  return top
end

describe("gradients", function()
  for _, case in ipairs(GRADIENTS) do
    it(("of %s {%s} in every dtype follow those in float64"):format(case[1], table.concat(case[2], ",")), function()
      for _, look in ipairs {function(t) return t end, inner} do
        local want = run_gradients(case, "f64", look)
        for _, dtype in ipairs {"f32", "f16", "bf16"} do
          local got = run_gradients(case, dtype, look)
          local exact = dtype == "f32" and 1e-6 or nil
          for k = 1, #want do
            local w = numbers.flat(want[k])
            assert.equal(hm.tensor({0}, {dtype = k == 1 and dtype or "f32"}).dtype, got[k].dtype)
            -- half types differ in where the relu cuts by nothing: x is the same in all dtypes
            numbers.assert_near(got[k], w, k == 1 and RTOL[dtype] or 2e-5, (exact or 1e-5) * largest(w) * 2, dtype .. " " .. k)
          end
        end
      end
    end)
  end
end)

-- ====== layer_norm and rms_norm ======

describe("row norms", function()
  for _, shape in ipairs {{5, 7}, {3, 64}, {2, 3, 130}, {9}, {2, 768}, {2, 4097}, {1, 9000}, {3, 1}} do
    it(("give what plain sums give: {%s}"):format(table.concat(shape, ",")), function()
      local length = shape[#shape]
      for _, dtype in ipairs {"f64", "f32", "f16", "bf16"} do
        local own = dtype == "f64" and "f64" or "f32"
        local x, w, b = sample(shape, 1, dtype), sample({length}, 2, dtype), sample({length}, 3, dtype)
        local ws, bs = numbers.flat(w), numbers.flat(b)
        local want, means, rstds = row_reference(x, length, ws, bs, 1e-4)
        local y, mean, rstd = call("layer_norm", x, w, b, {eps = 1e-4})
        near(y, want, dtype, dtype)
        near(mean, means, own, "mean")
        near(rstd, rstds, own, "rstd")
        assert.equal(x.dtype, y.dtype)
        local lead = table.move(shape, 1, #shape - 1, 1, {})
        assert.same(lead, mean.shape)
        want, means, rstds = row_reference(x, length, ws, nil, 1e-4, true)
        assert.truthy(means)
        y, rstd = call("rms_norm", x, w, {eps = 1e-4})
        near(y, want, dtype, "rms " .. dtype)
        near(rstd, rstds, own, "rms rstd")
        near((call("layer_norm", x, nil, nil, {})), (row_reference(x, length, nil, nil, 1e-5)), dtype, "no weight")
        near((call("layer_norm", x, nil, b, {})), (row_reference(x, length, nil, bs, 1e-5)), dtype, "no weight, a bias")
      end
    end)
  end

  it("normalize over several dims and any strides before them", function()
    local base = sample({4, 3, 6, 5}, 4, "f32")
    local w = sample({6, 5}, 5, "f32")
    for _, x in ipairs {base, base:transpose(1, 2), base:narrow(2, 2, 2), base:transpose(1, 4):contiguous():transpose(1, 4),
      base:narrow(1, 1, 1):expand({3, 3, 6, 5})} do
      local want = row_reference(x, 30, numbers.flat(w), nil, 1e-5)
      near((call("layer_norm", x, w, nil, {dims = 2})), want, "f32", "y")
      near((call("rms_norm", x, w, {dims = 2})), (row_reference(x, 30, numbers.flat(w), nil, 2 ^ -23, true)), "f32", "rms")
    end
    near((call("layer_norm", base, nil, nil, {dims = 4})), (row_reference(base, 360, nil, nil, 1e-5)), "f32", "all")
  end)

  it("keep NaN and infinities in their row", function()
    for _, bad in ipairs {nan, inf, -inf} do
      local x = sample({3, 70}, 6, "f32")
      x[{2, 5}] = bad
      for _, name in ipairs {"layer_norm", "rms_norm"} do
        local args = name == "layer_norm" and {x, nil, nil, {}} or {x, nil, {}}
        local y = call(name, table.unpack(args, 1, name == "layer_norm" and 4 or 3))
        local list = numbers.flat(y)
        assert.is_true(list[70 + 5] ~= list[70 + 5])
        for i = 1, 70 do assert.is_true(list[i] == list[i] and list[140 + i] == list[140 + i]) end
      end
    end
  end)

  it("take empty tensors", function()
    local w = hm.ones({4}):requires_grad_()
    local x = hm.empty({0, 4}):requires_grad_()
    local y = call("layer_norm", x, w, nil, {})
    assert.same({0, 4}, y.shape)
    y:sum():backward()
    numbers.assert_same(w.grad, {0, 0, 0, 0}, "gradient of weight")
    assert.same({3, 0}, call("layer_norm", hm.empty({3, 0}), nil, nil, {}).shape)
    assert.same({3, 0}, call("rms_norm", hm.empty({3, 0}), nil, {}).shape)
  end)

  it("have the gradients that differences give", function()
    for _, shape in ipairs {{3, 5}, {2, 2, 3}} do
      local length = shape[#shape]
      gradients.check(function(x, w, b) return (call("layer_norm", x, w, b, {})) end,
        {sample(shape, 1), sample({length}, 2), sample({length}, 3)}, 2e-6)
      gradients.check(function(x) return (call("layer_norm", x, nil, nil, {})) end, {sample(shape, 1)}, 2e-6)
      gradients.check(function(x, w) return (call("rms_norm", x, w, {})) end, {sample(shape, 1), sample({length}, 2)}, 2e-6)
      gradients.check(function(x) return (call("rms_norm", x:transpose(1, 2), nil, {})) end, {sample(shape, 1)}, 2e-6)
    end
    gradients.check(function(x, w, b) return (call("layer_norm", x:transpose(1, 2), w, b, {dims = 2})) end,
      {sample({2, 3, 4}, 1), sample({2, 4}, 2), sample({2, 4}, 3)}, 2e-6)
  end)

  it("refuse what does not fit, and say why", function()
    local x = sample({4, 3}, 1, "f32")
    raises({"layer_norm", "weight must be [3]", "f32[4]"}, call, "layer_norm", x, hm.ones({4}), nil, {})
    raises({"bias must be [4,3]"}, call, "layer_norm", x, nil, hm.ones({3}), {dims = 2})
    raises({"dims must be from 1", "3"}, call, "layer_norm", x, nil, nil, {dims = 3})
    raises({"dims must be from 1"}, call, "rms_norm", x, nil, {dims = 0})
    raises({"eps"}, call, "rms_norm", x, nil, {eps = -0.5})
    raises({"rms_norm", "float"}, call, "rms_norm", x:to("i32"), nil, {})
    raises({"mean must be [4]"}, call, "layer_norm_backward", x, x, nil, hm.zeros({3}), hm.ones({4}), {})
  end)
end)

-- ====== group_norm ======

describe("group_norm", function()
  for _, shape in ipairs {{3, 6}, {2, 6, 5}, {2, 6, 3, 5}, {1, 8, 16, 16}, {2, 4, 2, 3, 2}, {2, 6, 4200}, {3, 1, 4}} do
    it(("gives what plain sums give in both memory orders: {%s}"):format(table.concat(shape, ",")), function()
      local c = shape[2]
      for _, groups in ipairs {1, 2, c} do
        if c % groups == 0 and c // groups * count(shape, 3) > 1 then
          for _, dtype in ipairs {"f64", "f32", "f16", "bf16"} do
            local x, w, b = sample(shape, 1, dtype), sample({c}, 2, dtype), sample({c}, 3, dtype)
            local want, means, rstds = reference(x, shape, group_sets(shape, groups), numbers.flat(w), numbers.flat(b), 1e-4)
            local own = dtype == "f64" and "f64" or "f32"
            for _, look in ipairs {function(t) return t end, inner} do
              local t = look(x)
              local y, mean, rstd = call("group_norm", t, w, b, {groups = groups, eps = 1e-4})
              near(y, want, dtype, dtype)
              near(mean, means, own, "mean")
              near(rstd, rstds, own, "rstd")
              assert.same({shape[1], groups}, mean.shape)
              assert.same(t:stride(), y:stride())
            end
          end
        end
      end
    end)
  end

  it("has the gradients that differences give", function()
    for _, shape in ipairs {{2, 4, 3}, {2, 4, 2, 2}, {3, 4}} do
      for _, look in ipairs {function(t) return t end, inner} do
        for _, groups in ipairs {1, 2} do
          gradients.check(function(x, w, b) return (call("group_norm", look(x), w, b, {groups = groups})) end,
            {sample(shape, 1), sample({4}, 2), sample({4}, 3)}, 2e-6)
        end
        gradients.check(function(x) return (call("group_norm", look(x), nil, nil, {groups = 2})) end, {sample(shape, 1)}, 2e-6)
      end
    end
  end)

  it("keeps NaN in its group, and takes empty tensors", function()
    local x = sample({2, 4, 5}, 3, "f32")
    x[{2, 3, 1}] = nan
    local y = numbers.flat((call("group_norm", x, nil, nil, {groups = 2})))
    for i = 1, #y do assert.equal(i > 30, y[i] ~= y[i]) end
    assert.same({0, 4, 5}, call("group_norm", hm.empty({0, 4, 5}), nil, nil, {groups = 2}).shape)
    local w = hm.ones({4}):requires_grad_()
    call("group_norm", hm.empty({2, 4, 0}), w, nil, {groups = 2}):sum():backward()
    numbers.assert_same(w.grad, {0, 0, 0, 0}, "gradient of weight")
  end)

  it("refuses what does not fit, and says why", function()
    local x = sample({2, 6, 5}, 1, "f32")
    raises({"4 groups do not divide 6 channels", "hint"}, call, "group_norm", x, nil, nil, {groups = 4})
    raises({"0 groups"}, call, "group_norm", x, nil, nil, {groups = 0})
    raises({"weight must be [6]"}, call, "group_norm", x, hm.ones({5}), nil, {groups = 2})
    raises({"[N, C"}, call, "group_norm", sample({4}, 1, "f32"), nil, nil, {groups = 1})
    raises({"mean must be [2,3]"}, call, "group_norm_backward", x, x, nil, hm.zeros({3}), hm.ones({2, 3}), {groups = 3})
  end)
end)

-- ====== What they share ======

describe("normalizations", function()
  it("under autocast: batch_norm follows x, the others give float32", function()
    local x, one = sample({4, 6, 2, 2}, 1, "f32"), hm.ones({6})
    for _, low in ipairs {"f16", "bf16"} do
      local half = x:to(low)
      local bn, ln, rn, gn, plain
      hm.amp.autocast(low, function()
        bn = call("batch_norm", half, one, one, hm.zeros({6}), hm.ones({6}), {})
        plain = call("batch_norm", x, one, one, nil, nil, {})
        ln = call("layer_norm", half, nil, nil, {})
        rn = call("rms_norm", half, nil, {})
        gn = call("group_norm", half, one, nil, {groups = 2})
      end)
      assert.equal(half.dtype, bn.dtype)
      assert.equal("float32", plain.dtype)
      for _, y in ipairs {ln, rn, gn} do assert.equal("float32", y.dtype) end
      -- the float32 result is not a rounded one
      near(ln, (row_reference(half, 2, nil, nil, 1e-5)), "f32", "layer_norm")
      assert.equal(half.dtype, call("layer_norm", half, nil, nil, {}).dtype)
      assert.equal(half.dtype, call("rms_norm", half, nil, {}).dtype)
    end
  end)

  it("give gradients in x's dtype inside a region", function()
    local x, w = sample({6, 8}, 1, "f16"):requires_grad_(), hm.ones({8}):requires_grad_()
    local y
    hm.amp.autocast("f16", function() y = call("layer_norm", x, w, nil, {}) end)
    y:backward(sample({6, 8}, 2, "f32"))
    assert.equal("float16", x.grad.dtype)
    assert.equal("float32", w.grad.dtype)
  end)

  it("say that they have no second derivative", function()
    for _, case in ipairs {{"batch_norm", 5, {}}, {"layer_norm", 3, {}}, {"rms_norm", 2, {}}, {"group_norm", 3, {groups = 1}}} do
      local x = sample({3, 4}, 1):requires_grad_()
      local args = {x}
      args[case[2] + 1] = case[3]
      local y = call(case[1], table.unpack(args, 1, case[2] + 1))
      local ok, message = pcall(function()
        local g = core.grad({(y * y * y):sum()}, {x}, {create_graph = true})[1]
        core.grad({(g * g):sum()}, {x})
      end)
      assert.is_false(ok)
      assert.truthy(tostring(message):find(case[1], 1, true), message)
    end
  end)

  it("give the same bits for any number of threads", function()
    local x, g = sample({64, 24, 12, 12}, 1, "f32"), sample({64, 24, 12, 12}, 2, "f32")
    local rows, rg = sample({900, 257}, 3, "f32"), sample({900, 257}, 4, "f32")
    local function all()
      local out = {}
      for _, t in ipairs {x, inner(x)} do
        local y, mean, rstd = call("batch_norm", t, nil, nil, nil, nil, {relu = true})
        local dx, dw, db = call("batch_norm_backward", g, t, nil, nil, mean, rstd, {relu = true})
        for _, v in ipairs {y, mean, rstd, dx, dw, db} do out[#out + 1] = v end
        y, mean, rstd = call("group_norm", t, nil, nil, {groups = 4})
        dx, dw, db = call("group_norm_backward", g, t, nil, mean, rstd, {groups = 4})
        for _, v in ipairs {y, mean, rstd, dx, dw, db} do out[#out + 1] = v end
      end
      local y, mean, rstd = call("layer_norm", rows, nil, nil, {})
      local dx, dw, db = call("layer_norm_backward", rg, rows, nil, mean, rstd, {})
      for _, v in ipairs {y, mean, rstd, dx, dw, db} do out[#out + 1] = v end
      return out
    end
    local threads = hm.get_num_threads and hm.get_num_threads() or 1
    hm.set_num_threads(1)
    local one = all()
    hm.set_num_threads(3)
    local three = all()
    hm.set_num_threads(threads)
    for i = 1, #one do
      assert.equal(0, (one[i]:ne(three[i])):sum():item(), "result " .. i)
    end
  end)
end)
