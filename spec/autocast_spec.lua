-- autocast_spec.lua -- autocast: for every row of the op table what its class letters say, in both half types; scopes, overrides,
-- coroutines; casts of weights and the gradients that come back through them; the dtypes of a whole training step.

local hm = require "halfmoon"
local core = require "halfmoon.core"
local numbers = require "spec.support.numbers"
local devices = require "spec.support.devices"
local samples = require "spec.support.samples"
local expect = require "spec.support.expect"

local nn, optim, amp = hm.nn, hm.optim, hm.amp
local F = nn.functional
local same, near, raises = numbers.assert_same, numbers.assert_near, expect.raises
local LONG = {f16 = "float16", bf16 = "bfloat16", f32 = "float32", f64 = "float64", i64 = "int64"}

-- Positive numbers that no half type holds exactly.
local function filled(shape, dtype, seed)
  local n, list = 1, {}
  for _, s in ipairs(shape) do n = n * s end
  for i = 1, n do list[i] = 1 + (i * 0.61803398875 + (seed or 0) * 0.377) % 1 end
  if dtype == "i64" or dtype == "u8" then for i = 1, n do list[i] = i % 2 end end
  return hm.tensor(list, {dtype = dtype}):view(shape)
end

--- Collects the records of every op that fn runs.
local function logged(fn, ...)
  local records = {}
  core.op_log(function(r) records[#records + 1] = r end)
  local result = table.pack(pcall(fn, ...))
  core.op_log(nil)
  if not result[1] then error(result[2], 0) end
  return records, table.unpack(result, 2, result.n)
end

-- ====== Every row ======

local function arguments(op, dtype)
  if op.family ~= "elementwise" then
    local sample = samples.of(op)[1]
    local args = samples.arguments(op, sample, LONG[dtype])
    for i = 1, #op.inputs do
      if core.is_tensor(args[i]) then args[i] = args[i]:to(hm.get_default_device()) end -- samples are made on the CPU
    end
    args[#op.inputs + 1] = sample[2] or {}
    return args
  end
  local args = {}
  for i, input in ipairs(op.inputs) do
    args[i] = input.cls == "b" and filled({4}, "i64"):ne(0) or filled({4}, dtype, i)
  end
  args[#op.inputs + 1] = {}
  return args
end

local function call(op, args)
  hm.manual_seed(1)
  return (core.call(op.name, table.unpack(args, 1, #op.inputs + 1)))
end

local function letters(op)
  local has = {}
  for _, input in ipairs(op.inputs) do
    has[input.cls] = true
    if input.mutated then has.mutated = true end
  end
  return has
end

local FIXED_OUTPUT = {f = "float32", i = "int64", u = "uint8", b = "bool"}

local function is_view(op) return op.family == "view" end

--- The dtype that the letters promise for the first output inside a region of dtype `low`.
local function promised(op, dtype, low)
  local has, cls = letters(op), op.outputs[1].cls
  if has.mutated or is_view(op) then return LONG[dtype] end
  if FIXED_OUTPUT[cls] then return FIXED_OUTPUT[cls] end
  if has.F then return "float32" end
  if has.L then return LONG[low] end
  return LONG[dtype]
end

--- The same call with operands cast by hand, outside the region.
local function by_hand(op, args, low)
  local cast = {}
  for i, input in ipairs(op.inputs) do
    cast[i] = args[i]
    if core.is_tensor(args[i]) and args[i].dtype:find("float", 1, true) and not letters(op).mutated then
      if input.cls == "L" then cast[i] = args[i]:to(low) elseif input.cls == "F" then cast[i] = args[i]:float() end
    end
  end
  cast[#op.inputs + 1] = args[#op.inputs + 1]
  return call(op, cast)
end

local function operand_record(records, op)
  for i = #records, 1, -1 do
    if records[i].op == op.name and #records[i].inputs > 0 then return records[i] end
  end
end

local function try(op, args)
  return pcall(function()
    local y = call(op, args)
    devices.wait()
    return y
  end)
end

describe("inside autocast", function()
  local rows = 0
  for _, op in ipairs(core.ops()) do
    local has = letters(op)
    if has.L or has.F or has.P or has.T then
      rows = rows + 1
      for _, low in ipairs {"f16", "bf16"} do
        for _, dtype in ipairs {"f32", low} do
          it(("%s: %s in a region of %s"):format(op.signature, dtype, low), function()
            local args = arguments(op, dtype)
            local records, y = logged(amp.autocast, low, call, op, args)
            assert.equal(promised(op, dtype, low), y.dtype)
            local want = by_hand(op, arguments(op, dtype), low)
            if want.dtype == y.dtype then same(y, want, op.name) end -- else the hand-cast run has rounded, or widened, at the end
            local record = operand_record(records, op)
            for i, input in ipairs(op.inputs) do
              if record and core.is_tensor(args[i]) and not has.mutated then
                local given = args[i].dtype
                assert.equal(input.cls == "L" and LONG[low] or given, record.inputs[i].dtype, op.name .. ": operand " .. input.name)
              end
            end
            if not has.L and op.family ~= "composite" then
              for _, r in ipairs(records) do assert.not_equal("cast", r.op, op.name .. " must read its operands as they are") end
            end
          end)
        end
        for _, dtype in ipairs {"f64", "i64"} do
          it(("%s: %s is left alone in a region of %s"):format(op.signature, dtype, low), function()
            local ok, plain = try(op, arguments(op, dtype))
            local ok_inside, inside = amp.autocast(low, try, op, arguments(op, dtype))
            assert.equal(ok, ok_inside)
            if not ok then return assert.equal(plain, inside) end
            assert.equal(plain.dtype, inside.dtype)
            same(inside, plain, op.name)
          end)
        end
      end
    end
  end
  it("rows were found", function() assert(rows > 60, rows) end)

  it("the widest operand decides in promote and follow", function()
    amp.autocast("f16", function()
      local half, single, double = filled({3}, "f16"), filled({3}, "f32"), filled({3}, "f64")
      assert.equal("float32", (half + single).dtype)
      assert.equal("float16", (half + 1.5).dtype)
      assert.equal("float64", (half * double).dtype)
      assert.equal("float32", hm.cat({half, single}, 1).dtype)
      assert.equal("float32", hm.stack({single, half}, 1).dtype)
      assert.equal("bool", half:lt(single).dtype)
      assert.equal("float32", hm.where(half:lt(2), half, single).dtype)
    end)
  end)

  it("operators: @ low, ^ float32, arithmetic as it comes", function()
    amp.autocast("bf16", function()
      local x = filled({2, 2}, "f32")
      assert.equal("bfloat16", x:matmul(x).dtype)
      assert.equal("float32", (x:matmul(x) ^ 2).dtype)
      assert.equal("bfloat16", (x:matmul(x) * 2).dtype)
      assert.equal("float32", x:matmul(x):softmax(2).dtype)
      assert.equal("bfloat16", x:matmul(x):mean().dtype)
      assert.equal("float32", x:matmul(x):sum().dtype)
    end)
  end)

  it("in-place forms keep their tensor's dtype", function()
    amp.autocast("f16", function()
      for _, dtype in ipairs {"f16", "f32"} do
        local x = filled({3}, dtype)
        assert.equal(LONG[dtype], x:exp_().dtype)
        assert.equal(LONG[dtype], x:add_(filled({3}, "f32")).dtype)
        assert.equal(LONG[dtype], x:copy_(filled({3}, "f32")).dtype)
      end
    end)
  end)

  it("float64 with a half operand is as without autocast", function()
    local a, b = filled({2, 2}, "f64"), filled({2, 2}, "f16")
    local wanted = {"matmul: dtypes differ", "f64[2,2]", "f16[2,2]"}
    raises(wanted, a.matmul, a, b)
    amp.autocast("f16", raises, wanted, a.matmul, a, b)
  end)

  it("matrix products of different dtypes agree, outside they do not", function()
    local a, b = filled({2, 2}, "f32"), filled({2, 2}, "f16")
    raises({"matmul: dtypes differ", "amp.autocast"}, a.matmul, a, b)
    assert.equal("float16", amp.autocast("f16", a.matmul, a, b).dtype)
    local c = filled({2, 2}, "bf16") -- the other half type is cast too
    assert.equal("float16", amp.autocast("f16", a.matmul, a, c).dtype)
  end)

  it("losses are float32", function()
    local logits, target = filled({4, 3}, "f16"), filled({4}, "i64")
    amp.autocast("f16", function()
      assert.equal("float32", F.cross_entropy(logits, target).dtype)
      assert.equal("float32", F.mse_loss(logits, logits * 2).dtype)
      assert.equal("float32", F.l1_loss(logits, logits * 2).dtype)
    end)
  end)
end)

-- ====== Scopes ======

local function state() return amp.autocast_state() end

local function low_of() -- what a matrix product comes out in
  local x = filled({2, 2}, "f32")
  return x:matmul(x).dtype
end

describe("an autocast scope", function()
  it("is off outside, defaults to float16, and takes names short and long", function()
    assert.is_false(state().enabled)
    assert.equal("float32", low_of())
    assert.equal("float16", amp.autocast(low_of))
    assert.equal("float16", amp.autocast(nil, low_of))
    assert.equal("bfloat16", amp.autocast("bf16", low_of))
    assert.equal("bfloat16", amp.autocast("bfloat16", low_of))
    assert.equal("bfloat16", amp.autocast({dtype = "bf16"}, low_of))
    local callable = setmetatable({}, {__call = low_of})
    assert.equal("float16", amp.autocast(callable))
    assert.equal("bfloat16", amp.autocast("bf16", callable))
    assert.is_false(state().enabled)
  end)

  it("as a guard", function()
    do
      local _ <close> = amp.autocast("f16")
      assert.equal("float16", low_of())
      assert.same({enabled = true, dtype = "float16", cache_enabled = true}, state())
    end
    assert.equal("float32", low_of())
    local guard = amp.autocast("bf16")
    assert.equal("bfloat16", low_of())
    guard:close()
    guard:close()
    assert.equal("float32", low_of())
  end)

  it("as a function: arguments, all results, nothing", function()
    local a, b, c = amp.autocast("f16", function(...) return ... end, 1, nil, 3)
    assert.equal(1, a)
    assert.is_nil(b)
    assert.equal(3, c)
    assert.equal(0, select("#", amp.autocast("f16", function() end)))
  end)

  it("an error inside restores, in both forms", function()
    raises("boom", amp.autocast, "f16", function() error("boom") end)
    assert.is_false(state().enabled)
    raises("boom", function()
      local _ <close> = amp.autocast("f16")
      error("boom")
    end)
    assert.is_false(state().enabled)
  end)

  it("nests, can be disabled inside, and changes dtype inside", function()
    amp.autocast("f16", function()
      assert.equal("float16", low_of())
      amp.autocast({enabled = false}, function()
        assert.equal("float32", low_of())
        amp.autocast("bf16", function() assert.equal("bfloat16", low_of()) end)
        assert.equal("float32", low_of())
      end)
      assert.equal("float16", low_of())
      amp.autocast("bf16", function() assert.equal("bfloat16", low_of()) end)
      assert.equal("float16", low_of())
    end)
    assert.equal("float32", low_of())
  end)

  it("a tensor made inside keeps its dtype in a disabled region, where the user casts", function()
    amp.autocast("f16", function()
      local x = filled({2, 2}, "f32")
      local h = x:matmul(x)
      amp.autocast({enabled = false}, function()
        raises("matmul: dtypes differ", h.matmul, h, x)
        assert.equal("float32", h:float():matmul(x).dtype)
      end)
      assert.equal("float16", h:matmul(x).dtype) -- re-entry needs no cast
    end)
  end)

  it("guards closed in any order end in the right state", function()
    local a = amp.autocast("f16")
    local b = amp.autocast("bf16")
    a:close()
    assert.equal("bfloat16", low_of())
    b:close()
    assert.equal("float32", low_of())
  end)

  it("refuses unknown options, dtypes and classes, and names the closest", function()
    raises({"autocast: unknown option", "dtype"}, amp.autocast, {dtyp = "f16"})
    raises({"autocast: unknown option", "cache_enabled"}, amp.autocast, {cache_enable = true})
    raises({"autocast: dtype must be float16 or bfloat16, got float32", "enabled = false"}, amp.autocast, "f32")
    raises("f99", amp.autocast, "f99")
    raises({"autocast: there is no op \"expp\"", "exp"}, amp.autocast, {ops = {expp = "low"}})
    raises({"autocast: unknown class \"lov\"", "low"}, amp.autocast, {ops = {exp = "lov"}})
    raises("autocast: backward must be", amp.autocast, {backward = "f16"})
    raises("autocast: argument 1 must be", amp.autocast, 16)
    raises("autocast: argument 2 must be a function, got the number 3", amp.autocast, "f16", 3)
    raises("no_grad: argument 1 must be a function, got the number 3", hm.no_grad, 3)
    assert.is_true(hm.is_grad_enabled())
    raises("autocast: ops must be a table", amp.autocast, {ops = "exp"})
    assert.is_false(state().enabled)
  end)

  it("dropped unclosed restores when it is collected, and warns", function()
    local said, status = expect.program [[
      local amp = hm.amp
      collectgarbage "stop" -- but for the calls below
      do amp.autocast("f16") end
      assert(amp.autocast_state().enabled)
      collectgarbage() collectgarbage()
      assert(not amp.autocast_state().enabled)
      do hm.no_grad() end
      collectgarbage() collectgarbage()
      assert(hm.is_grad_enabled())
      print "done"]]
    assert.equal(0, status, said)
    assert.matches("done", said)
    assert.matches("a scope of autocast was dropped without being closed", said, 1, true)
    assert.matches("a scope of no_grad or enable_grad was dropped without being closed", said, 1, true)
    assert.matches("local _ <close>", said, 1, true)
  end)
end)

describe("overridden classes", function()
  local x = filled({2, 2}, "f32")

  it("hold inside, are inherited, and end with the scope", function()
    amp.autocast({ops = {exp = "low", matmul = "f32", add = "low"}}, function()
      assert.equal("float16", x:exp().dtype)
      assert.equal("float32", x:matmul(x).dtype)
      assert.equal("float16", (x + x).dtype)
      amp.autocast({dtype = "bf16", ops = {log = "low"}}, function()
        assert.equal("bfloat16", x:exp().dtype)
        assert.equal("bfloat16", x:log().dtype)
      end)
      assert.equal("float32", x:log().dtype)
    end)
    amp.autocast("f16", function() assert.equal("float32", x:exp().dtype) end)
  end)

  it("float32 and follow read low operands, too", function()
    local h = x:half()
    amp.autocast({ops = {matmul = "f32", mul = "float32", exp = "follow", softmax = "promote"}}, function()
      assert.equal("float32", h:matmul(h).dtype)
      same(h:matmul(h), h:float():matmul(h:float()))
      assert.equal("float32", h:matmul(x).dtype)
      assert.equal("float32", (h * h).dtype)
      assert.equal("float16", h:exp().dtype)
      assert.equal("float32", x:exp().dtype)
      assert.equal("float16", h:softmax(1).dtype)
    end)
    amp.autocast({ops = {matmul = "promote"}}, function()
      assert.equal("float32", h:matmul(x).dtype)
      assert.equal("float16", h:matmul(h).dtype)
    end)
    amp.autocast({ops = {linear = "follow"}}, function()
      assert.equal("float32", core.call("linear", x, x).dtype)
      assert.equal("float16", core.call("linear", h, h).dtype)
    end)
  end)

  it("gradients come back through them", function()
    local w = filled({2, 2}, "f32"):requires_grad_()
    amp.autocast({ops = {matmul = "f32"}}, function() w:half():matmul(w):sum():backward() end)
    assert.equal("float32", w.grad.dtype)
  end)
end)

describe("coroutines", function()
  it("one made inside a region starts with autocast off", function()
    amp.autocast("f16", function()
      assert.equal("float32", coroutine.wrap(low_of)())
      assert.equal("float16", low_of())
    end)
  end)

  it("yielding inside a region leaks to nobody", function()
    local inside = coroutine.wrap(function()
      amp.autocast("bf16", function()
        coroutine.yield(low_of())
        coroutine.yield(low_of())
      end)
      coroutine.yield(low_of())
    end)
    assert.equal("bfloat16", inside())
    assert.equal("float32", low_of())
    amp.autocast("f16", function()
      assert.equal("bfloat16", inside())
      assert.equal("float16", low_of())
    end)
    assert.equal("float32", inside())
  end)

  it("one that dies or is collected inside a region leaves the others alone", function()
    local dead = coroutine.create(function() amp.autocast("f16", function() error("dies") end) end)
    assert.is_false((coroutine.resume(dead)))
    local left = coroutine.create(function() amp.autocast("f16", coroutine.yield) end)
    assert.is_true((coroutine.resume(left)))
    left = nil -- luacheck: ignore 311
    collectgarbage()
    collectgarbage()
    assert.equal("float32", low_of())
  end)

  it("backward runs without autocast wherever it is called", function()
    local w = filled({2, 2}, "f32"):requires_grad_()
    local y = w:matmul(w):sum()
    local records = logged(amp.autocast, "f16", function() y:backward() end)
    for _, r in ipairs(records) do
      for _, o in ipairs(r.outputs) do assert.equal("float32", o.dtype) end
    end
  end)
end)

-- ====== Casts of weights ======

describe("casts of a weight", function()
  local function counts(fn)
    local before = core.cast_stats()
    fn()
    local after = core.cast_stats()
    return after.misses - before.misses, after.hits - before.hits, after.casts - before.casts
  end
  local x = filled({2, 3}, "f16")
  local function weight() return filled({4, 3}, "f32", 5):requires_grad_() end
  local function use(w, n)
    for _ = 1, n or 1 do core.call("linear", x, w) end
  end

  it("are made once per version, also over regions and under no_grad", function()
    local w = weight()
    assert.same({1, 2, 0}, {counts(function() amp.autocast("f16", use, w, 3) end)})
    assert.same({0, 1, 0}, {counts(function() amp.autocast("f16", use, w) end)})
    assert.same({0, 1, 0}, {counts(function() hm.no_grad(amp.autocast, "f16", use, w) end)})
  end)

  it("are made again after an in-place change under no_grad, with the new values", function()
    local w = weight()
    amp.autocast("f16", function()
      use(w)
      hm.no_grad(function() w:mul_(2) end)
      assert.same({1, 1, 0}, {counts(function() use(w, 2) end)})
      same(core.call("linear", x, w), core.call("linear", x, (w:detach() * 1):half()))
      hm.no_grad(function() w[1] = 0 end)
      same(core.call("linear", x, w), core.call("linear", x, w:detach():half()))
      w:detach():fill_(3)
      same(core.call("linear", x, w), core.call("linear", x, w:detach():half()))
    end)
  end)

  it("are right after an optimizer step inside the region", function()
    local w = weight()
    local opt = optim.SGD({w}, {lr = 0.5})
    amp.autocast("f16", function()
      for _ = 1, 3 do
        core.call("linear", x, w):sum():backward()
        opt:step()
        same(core.call("linear", x, w), core.call("linear", x, w:detach():half()))
      end
    end)
  end)

  it("are right after steps of a convolution, too, whose weight the backend packs", function()
    for _, low in ipairs {"f16", "bf16"} do
      for _, kind in ipairs {"SGD", "AdamW"} do
        local w, b = filled({8, 8, 3, 3}, "f32", 2):requires_grad_(), filled({8}, "f32", 3):requires_grad_()
        local image = filled({2, 8, 6, 6}, "f32", 4)
        local opt = optim[kind]({w, b}, {lr = 0.1})
        for _ = 1, 3 do
          local y = amp.autocast(low, function() return core.call("conv2d", image, w, b) end)
          same(y, core.call("conv2d", image:to(low), w:detach():to(low), b:detach():to(low)))
          opt:zero_grad()
          y:float():mean():backward()
          opt:step()
        end
        hm.no_grad(function() w:mul_(0.5) end)
        local y = amp.autocast(low, function() return core.call("conv2d", image, w, b) end)
        same(y, core.call("conv2d", image:to(low), w:detach():to(low), b:detach():to(low)))
        same(core.call("conv2d", image, w, b), core.call("conv2d", image, w:detach():clone(), b))
      end
    end
  end)

  it("each dtype has its own", function()
    local w = weight()
    amp.autocast("f16", function()
      use(w)
      amp.autocast("bf16", function()
        assert.equal("bfloat16", core.call("linear", x, w).dtype)
        same(core.call("linear", x:bfloat16(), w), core.call("linear", x:bfloat16(), w:detach():bfloat16()))
      end)
      assert.equal("float16", core.call("linear", x, w).dtype)
      assert.same({0, 1, 0}, {counts(function() use(w) end)})
    end)
  end)

  it("cache_enabled = false casts at every use", function()
    local w = weight()
    assert.same({0, 0, 3}, {counts(function() amp.autocast({dtype = "f16", cache_enabled = false}, use, w, 3) end)})
  end)

  it("other tensors are cast at every use and not kept", function()
    local plain = filled({4, 3}, "f32")
    assert.same({0, 0, 2}, {counts(function() amp.autocast("f16", use, plain, 2) end)})
    local w = weight()
    assert.same({0, 0, 1}, {counts(function() amp.autocast("f16", use, w * 1) end)})
  end)

  it("a forward under no_grad first does not cost a later forward its weight gradient", function()
    local w = weight()
    amp.autocast("f16", function()
      hm.no_grad(function() use(w) end)
      core.call("linear", x, w):float():sum():backward()
    end)
    assert.is_not_nil(w.grad)
    near(w.grad[1], numbers.flat(x:float():sum(1)), 1e-6)
  end)

  it("repeated forwards under no_grad keep memory still", function()
    local w = weight()
    amp.autocast("f16", function()
      hm.no_grad(use, w)
      collectgarbage()
      collectgarbage()
      local before = core.memory_stats().live
      hm.no_grad(use, w, 50)
      collectgarbage()
      collectgarbage()
      assert.equal(before, core.memory_stats().live)
    end)
  end)

  it("a weight used twice adds its gradients in float32", function()
    local w = weight()
    amp.autocast("f16", function()
      local y = core.call("linear", x, w):float():sum() + core.call("linear", x * 0.0009765625, w):float():sum()
      y:backward()
    end)
    local tall = x:double():sum(1)
    near(w.grad[2], numbers.flat(tall * (1 + 2 ^ -10)), 3e-7)
  end)
end)

-- ====== Weight gradients ======

describe("weight gradients under autocast", function()
  -- What the gradient is for operands rounded to the low dtype, in float64.
  local function exact(low, seed_shape, fn, leaves)
    local doubles = {}
    for i, t in ipairs(leaves) do doubles[i] = t:detach():to(low):double():requires_grad_() end
    fn(table.unpack(doubles)):backward(filled(seed_shape, low, 9):double())
    return doubles
  end

  for _, low in ipairs {"f16", "bf16"} do
    local function check(name, shapes, seed_shape, fn, from)
      it(("%s in %s are float32 and were never rounded to it"):format(name, low), function()
        local leaves = {}
        for i, shape in ipairs(shapes) do leaves[i] = filled(shape, "f32", i):requires_grad_() end
        local y = amp.autocast(low, fn, table.unpack(leaves))
        assert.equal(LONG[low], y.dtype)
        y:backward(filled(seed_shape, low, 9))
        local want = exact(low, seed_shape, fn, leaves)
        for i = from, #leaves do
          assert.equal("float32", leaves[i].grad.dtype)
          near(leaves[i].grad, want[i].grad, 1e-6, 0, ("gradient %d"):format(i))
          -- the bound tells a rounded path from this one: rounding would err by much more somewhere
          local rounded, worst = numbers.flat(want[i].grad:to(low)), 0
          for k, v in ipairs(numbers.flat(want[i].grad)) do worst = math.max(worst, math.abs(rounded[k] - v) / math.abs(v)) end
          assert(worst > 1e-5, worst)
        end
      end)
    end

    check("linear", {{24, 16}, {8, 16}, {8}}, {24, 8}, function(x, w, b) return core.call("linear", x, w, b) end, 1)
    check("linear without a bias", {{24, 16}, {8, 16}}, {24, 8}, function(x, w) return core.call("linear", x, w) end, 1)
    check("matmul", {{24, 16}, {16, 8}}, {24, 8}, function(x, w) return x:matmul(w) end, 1)
    check("conv2d", {{4, 3, 6, 6}, {8, 3, 3, 3}, {8}}, {4, 8, 4, 4}, function(x, w, b) return core.call("conv2d", x, w, b) end, 1)
  end
end)

-- ====== A whole step ======

describe("a training step", function()
  local function small_cnn()
    hm.manual_seed(7)
    return nn.Sequential(nn.Conv2d(1, 8, 3, {padding = 1}), nn.ReLU(), nn.MaxPool2d(2),
      nn.Conv2d(8, 8, 3, {padding = 1}), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 10))
  end

  for _, low in ipairs {"f16", "bf16"} do
    it(("in %s: conv and linear read and save it, forward and backward; loss, masters, gradients are float32"):format(low), function()
      local model = small_cnn()
      local opt = optim.AdamW(model:parameters(), {lr = 1e-3})
      local scaler = amp.GradScaler {dtype = low, init_scale = low == "f16" and 1024 or nil}
      local x, y = hm.rand({4, 1, 8, 8}), hm.randint(0, 10, {4})
      local loss
      local records = logged(function()
        loss = amp.autocast(low, function() return F.cross_entropy(model(x), y) end)
        scaler:scale(loss):backward()
        assert.is_true((scaler:step(opt)))
        scaler:update()
      end)
      assert.equal("float32", loss.dtype)
      for name, p in model:named_parameters() do
        assert.equal("float32", p.dtype, name)
        assert.equal("float32", p.grad.dtype, name)
      end
      local seen, saved = {}, 0
      for _, r in ipairs(records) do
        if r.family == "conv" or r.family == "matmul" then
          seen[r.op] = (seen[r.op] or 0) + 1
          for _, operand in ipairs(r.inputs) do
            assert(operand.absent or operand.dtype == LONG[low], ("%s reads %s"):format(r.op, operand.dtype))
          end
          for _, s in ipairs(r.saved) do
            saved = saved + 1
            assert.equal(LONG[low], s.dtype, r.op .. " saved")
          end
          for _, o in ipairs(r.outputs) do
            local of_parameters = r.op:find("weight", 1, true) or r.op == "linear_backward_params"
            assert.equal(of_parameters and "float32" or LONG[low], o.dtype, r.op .. " writes")
          end
        elseif r.op == "relu" or r.op == "max_pool2d" then
          for _, s in ipairs(r.saved) do
            saved = saved + 1
            assert(s.dtype == LONG[low] or s.dtype == "uint8", r.op .. " saved " .. s.dtype)
          end
        elseif r.op == "cross_entropy" and #r.inputs > 0 then
          assert.equal(LONG[low], r.inputs[1].dtype)
          assert.equal("float32", r.outputs[1].dtype)
        elseif r.op:find("backward_bias", 1, true) then
          assert.equal(LONG[low], r.inputs[1].dtype)
          assert.equal("float32", r.outputs[1].dtype)
        end
      end
      -- records of saved tensors count as calls too, so there are at least this many
      assert(seen.conv2d >= 2 and seen.conv2d_backward_weight == 2 and seen.conv2d_backward_input == 1, "convolutions were logged")
      assert(seen.linear >= 1 and seen.linear_backward_params == 1 and seen.linear_backward_input == 1, "linear was logged")
      assert(saved >= 8, saved)
    end)
  end

  it("backward = \"float32\" computes gradients in float32 from low operands", function()
    local w1, w2 = filled({16, 8}, "f32", 1):requires_grad_(), filled({8, 4}, "f32", 2):requires_grad_()
    local x = filled({4, 16}, "f32", 3)
    local function forward() return x:matmul(w1):relu():matmul(w2) end
    local y = amp.autocast({dtype = "f16", backward = "float32"}, forward)
    assert.equal("float16", y.dtype)
    local seed = filled(y.shape, "f16", 4)
    local records = logged(function() y:backward(seed) end)
    for _, r in ipairs(records) do
      if r.family == "matmul" then
        for _, operand in ipairs(r.inputs) do assert.equal("float32", operand.dtype, r.op) end
        for _, o in ipairs(r.outputs) do assert.equal("float32", o.dtype, r.op) end
      end
    end
    -- exact but for float32: activations were rounded forward, gradients never
    local h = x:half():double():matmul(w1:detach():half():double()):half():double()
    local g = seed:double()
    near(w2.grad, h:t():matmul(g), 1e-6)
    near(w1.grad, x:half():double():t():matmul(g:matmul(w2:detach():half():double():t())), 1e-6)
  end)

  it("an activation that overflows half becomes infinite and is not hidden", function()
    amp.autocast("f16", function()
      local x = hm.full({2, 2}, 300)
      assert.equal(math.huge, x:matmul(x):amax():item())
      assert.equal("float32", (x:matmul(x)):sum().dtype)
    end)
  end)
end)
