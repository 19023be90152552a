-- layer_pairs.lua -- for specs of pairs (core/pairs.c): linear layers with their activations, made twice, as the rows that do
-- both and as two ops, and walked backward with the ops of the walk counted.

local assert = require "luassert"
local hm = require "halfmoon"
local core = require "halfmoon.core"
local devices = require "spec.support.devices"
local numbers = require "spec.support.numbers"

local inf = math.huge

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

return {
  ACTIVATIONS = {"relu", "gelu_tanh"},
  -- How many pairs run where the upper weight wants no gradient: with relu none on cuda, whose bits may hide a NaN (pairs.c).
  RESTRICTED = {relu = devices.pick(1, nil), gelu_tanh = 1},
  DTYPES = {"f32", "f16", "bf16", "f64"},
  NEAR = NEAR, fused = fused, apart = apart, linear = linear, values = values, drop_gradients = drop_gradients, leaf = leaf,
  network = network, backward_ops = backward_ops, pairs_in = pairs_in, text = text, identical = identical, same = same,
  compare = compare, chain = chain, two = two,
}
