-- cuda_parity_spec.lua -- every row of the op table that has a kernel, on the CPU and on cuda from the same inputs:
-- values and gradients,
-- in every dtype that the row takes, contiguous, strided, off the alignment of a vector, broadcast, with NaN and
-- infinities, and empty.
--
-- Elementwise rows, copies, fills, random numbers, pooling and indices must agree to the bit (float64 functions on a GPU
-- within a few ulp); reductions, norms and losses
-- must lie within the row's bound of the float64 result; matrix products and convolutions within the tolerance below.
-- A row that is neither elementwise nor has a sample fails.
-- One case alone:  HALFMOON_CUDA=emu build/halfmoon spec/run.lua --filter='tanh: float16' spec/cuda_parity_spec.lua

local hm = require "halfmoon"
local core = require "halfmoon.core"
local numbers = require "spec.support.numbers"
local devices = require "spec.support.devices"
local samples = require "spec.support.samples"

local inf, nan = math.huge, 0 / 0
local FLOATS = {"float32", "float16", "bfloat16", "float64"}
local INTEGERS = {"int64", "int32", "uint8", "bool"}

-- Families whose results are the CPU's to the bit.
local TO_THE_BIT = {elementwise = true, copy = true, fill = true, random = true, pool = true, index = true}
-- |difference| over the largest result, for sums of up to a hundred products in any order.
local PRODUCTS = {float64 = 1e-13, float32 = 2e-6, float16 = 2.0 ^ -10, bfloat16 = 2.0 ^ -7}
-- Rows that subtract a mean: what cancels is held to the largest result as well.
local SUBTRACTS_MEAN = {}
for _, name in ipairs {"batch_norm", "layer_norm", "rms_norm", "group_norm"} do
  SUBTRACTS_MEAN[name], SUBTRACTS_MEAN[name .. "_backward"] = true, true
end
-- Gradients of half types go through results that were rounded before: how often the tolerance of products they may be off.
local SLACK = {
  logsumexp = 12, -- e^(x - out), out rounded
  attention = 16, -- differences of sums with out, rounded
}
-- A half type rounds once what was computed in float32.
local HALF_BOUND = 0.6

--- Is result n one that a backend keeps for itself alone?  Each has its own: as many bytes as it likes, in an order of its own.
local function is_private(op, n) return op.name == "linear_relu" and op.outputs[n] and op.outputs[n].name == "aux" end

-- ====== Inputs ======

local DOMAIN = samples.DOMAIN
local SPECIAL = {nan, inf, -inf, 0.0, -0.0, 1.0, -1.0, 65504.0, 1e-40, 3e38, 0.5}
local count, is_integer, tensor, filled = samples.count, samples.is_integer, samples.tensor, samples.filled

-- How a tensor may lie in memory: each takes a contiguous tensor on the CPU and gives {what to move, how to look at it
-- there}.
local LAYOUTS = {
  contiguous = function(t) return t, function(x) return x end end,
  transposed = function(t)
    local n = t:dim()
    if n < 2 then
      return t:unsqueeze(1):expand({2, table.unpack(t.shape)}):contiguous(), function(x) return x:select(1, 2) end
    end
    return t:transpose(1, n):contiguous(), function(x) return x:transpose(1, n) end
  end,
  ["every second, from an odd place"] = function(t)
    local n = t:dim()
    if n == 0 then return hm.stack({t, t, t}, 1), function(x) return x:select(1, 3) end end
    local pairs_of = hm.stack({t, t}, n + 1) -- [..., 2]
    local flat = hm.cat({pairs_of:flatten():narrow(1, 1, 1), pairs_of:flatten()}, 1)
    local size, shape = pairs_of:numel(), pairs_of.shape
    return flat, function(x) return x:narrow(1, 2, size):view(shape):select(n + 1, 2) end
  end,
}

--- An argument as a recipe: fn(device) makes it there from the same values.
local function recipe(t, layout)
  if not core.is_tensor(t) then return function() return t end end
  local base, look = LAYOUTS[layout](t)
  return function(device) return look(base:to(device):clone()) end -- a clone: mutated ops keep to their own
end

-- ====== Running a case on both devices ======

local function call(op, recipes, device, attrs, grads)
  local args = {}
  for k = 1, #op.inputs do
    if recipes[k] then args[k] = recipes[k](device) end
    if grads and core.is_tensor(args[k]) and args[k]:is_floating_point() and op.inputs[k].differentiable then
      args[k] = args[k]:detach():requires_grad_(true)
    end
  end
  local copy = {}
  for name, value in pairs(attrs or {}) do copy[name] = value end
  args[#op.inputs + 1] = copy
  hm.manual_seed(5)
  local out = table.pack(core.call(op.name, table.unpack(args, 1, #op.inputs + 1)))
  if op.family == "random" then out[out.n + 1], out.n = core.call("uniform_", hm.empty({3}, {device = device})),
    out.n + 1 end
  return out, args
end

local function show(v) return type(v) == "number" and ("%.9g"):format(v) or tostring(v) end

--- Equal to the bit, or both NaN.
local function identical(a, b)
  if a ~= b then return a ~= a and b ~= b end
  return a ~= 0 or type(a) ~= "number" or math.type(a) == "integer" or 1 / a == 1 / b
end

local function check_identical(got, want, what)
  local g, w = numbers.flat(got), numbers.flat(want)
  assert(#g == #w, ("%s: %d values, expected %d"):format(what, #g, #w))
  for i = 1, #w do
    if not identical(g[i],
      w[i]) then error(("%s: value %d is %s, on the CPU %s"):format(what, i, show(g[i]), show(w[i])), 0) end
  end
end

local function largest(list)
  local top = 0
  for _, v in ipairs(list) do if v == v and math.abs(v) > top and math.abs(v) < inf then top = math.abs(v) end end
  return top
end

--- Within `bound` ulp of the exact value; small ones among large ones (x - max - log(sum) cancels) are held to the ulp
-- of a sixteenth of the largest; where terms of size `cancels` cancel, of those.
local function check_ulps(got, exact, dtype, bound, what, cancels)
  local g, w = numbers.flat(got), numbers.flat(exact)
  assert(#g == #w, ("%s: %d values, expected %d"):format(what, #g, #w))
  local floor = numbers.ulp(cancels and math.max(largest(w), cancels) or largest(w) / 16, dtype)
  for i = 1, #w do
    local d = numbers.ulps(g[i], w[i], dtype)
    local close = math.abs(g[i] - w[i]) <= bound * floor -- false for NaN
    if d > bound and not close then
      error(("%s: value %d is %s, exact %s: %.3g ulp, bound %g"):format(what, i, show(g[i]), show(w[i]), d, bound), 0)
    end
  end
end

local on_gpu -- and not on the test double; looked at once

--- Equal to the bit; float64 functions are CUDA's own on a GPU and the C library's on the CPU (kernels/math.h): these agree within a
-- few ulp.
local function check_same(op, got, want, what)
  if want.dtype ~= "float64" or op.ulp == 0 or not (op.family == "elementwise" or op.family == "random") then
    return check_identical(got, want, what)
  end
  if on_gpu == nil then on_gpu = not hm.cuda.properties().name:find("test double", 1, true) end
  if not on_gpu then return check_identical(got, want, what) end
  check_ulps(got, want, "float64", 8 * op.ulp, what)
end

--- slack: 1, or more for gradients in half types, which go through results that were rounded before.
local function check_products(got, exact, dtype, what, slack)
  local g, w = numbers.flat(got), numbers.flat(exact)
  assert(#g == #w, ("%s: %d values, expected %d"):format(what, #g, #w))
  local tolerance = PRODUCTS[dtype] * (slack or 1)
  local atol = tolerance * largest(w)
  for i = 1, #w do
    local close = math.abs(g[i] - w[i]) <= atol -- false for NaN
    if not close then
      error(("%s: value %d is %s, exact %s (tolerance %g of the largest)"):format(what, i, show(g[i]), show(w[i]),
        tolerance), 0)
    end
  end
end

--- The recipes with every floating tensor as float64.
local function widened(recipes)
  if recipes.exact then return recipes.exact end
  local out = {}
  for k, make in pairs(recipes) do
    out[k] = function(device)
      local t = make(device)
      return core.is_tensor(t) and t:is_floating_point() and t:double() or t
    end
  end
  return out
end

--- Compares one result by the row's measure.  exact: the same from float64.
local function compare(op, got, want, exact, what)
  assert(got.dtype == want.dtype, ("%s: dtype %s, on the CPU %s"):format(what, got.dtype, want.dtype))
  assert(table.concat(got.shape, ",") == table.concat(want.shape, ","), ("%s: shape {%s}, on the CPU {%s}"):format(what,
    table.concat(got.shape, ","), table.concat(want.shape, ",")))
  assert(got.device:find("^cuda"), what .. ": the result lies on " .. got.device)
  if TO_THE_BIT[op.family] or op.ulp == 0 or is_integer(want.dtype) then return check_same(op, got, want, what) end
  if op.family == "matmul" or op.family == "conv" or SUBTRACTS_MEAN[op.name] then
    return check_products(got, exact, want.dtype, what)
  end
  local half = want.dtype == "float16" or want.dtype == "bfloat16"
  -- float64 has nothing more exact to be held against than itself in another order
  local bound = half and HALF_BOUND or want.dtype == "float64" and 8 * op.ulp or op.ulp
  check_ulps(got, exact, want.dtype, bound, what, samples.cancels(op))
end

--- The first line of a message, without the place and the device in it.
local function bare(message) return (tostring(message):match("^[^\n]*"):gsub("^[%w_/.]+:%d+: ", ""):gsub("cuda:0",
  "cpu")) end

--- Runs a row on both devices and compares; false where both refuse, as they may for integers only.
local function values_agree(op, recipes, attrs, what, floating)
  local ok, want, cpu_args = pcall(call, op, recipes, "cpu", attrs)
  local done, got, args = pcall(call, op, recipes, "cuda", attrs)
  local waited, fault = pcall(hm.cuda.synchronize) -- a fault inside a kernel is known when the device has come to it
  if done and not waited then done, got = false, fault end
  if not ok then -- what the CPU refuses, cuda refuses
    assert(not done, ("%s: the CPU raises, cuda does not: %s"):format(what, tostring(want)))
    assert(not floating, ("%s: refused: %s"):format(what, tostring(want)))
    assert(bare(got) == bare(want),
      ("%s: the errors differ:\n  cuda: %s\n  CPU:  %s"):format(what, tostring(got), tostring(want)))
    return false
  end
  assert(done, ("%s: %s"):format(what, tostring(got)))
  local exact
  if not (TO_THE_BIT[op.family] or op.ulp == 0) then exact = call(op, widened(recipes), "cpu", attrs) end
  assert(got.n == want.n, what)
  for i = 1, want.n do
    if not is_private(op, i) then compare(op, got[i], want[i], exact and exact[i], ("%s, result %d"):format(what, i)) end
  end
  for k, input in ipairs(op.inputs) do
    if input.mutated and cpu_args[k] then check_same(op, args[k], cpu_args[k], what .. ": " .. input.name) end
  end
  return true
end

--- Gradients by backward() from the same gradient of the first result.  exact_too: whether they are equal to the bit.
local function gradients_agree(op, recipes, attrs, what, to_the_bit)
  local dtype -- of the first result, in which its gradient comes
  local function run(device, from)
    local out, args = call(op, from, device, attrs, true)
    local y = out[1]
    if not y.requires_grad then return {} end
    dtype = dtype or y.dtype
    y:backward(filled(y.shape, dtype, 9):to(y.dtype):to(device))
    local grads = {}
    for k = 1, #op.inputs do grads[k] = core.is_tensor(args[k]) and args[k].grad or false end
    return grads
  end
  local want, got = run("cpu", recipes), run("cuda", recipes)
  local exact = not to_the_bit and run("cpu", widened(recipes))
  for k = 1, #op.inputs do
    assert((not want[k]) == (not got[k]), ("%s: a gradient of %s on one device only"):format(what, op.inputs[k].name))
    if want[k] then
      local title = ("%s, gradient of %s"):format(what, op.inputs[k].name)
      assert(got[k].dtype == want[k].dtype, title .. ": dtype")
      if to_the_bit then check_same(op, got[k], want[k], title) else check_products(got[k], exact[k], want[k].dtype,
        title, SLACK[op.name] or 4) end
    end
  end
end

-- ====== Elementwise rows ======

local function elementwise_recipes(op, dtype, shapes, layout)
  local out = {}
  for k, input in ipairs(op.inputs) do
    local own = input.cls == "b" and "bool" or dtype
    local values = DOMAIN[is_integer(dtype) and "integer" or op.domain or "real"]
    out[k] = recipe(tensor(values, own, shapes[(k - 1) % #shapes + 1], (k - 1) * 5), layout)
  end
  return out
end

--- Every pair of special values: input k goes through the list at its own speed.
local function special_recipes(op, dtype)
  local n, out = #SPECIAL, {}
  for k, input in ipairs(op.inputs) do
    local list = {}
    for i = 0, n * n - 1 do list[i + 1] = SPECIAL[(k % 2 == 1 and i or i // n + (k - 1)) % n + 1] end
    out[k] = recipe(tensor(list, input.cls == "b" and "bool" or dtype, {n * n}), "contiguous")
  end
  return out
end

local function elementwise_row(op, dtype)
  for _, attrs in ipairs(samples.settings(op)) do
    local taken = values_agree(op, elementwise_recipes(op, dtype, {{301}}, "contiguous"), attrs, "contiguous", not is_integer(dtype))
    if not taken then return end
    for layout in pairs(LAYOUTS) do
      values_agree(op, elementwise_recipes(op, dtype, {{6, 9}}, layout), attrs, layout)
    end
    if #op.inputs > 1 then
      values_agree(op, elementwise_recipes(op, dtype, {{6, 1}, {9}, {6, 9}}, "contiguous"), attrs, "broadcast")
      values_agree(op, elementwise_recipes(op, dtype, {{5, 7}, {}}, "contiguous"), attrs,
        "with a tensor of no dimensions")
    end
    values_agree(op, elementwise_recipes(op, dtype, {{0, 3}}, "contiguous"), attrs, "empty")
    if not op.generated then
      values_agree(op, elementwise_recipes(op, dtype, {{9, 1031}}, "contiguous"), attrs, "many blocks")
      values_agree(op, elementwise_recipes(op, dtype, {{2, 3, 2, 3, 2}}, "transposed"), attrs, "five dimensions")
      if dtype == "float32" and op.outputs[1].cls ~= "b" then
        local narrow = {out_dtype = "f16"}
        for name, value in pairs(attrs) do narrow[name] = value end
        values_agree(op, elementwise_recipes(op, dtype, {{301}}, "contiguous"), narrow, "written as float16")
      end
    end
    if not is_integer(dtype) then
      values_agree(op, special_recipes(op, dtype), attrs, "special values")
      if op.differentiable then
        gradients_agree(op, elementwise_recipes(op, dtype, {{6, 9}}, "contiguous"), attrs, "gradient", true)
        gradients_agree(op, elementwise_recipes(op, dtype, {{6, 9}}, "transposed"), attrs, "gradient, transposed", true)
      end
    end
  end
end

-- ====== Rows with samples ======

local function sampled_row(op, dtype)
  for i, s in ipairs(samples.of(op)) do
    local shapes, attrs = s[1], s[2] or {}
    for layout in pairs(LAYOUTS) do
      local what, recipes = ("sample %d, %s"):format(i, layout), {}
      local args = samples.arguments(op, s, dtype)
      local wide, exact = samples.widened(op, s, args), {}
      for k = 1, #op.inputs do
        local t = args[k]
        if t ~= nil then
          recipes[k] = recipe(t, core.is_tensor(t) and t:numel() > 0 and layout or "contiguous")
          exact[k] = recipe(wide[k], "contiguous")
        end
      end
      recipes.exact = exact
      if not values_agree(op, recipes, attrs, what, not is_integer(dtype)) then break end
      -- a view is not changed in place while gradients are recorded
      local records = op.differentiable and not is_integer(dtype) and (layout == "contiguous" or not op.inputs[1].mutated)
      -- a gradient rounded to a half type less its mean is mostly rounding; the backward rows have samples of their own
      records = records and not (SUBTRACTS_MEAN[op.name] and (dtype == "float16" or dtype == "bfloat16"))
      if records and layout ~= "transposed" and count(shapes[1]) > 0 then
        gradients_agree(op, recipes, attrs, what, TO_THE_BIT[op.family] and op.family ~= "copy")
      end
    end
  end
end

--- In a region of `low`, from float32: the same dtypes as on the CPU, and the CPU's values within the tolerance of products.
local function autocast_row(op, low)
  for i, s in ipairs(samples.of(op)) do
    local recipes = {}
    for k = 1, #op.inputs do
      local t = samples.argument(op, k, s, "float32")
      if t ~= nil then recipes[k] = recipe(t, "contiguous") end
    end
    local want = hm.amp.autocast(low, call, op, recipes, "cpu", s[2])
    local got = hm.amp.autocast(low, call, op, recipes, "cuda", s[2])
    for n = 1, want.n do
      local what = ("sample %d, result %d"):format(i, n)
      assert(got[n].dtype == want[n].dtype, ("%s: dtype %s, on the CPU %s"):format(what, got[n].dtype, want[n].dtype))
      if not is_private(op, n) then check_products(got[n], want[n], want[n].dtype, what, 2) end
    end
  end
end

--- Maxima, pooling and the like with NaN, infinities and ties.
local function special_row(op, dtype)
  if op.ulp ~= 0 or is_integer(dtype) or #op.inputs ~= 1 or op.inputs[1].mutated then return end
  for i, s in ipairs(samples.of(op)) do
    for at, list in ipairs {SPECIAL, {1, 2, 2, 1, 0, 2}, {-inf, -inf, nan}, {-0.0, 0.0}} do
      values_agree(op, {recipe(tensor(list, dtype, s[1][1]), "contiguous")}, s[2] or {},
        ("sample %d, special values %d"):format(i, at))
    end
  end
end

describe("cpu and cuda", function()
  local cases, why = devices.cases("spec/cuda_parity_spec.lua")
  if not cases then return pending(why) end
  local function case(name, fn) it(name, function() cases:run(name, fn) end) end

  case("a device is there", function() assert(hm.cuda.is_available()) end)

  local rows = 0
  for _, op in ipairs(core.ops()) do
    if op.family ~= "view" and op.family ~= "composite" then
      rows = rows + 1
      if not samples.has(op) then
        case(op.name .. ": has a sample", function() samples.of(op) end)
      else
        for _, dtype in ipairs(FLOATS) do
          case(("%s: %s"):format(op.name, dtype), function()
            if op.family == "elementwise" then elementwise_row(op, dtype) else
              sampled_row(op, dtype)
              special_row(op, dtype)
            end
          end)
        end
        local summed = op.family == "matmul" or op.family == "conv" or op.family == "norm" or op.family == "loss"
        for _, low in ipairs(summed and {"f16", "bf16"} or {}) do
          case(("%s: in a region of %s"):format(op.name, low), function() autocast_row(op, low) end)
        end
        if op.ints ~= "no" then
          case(op.name .. ": integers", function()
            for _, dtype in ipairs(INTEGERS) do (op.family == "elementwise" and elementwise_row or sampled_row)(op,
              dtype) end
          end)
        end
      end
    end
  end

  case("rows were found", function() assert(rows > 100, rows) end)

  case("a difference of one bit would be seen", function()
    local op = {name = "add", family = "elementwise", ulp = 0.5}
    local one, next_one, zero = hm.tensor {1.0}, hm.tensor {1 + 2.0 ^ -23}, hm.tensor {0.0}
    assert(pcall(compare, op, one:to("cuda"), one, nil, "x"))
    local _, message = pcall(compare, op, next_one:to("cuda"), one, nil, "x")
    assert(message:find("on the CPU 1", 1, true), message)
    assert(not pcall(compare, op, next_one:to("cuda"), one, nil, "x"))
    assert(not pcall(compare, op, (-zero):to("cuda"), zero, nil, "x"))
    assert(not pcall(compare, op, one, one, nil, "x")) -- not on cuda
    op = {name = "sum", family = "reduce", ulp = 4}
    assert(pcall(compare, op, next_one:to("cuda"), one, one:double(), "x"))
    assert(not pcall(compare, op, hm.tensor({1 + 2.0 ^ -20}):to("cuda"), one, one:double(), "x"))
  end)
end)
