-- pairs_spec.lua -- nodes whose backward runs as one (core/pairs.c): a linear above a linear_relu or linear_gelu_tanh.  They run so where
-- nobody can tell the difference, and gradients are then those of linear and the activation apart, on the CPU to the bit.  And the one call
-- for a layer's weight and bias (linear_backward_params).

local hm = require "halfmoon"
local core = require "halfmoon.core"
local devices = require "spec.support.devices"
local expect = require "spec.support.expect"
local gradients = require "spec.support.gradients"
local numbers = require "spec.support.numbers"

local amp, autograd = hm.amp, hm.autograd
local raises = expect.raises
local nan, inf = 0 / 0, math.huge

local ACTIVATIONS = {"relu", "gelu_tanh"}
-- How many pairs run where the upper weight wants no gradient: with relu none on cuda, whose bits may hide a NaN (pairs.c).
local RESTRICTED = {relu = devices.pick(1, nil), gelu_tanh = 1}
local DTYPES = {"f32", "f16", "bf16", "f64"}
-- |difference| over the largest, on devices that round once where the CPU rounds twice, or add in another order.
local NEAR = {float32 = 1e-5, float16 = 8e-3, bfloat16 = 6e-2, float64 = 1e-12}

-- ====== Layers, made twice ======

--- linear and an activation in one node.
local function fused(act, x, w, b) return (core.call("linear_" .. act, x, w, b)) end

--- The same as two.
local function apart(act, x, w, b) return core.call(act, core.call("linear", x, w, b)) end

local function linear(x, w, b) return core.call("linear", x, w, b) end

--- Numbers of both signs, none of them 0.
local function values(shape, seed, dtype)
  local n, list = 1, {}
  for _, s in ipairs(shape) do n = n * s end
  for i = 1, n do list[i] = ((i * 61 + seed * 29) % 127 - 63.25) / 64 end
  return hm.tensor(list, {dtype = dtype or "f32"}):view(shape)
end

--- Drops the gradients of leaves: those made under create_graph hold their graph, and it the leaves.
local function drop_gradients(leaves) for _, t in ipairs(leaves) do t.grad = nil end end

local function leaf(shape, seed, dtype) return values(shape, seed, dtype):requires_grad_() end

--- Weights and biases of layers of the given widths; frozen: names ("w1", "b2") of those that want no gradient, no_bias: none is made.
---@param widths integer[]
---@param o {dtype: string?, frozen: table<string, boolean>?, no_bias: boolean?, x: integer[]?, x_grad: boolean?}
local function network(widths, o)
  local net = {w = {}, b = {}, leaves = {}}
  local function own(name, shape, seed)
    local t = values(shape, seed, o.dtype)
    if (o.frozen or {})[name] then return t end
    net.leaves[#net.leaves + 1] = t:requires_grad_()
    return t
  end
  for i = 1, #widths - 1 do
    net.w[i] = own("w" .. i, {widths[i + 1], widths[i]}, i)
    if not o.no_bias then net.b[i] = own("b" .. i, {widths[i + 1]}, 10 + i) end
  end
  net.x = values(o.x or {5, widths[1]}, 20, o.dtype)
  if o.x_grad then net.leaves[#net.leaves + 1] = net.x:requires_grad_() end
  return net
end

-- ====== Running ======

--- The ops that the engine's walk runs in fn, counted by name, and in order.
local function backward_ops(fn)
  local ops = {}
  core.op_log(function(r)
    if not r.backward then return end
    ops[r.op] = (ops[r.op] or 0) + 1
    ops[#ops + 1] = r.op
  end)
  local ok, message = pcall(fn)
  core.op_log(nil)
  if not ok then error(message, 0) end
  return ops
end

--- How many pairs ran as one.
local function pairs_in(ops) return (ops.linear_backward_input_relu or 0) + (ops.linear_backward_input_gelu_tanh or 0) end

local function text(ops) return table.concat(ops, " ") end

--- Both NaN, or equal, zeros of the same sign.
local function identical(a, b)
  if a ~= b then return a ~= a and b ~= b end
  return a ~= 0 or 1 / a == 1 / b
end

--- Equal to the bit on the CPU, unless a tolerance is given: of the largest value.
local function same(got, want, what, tolerance)
  assert.equal(want ~= nil, got ~= nil, what)
  if want == nil then return end
  assert.equal(want.dtype, got.dtype, what)
  assert.same(want.shape, got.shape, what)
  local g, w, top = numbers.flat(got), numbers.flat(want), 0
  if devices.is_cpu and not tolerance then
    for i, v in ipairs(w) do
      if not identical(g[i], v) then error(("%s: value %d is %s, expected %s"):format(what, i, g[i], v), 2) end
    end
    return
  end
  for _, v in ipairs(w) do if v == v and math.abs(v) < inf then top = math.max(top, math.abs(v)) end end
  numbers.assert_near(g, w, 0, math.max(NEAR[want.dtype], tolerance or 0) * top, what)
end

--- Runs build(layer) with fused layers and with layers apart: it returns a function that walks backward, and what then holds the
--- gradients (an array of leaves, or of functions that give a tensor).  All must be the same.  Returns the ops of the fused walk,
--- and its gradients.
local function compare(build, tolerance)
  local function run(layer)
    local walk, held = build(layer)
    local ops, out = backward_ops(walk), {}
    for i, t in ipairs(held) do
      if type(t) == "function" then out[i] = t() else
        out[i] = t.grad and t.grad:detach()
        drop_gradients {t}
      end
    end
    return ops, out, #held
  end
  local ops, got, n = run(fused)
  local plain, want = run(apart)
  assert.equal(0, pairs_in(plain))
  for i = 1, n do same(got[i], want[i], "gradient " .. i, tolerance) end
  return ops, got
end

--- A chain of layers with these activations (false: none), as build() for compare(); seeds the result's gradient.
local function chain(net, acts)
  return function(layer)
    local h = net.x
    for i, act in ipairs(acts) do
      if act then h = layer(act, h, net.w[i], net.b[i]) else h = linear(h, net.w[i], net.b[i]) end
    end
    drop_gradients(net.leaves)
    local seed = values(h.shape, 30, h.dtype)
    return function() h:backward(seed) end, net.leaves
  end
end

--- A hidden layer under a second one, for what comes between: use(h, y, env) may add a consumer before and after the second layer.
local function two(act, o)
  o = o or {}
  return function(layer)
    local x, w1, b1 = leaf({5, 4}, 1), leaf({6, 4}, 2), leaf({6}, 3)
    local w2, b2 = leaf({3, 6}, 4), leaf({3}, 5)
    local h = layer(act, x, w1, b1)
    local first = o.before and o.before(h)
    local y = linear(o.between and o.between(h) or h, w2, b2)
    local last = o.after and o.after(h)
    local loss = (y * values(y.shape, 6)):sum()
    if first then loss = loss + first end
    if last then loss = loss + last end
    local held = {x, w1, b1, w2, b2}
    local more = o.finish and o.finish {loss = loss, h = h, y = y, leaves = held}
    return more or function() loss:backward(o.options) end, held
  end
end

-- ====== When they run ======

describe("linear above a linear with an activation: one op makes the gradient between them", function()
  for _, act in ipairs(ACTIVATIONS) do
    local through = "linear_backward_input_" .. act
    for _, dtype in ipairs(DTYPES) do
      it(("a chain of three layers of %s, %s"):format(act, dtype), function()
        local net = network({4, 6, 5, 3}, {dtype = dtype, x_grad = true})
        local ops = compare(chain(net, {act, act, false}))
        assert.equal(2, ops[through], text(ops))
        assert.equal(3, ops.linear_backward_params, text(ops))
        assert.equal(1, ops.linear_backward_input, text(ops)) -- by x
        assert.is_nil(ops[act .. "_backward"], text(ops))
      end)

      it(("inputs of three dims and of one, %s, %s"):format(act, dtype), function()
        for _, shape in ipairs {{2, 3, 4}, {4}, {2, 1, 3, 4}} do
          local ops = compare(chain(network({4, 6, 5, 3}, {dtype = dtype, x = shape, x_grad = true}), {act, act, false}))
          assert.equal(2, ops[through], text(ops))
        end
      end)
    end

    it("the last layer has one too: its own gradient goes through it first, " .. act, function()
      local ops = compare(chain(network({4, 6, 5, 3}, {x_grad = true}), {act, act, act}))
      assert.equal(2, ops[through], text(ops))
      assert.equal(1, ops[act .. "_backward"], text(ops))
      assert.equal(1, ops.linear_backward_input, text(ops))
      ops = compare(chain(network({4, 6}, {x_grad = true}), {act})) -- nothing to pair with
      assert.equal("", (text(ops):gsub(act .. "_backward", "", 1):gsub(" linear_backward_params linear_backward_input", "", 1)), text(ops))
    end)

    it("no biases, " .. act, function()
      local ops = compare(chain(network({4, 6, 5, 3}, {no_bias = true, x_grad = true}), {act, act, false}))
      assert.equal(2, ops[through], text(ops))
      assert.is_nil(ops.linear_backward_params, text(ops))
      assert.equal(3, ops.linear_backward_weight, text(ops))
    end)

    it("some parameters are frozen, " .. act, function()
      for _, frozen in ipairs {{"w2"}, {"b2"}, {"w1"}, {"b1"}, {"w1", "b1"}, {"w2", "b2"}, {"w3", "b3"}, {"b1", "b2", "b3"},
        {"w1", "b1", "w2", "b2", "w3", "b3"}} do
        local set = {}
        for _, name in ipairs(frozen) do set[name] = true end
        local ops = compare(chain(network({4, 6, 5, 3}, {frozen = set, x_grad = true}), {act, act, false}))
        local pairs_run = (set.w2 and RESTRICTED[act] or not set.w2 and 1 or 0) + (set.w3 and RESTRICTED[act] or not set.w3 and 1 or 0)
        assert.equal(pairs_run > 0 and pairs_run or nil, ops[through], text(ops))
      end
    end)

    it("everything below is frozen: there is nothing to go on to, " .. act, function()
      local ops = compare(chain(network({4, 6, 5, 3}, {frozen = {w1 = true, b1 = true}}), {act, act, false}))
      assert.equal(1, ops[through], text(ops))
      ops = compare(chain(network({4, 6, 5, 3}, {frozen = {w1 = true, b1 = true, w2 = true, b2 = true}}), {act, act, false}))
      assert.equal("linear_backward_params", text(ops))
    end)

    it("an empty batch, " .. act, function()
      local ops = compare(chain(network({4, 6, 3}, {x = {0, 4}, x_grad = true}), {act, false}))
      assert.equal(1, ops[through], text(ops))
    end)

    it("NaN and infinities in what comes and in what was kept, " .. act, function()
      -- relu's bits on cuda are the library's, and what they say of NaN too; the gradient of w2 is NaN either way
      local odd = devices.pick(nan, act == "relu" and 1 or nan)
      local function build(layer)
        local x = hm.tensor({{1, odd, 0, 2}, {inf, 1, 1, 1}, {-inf, 1, -1, 2}, {0.5, -0.25, 1, 3}}):requires_grad_()
        local w1, b1, w2, b2 = leaf({5, 4}, 1), leaf({5}, 2), leaf({3, 5}, 3), leaf({3}, 4)
        local y = linear(layer(act, x, w1, b1), w2, b2)
        local g = hm.tensor {{1, 2, 3}, {1, 1, 1}, {nan, 0, 1}, {inf, -1, 0}}
        return function() y:backward(g) end, {x, w1, b1, w2, b2}
      end
      assert.equal(1, compare(build)[through])
    end)

    it("a NaN in the hidden layer shows in a gradient, whatever bits of it are kept, " .. act, function()
      for _, frozen in ipairs {false, true} do
        local x = hm.tensor {{1, nan, 0, 2}, {1, 1, 1, 1}}
        local w1, b1, w2 = leaf({8, 4}, 1), leaf({8}, 2), leaf({3, 8}, 3):requires_grad_(not frozen)
        linear(core.call("linear_" .. act, x, w1, b1), w2):sum():backward()
        assert.falsy(core.all((frozen and w1 or w2).grad:isfinite()):item())
      end
    end)

    it("weights that are views and results of ops, recorded before the layer below, " .. act, function()
      local function build(layer)
        local x, a, b = leaf({5, 4}, 1), leaf({4, 6}, 2), leaf({12, 3}, 3)
        local w1, w2 = a:t(), (b * 2):t():narrow(2, 2, 6)
        local y = linear(layer(act, x, w1), w2)
        return function() y:backward(values({5, 3}, 7)) end, {x, a, b}
      end
      assert.equal(1, compare(build)[through])
    end)

    it("a weight that was made of the hidden result, or after it, " .. act, function()
      for _, of_hidden in ipairs {true, false} do
        local function build(layer)
          local x, w1, v = leaf({3, 4}, 1), leaf({6, 4}, 2), leaf({3, 6}, 3)
          local h = layer(act, x, w1)
          local w2 = of_hidden and h * v or v:exp()
          local y = linear(h, w2)
          return function() y:backward(values({3, 3}, 7)) end, {x, w1, v}
        end
        assert.equal(0, pairs_in(compare(build)))
      end
    end)

    it("one weight in several layers, " .. act, function()
      local function build(layer)
        local x, w, b = leaf({3, 4}, 1), leaf({4, 4}, 2), leaf({4}, 3)
        local y = linear(layer(act, layer(act, x, w, b), w, b), w, b)
        return function() y:backward(values({3, 4}, 7)) end, {x, w, b}
      end
      assert.equal(2, compare(build)[through])
    end)
  end

  it("different activations, one above the other", function()
    local net = network({4, 6, 5, 7, 3}, {x_grad = true})
    local ops = compare(chain(net, {"relu", "gelu_tanh", "relu", false}))
    assert.equal(2, ops.linear_backward_input_relu, text(ops))
    assert.equal(1, ops.linear_backward_input_gelu_tanh, text(ops))
    ops = compare(chain(net, {"gelu_tanh", "relu", "gelu_tanh", "relu"}))
    assert.equal(1, ops.linear_backward_input_relu, text(ops))
    assert.equal(2, ops.linear_backward_input_gelu_tanh, text(ops))
    assert.equal(1, ops.relu_backward, text(ops))
  end)

  it("fifty layers", function()
    local widths, acts = {4}, {}
    for i = 1, 50 do
      widths[i + 1] = 3 + i % 3
      acts[i] = i < 50 and ACTIVATIONS[i % 2 + 1]
    end
    assert.equal(49, pairs_in(compare(chain(network(widths, {x_grad = true}), acts))))
  end)

  it("a weight that is a leaf of another dtype than the hidden result is refused as by linear", function()
    local h = fused("relu", leaf({2, 4}, 1), leaf({3, 4}, 2))
    raises({"linear: dtypes differ"}, linear, h, leaf({2, 3}, 3, "f16"))
  end)
end)

-- ====== Under autocast ======

describe("pairs under autocast", function()
  for _, act in ipairs(ACTIVATIONS) do
    local through = "linear_backward_input_" .. act
    for _, low in ipairs {"f16", "bf16"} do
      it(("%s: gradients of float32 weights are float32, in a region of %s"):format(act, low), function()
        local net = network({4, 6, 5, 3}, {x_grad = true})
        local function build(layer)
          local walk, leaves
          amp.autocast(low, function() walk, leaves = chain(net, {act, act, false})(layer) end)
          return walk, leaves
        end
        local ops, grads = compare(build)
        assert.equal(2, ops[through], text(ops))
        assert.equal(3, ops.linear_backward_params, text(ops))
        assert.equal(7, #grads)
        for _, g in ipairs(grads) do assert.equal("float32", g.dtype) end
        -- no cast on the way: each gradient is made in the dtype that it is wanted in
        assert.is_nil(ops.cast, text(ops))
      end)

      it(("%s: only one of the layers is in the region of %s"):format(act, low), function()
        for which = 1, 2 do
          local function build(layer)
            local x, w1, b1, w2, b2 = leaf({5, 4}, 1), leaf({6, 4}, 2), leaf({6}, 3), leaf({3, 6}, 4), leaf({3}, 5)
            local function lower() return layer(act, x, w1, b1) end
            local h = which == 1 and amp.autocast(low, lower) or lower()
            local function upper() return linear(h, w2, b2) end
            if which == 1 then
              h = h:float() -- linear takes one dtype
              local y = upper()
              return function() y:backward(values(y.shape, 7)) end, {x, w1, b1, w2, b2}
            end
            local y = amp.autocast(low, upper)
            return function() y:backward(values(y.shape, 7, low)) end, {x, w1, b1, w2, b2}
          end
          assert.equal(which - 1, pairs_in(compare(build))) -- the cast stands between in the first case
        end
      end)

      it(("%s: regions of different dtypes, %s above"):format(act, low), function()
        local other = low == "f16" and "bf16" or "f16"
        local function build(layer)
          local x, w1, b1, w2, b2 = leaf({5, 4}, 1), leaf({6, 4}, 2), leaf({6}, 3), leaf({3, 6}, 4), leaf({3}, 5)
          local h = amp.autocast(other, layer, act, x, w1, b1)
          local y = amp.autocast(low, linear, h, w2, b2)
          return function() y:backward(values(y.shape, 7, low)) end, {x, w1, b1, w2, b2}
        end
        assert.equal(1, compare(build)[through])
      end)
    end

    it(act .. ": backward = \"float32\" is apart", function()
      local net = network({4, 6, 5, 3}, {x_grad = true})
      local function build(layer)
        local walk, leaves
        amp.autocast({dtype = "f16", backward = "float32"}, function() walk, leaves = chain(net, {act, act, false})(layer) end)
        return walk, leaves
      end
      assert.equal(0, pairs_in(compare(build)))
      -- the layer below alone, or the one above, in such a region
      for which = 1, 2 do
        local function mixed(layer)
          local x, w1, b1, w2, b2 = leaf({5, 4}, 1), leaf({6, 4}, 2), leaf({6}, 3), leaf({3, 6}, 4), leaf({3}, 5)
          local wide, plain = {dtype = "f16", backward = "float32"}, {dtype = "f16"}
          local h = amp.autocast(which == 1 and wide or plain, layer, act, x, w1, b1)
          local y = amp.autocast(which == 2 and wide or plain, linear, h, w2, b2)
          return function() y:backward(values(y.shape, 7, "f16")) end, {x, w1, b1, w2, b2}
        end
        -- apart, a float32 gradient that comes to the activation of the plain region is rounded to float16 behind it
        assert.equal(0, pairs_in(compare(mixed, which == 2 and NEAR.float16 or nil)))
      end
    end)

    it(act .. ": a region that makes linear float32", function()
      local net = network({4, 6, 5, 3}, {x_grad = true})
      local ops = {linear = "float32", linear_relu = "float32", linear_gelu_tanh = "float32"}
      local function build(layer)
        local walk, leaves
        amp.autocast({dtype = "f16", ops = ops}, function() walk, leaves = chain(net, {act, act, false})(layer) end)
        return walk, leaves
      end
      assert.equal(2, compare(build)[through])
    end)
  end
end)

-- ====== When they do not ======

describe("linear above a linear with an activation: apart", function()
  for _, act in ipairs(ACTIVATIONS) do
    local function case(name, fn) it(name .. ", " .. act, fn) end

    case("where another op has used the hidden result, recorded before, after, or both", function()
      local function other(seed) return function(h) return (h:exp() * values(h.shape, seed)):sum() end end
      assert.equal(0, pairs_in(compare(two(act, {before = other(7)}))))
      assert.equal(0, pairs_in(compare(two(act, {after = other(8)}))))
      assert.equal(0, pairs_in(compare(two(act, {before = other(7), after = other(8)}))))
    end)

    case("but not where what was made of it has no gradient to send", function()
      assert.equal(1, pairs_in(compare(two(act, {before = function(h) return h:detach():sum() end}))))
      assert.equal(1, pairs_in(compare(two(act, {after = function(h)
        local unused = h:exp() -- no part of the loss
        return unused:detach():sum() * 0
      end}))))
    end)

    case("where the consumer comes late in the graph", function()
      local function build(layer)
        local x, w1, w2, w3 = leaf({5, 4}, 1), leaf({6, 4}, 2), leaf({6, 6}, 3), leaf({6, 6}, 4)
        local h = layer(act, x, w1)
        local y = layer(act, h, w2)
        local z = linear(y, w3) + h -- a residual connection round two layers
        return function() z:backward(values({5, 6}, 7)) end, {x, w1, w2, w3}
      end
      local ops = compare(build)
      assert.equal(1, pairs_in(ops), text(ops)) -- w3 above w2; not w2 above w1
    end)

    case("under two heads", function()
      local function build(layer)
        local x, w1, w2, w3 = leaf({5, 4}, 1), leaf({6, 4}, 2), leaf({3, 6}, 3), leaf({2, 6}, 4)
        local h = layer(act, x, w1)
        local loss = linear(h, w2):sum() + (linear(h, w3) * 2):sum()
        return function() loss:backward() end, {x, w1, w2, w3}
      end
      assert.equal(0, pairs_in(compare(build)))
    end)

    case("where one linear takes it twice, as x and weight, or bias", function()
      local function twice(layer)
        local x, w1 = leaf({5, 4}, 1), leaf({6, 4}, 2)
        local h = layer(act, x, w1)
        local y = linear(h, h)
        return function() y:backward(values({5, 5}, 7)) end, {x, w1}
      end
      assert.equal(0, pairs_in(compare(twice)))
      local function as_bias(layer)
        local x, w1, w2 = leaf({4}, 1), leaf({6, 4}, 2), leaf({6, 6}, 3)
        local h = layer(act, x, w1)
        local y = linear(h, w2, h)
        return function() y:backward(values({6}, 7)) end, {x, w1, w2}
      end
      assert.equal(0, pairs_in(compare(as_bias)))
      local function as_weight(layer)
        local x, w1 = leaf({5, 4}, 1), leaf({6, 4}, 2)
        local y = linear(values({2, 6}, 5), layer(act, x, w1))
        return function() y:backward(values({2, 5}, 7)) end, {x, w1}
      end
      local function as_weight_above(layer) -- the other's x is a hidden layer of its own
        local x, w1, w2 = leaf({5, 4}, 1), leaf({6, 4}, 2), leaf({6, 4}, 3)
        local y = linear(layer(act, x, w1), layer(act, x, w2))
        return function() y:backward(values({5, 5}, 7)) end, {x, w1, w2}
      end
      assert.equal(0, pairs_in(compare(as_weight)))
      assert.equal(0, pairs_in(compare(as_weight_above)))
    end)

    case("where a hook sits on it: it sees the gradient of the result, and may replace it", function()
      local seen = {}
      local function hooked(replace)
        return {before = function(h)
          h:register_hook(function(g)
            seen[#seen + 1] = g:clone()
            if replace then return g * 2 end
          end)
        end}
      end
      for _, replace in ipairs {false, true} do
        seen = {}
        assert.equal(0, pairs_in(compare(two(act, hooked(replace)))))
        assert.equal(2, #seen)
        same(seen[1], seen[2], "what the hook saw")
      end
    end)

    case("where retain_grad keeps it", function()
      local ops = compare(two(act, {before = function(h) h:retain_grad() end, finish = function(e)
        e.leaves[#e.leaves + 1] = e.h
      end}))
      assert.equal(0, pairs_in(ops))
    end)

    case("and together again when the hook is gone", function()
      local ops = compare(two(act, {before = function(h) h:register_hook(function(g) return g * 2 end):remove() end}))
      assert.equal(1, pairs_in(ops))
    end)

    case("where a hook on the layer above puts one on it", function()
      local function build(layer)
        local x, w1, w2, seen = leaf({5, 4}, 1), leaf({6, 4}, 2), leaf({3, 6}, 3), nil
        local h = layer(act, x, w1)
        local y = linear(h, w2)
        y:register_hook(function() h:register_hook(function(g) seen = g:clone() end) end)
        return function() y:backward(values({5, 3}, 7)) end, {x, w1, w2, function() return seen end}
      end
      assert.equal(0, pairs_in(compare(build)))
    end)

    case("where grad asks for it", function()
      local function build(layer)
        local x, w1, w2 = leaf({5, 4}, 1), leaf({6, 4}, 2), leaf({3, 6}, 3)
        local h = layer(act, x, w1)
        local loss, got = (linear(h, w2) * values({5, 3}, 4)):sum(), nil
        return function() got = core.grad({loss}, {h, w1, x, w2}) end, {
          function() return got[1] end, function() return got[2] end, function() return got[3] end, function() return got[4] end,
        }
      end
      assert.equal(0, pairs_in(compare(build)))
    end)

    case("under create_graph", function()
      local ops = compare(two(act, {options = {create_graph = true}}))
      assert.equal(0, pairs_in(ops))
      assert.is_nil(ops.linear_backward_params, text(ops))
    end)

    case("under detect_anomaly", function()
      local _ <close> = autograd.detect_anomaly()
      assert.equal(0, pairs_in(compare(two(act))))
    end)

    case("while gradients are watched: the watch sees the same of both, but for the one that fusing leaves out", function()
      local function seen_by(layer)
        local list = {}
        core.gradient_watch(function(s)
          if not s.forward then list[#list + 1] = ("%s %d %s"):format(s.foretold and "foretold" or "held", s.count, s.amax) end
        end)
        local ok, message = pcall(function()
          local walk = amp.autocast("f16", two(act), layer)
          assert.equal(0, pairs_in(backward_ops(walk)))
        end)
        core.gradient_watch(nil)
        assert(ok, message)
        return list
      end
      local got, want = seen_by(fused), seen_by(apart)
      -- apart, the gradient between linear and the activation is one more that is held
      assert.equal(#got + 1, #want)
      for i, line in ipairs(devices.is_cpu and got or {}) do assert.equal(want[i], line) end
      assert.equal(0, pairs_in(compare(two(act, {finish = function(e)
        return function()
          core.gradient_watch(function() end)
          local ok, message = pcall(e.loss.backward, e.loss)
          core.gradient_watch(nil)
          assert(ok, message)
        end
      end}))))
      assert.equal(1, pairs_in(compare(two(act)))) -- and again without
    end)

    case("where it is a root itself", function()
      local function build(layer)
        local x, w1, w2, got = leaf({5, 4}, 1), leaf({6, 4}, 2), leaf({3, 6}, 3), nil
        local h = layer(act, x, w1)
        local y = linear(h, w2)
        local seeds = {values(y.shape, 7), values(h.shape, 8)}
        return function() got = core.grad({y, h}, {x, w1, w2}, {grad_outputs = seeds}) end,
          {function() return got[1] end, function() return got[2] end, function() return got[3] end}
      end
      assert.equal(0, pairs_in(compare(build)))
    end)

    case("where a view, a cast, dropout or another op lies between", function()
      local ways = {
        function(h) return h:view(h.shape) end,
        function(h) return h:view({1, 5, 6}):flatten(1, 2) end,
        function(h) return h:narrow(1, 1, 5) end,
        function(h) return h:double():float() end,
        function(h) return h + 0.25 end,
        function(h)
          hm.manual_seed(3)
          return hm.nn.functional.dropout(h, 0.5, true)
        end,
      }
      for _, between in ipairs(ways) do assert.equal(0, pairs_in(compare(two(act, {between = between})))) end
      local function sideways(layer) -- it is read as the transpose of what was made
        local x, w1, w2 = leaf({5, 4}, 1), leaf({6, 4}, 2), leaf({3, 5}, 3)
        local y = linear(layer(act, x, w1):t(), w2)
        return function() y:backward(values({6, 3}, 7)) end, {x, w1, w2}
      end
      assert.equal(0, pairs_in(compare(sideways)))
    end)

    case("but not where dropout leaves it alone", function()
      assert.equal(1, pairs_in(compare(two(act, {between = function(h) return hm.nn.functional.dropout(h, 0.5, false) end}))))
    end)
  end
end)

-- ====== Walks by chosen inputs ======

describe("grad by parameters alone", function()
  local function walks(act, wanted, names)
    return function(layer)
      local leaves = {x = leaf({5, 4}, 1), w1 = leaf({6, 4}, 2), b1 = leaf({6}, 3), w2 = leaf({3, 6}, 4), b2 = leaf({3}, 5)}
      local loss = (linear(layer(act, leaves.x, leaves.w1, leaves.b1), leaves.w2, leaves.b2) * values({5, 3}, 6)):sum()
      local inputs, got, held = {}, nil, {}
      for i, name in ipairs(wanted) do
        inputs[i] = leaves[name]
        held[i] = function() return got[i] end
      end
      for _, name in ipairs(names or {}) do held[#held + 1] = function() assert(not leaves[name].grad) end end
      return function() got = core.grad({loss}, inputs) end, held
    end
  end

  for _, act in ipairs(ACTIVATIONS) do
    local through = "linear_backward_input_" .. act
    it("pairs run where what is below is wanted, and the rest is left out, " .. act, function()
      local ops = compare(walks(act, {"w1"}, {"w1", "w2", "x"}))
      assert.equal(RESTRICTED[act], ops[through], text(ops))
      assert.equal(1, ops.linear_backward_weight, text(ops))
      assert.is_nil(ops.linear_backward_bias, text(ops))
      assert.is_nil(ops.linear_backward_params, text(ops))
      assert.equal(not RESTRICTED[act] and 1 or nil, ops.linear_backward_input, text(ops))
      ops = compare(walks(act, {"b1"}))
      assert.equal(RESTRICTED[act], ops[through], text(ops))
      assert.equal(1, ops.linear_backward_bias, text(ops))
      ops = compare(walks(act, {"x", "w2"}))
      assert.equal(1, ops[through], text(ops))
      assert.equal(1, ops.linear_backward_input, text(ops))
      assert.equal(1, ops.linear_backward_weight, text(ops))
      ops = compare(walks(act, {"w1", "b1", "w2", "b2"}))
      assert.equal(1, ops[through], text(ops))
      assert.equal(2, ops.linear_backward_params, text(ops))
    end)

    it("nothing is made for what is below where only the layer above is wanted, " .. act, function()
      local ops = compare(walks(act, {"w2"}))
      assert.equal(0, pairs_in(ops), text(ops))
      assert.is_nil(ops.linear_backward_input, text(ops))
      ops = compare(walks(act, {"w2", "b2"}))
      assert.equal(1, ops.linear_backward_params, text(ops))
      assert.equal(0, pairs_in(ops), text(ops))
    end)
  end
end)

-- ====== Second derivatives ======

describe("second derivatives", function()
  for _, act in ipairs(ACTIVATIONS) do
    it(("through a layer with %s and one above it, by differences"):format(act), function()
      local inputs = {values({3, 4}, 1, "f64"), values({5, 4}, 2, "f64"), values({5}, 3, "f64"), values({2, 5}, 4, "f64"),
        values({2}, 5, "f64")}
      local function net(x, w1, b1, w2, b2) return linear(fused(act, x, w1, b1), w2, b2) end
      gradients.check(net, inputs)
      gradients.check_second(net, inputs)
      local function last(x, w1, b1, w2, b2) return fused(act, fused(act, x, w1, b1), w2, b2) end
      gradients.check(last, inputs)
      gradients.check_second(last, inputs)
      local function alone(x, w1) return fused(act, x, w1) end
      gradients.check_second(alone, {inputs[1], inputs[2]})
      local leaves = {}
      for i, t in ipairs(inputs) do leaves[i] = t:clone():requires_grad_() end
      assert.is_true(autograd.gradgradcheck(net, leaves))
    end)

    it(("are those of the layer apart, %s, also under autocast"):format(act), function()
      for _, low in ipairs {false, "f16", "bf16"} do
        local function build(layer)
          local x, w1, b1, w2 = leaf({5, 4}, 1), leaf({6, 4}, 2), leaf({6}, 3), leaf({3, 6}, 4)
          local function forward() return linear(layer(act, x, w1, b1), w2) end
          local y = low and amp.autocast(low, forward) or forward()
          local g = core.grad({y}, {x, w1, b1}, {create_graph = true, grad_outputs = {values(y.shape, 7, y.dtype)}})
          local loss = (g[1] * g[1]):sum() + (g[2] * values(g[2].shape, 8)):sum() + (g[3] * g[3]):sum()
          return function() loss:backward() end, {x, w1, b1, w2}
        end
        compare(build, NEAR[low == "f16" and "float16" or low == "bf16" and "bfloat16" or "float32"]) -- sums in another order
      end
    end)

    it(("the graph of a walk with create_graph serves a plain walk afterwards, %s"):format(act), function()
      local function build(layer)
        local x, w1, b1, w2 = leaf({5, 4}, 1), leaf({6, 4}, 2), leaf({6}, 3), leaf({3, 6}, 4)
        local y = linear(layer(act, x, w1, b1), w2):sum()
        core.grad({y}, {w1}, {create_graph = true})
        return function() y:backward() end, {x, w1, b1, w2}
      end
      assert.equal(1, pairs_in(compare(build)))
    end)
  end
end)

-- ====== Graphs that are walked again, or no more ======

describe("the graph of a pair", function()
  local function live()
    for _ = 1, 3 do collectgarbage() end
    return core.memory_stats().live
  end

  for _, act in ipairs(ACTIVATIONS) do
    local through = "linear_backward_input_" .. act

    it("serves again with retain_graph, and a hook that came meanwhile is heard, " .. act, function()
      local function build(layer)
        local x, w1, b1, w2, seen = leaf({5, 4}, 1), leaf({6, 4}, 2), leaf({6}, 3), leaf({3, 6}, 4), nil
        local h = layer(act, x, w1, b1)
        local y = linear(h, w2):sum()
        return function()
          y:backward({retain_graph = true})
          y:backward({retain_graph = true})
          h:register_hook(function(g) seen = g:clone() end)
          y:backward()
        end, {x, w1, b1, w2, function() return seen end}
      end
      assert.equal(2, compare(build)[through])
    end)

    it("is gone after a walk, and the message names the op, " .. act, function()
      local x, w1, w2 = leaf({5, 4}, 1), leaf({6, 4}, 2), leaf({3, 6}, 4)
      local y = linear(fused(act, x, w1), w2):sum()
      y:backward()
      raises({"the graph was freed: ", "retain_graph = true"}, y.backward, y)
      y = linear(fused(act, x, w1), w2)
      y:sum():backward()
      raises({"the graph was freed: linear has given up its saved tensors"}, function() (y * 2):sum():backward() end)
      local h = fused(act, x, w1) -- below alone is gone
      h:sum():backward()
      raises({("the graph was freed: linear_%s has given up its saved tensors"):format(act)}, function() linear(h, w2):sum():backward() end)
      local bare = fused(act, x, w1) -- and where the layer above keeps nothing of x
      bare:sum():backward()
      raises({("the graph was freed: linear_%s has given up"):format(act)}, function() linear(bare, w2:detach()):sum():backward() end)
    end)

    it("an error on the way leaves nothing behind, " .. act, function()
      local x, w1, w2 = leaf({5, 4}, 1), leaf({6, 4}, 2), values({3, 6}, 4)
      local function attempt()
        local h = fused(act, x, w1)
        local y = linear(h, w2):sum()
        h:sum():backward()
        raises("the graph was freed", y.backward, y)
        drop_gradients {x, w1}
      end
      attempt()
      local before = live()
      attempt()
      assert.equal(before, live())
    end)

    it("gives all memory back, " .. act, function()
      local net = network({4, 6, 5, 3}, {x_grad = true})
      local before
      for round = 1, 3 do
        chain(net, {act, act, false})(fused)()
        drop_gradients(net.leaves)
        if round == 2 then before = live() end
      end
      assert.equal(before, live())
    end)

    it("the hidden result changed in place afterwards gives the usual error, " .. act, function()
      local function changed(weight)
        local x, w1 = leaf({5, 4}, 1), leaf({6, 4}, 2)
        local h, pre = core.call("linear_" .. act, x, w1)
        local y = linear(h, weight):sum()
        return h, pre, y
      end
      local h, _, y = changed(leaf({3, 6}, 4))
      hm.no_grad(function() h:mul_(2) end)
      raises({"operand x of linear, ", "was changed in place after it was saved"}, y.backward, y)
      local pre
      h, pre, y = changed(values({3, 6}, 4)) -- linear does not keep x for a frozen weight
      hm.no_grad(function() (act == "relu" and h or pre):mul_(2) end)
      local kept = act == "relu" and "result out of linear_relu, " or "result pre of linear_gelu_tanh, "
      raises({kept, "was changed in place after it was saved"}, y.backward, y)
      if act == "gelu_tanh" then
        h, _, y = changed(values({3, 6}, 4))
        hm.no_grad(function() h:mul_(2) end)
        y:backward() -- its own result is not what gelu_tanh reads
      end
    end)

    it("an in-place op that is recorded is another op between, " .. act, function()
      local function build(layer)
        local x, w1, w2 = leaf({5, 4}, 1), leaf({6, 4}, 2), leaf({3, 6}, 4)
        local h = layer(act, x, w1)
        if act == "gelu_tanh" then h:mul_(2) else h = h * 2 end -- relu reads its own result
        local y = linear(h, w2)
        return function() y:backward(values({5, 3}, 7)) end, {x, w1, w2}
      end
      assert.equal(0, pairs_in(compare(build)))
    end)
  end
end)

-- ====== Walks in walks ======

describe("a hook that walks itself", function()
  for _, act in ipairs(ACTIVATIONS) do
    it("over another graph with a pair, " .. act, function()
      local function build(layer)
        local x, w1, w2 = leaf({5, 4}, 1), leaf({6, 4}, 2), leaf({3, 6}, 4)
        local u1, u2 = leaf({6, 4}, 5), leaf({3, 6}, 6)
        local y = linear(layer(act, x, w1), w2)
        y:register_hook(function()
          hm.enable_grad(function() linear(layer(act, x:detach(), u1), u2):sum():backward() end)
        end)
        return function() y:backward(values({5, 3}, 7)) end, {x, w1, w2, u1, u2}
      end
      assert.equal(2, pairs_in(compare(build)))
    end)

    it("over the same graph, on the way to the upper layer and to the lower, " .. act, function()
      local function build(layer)
        local x, w1, w2, w3 = leaf({5, 4}, 1), leaf({6, 4}, 2), leaf({6, 6}, 4), leaf({3, 6}, 5)
        local seen = {}
        local a = layer(act, x, w1)
        local b = layer(act, a, w2)
        local y = linear(b, w3)
        local busy
        local function again(of)
          return function()
            if busy then return end
            busy = true
            seen[#seen + 1] = core.grad({of}, {x, w1}, {retain_graph = true, grad_outputs = {hm.ones(of.shape)}})[2]
            busy = false
          end
        end
        y:register_hook(again(y)) -- before the pair of b and y has run
        w3:register_hook(again(b))
        return function() y:backward(values({5, 3}, 7), {retain_graph = true}) end,
          {x, w1, w2, w3, function() return seen[1] end, function() return seen[2] end}
      end
      -- the outer walk 2; the hook on y 2; the hook on w3, when all is done, 1
      assert.equal(RESTRICTED[act] and 5 or 2, pairs_in(compare(build)))
    end)

    it("from a function with a backward of its own between two pairs, " .. act, function()
      local function build(layer)
        local x, w1, w2, w3, w4 = leaf({5, 4}, 1), leaf({6, 4}, 2), leaf({6, 6}, 4), leaf({6, 6}, 5), leaf({3, 6}, 6)
        local inner
        local twice = autograd.Function("twice", {
          forward = function(_, t) return t * 2 end,
          backward = function(_, g)
            inner = core.grad({hm.enable_grad(function() return linear(layer(act, x, w1), w2):sum() end)}, {w1})[1]
            return g * 2
          end,
        })
        local y = linear(layer(act, twice(linear(layer(act, x, w1), w2)), w3), w4)
        return function() y:backward(values({5, 3}, 7)) end, {x, w1, w2, w3, w4, function() return inner end}
      end
      assert.equal(RESTRICTED[act] and 3 or 2, pairs_in(compare(build)))
    end)
  end
end)

-- ====== Regions that are computed again ======

describe("pairs and hm.checkpoint", function()
  local function plain(fn, ...) return fn(...) end

  for _, act in ipairs(ACTIVATIONS) do
    local through = "linear_backward_input_" .. act

    --- way(call, x, net, layer) -> y, with `call` for what is in a region.
    local function gives(way, count)
      local net
      local function build(call)
        return function(layer)
          net = network({4, 6, 5, 3}, {x_grad = true})
          local y = way(call, net, layer)
          local seed = values(y.shape, 30)
          return function() y:backward(seed) end, net.leaves
        end
      end
      local ops, grads = compare(build(hm.checkpoint))
      assert.equal(count, ops[through] or 0, text(ops))
      build(plain)(fused)() -- and the same without regions
      for i, t in ipairs(net.leaves) do same(t.grad, grads[i], "gradient " .. i) end
    end

    local function one(net, layer, i) return function(h) return layer(act, h, net.w[i], net.b[i]) end end
    local function last(net) return function(h) return linear(h, net.w[3], net.b[3]) end end

    it("over the lower layer, " .. act, function()
      gives(function(call, net, layer)
        return last(net)(one(net, layer, 2)(call(one(net, layer, 1), net.x)))
      end, 2)
    end)

    it("over the upper layer, " .. act, function()
      gives(function(call, net, layer)
        return call(last(net), call(one(net, layer, 2), one(net, layer, 1)(net.x)))
      end, 2)
    end)

    it("over each, " .. act, function()
      gives(function(call, net, layer)
        return call(last(net), call(one(net, layer, 2), call(one(net, layer, 1), net.x)))
      end, 2)
    end)

    it("over all, and nested, " .. act, function()
      gives(function(call, net, layer)
        return call(function(x) return last(net)(one(net, layer, 2)(one(net, layer, 1)(x))) end, net.x)
      end, 2)
      gives(function(call, net, layer)
        return call(function(x)
          return last(net)(call(function(h) return one(net, layer, 2)(call(one(net, layer, 1), h)) end, x))
        end, net.x)
      end, 2)
    end)

    it("runs each region again once, " .. act, function()
      local net = network({4, 6, 5, 3}, {x_grad = true})
      local runs = {0, 0, 0}
      local function counted(i, fn)
        return function(h)
          runs[i] = runs[i] + 1
          return fn(h)
        end
      end
      local h = hm.checkpoint(counted(1, one(net, fused, 1)), net.x)
      h = hm.checkpoint(counted(2, one(net, fused, 2)), h)
      local y = hm.checkpoint(counted(3, last(net)), h)
      local ops = backward_ops(function() y:backward(values(y.shape, 30)) end)
      assert.same({2, 2, 2}, runs)
      assert.equal(2, ops[through])
    end)

    it("with retain_graph, and by chosen inputs, " .. act, function()
      local function build(layer)
        local net = network({4, 6, 5, 3}, {x_grad = true})
        local h = hm.checkpoint(one(net, layer, 1), net.x)
        local y = hm.checkpoint(function(t) return last(net)(one(net, layer, 2)(t)) end, h)
        local got
        return function()
          got = core.grad({y:sum()}, {net.w[1], net.b[2]}, {retain_graph = true})
          y:backward(values(y.shape, 30), {retain_graph = true})
          y:backward(values(y.shape, 30))
        end, {function() return got[1] end, function() return got[2] end, table.unpack(net.leaves)}
      end
      assert.equal(RESTRICTED[act] and 6 or 4, compare(build)[through])
    end)

    it("under create_graph, " .. act, function()
      local function build(layer)
        local net = network({4, 6, 5, 3}, {x_grad = true})
        local h = hm.checkpoint(one(net, layer, 1), net.x)
        local y = hm.checkpoint(function(t) return last(net)(one(net, layer, 2)(t)) end, h)
        local g = core.grad({y:sum()}, {net.x}, {create_graph = true})[1]
        return function() (g * g):sum():backward() end, net.leaves
      end
      compare(build, NEAR.float32)
    end)

    it("in a region of float16, " .. act, function()
      gives(function(call, net, layer)
        return amp.autocast("f16", function()
          return last(net)(call(function(x) return one(net, layer, 2)(one(net, layer, 1)(x)) end, net.x)):float()
        end)
      end, 2)
    end)
  end
end)

-- ====== One call for weight and bias ======

describe("linear_backward_params", function()
  local function ops_of(frozen, options, no_bias)
    local set = {}
    for _, name in ipairs(frozen) do set[name] = true end
    local net = network({4, 3}, {frozen = set, x_grad = true, no_bias = no_bias})
    local y = linear(net.x, net.w[1], net.b[1])
    local ops = backward_ops(function() y:backward(values(y.shape, 5), options) end)
    drop_gradients(net.leaves)
    return ops
  end

  it("runs once where weight and bias both want gradients, and not otherwise", function()
    local function counts(ops)
      return {ops.linear_backward_params or 0, ops.linear_backward_weight or 0, ops.linear_backward_bias or 0}
    end
    assert.same({1, 0, 0}, counts(ops_of {}))
    assert.same({0, 1, 0}, counts(ops_of {"b1"}))
    assert.same({0, 0, 1}, counts(ops_of {"w1"}))
    assert.same({0, 0, 0}, counts(ops_of {"w1", "b1"}))
    assert.same({0, 1, 0}, counts(ops_of({}, nil, true)))
    assert.same({0, 1, 1}, counts(ops_of({}, {create_graph = true}))) -- these have derivatives
    assert.same({1, 0, 0}, counts(ops_of({}, {retain_graph = true})))
  end)

  it("in the layers with an activation, too, whose own gradient is made once", function()
    for _, act in ipairs(ACTIVATIONS) do
      local net = network({4, 3}, {x_grad = true})
      local function log(options)
        local y = fused(act, net.x, net.w[1], net.b[1])
        local ops = backward_ops(function() y:backward(values(y.shape, 5), options) end)
        drop_gradients(net.leaves)
        return ops
      end
      local ops = log()
      assert.same({1, 1, 1}, {ops[act .. "_backward"], ops.linear_backward_params, ops.linear_backward_input}, text(ops))
      assert.equal(3, #ops, text(ops))
      ops = log {create_graph = true}
      assert.is_nil(ops.linear_backward_params, text(ops))
      assert.equal(1, ops[act .. "_backward"], text(ops))
      assert.equal(1, ops.linear_backward_weight, text(ops))
      assert.equal(1, ops.linear_backward_bias, text(ops))
    end
  end)

  for _, dtype in ipairs(DTYPES) do
    it("gives what its two halves give, in the dtypes that they are wanted in, " .. dtype, function()
      for _, shape in ipairs {{5}, {2, 3}, {}, {0}, {300}} do
        local lead = table.move(shape, 1, #shape, 1, {})
        local function ending(n)
          local out = table.move(lead, 1, #lead, 1, {})
          out[#out + 1] = n
          return out
        end
        local g, x = values(ending(4), 1, dtype), values(ending(3), 2, dtype)
        local weight, bias = core.call("linear_backward_params", g, x)
        same(weight, core.call("linear_backward_weight", g, x), "weight")
        same(bias, core.call("linear_backward_bias", g), "bias")
        if dtype ~= "f64" then -- as the parameters of autocast want it
          weight, bias = core.call("linear_backward_params", g, x, {out_dtype = "f32"})
          same(weight, core.call("linear_backward_weight", g, x, {out_dtype = "f32"}), "weight")
          same(bias, core.call("linear_backward_bias", g, {out_dtype = "f32"}), "bias")
        end
      end
    end)
  end

  it("is not called where the two are wanted in different dtypes", function()
    local x, w, b = leaf({5, 4}, 1), leaf({3, 4}, 2), leaf({3}, 3, "f16")
    local y = amp.autocast("f16", linear, x, w, b)
    local ops = backward_ops(function() y:backward(values(y.shape, 4, "f16")) end)
    assert.is_nil(ops.linear_backward_params, text(ops))
    assert.same({"float32", "float16"}, {w.grad.dtype, b.grad.dtype})
    same(b.grad, core.call("linear_backward_bias", values(y.shape, 4, "f16")), "bias")
  end)

  it("gradients have the dtype of the parameters", function()
    for _, dtype in ipairs(DTYPES) do
      local net = network({4, 3}, {dtype = dtype, x_grad = true})
      local y = linear(net.x, net.w[1], net.b[1])
      y:backward(values(y.shape, 5, dtype))
      for _, t in ipairs(net.leaves) do assert.equal(t.dtype, t.grad.dtype) end
    end
  end)

  it("refuses what does not fit", function()
    raises({"linear_backward_params: ", "dtypes differ"}, core.call, "linear_backward_params", values({2, 3}, 1), values({2, 3}, 1, "f16"))
    raises("linear_backward_params", core.call, "linear_backward_params", values({2, 3}, 1), values({3, 3}, 1))
  end)
end)

-- ====== What the rows refuse ======

describe("linear with an activation", function()
  it("refuses what linear refuses, by its own name", function()
    for _, act in ipairs(ACTIVATIONS) do
      local name = "linear_" .. act
      local x, w = values({2, 4}, 1), values({3, 4}, 2)
      raises({name .. ": bias must be [3], got f32[4]"}, core.call, name, x, w, values({4}, 1))
      raises({name .. ": "}, core.call, name, x, values({3, 5}, 2))
      raises({name .. ": ", "dtypes differ"}, core.call, name, x, w:half())
      raises({name .. ": needs a floating dtype"}, core.call, name, x:to("i64"), w:to("i64"))
    end
    local g, w, out = values({2, 3}, 1), values({3, 4}, 2), values({2, 4}, 3)
    local aux = hm.zeros({0}, {dtype = "u8"})
    raises({"linear_backward_input_relu: out must have the shape of the result, got f32[2,3]"}, core.call,
      "linear_backward_input_relu", g, w, g, aux)
    raises({"linear_backward_input_gelu_tanh: pre must have the shape of the result, got f32[4,2]"}, core.call,
      "linear_backward_input_gelu_tanh", g, w, out:t())
    raises({"linear_backward_input_relu: ", "(aux) is missing"}, core.call, "linear_backward_input_relu", g, w, out)
  end)

  it("keeps its input and one result", function()
    local function kept(act, o)
      local net, saved = network({4, 3}, o), {}
      core.op_log(function(r)
        for _, t in ipairs(r.saved) do if t.dtype ~= "uint8" then saved[#saved + 1] = table.concat(t.shape, "x") end end
      end)
      local y = fused(act, net.x, net.w[1], net.b[1])
      core.op_log(nil)
      assert(y.requires_grad)
      return table.concat(saved, " ")
    end
    assert.equal("5x4 3x4 5x3", kept("relu", {x_grad = true}))
    assert.equal("5x4 5x3", kept("relu", {}))
    assert.equal("3x4 5x3", kept("relu", {x_grad = true, frozen = {w1 = true, b1 = true}}))
    assert.equal("5x3", kept("relu", {frozen = {w1 = true}})) -- the bias
    assert.equal("5x4 3x4 3 5x3", kept("gelu_tanh", {x_grad = true})) -- the bias too: see `again` in kernels/ops.def
    assert.equal("5x4 3x4 5x3", kept("gelu_tanh", {x_grad = true, no_bias = true}))
  end)
end)

describe("relu after max_pool2d", function()
  it("is two ops on the CPU still", devices.cpu_only("the CPU's own choice", function()
    local x = leaf({2, 3, 6, 6}, 1)
    local p = core.call("max_pool2d", x, {kernel_size = {2}})
    local y = core.call("relu", p)
    local ops = backward_ops(function() y:backward(values(y.shape, 2)) end)
    assert.equal("relu_backward max_pool2d_backward", text(ops))
  end))

  it("and under layers that pair", function()
    local function build(layer)
      local x, w1, w2 = leaf({2, 1, 6, 6}, 1), leaf({6, 9}, 2), leaf({3, 6}, 3)
      local h = core.call("relu", (core.call("max_pool2d", x, {kernel_size = {2}})))
      local y = linear(layer("relu", h:flatten(2), w1), w2)
      return function() y:backward(values({2, 3}, 7)) end, {x, w1, w2}
    end
    local ops = compare(build)
    assert.equal(1, pairs_in(ops), text(ops))
    assert.equal(devices.is_cpu and 1 or 0, ops.max_pool2d_backward or 0, text(ops))
  end)
end)
