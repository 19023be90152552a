-- pairs_spec.lua -- nodes whose backward runs as one (core/pairs.c): a linear above a linear_relu or linear_gelu_tanh.  They run so where
-- nobody can tell the difference, and gradients are then those of linear and the activation apart, on the CPU to the bit.

local hm = require "halfmoon"
local core = require "halfmoon.core"
local devices = require "spec.support.devices"
local expect = require "spec.support.expect"
local layers = require "spec.support.layer_pairs"

local amp, autograd = hm.amp, hm.autograd
local raises = expect.raises
local nan, inf = 0 / 0, math.huge
local fused, apart, linear, values, leaf = layers.fused, layers.apart, layers.linear, layers.values, layers.leaf
local network, backward_ops, pairs_in, text, same = layers.network, layers.backward_ops, layers.pairs_in, layers.text, layers.same
local compare, chain, two = layers.compare, layers.chain, layers.two
local ACTIVATIONS, RESTRICTED, NEAR = layers.ACTIVATIONS, layers.RESTRICTED, layers.NEAR
local DTYPES = layers.DTYPES

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
