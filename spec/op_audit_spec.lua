-- op_audit_spec.lua -- the op audit: walks the op table and makes for each row that is no formula, and for the rows
-- made from derivative formulas, their proof: value against plain loops in float64 (spec/reference/rows.lua), float32
-- and the half types against float64 within the row's bound, integers, derivatives against differences, second
-- derivatives (or an error that names the row without one), memory orders, empty tensors, NaN and infinities, in-place
-- forms, autocast class, and what is refused.
--
-- Inputs come from spec/support/samples.lua.  Elementwise rows themselves are proved by ops_elementwise_spec, CPU
-- against CUDA by cuda_parity_spec from the same samples.  What passed goes into the ledger (spec/support/proofs.lua)
-- that scripts/audit reads. One case alone:  make test SPEC=spec/op_audit_spec.lua FILTER='cumsum: float16'

local hm = require "halfmoon"
local core = require "halfmoon.core"
local autocast = require "spec.reference.autocast"
local devices = require "spec.support.devices"
local gradients = require "spec.support.gradients"
local naive = require "spec.reference.naive"
local numbers = require "spec.support.numbers"
local proofs = require "spec.support.proofs"
local rows = require "spec.reference.rows"
local samples = require "spec.support.samples"

local it = devices.cpu_cases("the audit's proofs; cuda_parity_spec compares the devices", it)
local inf, nan = math.huge, 0 / 0
local FLOATS = {"float64", "float32", "float16", "bfloat16"}
local INTEGERS = {"int64", "int32", "uint8", "bool"}

-- ====== What does not apply, with the reason ======

-- Rows whose derivative is not that of their own inputs taken one by one.
local NOT_BY_DIFFERENCES = {
  cross_entropy_backward = "lse counts as a function of x: cross_entropy's second derivative proves it",
}
-- Rows without plain loops in spec/reference/rows.lua: gradients, held against differences with the row they belong to.
local function is_gradient(op) return op.name:find("_backward", 1, true) ~= nil end

-- Rows for which NaN in an input need not come out as the loops say.
local NAN_APART = {
  one_hot = "takes ids",
  norm = "p = 0 counts what is not zero",
  fill_ = "takes a number", arange_ = "takes numbers", eye_ = "reads nothing", copy_ = "overwrites",
  uniform_ = "overwrites", normal_ = "overwrites", random_ = "overwrites", bernoulli_ = "overwrites",
}

-- ====== Running ======

local function copied(t) return core.is_tensor(t) and t:clone() or t end

--- Runs a row on inputs: those that it writes to are copies.
local function run(op, args, attrs)
  local list = {}
  for k = 1, #op.inputs do
    list[k] = args[k]
    if op.inputs[k].mutated then list[k] = copied(args[k]) end
  end
  return samples.call(op, list, attrs)
end

--- The attributes for the loops: those of the call, and where its random numbers begin.
local function attributes(op, sample, dtype)
  local attrs = {}
  for name, value in pairs(sample[2] or {}) do attrs[name] = value end
  hm.manual_seed(5)
  local state = hm.rng_state("cpu")
  attrs.rng = {state.seed, state.offset}
  attrs.wide = dtype == "float64" or samples.is_integer(dtype)
  return attrs
end

--- What the loops say for the values that the tensors really hold.
local function expected(op, args, attrs)
  local list = {}
  for k = 1, #op.inputs do list[k] = core.is_tensor(args[k]) and naive.of(args[k]) or args[k] end
  list[#op.inputs + 1] = attrs
  return table.pack(rows[op.name](table.unpack(list, 1, #op.inputs + 1)))
end

local function shape_text(shape) return "{" .. table.concat(shape, ",") .. "}" end

local function check_shape(got, want, what)
  local g, w = shape_text(got.shape), shape_text(want.shape)
  if g ~= w then error(("%s: shape %s, expected %s"):format(what, g, w), 0) end
end

local function largest(list)
  local top = 0
  for _, v in ipairs(list) do
    if type(v) == "number" and v == v and math.abs(v) > top and math.abs(v) < inf then top = math.abs(v) end
  end
  return top
end

--- Each value against the exact one: |difference| in ulp of the dtype, small values among large ones in that of a
--- sixteenth of the largest (of the terms where they cancel).  Raises above the bound; keeps the largest error.
local function check_ulps(op, got, exact, bound, what)
  local dtype, g, w = got.dtype, numbers.flat(got), numbers.flat(exact)
  if #g ~= #w then error(("%s: %d values, expected %d"):format(what, #g, #w), 0) end
  local scale = samples.cancels(op)
  local floor = dtype:find("float", 1, true) and numbers.ulp(scale and math.max(largest(w), scale) or largest(w) / 16,
    dtype)
  for i = 1, #w do
    local ok
    if type(w[i]) == "boolean" or not dtype:find("float", 1, true) then
      ok = g[i] == w[i]
    else
      local d = numbers.ulps(g[i], w[i], dtype)
      if d < inf then d = math.abs(g[i] - w[i]) == 0 and 0 or numbers.same(g[i], w[i]) and 0
        or math.abs(w[i]) == inf and d or math.min(d, math.abs(g[i] - w[i]) / floor) end
      ok = d <= bound
      if ok then proofs.measured(dtype, op.name, d) end
    end
    if not ok then
      error(("%s: value %d is %s, exact %s (bound %g ulp of %s)"):format(what, i, tostring(g[i]), tostring(w[i]), bound,
        dtype), 0)
    end
  end
end

-- How far a result may be from the exact one: float32 by the row; a half type by its one rounding and what float32
-- lost before.
local function bound_of(op, dtype)
  if op.name == "uniform_" and dtype ~= "float32" and dtype ~= "float64" then return 1.01 end -- held below `high`
  if dtype == "float16" then return 0.5 + (op.ulp + 1) * 2.0 ^ -13 end
  if dtype == "bfloat16" then return 0.5 + (op.ulp + 1) * 2.0 ^ -16 end
  if dtype == "float64" then return math.max(16, 4 * op.ulp) end
  return op.ulp + 1e-6
end

--- The samples of a row: its own, or for formulas tensors of its domain in one shape for each setting.
local function samples_of(op)
  if op.family ~= "elementwise" then return samples.of(op) end
  local list = {}
  for i, attrs in ipairs(samples.settings(op)) do
    local shapes = {}
    for k = 1, #op.inputs do shapes[k] = {13} end
    list[i] = {shapes, attrs}
  end
  return list
end

local function arguments(op, sample, dtype)
  if op.family ~= "elementwise" then return samples.arguments(op, sample, dtype) end
  local args = {}
  for k, input in ipairs(op.inputs) do
    local list = samples.DOMAIN[samples.is_integer(dtype) and "integer" or op.domain or "real"]
    args[k] = samples.tensor(list, input.cls == "b" and "bool" or dtype, sample[1][k], (k - 1) * 5)
  end
  return args
end

--- Rows that a backend may run in two steps: then the first result of the second step, made in float64 from what the
--- first step gave in the row's dtype.
local IN_TWO_STEPS = {
  linear_gelu_tanh = function(_, got) return core.call("gelu_tanh", got[2]:double()) end,
  linear_backward_input_gelu_tanh = function(args)
    local product = core.call("linear_backward_input", args[1], args[2])
    return core.call("gelu_tanh_backward", product:double(), args[3]:double())
  end,
}

-- Attributes that name a dtype make the row another one.
local function same_dtype(sample) return not (sample[2] and sample[2].dtype) end

-- ====== Checks ======

local function check_value(op)
  for i, sample in ipairs(samples.of(op)) do
    if samples.is_small(sample) and same_dtype(sample) then
      local args = arguments(op, sample, "float64")
      local got, want = run(op, args, sample[2]), expected(op, args, attributes(op, sample, "float64"))
      assert(want.n > 0, "the loops gave nothing")
      for n = 1, want.n do
        local what = ("%s, sample %d, result %d"):format(op.name, i, n)
        check_shape(got[n], want[n], what)
        numbers.assert_near(got[n], want[n], 1e-11, 1e-12 * math.max(1, largest(want[n])), what)
      end
    end
  end
end

local function check_precision(op, dtype)
  for i, sample in ipairs(samples_of(op)) do
    if same_dtype(sample) then
      local args = arguments(op, sample, dtype)
      local got = run(op, args, sample[2])
      -- Random numbers are not the same in float64: those rows have the loops.
      local random = op.family == "random"
      local exact = random and expected(op, args, attributes(op, sample, dtype)) or run(op, samples.widened(op, sample,
        args), sample[2])
      for n = 1, random and 1 or got.n do
        local what, bound = ("%s, sample %d, result %d"):format(op.name, i, n), bound_of(op, got[n].dtype)
        local ok, message = pcall(check_ulps, op, got[n], exact[n], bound, what)
        if not ok and n == 1 and IN_TWO_STEPS[op.name] then
          check_ulps(op, got[n], IN_TWO_STEPS[op.name](args, got), bound, what .. ", in two steps")
        elseif not ok then error(message, 0) end
      end
    end
  end
end

--- What a number or boolean becomes in an integer dtype: without its fraction, uint8 modulo 256.
local function as_integer(v, dtype)
  if dtype == "bool" then
    if type(v) == "number" then return v ~= 0 end
    return v
  end
  if type(v) == "boolean" then v = v and 1 or 0 end
  v = v < 0 and math.ceil(v) or math.floor(v)
  return dtype == "uint8" and v % 256 or v
end

local function check_integers(op)
  for _, dtype in ipairs(INTEGERS) do
    for i, sample in ipairs(samples.of(op)) do
      if samples.is_small(sample) and same_dtype(sample) then
        local args = arguments(op, sample, dtype)
        local ok, got = pcall(run, op, args, sample[2])
        local what = ("%s, sample %d of %s"):format(op.name, i, dtype)
        if not ok then
          assert(op.ints == "no" or dtype == "bool" or tostring(got):find(op.name, 1, true),
            what .. ": " .. tostring(got))
        elseif rows[op.name] and op.ints == "keep" then
          local want = expected(op, args, attributes(op, sample, dtype))
          for n = 1, want.n do
            check_shape(got[n], want[n], what)
            for p, v in ipairs(want[n]) do want[n][p] = as_integer(v, got[n].dtype) end
            numbers.assert_same(got[n], want[n], what)
          end
        end
      end
    end
  end
end

--- The row as a function of those inputs that have a derivative, and these inputs; nil where there is none.
local function as_function(op, sample)
  if not same_dtype(sample) and sample[2].dtype ~= "float64" then return nil end
  local args, leaves, places = arguments(op, sample, "float64"), {}, {}
  for k, input in ipairs(op.inputs) do
    if input.differentiable and not input.mutated and core.is_tensor(args[k]) and args[k]:is_floating_point() then
      leaves[#leaves + 1], places[#places + 1] = args[k], k
    end
  end
  if #leaves == 0 then return nil end
  return function(...)
    local list = table.move(args, 1, #op.inputs, 1, {})
    for j, k in ipairs(places) do list[k] = (select(j, ...)) end
    return (run(op, list, sample[2])[1])
  end, leaves
end

local function each_function(op, visit)
  local count = 0
  for _, sample in ipairs(samples.of(op)) do
    if samples.is_small(sample) and not sample[3] then
      local fn, leaves = as_function(op, sample)
      if fn then
        visit(fn, leaves)
        count = count + 1
      end
    end
  end
  assert(count > 0, op.name .. ": no sample of samples.lua is small enough for differences")
end

local by_name = {}
for _, op in ipairs(core.ops()) do by_name[op.name] = op end

local function check_second(op)
  each_function(op, function(fn, leaves)
    local ok, message = pcall(gradients.check_second, fn, leaves)
    if ok then return proofs.note("second", op.name) end
    local dead = tostring(message):match("([%w_]+) has no derivative: this gradient cannot be differentiated once more")
    if not dead then error(message, 0) end
    assert(by_name[dead] and not by_name[dead].differentiable, tostring(message))
    proofs.note("second", op.name, "refused: " .. dead)
  end)
end

-- Memory orders of the same values.
local LAYOUTS = {
  transposed = function(t)
    local n = t:dim()
    return n >= 2 and t:transpose(1, n):contiguous():transpose(1, n) or t
  end,
  ["one of two"] = function(t) return hm.stack({t, t}, t:dim() + 1):select(t:dim() + 1, 2) end,
  reversed = function(t) -- all dims in the opposite order in memory
    local dims = {}
    for d = 1, t:dim() do dims[d] = t:dim() + 1 - d end
    return #dims > 0 and t:permute(dims):contiguous():permute(dims) or t
  end,
}

--- Same values, but for the order in which a sum was made.
local function check_same(op, got, want, what)
  check_shape(got, want, what)
  if op.family == "elementwise" or op.ulp == 0 or not got:is_floating_point() then return numbers.assert_same(got, want,
    what) end
  check_ulps(op, got, want, got.dtype == "float32" and 2 * op.ulp or 1.01, what)
end

local function check_strides(op)
  for _, dtype in ipairs {"float32", "float16"} do
    for i, sample in ipairs(samples_of(op)) do
      if same_dtype(sample) then
        local args = arguments(op, sample, dtype)
        local want = run(op, args, sample[2])
        for name, lay in pairs(LAYOUTS) do
          local turned = {}
          for k = 1, #op.inputs do turned[k] = core.is_tensor(args[k]) and lay(args[k]) or args[k] end
          local what = ("%s, sample %d, %s"):format(op.name, i, name)
          local ok, got = pcall(samples.call, op, turned, sample[2])
          -- view() raises where strides forbid it
          if ok then
            for n = 1, want.n do check_same(op, got[n], want[n], what) end
          else
            assert(op.name == "view" and tostring(got):find("reshape", 1, true), what .. ": " .. tostring(got))
          end
        end
        if op.family ~= "view" and not op.inputs[1].mutated then -- an input of stride 0
          for k = 1, #op.inputs do
            local t = args[k]
            if core.is_tensor(t) and t:dim() > 0 and t:numel() > 0 and t.shape[1] > 1 then
              local flat, wide = {table.unpack(args, 1, #op.inputs)}, {table.unpack(args, 1, #op.inputs)}
              wide[k] = t:narrow(1, 1, 1):expand(t.shape)
              flat[k] = wide[k]:contiguous()
              local a, b = samples.call(op, wide, sample[2]), samples.call(op, flat, sample[2])
              for n = 1, a.n do check_same(op, a[n], b[n], ("%s, sample %d, expanded %s"):format(op.name, i,
                op.inputs[k].name)) end
            end
          end
        end
      end
    end
  end
end

--- A sample with nothing in it: its first size becomes 0 wherever it leads.
local function emptied(sample)
  local size = sample[1][1][1]
  if not size then return nil end
  local out, attrs = {}, {}
  for k, shape in pairs(sample[1]) do
    out[k] = shape
    if type(shape) == "table" and shape[1] == size then
      out[k] = table.move(shape, 2, #shape, 2, {0})
      out[k].kind = shape.kind
    end
  end
  for name, value in pairs(sample[2] or {}) do
    attrs[name] = value
    if name == "shape" and value[1] == size then attrs.shape = table.move(value, 2, #value, 2, {0}) end
  end
  return {out, attrs}
end

-- Composites let the rows that they are made of speak.
local SPEAKS = {amax_backward = "expand_reduced", select_pick = "gather"}

local function names_row(op, message)
  for _, name in ipairs {op.name, SPEAKS[op.name] or op.name, op.name:match("^(.-)_backward") or op.name} do
    if tostring(message):find(name .. ":", 1, true) then return true end
  end
  return false
end

local function check_empty(op)
  for i, sample in ipairs(samples_of(op)) do
    local empty = emptied(sample)
    -- ids into nothing are refused or not: nothing is read
    if empty and same_dtype(sample) and samples.limit(op, empty) ~= 0 then
      local args = arguments(op, empty, "float32")
      local what = ("%s, sample %d emptied"):format(op.name, i)
      local ok, got = pcall(run, op, args, empty[2])
      if not ok then assert(names_row(op, got), what .. ": " .. tostring(got))
      elseif rows[op.name] then
        local want = expected(op, args, attributes(op, empty, "float32"))
        for n = 1, want.n do
          check_shape(got[n], want[n], what)
          numbers.assert_near(got[n], want[n], 1e-5, 1e-5, what)
        end
      end
    end
  end
end

--- NaN, +inf and -inf in each floating input in turn: they come out where the loops have them.
local function check_special(op)
  for i, sample in ipairs(samples.of(op)) do
    if samples.is_small(sample) and same_dtype(sample) then
      local args = arguments(op, sample, "float32")
      for k = 1, #op.inputs do
        local t = args[k]
        if core.is_tensor(t) and t:is_floating_point() and t:numel() >= 3 and not op.inputs[k].mutated then
          local list = numbers.flat(t)
          list[2], list[#list] = nan, i % 2 == 0 and inf or -inf
          local changed = {table.unpack(args, 1, #op.inputs)}
          changed[k] = hm.tensor(list):view(t.shape)
          local what = ("%s, sample %d, NaN in %s"):format(op.name, i, op.inputs[k].name)
          local got, want = run(op, changed, sample[2]), expected(op, changed, attributes(op, sample, "float32"))
          local g = numbers.flat(got[1])
          for p, w in ipairs(want[1]) do
            local ok
            if type(w) == "boolean" then ok = g[p] == w else ok = numbers.near(g[p], w, 1e-4, 1e-4 * math.max(1,
              largest(want[1]))) end
            assert(ok, ("%s: value %d is %s, the loops say %s"):format(what, p, tostring(g[p]), tostring(w)))
          end
        end
      end
    end
  end
end

--- NaN everywhere in one input of a gradient: some of it must come out.
local function check_nan_arrives(op)
  for i, sample in ipairs(samples.of(op)) do
    local args = arguments(op, sample, "float32")
    local t = args[1]
    if core.is_tensor(t) and t:is_floating_point() and t:numel() > 0 then
      local changed = {table.unpack(args, 1, #op.inputs)}
      changed[1] = hm.full(t.shape, nan)
      local y = run(op, changed, sample[2])[1]
      assert(y:isnan():any():item(), ("%s, sample %d: NaN in %s is lost"):format(op.name, i, op.inputs[1].name))
    end
  end
end

local IDS_UNREAD = {cross_entropy_backward_by_x = "compares its targets with ignore_index and reads nothing by them"}

local function letter_class(op)
  local has = {}
  for _, input in ipairs(op.inputs) do has[input.cls] = true end
  return has.L and "low" or has.F and "float32" or has.P and "promote" or has.T and "follow" or "own"
end

--- Every one of these must raise, and name the row.
local function check_refusals(op)
  local sample = samples_of(op)[1]
  local args = arguments(op, sample, "float32")
  local attrs = sample[2] or {}
  local function refused(what, list, with)
    local ok, message = pcall(function()
      local out = samples.call(op, list, with)
      devices.wait()
      return out
    end)
    assert(not ok, ("%s: %s is not refused"):format(op.name, what))
    assert(names_row(op, message), ("%s: %s: the message does not name the row: %s"):format(op.name, what,
      tostring(message)))
  end
  local function changed(name, value)
    local copy = {}
    for k, v in pairs(attrs) do copy[k] = v end
    copy[name] = value
    return copy
  end
  local function with(k, value)
    local list = table.move(args, 1, #op.inputs, 1, {})
    for j = 1, #op.inputs do if op.inputs[j].mutated then list[j] = copied(args[j]) end end
    list[k] = value
    return list
  end
  refused("a string for an operand", with(1, "x"), attrs)
  refused("an unknown attribute", with(1, args[1]), changed("no_such_attribute", 1))
  for _, attr in ipairs(op.attrs) do
    if attr.type == "dim" then refused(attr.name .. " = 9", with(1, args[1]), changed(attr.name, 9)) end
    if attr.type == "dims" then refused(attr.name .. " = {9}", with(1, args[1]), changed(attr.name, {9})) end
    if attr.type == "enum" then refused("an unknown " .. attr.name, with(1, args[1]), changed(attr.name,
      "no_such_choice")) end
  end
  for k, input in ipairs(op.inputs) do
    if input.cls == "i" and type(sample[1][k]) == "table" and not IDS_UNREAD[op.name] then
      refused("floating ids", with(k, args[k]:float()), attrs)
      local limit = samples.limit(op, sample)
      for _, id in ipairs {limit, -1} do
        refused(("id %d of %d"):format(id, limit), with(k, hm.full(args[k].shape, id, {dtype = "i64"})), attrs)
      end
    end
  end
  if op.ints == "no" and op.family ~= "random" then
    local list = table.move(args, 1, #op.inputs, 1, {})
    for k, t in pairs(list) do if core.is_tensor(t) and t:is_floating_point() then list[k] = t:to("i64") end end
    refused("integers", list, attrs)
  end
end

-- ====== Cases ======

local function describe_row(op)
  local function case(name, aspect, fn)
    it(op.name .. ": " .. name, function()
      if aspect == "refusals" or aspect == "empty" then
        fn()
        proofs.note(aspect, op.name) -- it may have run nothing
      elseif aspect then proofs.check(aspect, op.name, fn) else fn() end
    end)
  end
  local formula = op.family == "elementwise"
  if formula and not op.generated then
    return case("refusals", "refusals", function() check_refusals(op) end)
  end
  if not samples.has(op) then
    return case("has a sample", nil, function() samples.of(op) end)
  end
  for _, dtype in ipairs(FLOATS) do
    if dtype ~= "float64" then
      case(dtype .. " against float64", dtype, function() check_precision(op, dtype) end)
    end
  end
  case("memory orders", "strides", function() check_strides(op) end)
  case("empty", "empty", function() check_empty(op) end)
  case("refusals", "refusals", function() check_refusals(op) end)
  if formula then return end

  if rows[op.name] then
    case("float64 value", "value", function() check_value(op) end)
    if op.ints ~= "no" then case("integers", "integers", function() check_integers(op) end) end
    if not NAN_APART[op.name] then case("NaN and infinities", "special", function() check_special(op) end) end
  else
    case("is a gradient, and NaN goes through", "special", function()
      assert(is_gradient(op), op.name .. ": spec/reference/rows.lua has no plain loops for it")
      check_nan_arrives(op)
    end)
  end
  if op.differentiable and not NOT_BY_DIFFERENCES[op.name] then
    case("derivative", "gradient", function() each_function(op, gradients.check) end)
    case("second derivative", nil, function()
      proofs.check("second derivative", op.name, function() check_second(op) end)
    end)
  end
  local method = core.Tensor[op.name .. "_"]
  if method and op.lua ~= "no" and #op.inputs == 1 and #op.attrs == 0 then
    case("in-place form", "in-place", function()
      local x = arguments(op, samples.of(op)[1], "float32")[1]
      local want = run(op, {x})[1]
      local y = x:clone()
      assert(method(y) == y)
      numbers.assert_same(y, want, op.name)
    end)
  end
end

-- Gradients of two rows in one pass, as the backward of a function that is both.
local WINDOW = {kernel_size = {3, 2}, stride = {2, 1}, padding = {1, 0}}
local PAIRS = {
  max_pool2d_relu_backward = hm.autograd.Function("relu_of_max_pool2d", {
    forward = function(ctx, x)
      local pooled, index = core.call("max_pool2d", x, WINDOW)
      local out = core.call("relu", pooled)
      ctx:save_for_backward(index, out)
      ctx.shape = x.shape
      return out
    end,
    backward = function(ctx, g)
      local index, out = ctx:saved()
      local attrs = {shape = ctx.shape}
      for name, value in pairs(WINDOW) do attrs[name] = value end
      return core.call("max_pool2d_relu_backward", g:contiguous(), index, out, attrs)
    end,
  }),
}
for name, fn in pairs(PAIRS) do
  it("op " .. name .. ": derivative", function()
    local list = {}
    for i = 1, 60 do list[i] = (i * 37 % 61 - 30.5) / 7 end -- all apart, and none near 0
    proofs.check("derivative", name, function() gradients.check(fn, {hm.tensor(list, {dtype = "f64"}):view({2, 1, 6, 5})}) end)
  end)
end

-- Gradients that go through a layer's activation on their way out of the layer above it: the walk makes them (core/pairs.c).
for name, layer in pairs {linear_backward_input_relu = "linear_relu", linear_backward_input_gelu_tanh = "linear_gelu_tanh"} do
  it("op " .. name .. ": derivative", function()
    local inputs = {}
    for i, shape in ipairs {{3, 5}, {4, 5}, {4}, {2, 4}, {2}} do
      local list = {}
      for k = 1, samples.count(shape) do list[k] = ((k * 37 + i * 11) % 61 - 30.5) / 40 end -- no sum of them comes near 0
      inputs[i] = hm.tensor(list, {dtype = "f64"}):view(shape)
    end
    proofs.check("derivative", name, function()
      gradients.check(function(x, w1, b1, w2, b2) return (core.call("linear", (core.call(layer, x, w1, b1)), w2, b2)) end, inputs)
    end)
  end)
end

describe("op", function()
  local count = 0
  for _, op in ipairs(core.ops()) do
    count = count + 1
    describe_row(op)
    if not op.generated then
      it(op.name .. ": its autocast class", function()
        local want = autocast.class(op.name)
        local has = letter_class(op)
        assert(has == want, ("%s: the letters of its signature say %s, the lists %s"):format(op.name, has, want))
        proofs.note("class", op.name)
      end)
    end
  end
  it("rows were found", function()
    assert(count > 400, count)
    for name in pairs(autocast.all()) do assert(by_name[name], "spec/reference/autocast.lua names no row: " .. name) end
    for name in pairs(rows) do assert(by_name[name], "spec/reference/rows.lua names no row: " .. name) end
  end)

  -- What the checks would not see would be of no use.
  it("wrong values would be seen", function()
    local op = {name = "x", family = "reduce", ulp = 1}
    local one = hm.tensor {1.0}
    assert(pcall(check_ulps, op, one, {1 + 2.0 ^ -24}, 1, "x"))
    assert(not pcall(check_ulps, op, one, {1 + 2.0 ^ -20}, 1, "x"))
    assert(not pcall(check_ulps, op, hm.tensor {nan}, {1.0}, 1, "x"))
    assert(not pcall(check_ulps, op, one, {nan}, 1, "x"))
    assert(not pcall(check_ulps, op, one, {inf}, 1, "x"))
    assert(not pcall(proofs.check, "value", "tanh", function() return one:exp() end))
  end)
  teardown(function() print("  worst error in ulp: " .. proofs.errors()) end)
end)
