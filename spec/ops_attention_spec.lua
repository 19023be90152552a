-- ops_attention_spec.lua -- attention by blocks against plain sums in float64, with every option; its gradients by
-- differences and against products and softmax; memory, threads, instruction sets, cuda; dropout and bernoulli_.
--
-- One case alone:  build/halfmoon spec/run.lua --filter='grouped' spec/ops_attention_spec.lua

local hm = require "halfmoon"
local core = require "halfmoon.core"
local fixed = require "spec.support.inputs"
local numbers = require "spec.support.numbers"
local gradients = require "spec.support.gradients"
local expect = require "spec.support.expect"
local devices = require "spec.support.devices"
local process = require "spec.support.process"

local raises = expect.raises
local inf, nan = math.huge, 0 / 0
local flat = numbers.flat

-- ====== Inputs ======

local count = fixed.count

--- Numbers without a pattern, in (-1.5, 1.5).
local function sample(shape, seed, dtype) return fixed.sample(shape, seed, dtype, -1.5, 1.5) end

---@class Sizes b, h, g, t, s, d, e as kernels/ops.def has them
--- q, k, v and a gradient of the output.
local function inputs(n, dtype)
  return sample({n.b, n.h, n.t, n.d}, 1, dtype), sample({n.b, n.g, n.s, n.d}, 2, dtype),
    sample({n.b, n.g, n.s, n.e}, 3, dtype), sample({n.b, n.h, n.t, n.e}, 4, dtype)
end

local function sizes(b, h, g, t, s, d, e) return {b = b, h = h, g = g, t = t, s = s, d = d, e = e} end

local function attention(q, k, v, mask, options) return core.call("attention", q, k, v, mask, options or {}) end

-- ====== Reference: one number at a time ======

--- The mask as one value for each of [B, H, T, S], from 0.
local function spread(mask, n)
  local list = flat(mask:expand({n.b, n.h, n.t, n.s}))
  return function(b, h, t, s) return list[((b * n.h + h) * n.t + t) * n.s + s + 1] end
end

--- Scores of a row; nil where the key takes no part.
local function scores_of(n, q, k, at_q, at_k, options)
  local row = {}
  for s = 0, n.s - 1 do
    local x = 0
    for d = 1, n.d do x = x + q[at_q + d] * k[at_k + s * n.d + d] end
    x = x * (options.scale or 1 / math.sqrt(n.d))
    local m = options.mask_at and options.mask_at(s)
    if m == false or (options.causal and s > options.t) then x = -inf end
    if type(m) == "number" then x = x + m end
    row[s] = x
  end
  return row
end

--- Weights of a row in place of its scores; returns log of the sum of their exponentials.
local function softmax(row, n)
  local top, sum = -inf, 0
  for s = 0, n - 1 do top = math.max(top, row[s]) end
  for s = 0, n - 1 do
    row[s] = top == -inf and 0 or math.exp(row[s] - top)
    sum = sum + row[s]
  end
  for s = 0, n - 1 do row[s] = sum == 0 and 0 or row[s] / sum end
  return top + math.log(sum)
end

--- Output and lse as lists.  chance(b, h, t, s): what a weight is multiplied by.
local function reference(n, q, k, v, mask, options, chance)
  local ql, kl, vl, out, lse = flat(q), flat(k), flat(v), {}, {}
  local mask_of = mask and spread(mask, n)
  for row = 0, n.b * n.h * n.t - 1 do
    local t, h, b = row % n.t, row // n.t % n.h, row // n.t // n.h
    local head = b * n.g + h // (n.h // n.g)
    local w = scores_of(n, ql, kl, row * n.d, head * n.s * n.d, {scale = options.scale, causal = options.causal, t = t,
      mask_at = mask_of and function(s) return mask_of(b, h, t, s) end})
    lse[row + 1] = softmax(w, n.s)
    for e = 1, n.e do
      local x = 0
      for s = 0, n.s - 1 do x = x + w[s] * (chance and chance(b, h, t, s) or 1) * vl[(head * n.s + s) * n.e + e] end
      out[row * n.e + e] = x
    end
  end
  return out, lse
end

--- The same by products and softmax, with a graph.  chance: a tensor.
local function composite(n, q, k, v, mask, options, chance)
  local function heads(x)
    if n.g == n.h then return x end
    local shape = x.shape
    return x:unsqueeze(3):expand({n.b, n.g, n.h // n.g, shape[3], shape[4]}):reshape({n.b, n.h, shape[3], shape[4]})
  end
  local w = q:matmul(heads(k):transpose(3, 4)) * (options.scale or 1 / math.sqrt(n.d))
  if options.causal then w = w:masked_fill(hm.ones({n.t, n.s}):triu(1):ne(0), -inf) end
  if mask and mask.dtype == "bool" then w = w:masked_fill(mask:logical_not(), -inf)
  elseif mask then w = w + mask end
  w = w:softmax(4)
  if chance then w = w * chance end
  return w:matmul(heads(v))
end

local function largest(list)
  local top = 0
  for _, x in ipairs(list) do if x == x and math.abs(x) < inf then top = math.max(top, math.abs(x)) end end
  return top
end

-- Of the largest value: float32 within the row's bound, halves by one rounding of the result.
local RTOL = {f64 = 1e-12, f32 = 0, f16 = 2 ^ -11 * 1.02, bf16 = 2 ^ -8 * 1.02}
local ATOL = {f64 = 1e-13, f32 = 2 ^ -24 * 16, f16 = 4e-6, bf16 = 4e-6}

local function near(got, want, dtype, what, slack)
  local w = flat(want)
  numbers.assert_near(got, w, RTOL[dtype] * (slack or 1), ATOL[dtype] * (slack or 1) * largest(w), what)
end

--- Inputs of a dtype, held against the reference.
local function check(n, dtype, mask, options)
  options = options or {}
  local q, k, v = inputs(n, dtype)
  local out, lse = attention(q, k, v, mask, options)
  local want, want_lse = reference(n, q, k, v, mask, options)
  assert.same({n.b, n.h, n.t, n.e}, out.shape)
  assert.same({n.b, n.h, n.t}, lse.shape)
  assert.equal(dtype == "f64" and "float64" or "float32", lse.dtype)
  assert.is_true(out:is_contiguous())
  near(out, want, dtype, "out")
  near(lse, want_lse, dtype == "f64" and "f64" or "f32", "lse")
end

local function every_third(shape)
  local list = {}
  for i = 1, count(shape) do list[i] = i * 7 % 3 ~= 0 end
  return hm.tensor(list, {dtype = "bool"}):view(shape)
end

local SHAPES = {
  sizes(2, 3, 3, 5, 7, 4, 4), sizes(1, 1, 1, 1, 1, 1, 1), sizes(1, 2, 2, 70, 67, 8, 8), sizes(1, 1, 1, 3, 130, 5, 33),
  sizes(2, 1, 1, 65, 2, 40, 3), sizes(1, 1, 1, 9, 12, 130, 100),
}
local LARGE = sizes(1, 2, 1, 70, 67, 8, 5) -- past one block each way

describe("attention", function()
  for _, dtype in ipairs {"f64", "f32", "f16", "bf16"} do
    it("is softmax of the scores times v: " .. dtype, function()
      for _, n in ipairs(SHAPES) do check(n, dtype) end
    end)

    it("takes a triangle, masks, groups, another scale: " .. dtype, function()
      local n = LARGE
      check(n, dtype, nil, {causal = true})
      check(n, dtype, nil, {scale = 0.3})
      check(n, dtype, every_third {n.t, n.s})
      check(n, dtype, every_third {n.b, n.h, 1, n.s}, {scale = -0.2})
      check(n, dtype, sample({n.t, n.s}, 8, "f32"))
      check(n, dtype, sample({n.h, n.t, 1}, 8, dtype))
    end)
  end

  it("sees the top left triangle where T and S differ", function()
    for _, side in ipairs {{4, 9}, {9, 4}, {130, 40}, {40, 130}} do
      check(sizes(1, 1, 1, side[1], side[2], 3, 2), "f64", nil, {causal = true})
    end
    local q, k, v = inputs(sizes(1, 1, 1, 4, 9, 3, 2))
    local out = attention(q, k, v, nil, {causal = true})
    numbers.assert_near(out:select(3, 1), v:select(3, 1), 1e-15, 0, "the first query sees the first key")
  end)

  it("takes masks that broadcast, of any floating dtype and any layout", function()
    local n = sizes(2, 3, 3, 5, 7, 4, 4)
    local shapes = {{}, {7}, {1, 7}, {5, 1}, {5, 7}, {3, 1, 7}, {1, 5, 7}, {2, 1, 1, 7}, {2, 3, 5, 7}, {1, 1, 1, 1}}
    for _, shape in ipairs(shapes) do
      for _, dtype in ipairs {"f64", "f32", "f16", "bf16"} do check(n, "f32", sample(shape, 5, dtype)) end
      check(n, "f64", every_third(shape))
    end
    check(n, "f64", every_third({7, 5}):t())
    check(n, "f64", sample({2, 7, 5, 3}, 5):permute({1, 4, 3, 2}))
    check(n, "f64", every_third({5, 14}):view({5, 7, 2}):select(3, 2))
  end)

  it("shares heads of k and v in groups", function()
    check(sizes(2, 6, 2, 5, 7, 4, 3), "f64")
    check(sizes(2, 6, 1, 5, 7, 4, 3), "f32", nil, {causal = true})
    check(sizes(1, 4, 2, 66, 5, 4, 3), "f64", every_third {4, 66, 5})
  end)

  it("reads heads where they lie", function()
    local n = sizes(2, 3, 3, 70, 66, 8, 8)
    local q, k, v, g = inputs(n)
    local want = attention(q, k, v)
    local function heads_inside(x) return x:permute({1, 3, 2, 4}):contiguous():permute({1, 3, 2, 4}) end
    local function columns(x) return x:transpose(3, 4):contiguous():transpose(3, 4) end
    local function wider(x) return hm.cat({x, x}, 4):narrow(4, 9, 8) end
    for _, change in ipairs {heads_inside, columns, wider} do
      local function run(f)
        local a, b, c = f(q):detach():requires_grad_(), f(k):detach():requires_grad_(), f(v):detach():requires_grad_()
        local out = attention(a, b, c)
        out:backward(f(g))
        return {out, a.grad, b.grad, c.grad}
      end
      local plain, got = run(function(x) return x end), run(change)
      numbers.assert_same(got[1], want)
      for i = 1, 4 do numbers.assert_same(got[i], plain[i], "result " .. i) end
    end
    local a = q:clone():requires_grad_()
    attention(a, k, v):sum():backward() -- an expanded gradient
    local b = q:clone():requires_grad_()
    attention(b, k, v):backward(hm.ones({2, 3, 70, 8}, {dtype = "f64"}))
    numbers.assert_same(a.grad, b.grad)
  end)

  it("gives nothing for a query that sees nothing, and no gradient", function()
    local q, k, v, g = inputs(sizes(1, 2, 2, 3, 4, 5, 2), "f32")
    local mask = hm.tensor({1, 1, 0, 1, 0, 0, 0, 0, 1, 1, 1, 1}, {dtype = "bool"}):view({3, 4})
    for _, m in ipairs {mask, hm.where(mask, hm.tensor(0.0), hm.tensor(-inf))} do
      local a, b, c = q:clone():requires_grad_(), k:clone():requires_grad_(), v:clone():requires_grad_()
      local out, lse = attention(a, b, c, m)
      numbers.assert_same(out:select(3, 2), hm.zeros({1, 2, 2}))
      numbers.assert_same(lse:select(3, 2), {-inf, -inf})
      out:backward(g)
      numbers.assert_same(a.grad:select(3, 2), hm.zeros({1, 2, 5}))
      for _, x in ipairs {out, a.grad, b.grad, c.grad} do assert.is_true(x:isfinite():all():item()) end
      local rest = hm.tensor({0, 2}, {dtype = "i64"})
      local d, e = k:clone():requires_grad_(), v:clone():requires_grad_()
      attention(q:index_select(3, rest), d, e, m:index_select(1, rest)):backward(g:index_select(3, rest))
      numbers.assert_near(b.grad, d.grad, 1e-6, 1e-7)
      numbers.assert_near(c.grad, e.grad, 1e-6, 1e-7)
    end
  end)

  it("takes empty tensors", function()
    local function run(n)
      local q, k, v, g = inputs(n, "f32")
      local a, b, c = q:requires_grad_(), k:requires_grad_(), v:requires_grad_()
      local out, lse = attention(a, b, c)
      out:backward(g)
      assert.same({a.shape, b.shape, c.shape}, {a.grad.shape, b.grad.shape, c.grad.shape})
      for _, x in ipairs {out, a.grad, b.grad} do numbers.assert_same(x, hm.zeros(x.shape)) end
      return out, lse, c.grad
    end
    local out, lse = run(sizes(2, 3, 3, 4, 0, 5, 6))
    assert.same({2, 3, 4, 6}, out.shape)
    numbers.assert_same(lse, hm.full({2, 3, 4}, -inf))
    numbers.assert_same(select(3, run(sizes(2, 3, 3, 0, 4, 5, 6))), hm.zeros({2, 3, 4, 6}))
    run(sizes(0, 3, 3, 4, 4, 5, 6))
    run(sizes(2, 0, 0, 4, 4, 5, 6))
    run(sizes(2, 3, 3, 4, 4, 5, 0))
    local q, k, v = inputs(sizes(1, 1, 1, 3, 4, 0, 2)) -- all scores are 0
    numbers.assert_near(attention(q, k, v):select(3, 1), v:mean(3), 1e-14, 1e-15)
  end)

  it("lets NaN and infinity through", function()
    local n = sizes(1, 1, 1, 70, 3, 4, 2)
    local q, k, v = inputs(n, "f32")
    local function put(x, row, value)
      x = x:clone()
      x[{1, 1, row, 2}] = value
      return x
    end
    local function is_nan(out, row) return out[{1, 1, row, 1}]:isnan():item() end
    local out, lse = attention(put(q, 66, nan), k, v)
    for row = 1, 70 do
      assert.equal(row == 66, is_nan(out, row))
      assert.equal(row == 66, lse[{1, 1, row}]:isnan():item())
    end
    assert.is_true(is_nan(attention(q, put(k, 2, nan), v), 5))
    assert.is_true(attention(q, k, put(v, 2, nan)):select(4, 2):isnan():all():item())
    assert.is_false(attention(q, k, put(v, 2, nan)):select(4, 1):isnan():any():item())
    -- an infinite score: infinity minus infinity
    local ones = hm.ones({1, 1, 70, 4})
    assert.is_true(is_nan(attention(ones, put(k, 2, inf), v), 5))
    -- the weight of minus infinity is 0
    local rest = hm.tensor({0, 2}, {dtype = "i64"})
    numbers.assert_near(attention(ones, put(k, 2, -inf), v),
      attention(ones, k:index_select(3, rest), v:index_select(3, rest)), 1e-6, 1e-7)
    assert.equal(inf, attention(q, k, put(v, 2, inf))[{1, 1, 3, 2}]:item())
    -- a key out of sight is not looked at
    local mask = hm.tensor({true, false, true}, {dtype = "bool"})
    numbers.assert_same(attention(q, put(k, 2, nan), v, mask), attention(q, k, v, mask))
    -- nor is one beyond the triangle
    local far = sizes(1, 1, 1, 70, 140, 4, 2)
    q, k, v = inputs(far, "f32")
    numbers.assert_same(attention(q, put(k, 139, nan), put(v, 139, nan), nil, {causal = true}),
      attention(q, k, v, nil, {causal = true}))
    local x = q:clone():requires_grad_()
    attention(x, k, v):backward(hm.full({1, 1, 70, 2}, nan))
    assert.is_true(x.grad:isnan():all():item())
  end)

  it("does not overflow where scores are large", function()
    local n = sizes(1, 1, 1, 3, 70, 4, 2)
    local q, k, v = inputs(n)
    near(attention(q * 100, k * 100, v), (reference(n, q * 100, k * 100, v, nil, {})), "f64", "large", 1e3)
    assert.is_true(attention((q * 300):float(), (k * 300):float(), v:float()):isfinite():all():item())
  end)

  it("refuses what does not fit, and says why", function()
    local q, k, v = inputs(sizes(2, 6, 6, 5, 7, 4, 3), "f32")
    raises({"attention", "q must have 4 dims [B, H, T, D]", "f32[6,5,4]", "hint"}, attention, q:select(1, 1), k, v)
    raises({"the batch"}, attention, q:narrow(1, 1, 1), k, v)
    raises({"same heads and length", "v is f32[2,6,6,3]"}, attention, q, k, v:narrow(3, 1, 6))
    raises({"same width"}, attention, q, k:narrow(4, 1, 3), v)
    raises({"must divide those of q", "hint"}, attention, q, k:narrow(2, 1, 4), v:narrow(2, 1, 4))
    raises({"must divide those of q"}, attention, q, k:narrow(2, 1, 0), v:narrow(2, 1, 0))
    raises({"dtypes differ", "k is f16", "hint"}, attention, q, k:half(), v)
    raises({"floating dtype"}, attention, q:to("i64"), k:to("i64"), v:to("i64"))
    raises({"mask and causal do not go together"}, attention, q, k, v, every_third {5, 7}, {causal = true})
    raises({"mask must broadcast to [B, H, T, S] = [2,6,5,7]", "bool[5,6]"}, attention, q, k, v, every_third {5, 6})
    raises({"mask must broadcast"}, attention, q, k, v, every_third {1, 2, 6, 5, 7})
    raises({"mask must be bool", "i64", "hint"}, attention, q, k, v, hm.ones({5, 7}, {dtype = "i64"}))
    raises({"dropout must be from 0 to 1, got 1.5"}, attention, q, k, v, nil, {dropout = 1.5})
    raises({"dropout must be from 0 to 1"}, attention, q, k, v, nil, {dropout = -0.1})
    raises({"scale must be finite"}, attention, q, k, v, nil, {scale = inf})
    local out, lse = attention(q, k, v)
    raises({"attention_backward", "rng"}, core.call, "attention_backward", out, q, k, v, nil, out, lse, {dropout = 0.5})
    raises({"out does not fit q"}, core.call, "attention_backward", out, q, k, v, nil, q, lse, {})
  end)

  it("casts to the dtype of autocast, and keeps float32 gradients for leaves", function()
    local q, k, v, g = inputs(sizes(1, 2, 2, 5, 7, 4, 3), "f32")
    local a, b, c = q:clone():requires_grad_(), k:clone():requires_grad_(), v:clone():requires_grad_()
    local out, lse = hm.amp.autocast("bf16", function() return attention(a, b, c) end)
    assert.equal("bfloat16", out.dtype)
    assert.equal("float32", lse.dtype)
    out:backward(g:to("bf16"))
    for _, x in ipairs {a, b, c} do assert.equal("float32", x.grad.dtype) end
    local low = attention(q:to("bf16"), k:to("bf16"), v:to("bf16"))
    numbers.assert_same(out, low)
  end)
end)

-- ====== Gradients ======

describe("the gradient of attention", function()
  local function differences(n, mask, options)
    local q, k, v = inputs(n)
    gradients.check(function(a, b, c)
      hm.manual_seed(11)
      return (attention(a, b, c, mask, options))
    end, {q, k, v}, 1e-6)
  end

  it("is what differences say, with every option", function()
    differences(sizes(2, 2, 2, 3, 4, 3, 2))
    differences(sizes(1, 4, 2, 3, 4, 3, 2), nil, {causal = true})
    differences(sizes(1, 2, 1, 4, 3, 2, 3), nil, {causal = true, scale = 0.7})
    differences(sizes(1, 2, 2, 3, 4, 3, 2), every_third {3, 4})
    differences(sizes(1, 2, 1, 3, 4, 3, 2), sample({2, 1, 4}, 7))
    differences(sizes(1, 2, 1, 3, 5, 3, 2), nil, {dropout = 0.4})
    differences(sizes(1, 2, 2, 3, 5, 3, 2), every_third {3, 5}, {dropout = 0.4})
  end)

  --- Gradients of both ways in f64.
  local function compare(n, mask, options)
    local q, k, v, g = inputs(n)
    local function run(fn)
      local a, b, c = q:clone():requires_grad_(), k:clone():requires_grad_(), v:clone():requires_grad_()
      fn(a, b, c):backward(g)
      return {a.grad, b.grad, c.grad}
    end
    local got = run(function(a, b, c) return (attention(a, b, c, mask, options)) end)
    local want = run(function(a, b, c) return composite(n, a, b, c, mask, options or {}) end)
    for i, name in ipairs {"dq", "dk", "dv"} do near(got[i], want[i], "f64", name, 10) end
  end

  it("is that of products and softmax, over several blocks", function()
    compare(sizes(2, 2, 2, 130, 70, 8, 5))
    compare(sizes(1, 4, 2, 70, 130, 8, 5), nil, {causal = true})
    compare(sizes(1, 2, 1, 130, 70, 20, 17), nil, {causal = true})
    compare(sizes(1, 2, 2, 66, 67, 8, 5), every_third {66, 67})
    compare(sizes(2, 2, 1, 66, 67, 8, 5), sample({2, 1, 66, 1}, 6))
    compare(sizes(1, 1, 1, 6, 7, 130, 180))
  end)

  for _, dtype in ipairs {"f32", "f16", "bf16"} do
    it("is made in float32 and rounded once: " .. dtype, function()
      local n = sizes(1, 4, 2, 70, 67, 24, 9)
      local q, k, v, g = inputs(n, dtype)
      local a, b, c = q:clone():requires_grad_(), k:clone():requires_grad_(), v:clone():requires_grad_()
      attention(a, b, c, nil, {causal = true}):backward(g)
      local x, y, z = q:double():requires_grad_(), k:double():requires_grad_(), v:double():requires_grad_()
      attention(x, y, z, nil, {causal = true}):backward(g:double())
      -- delta comes from the rounded output
      local bound = ({f32 = 2 ^ -24 * 32, f16 = 2 ^ -10, bf16 = 2 ^ -7})[dtype]
      for i, pair in ipairs {{a, x}, {b, y}, {c, z}} do
        assert.equal(q.dtype, pair[1].grad.dtype)
        numbers.assert_near(pair[1].grad, pair[2].grad, 0, bound * largest(flat(pair[2].grad)), "gradient " .. i)
      end
    end)
  end

  it("is given for the inputs that want one, and never for the mask", function()
    local q, k, v = inputs(sizes(1, 2, 2, 3, 4, 3, 2), "f32")
    local mask = hm.zeros({3, 4}):requires_grad_()
    local b = k:clone():requires_grad_()
    raises("the mask has no derivative", attention, q, b, v, mask)
    attention(q, b, v, mask:detach()):sum():backward()
    assert.is_nil(mask.grad)
    assert.is_nil(q.grad)
    assert.is_not_nil(b.grad)
  end)

  it("has no derivative of its own, and says so", function()
    local q, k, v = inputs(sizes(1, 1, 1, 3, 4, 3, 2), "f32")
    q:requires_grad_()
    raises({"attention_backward has no derivative"}, function()
      local first = core.grad({attention(q, k, v):sum()}, {q}, {create_graph = true})
      core.grad({first[1]:sum()}, {q})
    end)
  end)
end)

-- ====== Dropout of weights ======

describe("dropout in attention", function()
  local function identity(n) return hm.eye(n.s, {dtype = "f64"}):expand({n.b, n.g, n.s, n.s}) end

  --- The multipliers of the weights, recovered with v = identity.
  local function chances(n, q, k, options)
    local weights = attention(q, k, identity(n), nil, {causal = options.causal})
    hm.manual_seed(21)
    local dropped = attention(q, k, identity(n), nil, options)
    return hm.where(weights:eq(0), hm.zeros({}, {dtype = "f64"}), dropped / weights)
  end

  it("multiplies weights by 0 or 1 / (1 - p), the same in the gradient", function()
    for _, options in ipairs {{dropout = 0.3}, {dropout = 0.5, causal = true}} do
      local n = sizes(2, 2, 1, 70, 67, 5, 3)
      local q, k, v, g = inputs(n)
      local chance = chances(n, q, k, options)
      local keep, zeros = 1 / (1 - options.dropout), 0
      for _, c in ipairs(flat(chance)) do
        if c < 0.1 then zeros = zeros + 1 else assert.is_true(math.abs(c - keep) < 1e-9) end
      end
      local share = zeros / chance:numel()
      if options.causal then assert.is_true(share > 0.5) else assert.is_true(math.abs(share - 0.3) < 0.02) end
      chance = hm.where(chance:gt(0.1), hm.tensor(keep, {dtype = "f64"}), hm.tensor(0.0, {dtype = "f64"}))
      local function run(fn)
        local a, b, c = q:clone():requires_grad_(), k:clone():requires_grad_(), v:clone():requires_grad_()
        local out = fn(a, b, c)
        out:backward(g)
        return {out, a.grad, b.grad, c.grad}
      end
      hm.manual_seed(21)
      local got = run(function(a, b, c) return (attention(a, b, c, nil, options)) end)
      local want = run(function(a, b, c) return composite(n, a, b, c, nil, options, chance) end)
      for i = 1, 4 do near(got[i], want[i], "f64", "result " .. i, 10) end
    end
  end)

  it("draws what bernoulli_ draws, by the place of the weight", function()
    local n = sizes(2, 3, 3, 5, 7, 4, 4)
    local q, k = inputs(n)
    local chance = chances(n, q, k, {dropout = 0.4})
    hm.manual_seed(21)
    local drawn = core.call("bernoulli_", hm.empty({2, 3, 5, 7}), {p = 0.4})
    numbers.assert_same(chance:eq(0), drawn:ne(0))
  end)

  it("takes a counter for four weights, none where nothing is dropped", function()
    local n = sizes(1, 3, 3, 5, 7, 4, 4)
    local q, k, v = inputs(n, "f32")
    q:requires_grad_()
    local device = q.device
    local function offset() return core.rng_state(device).offset end
    hm.manual_seed(1)
    local before = offset()
    attention(q, k, v)
    assert.equal(before, offset())
    local out = attention(q, k, v, nil, {dropout = 0.1})
    assert.equal(before + (3 * 5 * 7 + 3) // 4, offset())
    out:sum():backward()
    assert.equal(before + (3 * 5 * 7 + 3) // 4, offset())
    assert.is_false(pcall(attention, q, k:narrow(4, 1, 2), v, nil, {dropout = 0.1}))
    assert.equal(before + (3 * 5 * 7 + 3) // 4, offset())
  end)

  it("drops all at p = 1", function()
    local q, k, v, g = inputs(sizes(1, 2, 2, 3, 4, 3, 2), "f32")
    q:requires_grad_()
    local out = attention(q, k, v, nil, {dropout = 1})
    out:backward(g)
    numbers.assert_same(out, hm.zeros({1, 2, 3, 2}))
    numbers.assert_same(q.grad, hm.zeros({1, 2, 3, 3}))
  end)
end)

-- ====== Memory, threads, instruction sets, cuda ======

describe("attention by blocks", function()
  it("needs memory by T, not T x T", function()
    local function peak(t)
      local n = sizes(1, 2, 2, t, t, 8, 8)
      local q, k, v, g = inputs(n, "f32")
      q, k, v = q:requires_grad_(), k:requires_grad_(), v:requires_grad_()
      collectgarbage()
      devices.memory.reset_peak()
      local before = devices.memory.memory_stats().live
      attention(q, k, v, nil, {dropout = 0.1, causal = true}):backward(g)
      return devices.memory.memory_stats().peak - before
    end
    local t = devices.pick(1024, 256)
    peak(t)
    local one, two = peak(t), peak(2 * t)
    assert.is_true(two < 2.2 * one + 4096, ("%d bytes for %d, %d for twice that"):format(one, t, two))
    assert.is_true(two < 2 * t * 2 * t * 4 / 2, two .. " bytes")
  end)

  local function results()
    local out = {}
    for _, dtype in ipairs {"f32", "bf16", "f64"} do
      for _, options in ipairs {{}, {causal = true}, {dropout = 0.2}} do
        local q, k, v, g = inputs(sizes(2, 4, 2, 140, 131, 24, 20), dtype)
        q, k, v = q:requires_grad_(), k:requires_grad_(), v:requires_grad_()
        hm.manual_seed(2)
        local y, lse = attention(q, k, v, nil, options)
        y:backward(g)
        for _, x in ipairs {y, lse, q.grad, k.grad, v.grad} do out[#out + 1] = x end
      end
    end
    return out
  end

  it("gives the same bits for any number of threads", devices.cpu_only("sets the number of threads", function()
    local threads, want = core.get_num_threads(), nil
    for _, n in ipairs {1, 2, 5} do
      hm.set_num_threads(n)
      local got = results()
      want = want or got
      for i, x in ipairs(got) do numbers.assert_same(x, want[i], ("result %d with %d threads"):format(i, n)) end
    end
    hm.set_num_threads(threads)
  end))

  it("gives the same bits with every instruction set", devices.cpu_only("the processor's instruction sets", function()
    local script = [[
      local hm = require "halfmoon"
      local core = require "halfmoon.core"
      hm.manual_seed(5)
      for _, e in ipairs {5, 16, 40, 72} do
        local q, k, v = hm.randn({1, 2, 70, 40}), hm.randn({1, 2, 67, 40}), hm.randn({1, 2, 67, e})
        q, k, v = q:requires_grad_(), k:requires_grad_(), v:requires_grad_()
        local y, lse = core.call("attention", q, k, v, nil, {dropout = 0.2})
        y:backward(hm.randn({1, 2, 70, e}))
        for _, x in ipairs {y, lse, q.grad, k.grad, v.grad} do
          for _, f in ipairs(x:flatten():totable()) do io.write(("%a "):format(f)) end
        end
      end
    ]]
    local want = process.script(script, {HALFMOON_ISA = "baseline"})
    assert.is_true(#want > 1e5)
    for _, isa in ipairs {"avx2", "avx512"} do
      local said, status = process.script(script, {HALFMOON_ISA = isa})
      if status == 0 then assert.is_true(said == want, isa .. " differs") else assert.truthy(said:find(isa, 1, true)) end
    end
  end))
end)

-- ====== dropout, bernoulli_ ======

describe("dropout", function()
  local function dropout(x, p) return core.call("dropout", x, {p = p}) end
  local function drawn(shape, p, dtype)
    return core.call("bernoulli_", hm.empty(shape, {dtype = dtype or "f32"}), {p = p})
  end

  for _, dtype in ipairs {"f64", "f32", "f16", "bf16"} do
    it("zeros what bernoulli_ draws and scales the rest: " .. dtype, function()
      for _, shape in ipairs {{}, {1}, {3}, {5, 7}, {1501}, {40, 1, 33}} do
        local x = sample(shape, 3, dtype)
        hm.manual_seed(8)
        local hit = flat(drawn(shape, 0.3))
        hm.manual_seed(8)
        local out = dropout(x, 0.3)
        assert.equal(x.dtype, out.dtype)
        local want = {}
        for i, v in ipairs(flat(x)) do want[i] = hit[i] ~= 0 and 0 or v * (1 / (1 - 0.3)) end
        local bound = ({f64 = 1e-15, f32 = 1.3e-7, f16 = 2 ^ -11 * 1.01, bf16 = 2 ^ -8 * 1.01})[dtype]
        numbers.assert_near(out, want, bound, 1e-8)
      end
    end)
  end

  it("has the gradient of what stayed, by the same numbers", function()
    local x, g = sample({37, 41}, 3, "f32"):requires_grad_(), sample({37, 41}, 4, "f32")
    local out = dropout(x, 0.25)
    dropout(x, 0.25) -- moves on
    out:backward(g)
    local want = hm.where(out:eq(0), hm.zeros({}), g * (1 / 0.75))
    numbers.assert_near(x.grad, want, 1e-6, 0)
    gradients.check(function(a) hm.manual_seed(3) return dropout(a, 0.4) end, {sample({4, 5}, 1)})
    gradients.check_second(function(a) hm.manual_seed(3) return dropout(a * a, 0.4) end, {sample({4, 5}, 1)})
  end)

  it("depends on places, not on layout, and keeps the layout", function()
    local x = sample({6, 70, 5}, 3, "f32")
    hm.manual_seed(8)
    local want = dropout(x, 0.5)
    for _, y in ipairs {x:permute({3, 1, 2}):contiguous():permute({2, 3, 1}), x:transpose(1, 3):contiguous():transpose(1, 3),
      hm.cat({x, x}, 3):narrow(3, 6, 5), hm.stack({x, x}, 4):select(4, 1)} do
      assert.is_false(y:is_contiguous())
      hm.manual_seed(8)
      numbers.assert_same(dropout(y, 0.5), want)
    end
    local last = sample({2, 3, 4, 5}, 1, "f32"):permute({1, 3, 4, 2}):contiguous():permute({1, 4, 2, 3})
    assert.same(last:stride(), dropout(last, 0.5):stride())
    local wide = sample({70, 1}, 1, "f32"):expand({70, 9})
    hm.manual_seed(8)
    local out = dropout(wide, 0.5)
    hm.manual_seed(8)
    numbers.assert_same(out, dropout(wide:contiguous(), 0.5))
  end)

  it("has its ends: p = 0, p = 1, NaN, infinity, nothing", function()
    local x = hm.tensor({nan, inf, -inf, 1, -0.0, 3})
    numbers.assert_same(dropout(x, 0), x)
    numbers.assert_same(dropout(x, 1), hm.zeros({6}))
    local many = hm.full({4000}, nan)
    local out = dropout(many, 0.5)
    assert.is_true(hm.where(out:isnan(), hm.ones({}), out:eq(0):float()):eq(1):all():item())
    local zeros = out:eq(0):sum():item()
    assert.is_true(zeros > 1850 and zeros < 2150, zeros)
    assert.same({0, 3}, dropout(hm.empty({0, 3}), 0.5).shape)
    local y = hm.ones({5}):requires_grad_()
    dropout(y, 1):sum():backward()
    numbers.assert_same(y.grad, hm.zeros({5}))
  end)

  it("refuses what is no probability", function()
    for _, p in ipairs {-0.01, 1.01, nan, inf} do
      raises({"dropout: p must be from 0 to 1"}, dropout, hm.ones({3}), p)
      raises({"dropout: p must be from 0 to 1"}, dropout, hm.ones({0}), p)
      raises({"bernoulli_: p must be from 0 to 1"}, drawn, {3}, p)
    end
    raises({"floating dtype"}, dropout, hm.ones({3}, {dtype = "i64"}), 0.5)
  end)

  it("bernoulli_ fills any dtype with the same ones", function()
    hm.manual_seed(8)
    local want = flat(drawn({40, 41}, 0.2))
    local ones = 0
    for _, x in ipairs(want) do ones = ones + x end
    assert.is_true(math.abs(ones / 1640 - 0.2) < 0.04)
    for _, dtype in ipairs {"f64", "f16", "bf16", "i64", "i32", "u8", "bool"} do
      hm.manual_seed(8)
      local got = flat(drawn({40, 41}, 0.2, dtype))
      for i, x in ipairs(got) do assert.equal(want[i] == 1, x == true or x == 1, dtype) end
      hm.manual_seed(8)
      local strided = hm.empty({41, 40}, {dtype = dtype}):t()
      core.call("bernoulli_", strided, {p = 0.2})
      numbers.assert_same(strided, got, dtype)
    end
    numbers.assert_same(drawn({9}, 0), hm.zeros({9}))
    numbers.assert_same(drawn({9}, 1), hm.ones({9}))
  end)
end)

-- ====== CPU and cuda ======

describe("attention and dropout on cuda", function()
  local cases, why = devices.cases("spec/ops_attention_spec.lua")
  if not cases then return pending(why) end
  local function case(name, fn) it(name, function() cases:run(name, fn) end) end

  local function both(fn)
    local function run(device)
      hm.manual_seed(17)
      local list = fn(function(t) return t:to(device):clone() end)
      for i, x in ipairs(list) do list[i] = x:to("cpu") end
      return list
    end
    return run("cuda"), run("cpu")
  end

  for _, dtype in ipairs {"f64", "f32", "f16", "bf16"} do
    case("values and gradients are the CPU's within the bound: " .. dtype, function()
      local bound = ({f64 = 1e-13, f32 = 2 ^ -24 * 32, f16 = 2 ^ -10, bf16 = 2 ^ -7})[dtype]
      local function compare(n, mask, options, change)
        local q, k, v, g = inputs(n, dtype)
        change = change or function(x) return x end
        local got, want = both(function(to)
          local a, b, c = to(change(q)):requires_grad_(), to(change(k)):requires_grad_(), to(change(v)):requires_grad_()
          local out, lse = attention(a, b, c, mask and to(mask), options)
          out:backward(to(g))
          return {out, lse, a.grad, b.grad, c.grad}
        end)
        for i, x in ipairs(got) do
          numbers.assert_near(x, want[i], 0, bound * math.max(largest(flat(want[i])), 1e-30), "result " .. i)
          assert.equal(want[i].dtype, x.dtype)
        end
      end
      compare(sizes(2, 3, 3, 5, 7, 4, 4))
      compare(sizes(1, 4, 2, 70, 67, 24, 9), nil, {causal = true})
      compare(sizes(1, 2, 1, 67, 130, 24, 9), every_third {67, 130}, {scale = 0.3})
      compare(sizes(1, 2, 1, 40, 70, 8, 8), sample({2, 40, 1}, 5, "f32"), {dropout = 0.3})
      compare(sizes(1, 1, 1, 5, 6, 100, 130))
      compare(sizes(1, 1, 1, 5, 6, 256, 70))
      compare(sizes(2, 3, 3, 0, 4, 5, 6))
      compare(sizes(2, 3, 3, 4, 0, 5, 6))
      compare(sizes(1, 2, 2, 5, 7, 4, 4), hm.zeros({5, 7}):ne(0))
      compare(sizes(2, 3, 3, 20, 17, 8, 8), nil, {causal = true}, function(x)
        return x:permute({1, 3, 2, 4}):contiguous():permute({1, 3, 2, 4})
      end)
    end)

    case("dropout and bernoulli_ are the CPU's to the bit: " .. dtype, function()
      for _, x in ipairs {sample({}, 1, dtype), sample({5, 7}, 1, dtype), sample({1501}, 2, dtype),
        sample({30, 41}, 3, dtype):t(), sample({8, 5}, 3, dtype):narrow(2, 2, 3),
        sample({70, 1}, 3, dtype):expand({70, 3})} do
        local got, want = both(function(to)
          local a = to(x):requires_grad_()
          local out = core.call("dropout", a, {p = 0.3})
          out:backward(to(x))
          return {out, a.grad, core.call("bernoulli_", to(x), {p = 0.6})}
        end)
        for i = 1, 3 do numbers.assert_same(got[i], want[i], "result " .. i) end
      end
    end)
  end

  case("bernoulli_ fills every dtype", function()
    for _, dtype in ipairs {"i64", "i32", "u8", "bool", "f64"} do
      for _, shape in ipairs {{7}, {64}, {5, 9}} do
        local got, want = both(function(to)
          return {core.call("bernoulli_", to(hm.zeros(shape, {dtype = dtype})), {p = 0.5})}
        end)
        numbers.assert_same(got[1], want[1], dtype)
      end
    end
  end)

  case("NaN and infinity arrive where they do on the CPU", function()
    local q, k, v = inputs(sizes(1, 1, 1, 70, 66, 4, 2), "f32")
    for _, value in ipairs {nan, inf, -inf} do
      for which = 1, 3 do
        local x = {q, k, v}
        x[which] = x[which]:clone()
        x[which][{1, 1, 65, 1}] = value
        local got, want = both(function(to) return {attention(to(x[1]), to(x[2]), to(x[3]))} end)
        for i = 1, 2 do
          numbers.assert_near(got[i], want[i], 0, 1e-6, ("%g in operand %d, result %d"):format(value, which, i))
        end
      end
    end
  end)

  case("wide heads are refused with a message", function()
    local q, k, v = inputs(sizes(1, 1, 1, 2, 3, 257, 4), "f32")
    raises({"up to 256 wide", "257", "hint"}, attention, q:to("cuda"), k:to("cuda"), v:to("cuda"))
  end)
end)
