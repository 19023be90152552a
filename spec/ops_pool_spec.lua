-- ops_pool_spec.lua -- pooling and interpolation: values and gradients against plain loops in float64, first and second
-- derivatives by differences, golden values worked out by hand, memory orders, half types, autocast, special values,
-- empty tensors, and what is refused.
-- (The CPU against cuda: cuda_parity_spec.lua.  Instruction sets: isa_spec.lua.)
--
-- One case alone:  build/halfmoon spec/run.lua --filter='ceil_mode' spec/ops_pool_spec.lua

local hm = require "halfmoon"
local core = require "halfmoon.core"
local devices = require "spec.support.devices"
local fixed = require "spec.support.inputs"
local numbers = require "spec.support.numbers"
local gradients = require "spec.support.gradients"
local expect = require "spec.support.expect"
local naive = require "spec.reference.naive"
local windows = require "spec.reference.windows"

local raises = expect.raises
local inf, nan = math.huge, 0 / 0
local DTYPES = {"f64", "f32", "f16", "bf16"}

-- ====== Inputs and calls ======

--- Numbers without a pattern in [-2, 3).
local function sample(shape, seed, dtype) return fixed.sample(shape, seed, dtype, -2, 3) end

-- How an image may lie in memory.
local ORDERS = {
  ["row-major"] = function(t) return t end,
  ["channels-last"] = function(t) return t:permute(1, 3, 4, 2):contiguous():permute(1, 4, 2, 3) end,
  ["with gaps"] = function(t)
    local wide = hm.stack({t, t * 0 + 7}, 5)
    return wide:select(5, 1)
  end,
  ["width outermost"] = function(t) return t:permute(4, 1, 2, 3):contiguous():permute(2, 3, 4, 1) end,
}

local function copy_of(attrs, more)
  local out = {}
  for k, v in pairs(attrs) do out[k] = v end
  for k, v in pairs(more or {}) do out[k] = v end
  return out
end

-- Attributes as the op table has them: lists for sizes.
local LISTS = {kernel_size = true, stride = true, padding = true, dilation = true, output_size = true, size = true}
local function listed(attrs)
  local out = copy_of(attrs)
  for k in pairs(LISTS) do if type(out[k]) == "number" then out[k] = {out[k]} end end
  return out
end

local function call(name, x, attrs, more) return core.call(name, x, copy_of(listed(attrs), more)) end

local function is_channels_last(t)
  local s = t:stride()
  return s[2] == 1 and s[4] == t:size(2) and s[3] == t:size(2) * t:size(4)
end

--- Bounds of ops.def: ulps of float32 for what is computed in it, one rounding of the result for the half types.
local function near(got, want, dtype, ulp, what)
  local rtol = dtype == "f64" and 1e-13 or ulp * 2.0 ^ -23 + (dtype == "f16" and 2.0 ^ -11 or dtype == "bf16"
    and 2.0 ^ -8 or 0)
  local atol = dtype == "f64" and 1e-13 or ulp * 2.0 ^ -23 * 3
  numbers.assert_near(got, want, rtol, atol, what)
end

local function title(name, attrs)
  local parts = {}
  for k, v in pairs(attrs) do parts[#parts + 1] = k .. " " .. (type(v) == "table" and "{" .. table.concat(v,
    ",") .. "}" or tostring(v)) end
  table.sort(parts)
  return name .. ", " .. table.concat(parts, ", ")
end

-- ====== Cases: {shape, attributes} ======

local MAX = {
  {{2, 5, 7, 8}, {kernel_size = 2}}, {{1, 17, 7, 8}, {kernel_size = 3, stride = 2}},
  {{2, 3, 6, 5}, {kernel_size = 3, stride = 1, padding = 1}},
  {{1, 5, 7, 9}, {kernel_size = {2, 3}, stride = {1, 2}, padding = {0, 1}}},
  {{2, 2, 9, 10}, {kernel_size = 3, dilation = 2}},
  {{1, 3, 11, 12}, {kernel_size = {3, 2}, stride = {2, 3}, padding = 1, dilation = {3, 2}}},
  {{1, 5, 9, 9}, {kernel_size = 2, stride = 5, dilation = 3}},
  {{2, 3, 6, 8}, {kernel_size = 2, stride = 3, ceil_mode = true}},
  {{1, 4, 7, 10}, {kernel_size = 3, stride = 2, padding = 1, ceil_mode = true}},
  {{1, 4, 8, 9}, {kernel_size = {2, 3}, stride = {3, 2}, padding = {1, 0}, dilation = {1, 2}, ceil_mode = true}},
  {{1, 1100, 3, 3}, {kernel_size = 2, stride = 1}}, {{3, 1, 5, 5}, {kernel_size = 5}},
  {{1, 2, 18, 17}, {kernel_size = 16, stride = 1}},
}

local AVERAGE = {
  {{2, 5, 7, 8}, {kernel_size = 2}}, {{1, 17, 7, 8}, {kernel_size = 3, stride = 2, padding = 1}},
  {{2, 3, 6, 5}, {kernel_size = 3, stride = 1, padding = 1, count_include_pad = false}},
  {{1, 5, 7, 9}, {kernel_size = {2, 3}, stride = {1, 2}, padding = {0, 1}, divisor_override = 5}},
  {{2, 3, 6, 8}, {kernel_size = 3, stride = 2, ceil_mode = true}},
  {{1, 4, 7, 10}, {kernel_size = 4, stride = 3, padding = {2, 1}, ceil_mode = true}},
  {{1, 4, 7, 10}, {kernel_size = {4, 3}, stride = 3, padding = {1, 1}, ceil_mode = true, count_include_pad = false}},
  {{1, 2, 9, 8}, {kernel_size = 2, stride = 4}}, {{1, 600, 3, 3}, {kernel_size = 2, stride = 1}},
  {{1, 3, 20, 19}, {kernel_size = {17, 18}, stride = 1}},
}

local ADAPTIVE = {
  {{2, 5, 7, 8}, {output_size = 1}}, {{1, 17, 7, 8}, {output_size = {3, 5}}}, {{2, 3, 5, 4}, {output_size = {5, 4}}},
  {{1, 4, 3, 5}, {output_size = {7, 8}}}, {{1, 3, 20, 19}, {output_size = {1, 2}}},
  {{1, 1100, 4, 3}, {output_size = 2}}, {{3, 1, 10, 7}, {output_size = {4, 3}}},
}

local SAMPLED = {
  {{2, 5, 4, 3}, {size = {8, 6}}}, {{1, 17, 5, 7}, {size = {3, 11}}}, {{2, 3, 5, 4}, {size = {5, 4}}},
  {{1, 2, 6, 6}, {size = 1}},
  {{2, 5, 4, 3}, {size = {8, 6}, mode = "bilinear"}}, {{1, 17, 5, 7}, {size = {3, 11}, mode = "bilinear"}},
  {{2, 3, 4, 5}, {size = {9, 7}, mode = "bilinear", align_corners = true}},
  {{1, 2, 7, 6}, {size = {3, 2}, mode = "bilinear", align_corners = true}},
  {{1, 2, 6, 6}, {size = 1, mode = "bilinear", align_corners = true}},
  {{1, 3, 1, 1}, {size = {3, 4}, mode = "bilinear"}},
  {{1, 2, 5, 6}, {size = {8, 9}, mode = "bilinear", scale_h = 1.7, scale_w = 1.6}},
  {{1, 2, 5, 6}, {size = {8, 9}, scale_h = 1.7, scale_w = 1.6}},
  {{1, 2, 8, 9}, {size = {3, 4}, mode = "bilinear", scale_h = 0.4, scale_w = 0.5}},
  {{1, 600, 2, 2}, {size = 3, mode = "bilinear"}},
  {{1, 2, 3, 4}, {size = {40, 33}, mode = "bilinear"}},
  {{1, 2, 4, 4}, {size = {9, 12}, mode = "bilinear", scale_h = 1, scale_w = 4}},
  {{1, 2, 4, 4}, {size = {9, 2}, scale_h = 1, scale_w = 4}},
}

--- Values in every dtype and memory order against the reference.
local function values(name, cases, ulp)
  for _, case in ipairs(cases) do
    local shape, attrs = case[1], case[2]
    it(title(name, attrs) .. (" on {%s}"):format(table.concat(shape, ",")), function()
      for _, dtype in ipairs(DTYPES) do
        local x = sample(shape, 1, dtype)
        local want, places = windows[name](naive.of(x), attrs)
        for order, lay in pairs(ORDERS) do
          local y, index = call(name, lay(x), attrs)
          local what = dtype .. " " .. order
          assert.same(want.shape, y.shape)
          assert.equal(x.dtype, y.dtype)
          assert.is_true(is_channels_last(y), what)
          if ulp == 0 then numbers.assert_same(y, want, what) else near(y, want, dtype, ulp, what) end
          if places then
            numbers.assert_same(index, places, what .. " index")
            assert.is_true(is_channels_last(index), what)
          end
        end
      end
    end)
  end
end

--- The backward op in every dtype and memory order against the reference, which scatters.
local function slopes(name, cases, ulp)
  local back = name .. "_backward"
  for _, case in ipairs(cases) do
    local shape, attrs = case[1], case[2]
    it(title(back, attrs) .. (" for {%s}"):format(table.concat(shape, ",")), function()
      local size = call(name, sample(shape, 1), attrs).shape
      for _, dtype in ipairs(DTYPES) do
        local g = sample(size, 2, dtype)
        local want = windows[back](naive.of(g), shape, attrs)
        local given = copy_of(attrs, {shape = shape})
        if name ~= "avg_pool2d" then given.output_size, given.size = nil, nil end
        for order, lay in pairs(ORDERS) do
          local dx = call(back, lay(g), given)
          assert.same(shape, dx.shape)
          assert.is_true(is_channels_last(dx))
          -- terms of both signs cancel: bounded by the size of what is added
          near(dx, want, dtype, ulp, dtype .. " " .. order)
        end
      end
    end)
  end
end

--- First and second derivatives of an op of one input by differences.
local function derivatives(name, cases, second)
  for _, case in ipairs(cases) do
    local shape = case[1]
    if shape[1] * shape[2] * shape[3] * shape[4] <= 120 then
      it(title(name, case[2]) .. ": derivatives", function()
        local function fn(x) return (call(name, x, case[2])) end
        gradients.check(fn, {sample(shape, 3)})
        -- squared, so that the second derivative is not zero
        if second then gradients.check_second(function(x) local y = fn(x) return y * y end, {sample(shape, 3)}) end
      end)
    end
  end
end

-- ====== max_pool2d ======

describe("max_pool2d", function()
  values("max_pool2d", MAX, 0)
  derivatives("max_pool2d", MAX, true)
  derivatives("max_pool2d", {
    {{1, 2, 5, 6}, {kernel_size = 3, stride = 1, padding = 1}},
    {{1, 1, 7, 8}, {kernel_size = 3, stride = 1, dilation = 2}},
    {{1, 1, 9, 9}, {kernel_size = 2, stride = 5, dilation = 3}},
    {{1, 2, 5, 7}, {kernel_size = 2, stride = 3, ceil_mode = true}},
    {{2, 1, 6, 6}, {kernel_size = {3, 2}, stride = {2, 1}, padding = 1, dilation = {2, 3}, ceil_mode = true}}}, true)

  it("gives gradients of half types summed in float32 and rounded once, for g of any dtype", function()
    for _, case in ipairs(MAX) do
      local shape, attrs = case[1], case[2]
      local x = sample(shape, 1)
      local y, index = call("max_pool2d", x, attrs)
      for _, dtype in ipairs {"f32", "f16", "bf16"} do
        local g = sample(y.shape, 2, dtype)
        local want = numbers.flat(core.call("max_pool2d_backward", g:double(), index, copy_of(listed(attrs),
          {shape = shape})))
        for _, lay in pairs(ORDERS) do
          local dx = core.call("max_pool2d_backward", lay(g), lay(index), copy_of(listed(attrs), {shape = shape}))
          near(dx, want, dtype, 8)
        end
      end
    end
  end)

  it("with relu after it: one pass gives the bits of relu's gradient and then the pool's", function()
    for _, case in ipairs(MAX) do
      local shape, attrs = case[1], listed(case[2])
      for _, dtype in ipairs(DTYPES) do
        local y, index = call("max_pool2d", sample(shape, 1, dtype), attrs)
        y = y:contiguous()
        local flat = y:view({-1})
        for i, v in ipairs {0, -0.0, nan, inf} do if i <= #flat then flat[i] = v end end
        local out = core.call("relu", y)
        local g = sample(y.shape, 2, dtype)
        local want = core.call("max_pool2d_backward", core.call("relu_backward", g, out), index, copy_of(attrs, {shape = shape}))
        for _, lay in pairs(ORDERS) do
          numbers.assert_same(core.call("max_pool2d_relu_backward", lay(g), lay(index), lay(out), copy_of(attrs,
            {shape = shape})), want)
        end
      end
    end
  end)

  describe("backward of relu after it", function()
    local shape, attrs = {2, 3, 6, 7}, {kernel_size = 3, stride = 2, padding = 1}

    --- The ops of backward, in order, and the gradient of x; extra(p, y) sees the pool's result and relu's, and may give more of the loss.
    local function walk(dtype, extra, opts)
      local x = sample(shape, 1, dtype):detach():requires_grad_()
      local p = call("max_pool2d", x, attrs)
      local y = core.call("relu", p)
      local more = extra and extra(p, y)
      local loss = (y * sample(y.shape, 2, dtype)):sum()
      if more then loss = loss + more end
      local ops = {}
      core.op_log(function(record) ops[#ops + 1] = record.op end)
      loss:backward(opts)
      core.op_log(nil)
      return x.grad, table.concat(ops, " ")
    end

    for _, dtype in ipairs(DTYPES) do
      it("is one op on cuda where nobody else sees the pool's result, and two on the CPU, whose peak it would raise: " .. dtype, function()
        local both, ops = walk(dtype)
        local fused = devices.name ~= "cpu"
        assert.equal(fused, ops:find("max_pool2d_relu_backward", 1, true) ~= nil, ops)
        assert.equal(not fused, ops:find("relu_backward max_pool2d_backward", 1, true) ~= nil, ops)
        local apart, seen = walk(dtype, function(p) p:register_hook(function() end) end)
        assert.truthy(seen:find("relu_backward max_pool2d_backward", 1, true), seen)
        numbers.assert_same(both, apart)
      end)
    end

    it("is two where a hook, another user, a second derivative or detect_anomaly wants the gradient between", function()
      local plain = walk("f32")
      local hooked
      local grad, ops = walk("f32", function(p) p:register_hook(function(g) hooked = g:clone() end) end)
      assert.falsy(ops:find("max_pool2d_relu_backward", 1, true), ops)
      numbers.assert_same(grad, plain)
      local kept
      grad = walk("f32", function(p)
        p:retain_grad()
        kept = p
      end)
      numbers.assert_same(kept.grad, hooked)
      numbers.assert_same(grad, plain)
      grad, ops = walk("f32", nil, {create_graph = true})
      assert.falsy(ops:find("max_pool2d_relu_backward", 1, true), ops)
      numbers.assert_same(grad, plain)
      local _ <close> = hm.autograd.detect_anomaly()
      grad, ops = walk("f32")
      assert.falsy(ops:find("max_pool2d_relu_backward", 1, true), ops)
      numbers.assert_same(grad, plain)
    end)

    it("adds what other users of the pool's result send, recorded before the relu or after it", function()
      local x = sample(shape, 1):detach():requires_grad_()
      local p = call("max_pool2d", x, attrs)
      local first = (p * sample(p.shape, 3)):sum()
      local y = core.call("relu", p)
      local last = (p * sample(p.shape, 4)):sum()
      local ops = {}
      core.op_log(function(record) ops[#ops + 1] = record.op end)
      local sum = (y * sample(p.shape, 2)):sum() + first + last
      sum:backward()
      core.op_log(nil)
      assert.falsy(table.concat(ops, " "):find("max_pool2d_relu_backward", 1, true))
      local pooled, index = call("max_pool2d", x:detach(), attrs)
      local g = core.call("relu_backward", sample(p.shape, 2), core.call("relu", pooled)) + sample(p.shape, 3) + sample(p.shape, 4)
      near(x.grad, numbers.flat(core.call("max_pool2d_backward", g, index, copy_of(listed(attrs), {shape = shape}))), "f64", 16)
    end)

    it("runs twice with retain_graph, and raises where the graph is gone", function()
      local x = sample(shape, 1):detach():requires_grad_()
      local loss = core.call("relu", (call("max_pool2d", x, attrs))):sum()
      loss:backward({retain_graph = true})
      local once = x.grad:clone()
      loss:backward()
      numbers.assert_same(x.grad, once + once)
      raises({"the graph was freed", "retain_graph"}, loss.backward, loss)
    end)

    it("names a relu's result that was changed in place", function()
      local x = sample(shape, 1):detach():requires_grad_()
      local y = core.call("relu", (call("max_pool2d", x, attrs)))
      local loss = (y * 2):sum()
      hm.no_grad(function() y:add_(1) end)
      raises({"relu", "was changed in place"}, loss.backward, loss)
    end)

    it("in a checkpoint the region is computed again", function()
      local function forward(t) return core.call("relu", (call("max_pool2d", t, attrs))) end
      local x = sample(shape, 1):detach():requires_grad_()
      forward(x):sum():backward()
      local again = x:detach():requires_grad_()
      hm.checkpoint(forward, again):sum():backward()
      numbers.assert_same(again.grad, x.grad)
    end)
  end)

  it("takes what stands at the index: the gradient of the gradient", function()
    for _, case in ipairs(MAX) do
      local shape, attrs = case[1], case[2]
      for _, dtype in ipairs(DTYPES) do
        local x = sample(shape, 1, dtype)
        local y, index = call("max_pool2d", x, attrs)
        for _, lay in pairs(ORDERS) do
          numbers.assert_same(core.call("max_pool2d_pick", lay(x), lay(index), listed(attrs)), y)
        end
      end
    end
  end)

  it("ceil_mode: the last window begins inside the image or its padding", function()
    local x = hm.arange(1, 26):to("f32"):view({1, 1, 5, 5})
    -- places 0 2 4: the third window holds the last row and column alone
    numbers.assert_same(call("max_pool2d", x, {kernel_size = 2, stride = 2, ceil_mode = true}), {7, 9, 10, 17, 19, 20,
      22, 24, 25})
    numbers.assert_same(call("max_pool2d", x, {kernel_size = 2, stride = 2}), {7, 9, 17, 19})
    -- a third window would begin at 2 * 3 - 0 = 6, past the end of 4: left out
    assert.same({1, 1, 2, 2}, call("max_pool2d", hm.zeros({1, 1, 4, 4}), {kernel_size = 1, stride = 3,
      ceil_mode = true}).shape)
    -- padding 1: windows begin at -1, 1, 3 and reach 2, 4, 6 of 4; a fourth would begin at 5
    assert.same({1, 1, 3, 3}, call("max_pool2d", hm.zeros({1, 1, 4, 4}), {kernel_size = 3, stride = 2, padding = 1,
      ceil_mode = true}).shape)
    -- begins at -1 and 2; the window at 5 would begin in the padding on the right: left out
    assert.same({1, 1, 2, 2}, call("max_pool2d", hm.zeros({1, 1, 5, 5}), {kernel_size = 2, stride = 3, padding = 1,
      ceil_mode = true}).shape)
    -- a window larger than the image
    numbers.assert_same(call("max_pool2d", x:narrow(3, 1, 2):narrow(4, 1, 2), {kernel_size = 3, stride = 2,
      ceil_mode = true}), {7})
  end)

  it("dilation: the index is the place in the window", function()
    local x = hm.arange(1, 26):to("f32"):view({1, 1, 5, 5})
    local y, index = call("max_pool2d", x, {kernel_size = 2, stride = 1, dilation = 3})
    numbers.assert_same(y, {19, 20, 24, 25})
    numbers.assert_same(index, {3, 3, 3, 3})
    local dx = core.call("max_pool2d_backward", y, index, {shape = {1, 1, 5, 5}, kernel_size = {2}, stride = {1},
      dilation = {3}})
    local want = naive.new({1, 1, 5, 5})
    want[19], want[20], want[24], want[25] = 19, 20, 24, 25
    numbers.assert_same(dx, want)
  end)

  it("a window without a pixel gives minus infinity, and takes and gives no gradient", function()
    -- places -1 and 4 of a row of 4
    local attrs = {kernel_size = 2, stride = 1, padding = 1, dilation = 5}
    for _, dtype in ipairs(DTYPES) do
      for _, lay in pairs(ORDERS) do
        local x = lay(sample({2, 3, 4, 4}, 1, dtype)):detach():requires_grad_()
        local y, index = call("max_pool2d", x, attrs)
        assert.same({2, 3, 1, 1}, y.shape)
        numbers.assert_same(y, {-inf, -inf, -inf, -inf, -inf, -inf})
        y:sum():backward()
        numbers.assert_same(x.grad, naive.new({2, 3, 4, 4}))
        numbers.assert_same(core.call("max_pool2d_pick", x:detach(), index, listed(attrs)), naive.new({2, 3, 1, 1}))
      end
    end
  end)

  it("NaN wins, of several the last; the first of equals; minus infinity is a value", function()
    for _, dtype in ipairs(DTYPES) do
      local function pooled(list)
        local y, index = call("max_pool2d", hm.tensor(list, {dtype = dtype}):view({1, 1, 2, 2}), {kernel_size = 2})
        return {y:item(), index:item()}
      end
      numbers.assert_same(pooled {inf, nan, 3, 2}, {nan, 1})
      numbers.assert_same(pooled {nan, 1, nan, 2}, {nan, 2})
      numbers.assert_same(pooled {5, 5, 5, 5}, {5, 0})
      numbers.assert_same(pooled {-inf, -inf, -inf, -inf}, {-inf, 0})
      numbers.assert_same(pooled {-inf, -3, inf, inf}, {inf, 2})
      -- padding never wins, whatever the numbers are
      numbers.assert_same(call("max_pool2d", hm.full({1, 1, 2, 2}, -inf, {dtype = dtype}), {kernel_size = 3,
        stride = 2, padding = 1}), {-inf})
    end
  end)
end)

-- ====== Averages ======

describe("avg_pool2d", function()
  values("avg_pool2d", AVERAGE, 4)
  slopes("avg_pool2d", AVERAGE, 8)
  derivatives("avg_pool2d", AVERAGE, true)
  derivatives("avg_pool2d", {{{1, 1, 5, 6}, {kernel_size = 3, stride = 2, padding = 1, ceil_mode = true,
    count_include_pad = false}},
    {{2, 2, 4, 4}, {kernel_size = 2, stride = 1, divisor_override = -3}}}, true)

  it("counts padding, but not what lies past it", function()
    local ones = hm.ones({1, 1, 5, 5})
    -- rows of windows -1..1, 1..3, 3..5: two of three places inside, three, two
    numbers.assert_near(call("avg_pool2d", ones, {kernel_size = 3, stride = 2, padding = 1}),
      {4 / 9, 6 / 9, 4 / 9, 6 / 9, 1, 6 / 9, 4 / 9, 6 / 9, 4 / 9}, 1e-6)
    numbers.assert_same(call("avg_pool2d", ones, {kernel_size = 3, stride = 2, padding = 1, count_include_pad = false}),
      {1, 1, 1, 1, 1, 1, 1, 1, 1})
    -- ceil_mode: windows 0..2 and 3..5 of a row of 5: the second counts its two places only
    numbers.assert_same(call("avg_pool2d", ones, {kernel_size = 3, stride = 3, ceil_mode = true}), {1, 1, 1, 1})
    -- with padding 1 on 4: windows -1..1, 1..3, 3..5; places up to 4 count (4 is padding), 5 does not
    numbers.assert_near(call("avg_pool2d", hm.ones({1, 1, 4, 4}), {kernel_size = 3, stride = 2, padding = 1,
      ceil_mode = true}),
      {4 / 9, 6 / 9, 2 / 6, 6 / 9, 1, 3 / 6, 2 / 6, 3 / 6, 1 / 4}, 1e-6)
    numbers.assert_same(call("avg_pool2d", ones, {kernel_size = 2, stride = 3, padding = 1, divisor_override = 2}),
      {0.5, 1, 1, 2})
  end)

  it("keeps NaN and infinity in the windows that hold them", function()
    for _, dtype in ipairs(DTYPES) do
      local x = hm.tensor({1, 2, nan, 4, 5, 6, 7, inf, -inf, 1, 1, inf}, {dtype = dtype}):view({1, 1, 3, 4})
      numbers.assert_same(call("avg_pool2d", x, {kernel_size = {1, 2}}), {1.5, nan, 5.5, inf, -inf, inf})
      numbers.assert_same(call("avg_pool2d", x, {kernel_size = {3, 1}, stride = 1}), {-inf, 3, nan, inf})
    end
    local wide = hm.zeros({1, 2, 20, 20}) -- enough terms for the careful sum
    wide[{1, 1, 3, 4}], wide[{1, 2, 5, 5}], wide[{1, 2, 6, 6}] = inf, inf, -inf
    numbers.assert_same(call("avg_pool2d", wide, {kernel_size = 20}), {inf, nan})
  end)

  it("loses next to nothing in long sums", function()
    local x = hm.full({1, 3, 100, 100}, 0.1)
    local exact = x:double():flatten()[1]:item()
    for _, lay in pairs(ORDERS) do
      local y = call("avg_pool2d", lay(x), {kernel_size = 100})
      for _, v in ipairs(numbers.flat(y)) do assert(numbers.ulps(v, exact, "float32") <= 2, v) end
    end
  end)
end)

describe("adaptive_avg_pool2d", function()
  values("adaptive_avg_pool2d", ADAPTIVE, 4)
  slopes("adaptive_avg_pool2d", ADAPTIVE, 8)
  derivatives("adaptive_avg_pool2d", ADAPTIVE, true)

  it("windows go from floor(i in / out) to ceil((i + 1) in / out)", function()
    local x = hm.arange(0, 5):to("f32"):view({1, 1, 1, 5})
    -- 0..1, 1..3, 3..4
    numbers.assert_same(call("adaptive_avg_pool2d", x, {output_size = {1, 3}}), {0.5, 2, 3.5})
    -- 0, 0..1, 1..2? of 3 into 4: [0,1) [0,2) [1,3) [2,3)
    numbers.assert_same(call("adaptive_avg_pool2d", x:narrow(4, 1, 3), {output_size = {1, 4}}), {0, 0.5, 1.5, 2})
  end)
end)

describe("adaptive_max_pool2d", function()
  values("adaptive_max_pool2d", ADAPTIVE, 0)
  derivatives("adaptive_max_pool2d", ADAPTIVE)
  derivatives("adaptive_max_pool2d", {{{1, 2, 5, 7}, {output_size = {3, 4}}}, {{1, 1, 3, 4}, {output_size = {5, 7}}}})

  it("adds the gradients of windows that chose one pixel", function()
    for _, dtype in ipairs(DTYPES) do
      for _, lay in pairs(ORDERS) do
        local x = sample({2, 3, 5, 4}, 1, dtype)
        local y, index = call("adaptive_max_pool2d", lay(x), {output_size = {4, 3}})
        local g = sample(y.shape, 2, dtype)
        local list, places, want = numbers.flat(g), numbers.flat(index), naive.new({2, 3, 5, 4})
        for i = 1, #list do
          local at = (i - 1) // 12 * 20 + places[i] + 1
          want[at] = want[at] + list[i]
        end
        near(core.call("adaptive_max_pool2d_backward", lay(g), lay(index), {shape = {2, 3, 5, 4}}), want, dtype, 8)
      end
    end
  end)

  it("NaN wins, of several the last; windows of more than 256 places too", function()
    for _, dtype in ipairs(DTYPES) do
      for _, lay in pairs(ORDERS) do
        local x = hm.zeros({1, 3, 30, 30}, {dtype = dtype})
        x[{1, 1, 3, 5}], x[{1, 1, 29, 2}], x[{1, 1, 30, 30}] = nan, nan, inf
        x[{1, 2, 20, 20}], x[{1, 2, 25, 25}] = 3, 3
        x[{1, 3}] = -inf
        local y, index = call("adaptive_max_pool2d", lay(x), {output_size = 1})
        numbers.assert_same(y, {nan, 3, -inf})
        numbers.assert_same(index, {28 * 30 + 1, 19 * 30 + 19, 0})
      end
    end
  end)

  it("has no second derivative, and says so", function()
    local x = sample({1, 1, 4, 4}, 1):requires_grad_()
    local y = call("adaptive_max_pool2d", x, {output_size = 2})
    local g = core.grad({(y * y):sum()}, {x}, {create_graph = true})[1]
    raises("has no derivative", function() g:sum():backward() end)
  end)
end)

-- ====== interpolate2d ======

describe("interpolate2d", function()
  for _, case in ipairs(SAMPLED) do
    local shape, attrs = case[1], case[2]
    it(title("interpolate2d", attrs) .. (" on {%s}"):format(table.concat(shape, ",")), function()
      for _, dtype in ipairs {"f64", "f32"} do
        local x = sample(shape, 1, dtype)
        local want = windows.interpolate2d(naive.of(x), attrs)
        -- places are computed in float32 for float32: off by some ulps of the place
        local slack = dtype == "f64" and 1e-13 or attrs.mode and 40 * 2.0 ^ -23 or 0
        for order, lay in pairs(ORDERS) do
          local what = dtype .. " " .. order
          local y = call("interpolate2d", lay(x), attrs)
          assert.same(want.shape, y.shape)
          assert.is_true(is_channels_last(y), what)
          numbers.assert_near(y, want, slack, slack * 3, what)
        end
      end
      for _, dtype in ipairs {"f16", "bf16"} do -- as float32, rounded once
        local x = sample(shape, 1, dtype)
        local want = call("interpolate2d", x:float(), attrs):to(dtype)
        for _, lay in pairs(ORDERS) do numbers.assert_same(call("interpolate2d", lay(x), attrs), want) end
      end
    end)
  end

  for _, case in ipairs(SAMPLED) do
    it(title("interpolate2d_backward", case[2]) .. (" for {%s}"):format(table.concat(case[1], ",")), function()
      local shape, attrs = case[1], copy_of(case[2])
      local y = call("interpolate2d", sample(shape, 1), attrs)
      for _, dtype in ipairs {"f64", "f32"} do
        local g = sample(y.shape, 2, dtype)
        local want = windows.interpolate2d_backward(naive.of(g), shape, attrs)
        local given = copy_of(attrs, {shape = shape})
        given.size = nil
        for order, lay in pairs(ORDERS) do
          local dx = call("interpolate2d_backward", lay(g), given)
          local slack = dtype == "f64" and 1e-12 or 200 * 2.0 ^ -23
          assert.is_true(is_channels_last(dx))
          numbers.assert_near(dx, want, slack, slack * 3, dtype .. " " .. order)
        end
      end
    end)
  end
  derivatives("interpolate2d", SAMPLED, true)

  it("golden values", function()
    local x = hm.tensor({1.0, 2, 3, 4}, {dtype = "f32"}):view({1, 1, 2, 2})
    numbers.assert_same(call("interpolate2d", x, {size = 3}), {1, 1, 2, 1, 1, 2, 3, 3, 4})
    -- places -1/4, 1/4, 3/4, 5/4: weights 1, 3/4 1/4, 1/4 3/4, 1
    numbers.assert_same(call("interpolate2d", x, {size = {2, 4}, mode = "bilinear"}), {1, 1.25, 1.75, 2, 3, 3.25, 3.75,
      4})
    numbers.assert_same(call("interpolate2d", x, {size = 3, mode = "bilinear", align_corners = true}), {1, 1.5, 2, 2,
      2.5, 3, 3, 3.5, 4})
    -- a scale is what output places are divided by: 1/2.5 from place to place, whatever the sizes say
    local row = hm.tensor({0.0, 1, 2, 3}, {dtype = "f32"}):view({1, 1, 1, 4})
    numbers.assert_same(call("interpolate2d", row, {size = {1, 10}, scale_w = 2.5}), {0, 0, 0, 1, 1, 2, 2, 2, 3, 3})
    numbers.assert_near(call("interpolate2d", row, {size = {1, 4}, scale_w = 2, mode = "bilinear"}), {0, 0.25, 0.75,
      1.25}, 1e-7)
    -- backward of the first: each pixel adds what was copied from it
    numbers.assert_same(call("interpolate2d_backward", hm.arange(1, 10):to("f32"):view({1, 1, 3, 3}), {shape = {1, 1,
      2, 2}}), {12, 9, 15, 9})
  end)

  it("a picture of one value stays that value", function()
    for _, attrs in ipairs {{size = {7, 9}}, {size = {7, 9}, mode = "bilinear"}, {size = {2, 3}, mode = "bilinear",
      align_corners = true}} do
      numbers.assert_near(call("interpolate2d", hm.full({1, 2, 4, 5}, 0.3), attrs), hm.full({1, 2, attrs.size[1],
        attrs.size[2]}, 0.3), 3e-7)
    end
  end)

  it("keeps NaN and infinity, also where they stand at the edge", function()
    local x = hm.tensor({inf, 1, 2, nan}, {dtype = "f32"}):view({1, 1, 1, 4})
    numbers.assert_same(call("interpolate2d", x, {size = {1, 8}}), {inf, inf, 1, 1, 2, 2, nan, nan})
    numbers.assert_same(call("interpolate2d", x, {size = {1, 8}, mode = "bilinear"}), {inf, inf, inf, 1.25, 1.75, nan,
      nan, nan})
  end)

  it("is of the class F: float32 inside autocast from low input, without a copy; the gradient comes back low",
    function()
    local x = sample({1, 2, 4, 4}, 1, "f16"):requires_grad_()
    hm.amp.autocast("f16", function()
      local y = call("interpolate2d", x, {size = 8, mode = "bilinear"})
      assert.equal("float32", y.dtype)
      numbers.assert_same(y, call("interpolate2d", x:detach():float(), {size = 8, mode = "bilinear"}))
      y:sum():backward()
      assert.equal("float16", x.grad.dtype)
      assert.equal("float16", call("avg_pool2d", x, {kernel_size = 2}).dtype)
    end)
    assert.equal("float16", call("interpolate2d", x:detach(), {size = 8}).dtype)
  end)
end)

-- ====== Together ======

describe("pooling and interpolation", function()
  local ALL = {
    max_pool2d = {kernel_size = 2}, avg_pool2d = {kernel_size = 2}, adaptive_avg_pool2d = {output_size = 2},
    adaptive_max_pool2d = {output_size = 2}, interpolate2d = {size = 8, mode = "bilinear"},
  }

  for name, attrs in pairs(ALL) do
    it(name .. " takes no samples and no channels, with gradients", function()
      for _, shape in ipairs {{0, 3, 4, 4}, {2, 0, 4, 4}} do
        local x = hm.zeros(shape, {requires_grad = true})
        local y = call(name, x, attrs)
        assert.same({shape[1], shape[2]}, {y:size(1), y:size(2)})
        assert.equal(0, y:numel())
        y:sum():backward()
        assert.same(shape, x.grad.shape)
      end
    end)

    it(name .. " gives the same bits for any number of threads", function()
      local before = hm.get_num_threads()
      local x, results = sample({3, 33, 40, 41}, 1, "f32"), {}
      for i, threads in ipairs {1, 3} do
        hm.set_num_threads(threads)
        local leaf = x:clone():requires_grad_()
        local y = call(name, leaf, attrs)
        y:backward(sample(y.shape, 2, "f32"))
        results[i] = {y:detach(), leaf.grad}
      end
      hm.set_num_threads(before)
      for k = 1, 2 do assert.is_true(results[1][k]:eq(results[2][k]):all():item()) end
    end)

    it(name .. " refuses integers, other numbers of dims, empty images", function()
      raises(name, call, name, hm.zeros({1, 1, 4, 4}, {dtype = "i64"}), attrs)
      raises({name, "[N, C, H, W]", "f32[4,4]"}, call, name, hm.zeros({4, 4}), attrs)
      raises({name, "empty", "f32[1,1,0,4]"}, call, name, hm.zeros({1, 1, 0, 4}), attrs)
    end)
  end

  it("an adaptive pool to nothing gives nothing, and its gradient is zero", function()
    local x = hm.ones({1, 2, 3, 3}, {requires_grad = true})
    local y = call("adaptive_avg_pool2d", x, {output_size = {0, 2}})
    assert.same({1, 2, 0, 2}, y.shape)
    y:sum():backward()
    numbers.assert_same(x.grad, naive.new({1, 2, 3, 3}))
  end)

  it("takes gradients that are expanded", function()
    for name, attrs in pairs(ALL) do
      local x = sample({1, 2, 4, 4}, 1):requires_grad_()
      local y = call(name, x, attrs)
      local a = core.grad({y:sum()}, {x})[1] -- g: one number expanded
      y = call(name, x, attrs)
      local b = core.grad({y}, {x}, {grad_outputs = {hm.ones(y.shape, {dtype = "f64"})}})[1]
      numbers.assert_near(a, b, 1e-15, 1e-15, name)
    end
  end)

  it("names what does not fit", function()
    local x = hm.zeros({1, 2, 4, 5})
    raises({"max_pool2d: kernel_size", "at least 1"}, call, "max_pool2d", x, {kernel_size = 0})
    raises({"max_pool2d: stride", "at least 1"}, call, "max_pool2d", x, {kernel_size = 2, stride = 0})
    raises({"max_pool2d: dilation", "at least 1"}, call, "max_pool2d", x, {kernel_size = 2, dilation = {1, 0}})
    raises({"max_pool2d: kernel_size", "one number or two"}, call, "max_pool2d", x, {kernel_size = {1, 2, 3}})
    raises("max_pool2d: padding 2 is more than half the kernel size 3", call, "max_pool2d", x, {kernel_size = 3,
      padding = 2})
    raises("max_pool2d: a window of 289 places is too large; at most 256", call, "max_pool2d", hm.zeros({1, 1, 20,
      20}), {kernel_size = 17})
    raises({"max_pool2d: the window does not fit: it spans 5 along dim 3", "f32[1,2,4,5]"}, call, "max_pool2d", x,
      {kernel_size = 3, dilation = 2})
    raises("avg_pool2d: padding 1 is more than half the kernel size 1", call, "avg_pool2d", x, {kernel_size = 1,
      padding = 1})
    raises("avg_pool2d: the window does not fit", call, "avg_pool2d", x, {kernel_size = 5})
    raises("avg_pool2d: kernel_size", call, "avg_pool2d", x, {kernel_size = math.tointeger(2 ^ 40)})
    raises({"adaptive_avg_pool2d: output_size", "at least 0"}, call, "adaptive_avg_pool2d", x, {output_size = -1})
    raises({"interpolate2d: size", "at least 1"}, call, "interpolate2d", x, {size = {3, 0}})
    raises({"interpolate2d: align_corners", "bilinear"}, call, "interpolate2d", x, {size = 3, align_corners = true})
    for _, scale in ipairs {-1, inf, nan, 1e-320} do
      raises("interpolate2d: scale_w must be a finite positive number", call, "interpolate2d", x, {size = 3,
        scale_w = scale})
    end
    local y, index = call("max_pool2d", x, {kernel_size = 2})
    raises({"max_pool2d_backward: g must be [1,2,4,4]", "f32[1,2,2,2]"}, core.call, "max_pool2d_backward", y, index,
      {shape = {1, 2, 8, 8}, kernel_size = {2}})
    raises({"max_pool2d_backward: index must be uint8", "second result"}, core.call, "max_pool2d_backward", y, y,
      {shape = {1, 2, 4, 5}, kernel_size = {2}})
    raises({"max_pool2d_relu_backward: out must be [1,2,2,2]"}, core.call, "max_pool2d_relu_backward", y, index, x,
      {shape = {1, 2, 4, 5}, kernel_size = {2}})
    raises({"max_pool2d_pick: index must be [1,2,3,4]"}, core.call, "max_pool2d_pick", x, index, {kernel_size = {2},
      stride = {1}})
    raises({"max_pool2d_backward: shape must be 4 sizes"}, core.call, "max_pool2d_backward", y, index, {shape = {2, 4,
      5}, kernel_size = {2}})
    raises({"adaptive_max_pool2d_backward: index must be int64"}, core.call, "adaptive_max_pool2d_backward", y,
      index:to("i32"), {shape = {1, 2, 4, 5}})
    raises({"avg_pool2d_backward: g must be [1,2,2,2]"}, core.call, "avg_pool2d_backward", x, {shape = {1, 2, 4, 5},
      kernel_size = {2}})
    raises({"interpolate2d_backward: g must be [1,3,4,5]"}, core.call, "interpolate2d_backward", x, {shape = {1, 3, 4,
      5}})
  end)
end)
