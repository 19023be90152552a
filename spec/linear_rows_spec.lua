-- linear_rows_spec.lua -- rows of the op table that do more than linear: the one call for a layer's weight and bias
-- (linear_backward_params), and what these rows refuse.

local hm = require "halfmoon"
local core = require "halfmoon.core"
local expect = require "spec.support.expect"
local layers = require "spec.support.layer_pairs"

local amp = hm.amp
local raises = expect.raises
local fused, linear, values, drop_gradients, leaf = layers.fused, layers.linear, layers.values, layers.drop_gradients, layers.leaf
local network, backward_ops, text, same = layers.network, layers.backward_ops, layers.text, layers.same
local ACTIVATIONS = layers.ACTIVATIONS
local DTYPES = layers.DTYPES

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
