-- ops_elementwise_spec.lua -- every elementwise row of the op table, proved from the row.
--
-- For each op: value in f64 against spec/reference, f32 within the row's ulp bound, f16 and bf16 rounded once, special
-- values, strides, broadcasting,
-- numbers, empty tensors, in-place form, integers, gradient and second derivative against finite differences.
-- One case alone:  make test SPEC=spec/ops_elementwise_spec.lua FILTER='tanh: f16'

local hm = require "halfmoon"
local core = require "halfmoon.core"
local numbers = require "spec.support.numbers"
local proofs = require "spec.support.proofs"
local reference = require "spec.reference.elementwise"
local samples = require "spec.support.samples"

local inf, nan = math.huge, 0 / 0

-- Ops whose derivative jumps or is not checked by differences, with the reason.
local NO_DIFFERENCES = {remainder = "jumps where x is a multiple of y", floor_divide = "flat"}

local DOMAIN = {
  real = {-3.7, -2.31, -1.05, -0.51, -0.13, 0.0, 0.07, 0.43, 0.99, 1.61, 2.72, 3.9},
  positive = {0.11, 0.27, 0.5, 0.73, 1.0, 1.31, 1.77, 2.19, 2.9, 3.3, 3.75, 4.2},
  nonzero = {-3.9, -2.6, -1.7, -1.1, -0.6, -0.23, 0.31, 0.8, 1.3, 1.9, 2.4, 3.5},
}
DOMAIN.unit = {0.02, 0.1, 0.21, 0.33, 0.4, 0.52, 0.6, 0.68, 0.77, 0.85, 0.93, 0.98}
local SPECIAL = {nan, inf, -inf, 0.0, -0.0, 1.0, -1.0}

-- ====== Making inputs ======

local function rotated(list, by)
  local out = {}
  for i = 1, #list do out[i] = list[(i - 1 + by) % #list + 1] end
  return out
end

--- Values for input k of an op: the domain's list, rotated so that operands differ.
local function values(op, k)
  if op.inputs[k].cls == "b" then
    local out = {}
    for i = 1, #DOMAIN.real do out[i] = i % 3 ~= 0 end
    return out
  end
  return rotated(DOMAIN[op.domain or "real"], (k - 1) * 5)
end

local function tensor(op, k, list, dtype, shape)
  local t = hm.tensor(list, {dtype = op.inputs[k].cls == "b" and "bool" or dtype})
  return shape and t:view(shape) or t
end

local function inputs(op, dtype, shape)
  local out = {}
  for k = 1, #op.inputs do out[k] = tensor(op, k, values(op, k), dtype, shape) end
  return out
end

--- Runs the op with attributes by name.
local function run(op, args, attr)
  local packed = table.move(args, 1, #op.inputs, 1, {})
  packed[#op.inputs + 1] = attr or {}
  return core.call(op.name, table.unpack(packed, 1, #op.inputs + 1))
end

--- What the reference gives for the values that the tensors really hold.
local function expected(op, args, attr)
  local flat, out = {}, {}
  for k = 1, #args do flat[k] = numbers.flat(args[k]) end
  for i = 1, #flat[1] do
    local row = {}
    for k = 1, #args do row[k] = flat[k][i] end
    row[#args + 1] = attr
    out[i] = reference[op.name](table.unpack(row, 1, #args + 1))
  end
  return out
end

-- ====== Checks ======

local function check_ulps(op, got, want, dtype, bound)
  local g = numbers.flat(got)
  assert.equal(#want, #g)
  for i = 1, #want do
    if type(want[i]) == "boolean" then
      assert.equal(want[i], g[i], ("%s: value %d"):format(op.name, i))
    else
      local d = numbers.ulps(g[i], want[i], dtype)
      proofs.measured(dtype, op.name, d)
      assert(d <= bound, ("%s %s: value %d is %.9g, exact %.9g: %.3g ulp, bound %g"):format(op.name, dtype, i, g[i], want[i], d, bound))
    end
  end
end

--- Slack for half types: the float32 result may err before the one rounding.
local HALF_BOUND = {float16 = 0.51, bfloat16 = 0.505}

local function differentiable_inputs(op)
  local list = {}
  if op.differentiable and not NO_DIFFERENCES[op.name] and not reference.straight_through[op.name] then
    for k, input in ipairs(op.inputs) do if input.cls ~= "b" then list[#list + 1] = k end end
  end
  return list
end

--- Numerical derivative of f by element i of list, central differences.
local function difference(f, list, i, h)
  local keep = list[i]
  list[i] = keep + h
  local up = f()
  list[i] = keep - h
  local down = f()
  list[i] = keep
  return (up - down) / (2 * h)
end

local WEIGHTS = {0.7, -1.2, 0.4, 1.9, -0.6, 0.9, -1.5, 0.3, 1.1, -0.8, 0.5, 1.4}

--- sum(op(inputs) * WEIGHTS) as a Lua number, for lists of values.
local function weighted(op, lists, attr)
  local args = {}
  for k = 1, #lists do args[k] = tensor(op, k, lists[k], "f64") end
  local y = numbers.flat(run(op, args, attr))
  local total = 0
  for i = 1, #y do total = total + y[i] * WEIGHTS[i] end
  return total
end

-- Kinks and ties make differences meaningless there.
local function smooth_lists(op)
  local lists = {}
  for k = 1, #op.inputs do
    lists[k] = values(op, k)
    for i, v in ipairs(lists[k]) do
      if v == 0 then lists[k][i] = 0.17 elseif v == 1.5 or v == 2 or v == -1 then lists[k][i] = v + 0.03 end
    end
  end
  return lists
end

local function check_gradient(op, attr)
  local lists = smooth_lists(op)
  local args = {}
  for k = 1, #lists do args[k] = tensor(op, k, lists[k], "f64") end
  local wanted = differentiable_inputs(op)
  for _, k in ipairs(wanted) do args[k]:requires_grad_() end
  local y = run(op, args, attr)
  y:backward(hm.tensor(WEIGHTS, {dtype = "f64"}))
  for _, k in ipairs(wanted) do
    local grad = numbers.flat(args[k].grad)
    for i = 1, #grad do
      local want = difference(function() return weighted(op, lists, attr) end, lists[k], i, 1e-5)
      assert(numbers.near(grad[i], want, 1e-6, 1e-7), ("%s: derivative by %s at value %d is %.9g, differences say %.9g"):format(
        op.name, op.inputs[k].name, i, grad[i], want))
    end
  end
end

--- Gradient of sum(grad_k * WEIGHTS reversed) by each input, against differences of grad_k.
local function first_gradients(op, lists, attr, create_graph)
  local args = {}
  for k = 1, #lists do args[k] = tensor(op, k, lists[k], "f64") end
  local wanted, leaves = differentiable_inputs(op), {}
  for _, k in ipairs(wanted) do leaves[#leaves + 1] = args[k]:requires_grad_() end
  local y = run(op, args, attr)
  -- not linear in y, so that the gradient which comes into backward hangs on the inputs too
  local loss = ((y + y * y * 0.25) * hm.tensor(WEIGHTS, {dtype = "f64"})):sum()
  return core.grad({loss}, leaves, {create_graph = create_graph}), leaves, wanted
end

local function sum_of_gradients(op, lists, attr)
  local grads = first_gradients(op, lists, attr, false)
  local total = 0
  for _, g in ipairs(grads) do
    for i, v in ipairs(numbers.flat(g)) do total = total + v * WEIGHTS[#WEIGHTS + 1 - i] end
  end
  return total
end

local function check_second(op, attr)
  local lists = smooth_lists(op)
  local grads, leaves, wanted = first_gradients(op, lists, attr, true)
  local backwards = {}
  for i = 1, #WEIGHTS do backwards[i] = WEIGHTS[#WEIGHTS + 1 - i] end
  local total
  for _, g in ipairs(grads) do
    local part = (g * hm.tensor(backwards, {dtype = "f64"})):sum()
    total = total and total + part or part
  end
  if not total.requires_grad then return end -- the gradient is constant in every input
  local second = core.grad({total}, leaves, {allow_unused = true})
  for j, k in ipairs(wanted) do
    local got = second[j] and numbers.flat(second[j])
    for i = 1, #lists[k] do
      local want = difference(function() return sum_of_gradients(op, lists, attr) end, lists[k], i, 1e-5)
      local have = got and got[i] or 0
      assert(numbers.near(have, want, 1e-5, 1e-6), ("%s: second derivative by %s at value %d is %.9g, not %.9g"):format(
        op.name, op.inputs[k].name, i, have, want))
    end
  end
end

--- Rows whose derivative is declared to go straight through (spec/reference/elementwise.lua says where): it is no
--- difference of values, which are steps.  First derivative, and the second of something that is not linear in y.
local function check_straight(op, attr, second)
  local args, lists = {}, {}
  for k = 1, #op.inputs do
    args[k] = inputs(op, "f64")[k]
    lists[k] = numbers.flat(args[k])
  end
  local x, weights = args[1]:requires_grad_(), hm.tensor(WEIGHTS, {dtype = "f64"})
  local y = run(op, args, attr)
  local loss = ((second and y + y * y * 0.25 or y) * weights):sum()
  local grad = core.grad({loss}, {x}, {create_graph = second})[1]
  if second then grad = core.grad({(grad * weights):sum()}, {x})[1] end
  for i, got in ipairs(numbers.flat(grad)) do
    local through = reference.straight_through[op.name](lists[1][i], lists[2] and lists[2][i], lists[3] and lists[3][i],
      attr)
    local want = through * (second and 0.5 * WEIGHTS[i] * WEIGHTS[i] or WEIGHTS[i])
    assert(numbers.near(got, want, 1e-12, 0), ("%s: derivative at value %d is %.9g, not %.9g"):format(op.name, i, got,
      want))
  end
end

-- ====== Cases ======

local function describe_op(op)
  local settings = samples.settings(op)
  --- aspect: what a pass proves, for the ledger that scripts/audit reads.
  local case = function(name, aspect, fn)
    it(op.name .. ": " .. name, function() proofs.check(aspect, op.name, fn) end)
  end

  it(op.name .. ": has a reference", function() assert.is_function(reference[op.name]) end)
  for s, attr in ipairs(settings) do
    local tag = s > 1 and (" with setting %d"):format(s) or ""
    case("f64 value" .. tag, "value", function()
      local args = inputs(op, "f64")
      numbers.assert_near(run(op, args, attr), expected(op, args, attr), 4e-14, 1e-15, op.name)
    end)
    case("f32 within its ulp bound" .. tag, "float32", function()
      local args = inputs(op, "f32")
      check_ulps(op, run(op, args, attr), expected(op, args, attr), "float32", op.ulp + 1e-6)
    end)
    for dtype, bound in pairs(HALF_BOUND) do
      case(dtype .. " rounded once" .. tag, dtype, function()
        local args = inputs(op, dtype)
        check_ulps(op, run(op, args, attr), expected(op, args, attr), dtype, bound)
      end)
    end
    if reference.straight_through[op.name] then
      case("gradient" .. tag, "gradient", function() check_straight(op, attr, false) end)
      case("second derivative" .. tag, "second derivative", function() check_straight(op, attr, true) end)
    end
    if #differentiable_inputs(op) > 0 then
      case("gradient" .. tag, "gradient", function() check_gradient(op, attr) end)
      case("second derivative" .. tag, "second derivative", function() check_second(op, attr) end)
    end
  end

  case("NaN, infinities and zeros", "special", function()
    local lists = {}
    for k = 1, #op.inputs do lists[k] = {} end
    for _, a in ipairs(SPECIAL) do
      for _, b in ipairs(SPECIAL) do
        local row = {a, b, a}
        for k, input in ipairs(op.inputs) do table.insert(lists[k], input.cls == "b" and b == b or (input.cls ~= "b" and row[k])) end
      end
    end
    for _, dtype in ipairs {"f64", "f32", "f16", "bf16"} do
      local args = {}
      for k = 1, #op.inputs do args[k] = tensor(op, k, lists[k], dtype) end
      local got, want = numbers.flat(run(op, args)), expected(op, args, {})
      for i = 1, #want do
        local number = type(want[i]) == "number"
        local ok = number and numbers.near(got[i], want[i], 0.01, 1e-3) or not number and got[i] == want[i]
        assert(ok, ("%s %s of (%s, %s): %s, expected %s"):format(op.name, dtype, lists[1][i], lists[2] and lists[2][i], got[i], want[i]))
      end
    end
  end)

  case("strides", "strides", function()
    for _, dtype in ipairs {"f32", "f16"} do
      local args, turned = inputs(op, dtype, {3, 4}), {}
      for k, t in ipairs(args) do turned[k] = t:t():contiguous():t() end
      numbers.assert_same(run(op, turned), run(op, args), op.name)
      for k, t in ipairs(args) do turned[k] = hm.stack({t, t}, 3):select(3, 2) end
      numbers.assert_same(run(op, turned), run(op, args), op.name)
    end
  end)

  case("empty and 0-dim tensors", "empty", function()
    local args = {}
    for k, input in ipairs(op.inputs) do args[k] = hm.zeros({0, 3}, {dtype = input.cls == "b" and "bool" or "f32"}) end
    assert.same({0, 3}, run(op, args).shape)
    for k = 1, #op.inputs do args[k] = tensor(op, k, {values(op, k)[3]}, "f64"):view({}) end
    local y = run(op, args)
    assert.same({}, y.shape)
    numbers.assert_near(y, expected(op, args, {}), 1e-12, 0, op.name)
  end)

  if #op.inputs >= 2 then
    case("broadcasting", "broadcast", function()
      local whole = inputs(op, "f32", {3, 4})
      for k = 1, #op.inputs do
        local args, full = {table.unpack(whole)}, {table.unpack(whole)}
        args[k] = whole[k]:narrow(1, 2, 1)
        full[k] = args[k]:expand({3, 4}):contiguous()
        numbers.assert_same(run(op, args), run(op, full), op.name)
        args[k] = whole[k]:narrow(2, 3, 1)
        full[k] = args[k]:expand({3, 4}):contiguous()
        numbers.assert_same(run(op, args), run(op, full), op.name)
      end
      local three = hm.zeros({3}, {dtype = op.inputs[1].cls == "b" and "bool" or "f32"})
      local four = {three}
      for k = 2, #op.inputs do four[k] = hm.zeros({4}, {dtype = op.inputs[k].cls == "b" and "bool" or "f32"}) end
      local ok, message = pcall(run, op, four)
      assert.is_false(ok)
      assert.matches(op.name .. ": shapes do not broadcast", message, 1, true)
    end)
  end

  if #op.inputs >= 2 and op.inputs[1].cls ~= "b" and op.inputs[2].cls ~= "b" and op.outputs[1].cls ~= "b" then
    case("numbers as operands", "numbers", function()
      local x = inputs(op, "f16")[1]
      local last = #op.inputs
      for _, v in ipairs {2, 1.0009765625001} do
        local with_number = run(op, last == 3 and {x, v, v} or {x, v})
        local as_f64 = hm.full({12}, v, {dtype = "f64"})
        local want = run(op, last == 3 and {x, as_f64, as_f64} or {x, as_f64})
        assert.equal("float16", with_number.dtype)
        check_ulps(op, with_number, numbers.flat(want), "float16", 0.51)
      end
    end)
  end

  if op.outputs[1].cls ~= "b" and op.inputs[1].cls ~= "b" and op.lua ~= "no" then
    case("in-place form", "in-place", function()
      local args = inputs(op, "f32")
      local want = run(op, args)
      local x = args[1]:clone()
      local back = x[op.name .. "_"](x, table.unpack(args, 2))
      assert.equal(x, back)
      numbers.assert_same(x, want, op.name)
    end)
  end

  if op.ints == "keep" then
    case("integers", "integers", function()
      for _, dtype in ipairs {"int64", "int32", "uint8"} do
        local lists = {{1, 2, 3, 4, 5, 6, 7}, {2, 3, 1, 2, 5, 1, 3}, {4, 1, 1, 2, 3, 4, 5}}
        local args = {}
        for k, input in ipairs(op.inputs) do
          local picks = {true, false, true, true, false, true, false}
          args[k] = input.cls == "b" and hm.tensor(picks) or hm.tensor(lists[k], {dtype = dtype})
        end
        local y = run(op, args)
        assert.equal(op.outputs[1].cls == "b" and "bool" or dtype, y.dtype)
        local want = expected(op, args, {})
        for i, w in ipairs(want) do
          if type(w) == "number" and dtype == "uint8" then want[i] = w % 256 end
        end
        numbers.assert_same(y, want, op.name .. " " .. dtype)
      end
    end)
  elseif op.ints == "float" then
    case("integers become float32", "integers", function()
      local args = {}
      for k = 1, #op.inputs do args[k] = hm.tensor({1, 2, 3}, {dtype = "i32"}) end
      assert.equal(op.outputs[1].cls == "b" and "bool" or "float32", run(op, args).dtype)
    end)
  end
end

describe("elementwise op", function()
  local count = 0
  for _, op in ipairs(core.ops()) do
    if op.family == "elementwise" and not op.generated then
      count = count + 1
      describe_op(op)
    end
  end
  it("rows were found", function() assert(count >= 30, count) end)
end)
