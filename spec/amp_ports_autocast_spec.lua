-- amp_ports_autocast_spec.lua -- what PyTorch's tests assert of autocast, under the ids A1 to A17 (its GPU tests) and C1 to C11 (its CPU
-- and shared ones).  One table of classes serves all devices here, so both lists are checked on whichever device the specs run on.
--
-- Of each function in a list: the dtype that comes out; the same from the method; the bits of a run with operands cast by hand
-- and autocast off; autocast on inside, off in a disabled region inside it, on again behind it, off outside.
--
-- What is left out, with the reason, stands in spec/reference/amp_ports.lua.

local hm = require "halfmoon"
local core = require "halfmoon.core"
local numbers = require "spec.support.numbers"
local expect = require "spec.support.expect"

local nn, amp = hm.nn, hm.amp
local F = nn.functional
local same, near, raises = numbers.assert_same, numbers.assert_near, expect.raises

local function rand(shape, dtype)
  return (hm.rand(shape) * 0.5 + 0.25):to(dtype or "f32")
end

--- Operands: shapes of floating ones (dtypes in turn from `kinds`), other tensors as they are.
local function operands(shapes, kinds)
  hm.manual_seed(1)
  local list = {}
  for i, shape in ipairs(shapes) do
    if type(shape) == "table" and type(shape[1]) ~= "table" then list[i] = rand(shape, kinds[(i - 1) % #kinds + 1])
    else list[i] = shape() end
  end
  return list
end

local function assert_on(low) assert.same({true, low}, {amp.autocast_state().enabled, amp.autocast_state().dtype}) end

local LONG = {f16 = "float16", bf16 = "bfloat16", f32 = "float32"}

--- Runs fn in a region and checks all that the lists check.  hand: dtype that the control's operands have.
local function check(name, fn, args, low, want, hand)
  local cast = {}
  for i, a in ipairs(args) do
    local floating = core.is_tensor(a) and a:is_floating_point()
    cast[i] = floating and hand and a:to(hand) or a
  end
  assert.is_false(amp.autocast_state().enabled)
  local y = amp.autocast(low, function()
    assert_on(LONG[low])
    local out = fn(table.unpack(args))
    if out.dtype ~= want then error(("%s in %s: expected %s, came %s"):format(name, low, want, out.dtype)) end
    local control = amp.autocast({enabled = false}, function()
      assert.is_false(amp.autocast_state().enabled)
      return fn(table.unpack(cast))
    end)
    assert_on(LONG[low])
    same(out, control, name)
    return out
  end)
  assert.is_false(amp.autocast_state().enabled)
  local method = core.Tensor[name]
  if method and core.is_tensor(args[1]) and hm[name] == fn then
    same(amp.autocast(low, method, table.unpack(args)), y, name .. " as a method")
  end
end

local function ids(n, range) return function() return hm.randint(0, range, n) end end

local LOW = {
  {"matmul", hm.matmul, {{3, 4}, {4, 2}}}, {"mm", hm.mm, {{3, 4}, {4, 2}}}, {"bmm", hm.bmm, {{2, 3, 4}, {2, 4, 2}}},
  {"mv", hm.mv, {{3, 4}, {4}}}, {"addmm", hm.addmm, {{3, 2}, {3, 4}, {4, 2}}}, {"addmv", hm.addmv, {{3}, {3, 4}, {4}}},
  {"baddbmm", hm.baddbmm, {{2, 3, 2}, {2, 3, 4}, {2, 4, 2}}},
  {"einsum", function(a, b) return hm.einsum("ij,jk->ik", a, b) end, {{3, 4}, {4, 2}}},
  {"conv1d", F.conv1d, {{2, 3, 8}, {4, 3, 3}, {4}}}, {"conv2d", F.conv2d, {{2, 3, 6, 6}, {4, 3, 3, 3}, {4}}},
  {"conv_transpose2d", F.conv_transpose2d, {{2, 3, 4, 4}, {3, 2, 3, 3}, {2}}},
  {"prelu", F.prelu, {{3, 4}, {4}}},
}
local LOW_NN = {
  {"linear", F.linear, {{3, 4}, {2, 4}, {2}}},
  {"scaled_dot_product_attention", F.scaled_dot_product_attention, {{2, 2, 5, 4}, {2, 2, 5, 4}, {2, 2, 5, 4}}},
}
local LINALG = {
  {"dot", function(a, b) return a:view(1, -1):matmul(b:view(-1, 1)) end, {{6}, {6}}}, -- vecdot as a product
  {"multi_dot", function(a, b, c) return a:matmul(b):matmul(c) end, {{2, 3}, {3, 4}, {4, 2}}},
}
local SINGLE = {}
for _, name in ipairs {
  "acos", "asin", "cosh", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh", "tan", "softplus", "sum",
  "prod", "norm",
} do
  SINGLE[#SINGLE + 1] = {name, hm[name], {{3, 4}}}
end
for _, entry in ipairs {
  {"pow", function(a) return a ^ 2.5 end, {{3, 4}}}, {"pow", hm.pow, {{3, 4}, {3, 4}}}, {"pow", function(a) return 2 ^ a end, {{3, 4}}},
  {"cumsum", function(a) return hm.cumsum(a, 2) end, {{3, 4}}}, {"cumprod", function(a) return hm.cumprod(a, 2) end, {{3, 4}}},
  {"softmax", function(a) return hm.softmax(a, 2) end, {{3, 4}}}, {"log_softmax", function(a) return hm.log_softmax(a, 2) end, {{3, 4}}},
  {"logsumexp", function(a) return hm.logsumexp(a, 2) end, {{3, 4}}},
  {"layer_norm", function(a) return F.layer_norm(a, {4}) end, {{3, 4}}},
  {"group_norm", function(a) return F.group_norm(a, 2) end, {{3, 4, 5}}},
} do
  SINGLE[#SINGLE + 1] = entry
end
local SINGLE_NN = {
  {"softplus", F.softplus, {{3, 4}}}, {"nll_loss", F.nll_loss, {{3, 4}, ids({3}, 4)}},
  {"cross_entropy", F.cross_entropy, {{3, 4}, ids({3}, 4)}}, {"l1_loss", F.l1_loss, {{3, 4}, {3, 4}}},
  {"smooth_l1_loss", F.smooth_l1_loss, {{3, 4}, {3, 4}}}, {"huber_loss", F.huber_loss, {{3, 4}, {3, 4}}},
  {"mse_loss", F.mse_loss, {{3, 4}, {3, 4}}}, {"kl_div", F.kl_div, {{3, 4}, {3, 4}}},
  {"bce_with_logits", F.binary_cross_entropy_with_logits, {{3, 4}, {3, 4}}},
  {"interpolate", function(a) return F.interpolate(a, {scale_factor = 2, mode = "bilinear"}) end, {{1, 2, 3, 3}}},
  {"cosine_similarity", F.cosine_similarity, {{3, 4}, {3, 4}}},
}
local PROMOTE = {
  {"addcdiv", hm.addcdiv, {{3}, {3}, {3}}}, {"addcmul", hm.addcmul, {{3}, {3}, {3}}}, {"atan2", hm.atan2, {{3}, {3}}},
  {"index_put", function(a, v) return hm.index_put(a, {hm.tensor({0, 2}, {dtype = "i64"})}, v) end, {{3}, {2}}},
  {"dot", hm.dot, {{6}, {6}}}, {"tensordot", function(a, b) return hm.tensordot(a, b, 1) end, {{2, 3}, {3, 2}}},
  {"scatter_add", function(a, v) return hm.scatter_add(a, 1, hm.tensor({0, 2}, {dtype = "i64"}), v) end, {{3}, {2}}},
}
local BUILTIN = {
  {"eq", hm.eq, {{3}, {3}}, "bool"}, {"ge", hm.ge, {{3}, {3}}, "bool"}, {"gt", hm.gt, {{3}, {3}}, "bool"},
  {"le", hm.le, {{3}, {3}}, "bool"}, {"lt", hm.lt, {{3}, {3}}, "bool"},
  {"ne", hm.ne, {{3}, {3}}, "bool"}, {"add", hm.add, {{3}, {3}}, "float32"},
  {"div", hm.div, {{3}, {3}}, "float32"}, {"mul", hm.mul, {{3}, {3}}, "float32"}, {"sub", hm.sub, {{3}, {3}}, "float32"},
  {"cat", function(a, b) return hm.cat({a, b}, 1) end, {{3}, {3}}, "float32"},
  {"stack", function(a, b) return hm.stack({a, b}, 1) end, {{3}, {3}}, "float32"},
}

--- A case for each function of a list.
local function list(id, entries, low, kinds, want, hand)
  for k, entry in ipairs(entries) do
    it(("%s: %s (%d) in %s"):format(id, entry[1], k, low), function()
      check(entry[1], entry[2], operands(entry[3], kinds), low, want or entry[4], hand)
    end)
  end
end

describe("autocast as in PyTorch, the lists", function()
  list("A1", LOW, "f16", {"f32"}, "float16", "f16")
  list("A2", LOW, "bf16", {"f32"}, "bfloat16", "bf16")
  list("A3", SINGLE, "f16", {"f16"}, "float32", "f32")
  list("A4", PROMOTE, "f16", {"f16", "f32"}, "float32", "f32")
  list("A5", BUILTIN, "f16", {"f16", "f32"})
  list("A6 _nn_fp16", LOW_NN, "f16", {"f32"}, "float16", "f16")
  list("A6 _nn_bf16", LOW_NN, "bf16", {"f32"}, "bfloat16", "bf16")
  list("A6 _nn_fp32", SINGLE_NN, "f16", {"f16"}, "float32", "f32")
  list("A7", LINALG, "f16", {"f32"}, "float16", "f16")
  list("C1 bf16", LOW, "bf16", {"f32"}, "bfloat16", "bf16")
  list("C1 f16, nn", LOW_NN, "f16", {"f32"}, "float16", "f16")
  list("C2 bf16", SINGLE, "bf16", {"bf16"}, "float32", "f32")
  list("C2 f16, nn", SINGLE_NN, "f16", {"bf16"}, "float32", "f32")
  list("C2 bf16, nn", SINGLE_NN, "bf16", {"bf16"}, "float32", "f32")
  list("C3", {BUILTIN[11], BUILTIN[12]}, "bf16", {"bf16", "f32"}, "float32", "f32")
  list("C4", BUILTIN, "bf16", {"bf16", "f32"})

  it("A8: operators", function()
    local h, s = rand({3, 3}, "f16"), rand({3, 3})
    amp.autocast("f16", function()
      assert.equal("float16", s:matmul(s).dtype)
      assert.equal("float32", (h ^ 2).dtype)
      assert.equal("float32", (2 ^ h).dtype)
      for _, y in ipairs {h + s, h - s, h * s, h / s, s + h} do assert.equal("float32", y.dtype) end
      for _, y in ipairs {h:lt(s), h:eq(s), h:ge(s)} do assert.equal("bool", y.dtype) end
      same(h * s, amp.autocast({enabled = false}, function() return h:float() * s end))
    end)
  end)
end)

describe("autocast as in PyTorch", function()
  it("A9: binary_cross_entropy is banned, and works in a disabled region", function()
    for _, dtype in ipairs {"f16", "f32"} do
      local x, y = rand({3, 4}, dtype), rand({3, 4}, dtype)
      for _, low in ipairs {"f16", "bf16"} do
        amp.autocast(low, raises, {"unsafe inside autocast", "binary_cross_entropy_with_logits"}, F.binary_cross_entropy, x, y)
      end
      local inside = amp.autocast("f16", amp.autocast, {enabled = false}, F.binary_cross_entropy, x:float(), y:float())
      same(inside, F.binary_cross_entropy(x:float(), y:float()))
    end
  end)

  it("A10: float64 and integers keep the dtype they have without autocast", function()
    local function dtype_of(fn, ...)
      local ok, y = pcall(fn, ...)
      return ok and y.dtype or "error"
    end
    for _, low in ipairs {"f16", "bf16"} do
      for _, group in ipairs {LOW, SINGLE, PROMOTE, BUILTIN} do
        for _, entry in ipairs(group) do
          for _, dtype in ipairs {"f64", "i64", "i32"} do
            local args = operands(entry[3], {"f32"})
            for i, a in ipairs(args) do if a:is_floating_point() then args[i] = a:to(dtype) end end
            local plain = dtype_of(entry[2], table.unpack(args))
            if dtype == "f64" then assert.not_equal("error", plain, entry[1]) end
            assert.equal(plain, amp.autocast(low, dtype_of, entry[2], table.unpack(args)), entry[1] .. " of " .. dtype)
          end
        end
      end
    end
    local d, h = rand({2, 2}, "f64"), rand({2, 2}, "f16")
    amp.autocast("f16", raises, "dtypes differ", hm.mm, d, h)
  end)

  --- x times w, which notes the region and the dtypes it sees.
  local function product(seen, fwd, bwd)
    return hm.autograd.Function("Product", {
      forward = fwd(function(ctx, a, b, more)
        seen.forward = {amp.autocast_state().enabled, a.dtype, b.dtype, more and more.inner[1].dtype}
        ctx:save_for_backward(a, b)
        return a:matmul(b)
      end),
      backward = bwd(function(ctx, g)
        local a, b = ctx:saved()
        local ga, gb = g:matmul(b:t()), a:t():matmul(g)
        seen.backward = {amp.autocast_state().enabled, g.dtype, ga.dtype, gb.dtype}
        return ga, gb
      end),
    })
  end

  it("A11: a custom function runs in the region, forward and backward", function()
    for _, low in ipairs {"float16", "bfloat16"} do
      local seen = {}
      local fn = product(seen, amp.custom_fwd, amp.custom_bwd)
      local x, w = rand({8, 8}):requires_grad_(), rand({8, 8}):requires_grad_()
      local y = amp.autocast(low, fn, x, w)
      assert.equal(low, y.dtype)
      assert.same({true, "float32", "float32"}, seen.forward)
      y:float():sum():backward()
      assert.same({true, low, low, low}, seen.backward)
      assert.equal("float32", x.grad.dtype)
      assert.is_false(amp.autocast_state().enabled)
      -- backward called inside a region of another dtype, or inside none: the same
      local again = amp.autocast(low, fn, x, w):float():sum()
      amp.autocast(low == "float16" and "bf16" or "f16", function() again:backward() end)
      assert.same({true, low, low, low}, seen.backward)
    end
  end)

  it("A11: custom_bwd without custom_fwd is an error, and so are other things than functions", function()
    local seen = {}
    local x, w = rand({4, 4}):requires_grad_(), rand({4, 4}):requires_grad_()
    local plain = product(seen, function(fn) return fn end, amp.custom_bwd)
    local y = amp.autocast("f16", plain, x, w)
    raises("forward was not wrapped by amp.custom_fwd", function() y:float():sum():backward() end)
    raises("expected a function", amp.custom_fwd, 3)
    raises("cast_inputs", amp.custom_fwd, print, {cast_inputs = "i64"})
    raises("unknown option", amp.custom_fwd, print, {cast_input = "f32"})
  end)

  it("A12: cast_inputs casts, also inside tables, and turns autocast off; outside a region it does nothing", function()
    local seen = {}
    local fn = product(seen, function(f) return amp.custom_fwd(f, {cast_inputs = "f32"}) end, amp.custom_bwd)
    local x, w = rand({8, 8}, "f16"):requires_grad_(), rand({8, 8}, "f16"):requires_grad_()
    local inner = {inner = {rand({2}, "f16"), "text", hm.ones({1}, {dtype = "i64"})}}
    local y = amp.autocast("f16", fn, x, w, inner)
    assert.equal("float32", y.dtype)
    assert.same({false, "float32", "float32", "float32"}, seen.forward)
    y:sum():backward()
    assert.same({false, "float32", "float32", "float32"}, seen.backward)
    local outside = fn(x, w, inner)
    assert.equal("float16", outside.dtype)
    assert.same({false, "float16", "float16", "float16"}, seen.forward)
    outside:float():sum():backward()
    assert.same({false, "float16", "float16", "float16"}, seen.backward)
  end)

  it("A15: RNN, LSTM and GRU give float16, and gradients near a float32 run's", function()
    local count = 0
    for _, kind in ipairs {"RNN", "LSTM", "GRU"} do
      for _, layers in ipairs {1, 2} do
        for _, bias in ipairs {true, false} do
          for _, first in ipairs {true, false} do
            for _, both in ipairs {true, false} do
              for _, input_dtype in ipairs {"f32", "f16"} do
                count = count + 1
                hm.manual_seed(count)
                local rnn = nn[kind](4, 3, {num_layers = layers, bias = bias, batch_first = first, bidirectional = both})
                local x = hm.randn({3, 2, 4}):to(input_dtype)
                local out = amp.autocast("f16", function() return (rnn(x)) end)
                assert.equal("float16", out.dtype)
                out:float():sum():backward()
                local grads = {}
                for name, p in rnn:named_parameters() do
                  assert.equal("float32", p.grad.dtype)
                  grads[name] = p.grad
                end
                rnn:zero_grad();
                (rnn(x:float())):sum():backward()
                for name, p in rnn:named_parameters() do near(grads[name], numbers.flat(p.grad), 2e-2, 2e-2, kind .. " " .. name) end
              end
            end
          end
        end
      end
    end
    assert.equal(96, count)
  end)

  it("A16: repeated forwards under no_grad inside one region keep memory still", function()
    local layer, x = nn.Linear(64, 64), hm.randn({8, 64})
    amp.autocast("f16", function()
      hm.no_grad(function()
        layer(x)
        collectgarbage() collectgarbage()
        local before = core.memory_stats().live
        for _ = 1, 30 do layer(x) end
        collectgarbage() collectgarbage()
        assert.equal(before, core.memory_stats().live)
      end)
    end)
  end)

  it("A17: checkpointed blocks inside autocast give float16 and a working backward", function()
    local model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    local x = hm.randn({8, 8}, {requires_grad = true})
    local function run(how)
      for _, p in ipairs(model:parameters()) do p.grad = nil end
      x.grad = nil
      local y = amp.autocast("f16", function()
        local h = x
        for i = 1, 3 do h = how(model[i], h) end
        return h
      end)
      assert.equal("float16", y.dtype)
      y:float():sum():backward()
      return model[1].weight.grad, x.grad
    end
    local w1, x1 = run(hm.checkpoint)
    local w2, x2 = run(function(layer, h) return layer(h) end)
    same(w1, w2)
    same(x1, x2)
  end)

  it("C5: an LSTM with bfloat16 weights and a float32 input: an error outside autocast, fine inside", function()
    local rnn = nn.LSTM(4, 3):bfloat16()
    local x = hm.randn({2, 1, 4})
    raises("dtype", rnn, x)
    assert.equal("bfloat16", (amp.autocast("bf16", rnn, x)).dtype)
  end)

  it("C6: enabled = false is silent about any dtype", function()
    local said = expect.stderr(function()
      amp.autocast({enabled = false}, function() assert.is_false(amp.autocast_state().enabled) end)
    end)
    assert.equal("", said)
  end)

  it("C8: one cast of a weight serves forward and a backward that enters autocast again", function()
    local before
    local fn = hm.autograd.Function("Twice", {
      forward = amp.custom_fwd(function(ctx, x, w)
        ctx:save_for_backward(x, w)
        return F.linear(x, w)
      end),
      backward = amp.custom_bwd(function(ctx, g)
        local x, w = ctx:saved()
        return g:matmul(w), g:t():matmul(x)
      end),
    })
    local x, w = rand({3, 3}), rand({3, 3}):requires_grad_()
    amp.autocast("bf16", function()
      before = amp.cast_stats()
      local y = F.linear(F.linear(x, w), w)
      assert.equal(1, amp.cast_stats().misses - before.misses)
      y:float():sum():backward()
      assert.equal(1, amp.cast_stats().misses - before.misses)
    end)
    w.grad = nil
    hm.no_grad(function() w:add_(0) end) -- another version of the weight: its cast is not there yet
    amp.autocast("bf16", function()
      before = amp.cast_stats()
      local y = fn(fn(x, w), w) -- backward of a Function enters the region again
      y:float():sum():backward()
      local after = amp.cast_stats()
      assert.same({1, 3}, {after.misses - before.misses, after.hits - before.hits}) -- of the weight: once, then from the cache
    end)
    assert(w.grad:isfinite():all():item())
  end)

  it("C9: without the cache there are exactly two casts", function()
    local x, w = rand({3, 3}, "bf16"), rand({3, 3}):requires_grad_()
    amp.autocast({dtype = "bf16", cache_enabled = false}, function()
      local before = amp.cast_stats()
      F.linear(F.linear(x, w), w)
      local after = amp.cast_stats()
      assert.same({0, 0, 2}, {after.misses - before.misses, after.hits - before.hits, after.casts - before.casts})
    end)
  end)

  it("C10: float16 is the dtype when none is named", function()
    amp.autocast(function() assert_on "float16" end)
    amp.autocast({}, function() assert_on "float16" end)
  end)

  it("C11: a dtype that is none, or is no string, is refused", function()
    raises("f99", amp.autocast, "f99", print)
    raises("autocast: argument 1", amp.autocast, 16, print)
  end)
end)

-- ====== Apex's tests of casts ======

describe("casts as in Apex's tests", function()
  it("test_basic_casts: linear and conv half; softmax, norms and losses float32; relu and batch_norm as they come", function()
    local h, s = rand({4, 6}, "f16"), rand({4, 6})
    amp.autocast("f16", function()
      for _, x in ipairs {h, s} do
        assert.equal("float16", nn.Linear(6, 3)(x).dtype)
        assert.equal("float16", nn.Conv2d(1, 2, 3)(x:view(1, 1, 4, 6)).dtype)
        assert.equal("float32", F.softmax(x, 2).dtype)
        assert.equal("float32", nn.GroupNorm(2, 6)(x).dtype)
        assert.equal("float32", F.mse_loss(x, x * 2).dtype)
        assert.equal(x.dtype, F.relu(x).dtype)
        assert.equal(x.dtype, nn.BatchNorm1d(6)(x).dtype)
        assert.equal("float16", x:matmul(x:t()).dtype)
        assert.equal("float32", (x ^ 2).dtype)
        assert.equal("float32", x:sum().dtype)
        assert.equal(x.dtype, x:cpu().dtype)
      end
    end)
  end)

  it("test_promotion: the widest operand wins; in-place forms keep their own dtype", function()
    local h, s = rand({3}, "f16"), rand({3})
    amp.autocast("f16", function()
      assert.equal("float32", hm.atan2(h, s).dtype)
      assert.equal("float16", hm.atan2(h, h).dtype)
      assert.equal("float32", (h * s).dtype)
      assert.equal("float32", hm.cat({h, s}, 1).dtype)
      assert.equal("float16", hm.cat({h, h}, 1).dtype)
      assert.equal("float16", h:clone():add_(s).dtype)
      assert.equal("float32", s:clone():add_(h).dtype)
      assert.equal("float16", h:clone():exp_().dtype) -- in Apex an error; here in-place forms are left alone
    end)
  end)

  it("test_cache: weights train, evaluate and train again inside one region", function()
    for _, dtype in ipairs {"f16", "f32"} do
      for _, use in ipairs {
        function(x, w) return F.linear(x, w) end, function(x, w) return x:matmul(w):float() * w:exp() end, function(x, w) return x * w end,
      } do
        local w, x = rand({4, 4}, dtype):requires_grad_(), rand({4, 4}, "f16")
        amp.autocast("f16", function()
          for round = 1, 3 do
            if round == 2 then
              hm.no_grad(use, x, w)
            else
              w.grad = nil
              use(x, w):float():sum():backward()
              assert.is_not_nil(w.grad)
              assert.equal(w.dtype, w.grad.dtype)
              hm.no_grad(function() w:sub_(w.grad * 0.125) end)
              same(use(x, w), amp.autocast("f16", function() return use(x, w:detach():clone():requires_grad_()) end))
            end
          end
        end)
      end
    end
  end)
end)
