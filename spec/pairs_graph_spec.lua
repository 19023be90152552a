-- pairs_graph_spec.lua -- pairs (core/pairs.c, spec/pairs_spec.lua) in graphs that are differentiated twice, walked again, walked from
-- within a walk, or computed again.

local hm = require "halfmoon"
local core = require "halfmoon.core"
local expect = require "spec.support.expect"
local gradients = require "spec.support.gradients"
local layers = require "spec.support.layer_pairs"

local amp, autograd = hm.amp, hm.autograd
local raises = expect.raises
local fused, linear, values, drop_gradients = layers.fused, layers.linear, layers.values, layers.drop_gradients
local leaf, network, backward_ops, pairs_in, text = layers.leaf, layers.network, layers.backward_ops, layers.pairs_in, layers.text
local same, compare, chain = layers.same, layers.compare, layers.chain
local ACTIVATIONS, RESTRICTED, NEAR = layers.ACTIVATIONS, layers.RESTRICTED, layers.NEAR

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
