-- layer_scale_spec.lua -- amp.layer_scale: gradients of parameters are true whatever the scales and the topology, and
-- small ones arrive; scalers on top, state, removal, refusals.  The rules are in layer_rules_spec.lua.

local hm = require "halfmoon"
local core = require "halfmoon.core"
local devices = require "spec.support.devices"
local expect = require "spec.support.expect"
local layers = require "spec.support.layers"
local numbers = require "spec.support.numbers"

local nn, optim, amp, autograd = hm.nn, hm.optim, hm.amp, hm.autograd
local same, near, raises = numbers.assert_same, numbers.assert_near, expect.raises
local model_of, chain, gradients, assert_equal_grads = layers.model_of, layers.chain, layers.gradients,
  layers.assert_equal_grads
local inf = math.huge

--- Scales 2, 1/4, 8, ... for all layers of a layer scale.
local function spread(ls)
  local i = 0
  for name in pairs(ls:get_scales()) do
    i = i + 1
    ls:set_scale(name, 2.0 ^ ((5 * i) % 9 - 4))
  end
end

--- run() gives the same gradients, to the bit, with the three layers of a chain scaled.
local function unmoved(model, run)
  local want = run()
  local ls = amp.layer_scale(model, "layerwise", {scales = {["0"] = 4, ["1"] = 32, ["2"] = 2}})
  assert_equal_grads(run(), want)
  ls:remove()
end

--- The gradients of model and fn() are the same to the bit with layers scaled, by the plain comparison and by check().
local function proves(model, fn, options)
  hm.manual_seed(11)
  local want = gradients(model, fn)
  local ls = amp.layer_scale(model, "layerwise", options)
  spread(ls)
  hm.manual_seed(11)
  local got = gradients(model, fn)
  assert_equal_grads(got, want)
  local changed = false
  for _, carried in pairs(ls:carried()) do changed = changed or carried ~= 1 end
  local report = ls:check(fn)
  assert.is_true(report.equal, tostring(report.worst.name))
  ls:remove()
  return changed
end

-- ====== Exactness ======

describe("layer_scale: gradients of parameters are true to the bit", function()
  before_each(function() hm.manual_seed(3) end)

  it("in a chain", function()
    local model, x = chain(4, 5), hm.randn {3, 5}
    assert.is_true(proves(model, function() return model(x):pow(2):sum() end))
  end)

  it("with residual sums outside of the layers", function()
    local model = model_of({{"first", nn.Linear(4, 4)}, {"a", nn.Linear(4, 4)}, {"b", nn.Linear(4, 4)},
      {"last", nn.Linear(4, 2)}}, function(self, x)
      local h = self.first(x)
      h = h + self.b(self.a(h):relu())
      return self.last(h + h:tanh())
    end)
    local x = hm.randn {3, 4}
    assert.is_true(proves(model, function() return model(x):sum() end))
  end)

  it("a tensor that goes into three layers, and past them into the loss", function()
    local model = model_of({{"first", nn.Linear(4, 4)}, {"q", nn.Linear(4, 4)}, {"k", nn.Linear(4, 4)},
      {"v", nn.Linear(4, 4)}, {"out", nn.Linear(4, 4)}}, function(self, x)
      local h = self.first(x)
      local mixed = (self.q(h):matmul(self.k(h):t())):softmax(2):matmul(self.v(h))
      return self.out(mixed):sum() + h:pow(2):sum()
    end)
    local x = hm.randn {3, 4}
    assert.is_true(proves(model, function() return model(x) end))
  end)

  it("a layer that is used twice, and a weight that two layers share", function()
    local a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    local model = model_of({{"a", a}, {"b", b}, {"c", nn.Linear(4, 4)}}, function(self, x)
      return self.c(self.a(self.c(self.b(self.a(x))):tanh())):sum()
    end)
    local x = hm.randn {3, 4}
    proves(model, function() return model(x) end)
  end)

  it("a layer's weight that is used outside of it, and parameters outside of all layers", function()
    local model = model_of({{"a", nn.Linear(4, 4)}, {"b", nn.Linear(4, 4)}, {"gain", nn.Parameter(hm.randn {4})}},
      function(self, x)
        local h = self.a(x) * self.gain
        return self.b(h):matmul(self.a.weight):sum() + (self.b.weight * self.b.weight):sum()
      end)
    local x = hm.randn {3, 4}
    proves(model, function() return model(x) end)
  end)

  it("layers in layers, layers that take and give tables, and results that go unused", function()
    local Pair = nn.class("Pair")
    function Pair:init() self.l, self.r = nn.Linear(4, 4), nn.Linear(4, 4) end
    function Pair:forward(pair)
      return {left = self.l(pair.left) + self.r(pair.right[1]), right = {self.r(pair.left), 7}}
    end
    local model = model_of({{"p", Pair()}, {"q", Pair()}}, function(self, x)
      return self.q(self.p {left = x, right = {x * 2}}).left:sum()
    end)
    local x = hm.randn {3, 4}
    assert.is_true(proves(model, function() return model(x) end, {layers = {"p", "q", "p.l", "q.r"}}))
  end)

  it("a layer that leaves a tensor behind for others", function()
    local Keeps = nn.class("Keeps")
    function Keeps:init() self.a = nn.Linear(4, 4) end
    function Keeps:forward(x)
      self.kept = self.a(x)
      return self.kept:relu()
    end
    local model = model_of({{"one", Keeps()}, {"two", nn.Linear(4, 4)}}, function(self, x)
      return self.two(self.one(x)) + self.one.kept
    end)
    local x = hm.randn {3, 4}
    proves(model, function() return model(x):sum() end, {layers = {model.one, model.two}})
  end)

  it("convolutions with batch norm, in place relu and dropout", function()
    local model = model_of({{"c1", nn.Conv2d(1, 4, 3)}, {"bn", nn.BatchNorm2d(4)}, {"c2", nn.Conv2d(4, 4, 3, {groups = 2})},
      {"fc", nn.Linear(4, 3)}}, function(self, x)
      local h = self.bn(self.c1(x))
      h:relu_()
      h = self.c2(nn.functional.dropout(h, 0.3, true)):mean({3, 4})
      return self.fc(h)
    end)
    local x = hm.randn {2, 1, 7, 7}
    assert.is_true(proves(model, function() return model(x):pow(2):sum() end))
  end)

  it("recurrent layers", function()
    local model = model_of({{"rnn", nn.LSTM(3, 4)}, {"fc", nn.Linear(4, 2)}}, function(self, x)
      return self.fc((self.rnn(x)))
    end)
    local x = hm.randn {2, 3, 3}
    assert.is_true(proves(model, function() return model(x):pow(2):sum() end))
  end)

  it("a transformer", function()
    local layer = nn.TransformerEncoderLayer(8, 2, {dim_feedforward = 16, dropout = 0})
    local model = model_of({{"embed", nn.Embedding(5, 8)}, {"body", layer}, {"head", nn.Linear(8, 5)}},
      function(self, ids) return self.head(self.body(self.embed(ids))) end)
    local ids = hm.tensor({{0, 1, 2}, {4, 3, 0}}, {dtype = "int64"})
    assert.is_true(proves(model, function() return model(ids):logsumexp(3):sum() end))
  end)

  it("inside hm.checkpoint", function()
    local model = chain(4, 4)
    local x = hm.randn {3, 4}
    assert.is_true(proves(model, function()
      local h = model[1](x)
      h = hm.checkpoint(function(t) return model[3](model[2](t):tanh()) end, h)
      return model[4](h):sum()
    end))
  end)

  it("gradients add up over several backwards, and over one graph twice", function()
    local model, x = chain(3, 4), hm.randn {3, 4}
    local function run()
      model:zero_grad()
      local loss = model(x):pow(2):sum()
      loss:backward(nil, {retain_graph = true})
      loss:backward()
      model(x):sum():backward()
      return {model[1].weight.grad:clone(), model[3].bias.grad:clone()}
    end
    local want = run()
    local ls = amp.layer_scale(model, "layerwise", {scales = {["0"] = 64, ["2"] = 0.5}})
    local got = run()
    same(got[1], want[1])
    same(got[2], want[2])
    ls:remove()
  end)

  it("the model's inputs, and what autograd.grad is asked for", function()
    local model, x = chain(3, 4), hm.randn({3, 4}, {requires_grad = true})
    local function run()
      local h = model[2](model[1](x))
      local loss = model[3](h):pow(2):sum()
      local grads = autograd.grad(loss, {x, h, model[1].weight, model[3].bias}, {retain_graph = true})
      x.grad = nil
      loss:backward()
      grads[5] = x.grad
      return grads
    end
    local want = run()
    local ls = amp.layer_scale(model, "layerwise", {init_scale = 2 ^ 10, scales = {["1"] = 4}})
    local got = run()
    for i = 1, 5 do same(got[i], want[i]) end
    ls:remove()
  end)

  it("second derivatives: a gradient penalty", function()
    local model, x = chain(3, 4), hm.randn({3, 4}, {requires_grad = true})
    local function penalty()
      local out = model[3](model[2](model[1](x):tanh()):sigmoid())
      local g = autograd.grad(out:sum(), x, {create_graph = true})[1]
      return out:sum() + (g:norm() - 1):pow(2)
    end
    local want = gradients(model, penalty)
    local ls = amp.layer_scale(model, "layerwise")
    spread(ls)
    assert_equal_grads(gradients(model, penalty), want)
    ls:remove()
  end)

  it("two models with scales of their own, one behind the other", function()
    local g, d, x = chain(2, 4), chain(2, 4), hm.randn {3, 4}
    local both = nn.ModuleList({g, d})
    local function loss() return d(g(x)):pow(2):sum() end
    local want = gradients(both, loss)
    local a = amp.layer_scale(g, "layerwise", {scales = {["0"] = 8, ["1"] = 2}})
    local b = amp.layer_scale(d, "layerwise", {init_scale = 32})
    assert_equal_grads(gradients(both, loss), want)
    b:remove()
    assert_equal_grads(gradients(both, loss), want)
    a:remove()
  end)

  it("one model under two layer scales, and a weight that two models share", function()
    local model, x = chain(4, 4), hm.randn {3, 4}
    local other = nn.Linear(4, 4)
    other.weight = model[1].weight
    local function loss() return other(model(x)):pow(2):sum() end
    local want = gradients(model, loss)
    local all = {
      amp.layer_scale(model, "layerwise", {layers = {"0", "1"}, init_scale = 8}),
      amp.layer_scale(model, "layerwise", {layers = {"2", "3"}, init_scale = 32}),
      amp.layer_scale(other, "layerwise", {init_scale = 2}),
    }
    for _, ls in ipairs(all) do
      assert_equal_grads(gradients(model, loss), want)
      ls:remove()
    end
    assert_equal_grads(gradients(model, loss), want)
  end)

  it("after the model was moved to new parameters", function()
    local model, x = chain(3, 4), hm.randn({3, 4}, {dtype = "float64"})
    local ls = amp.layer_scale(model, "layerwise", {init_scale = 2})
    spread(ls)
    local before = model[1].weight
    model:double()
    assert.is_false(rawequal(before, model[1].weight))
    local got = gradients(model, function() return model(x):pow(2):sum() end)
    assert.is_true(ls:carried()["0"] ~= 1 or ls:carried()["1"] ~= 1)
    ls:remove()
    assert_equal_grads(got, gradients(model, function() return model(x):pow(2):sum() end))
  end)

  it("a backward in a hook, that reaches the same parameters", function()
    local model, x = chain(3, 4), hm.randn {3, 4}
    local function run()
      return gradients(model, function()
        local h = model[2](model[1](x))
        h:register_hook(function()
          hm.enable_grad(function() (model(x):sum() + (model[1].weight * 3):sum()):backward() end)
        end)
        return model[3](h):sum()
      end)
    end
    unmoved(model, run)
  end)

  it("a backward in a hook, over the same graph", function()
    local model, x = chain(3, 4), hm.randn {3, 4}
    local function run()
      return gradients(model, function()
        local again = true
        local h = model[2](model[1](x))
        local loss = model[3](h):pow(2):sum()
        h:register_hook(function()
          if not again then return end
          again = false
          loss:backward(nil, {retain_graph = true})
        end)
        return {backward = function() loss:backward(nil, {retain_graph = true}) end}
      end)
    end
    unmoved(model, run)
  end)

  it("not over a graph that was freed, which is said", function()
    local model, x = chain(3, 4), hm.randn {3, 4}
    local ls = amp.layer_scale(model, "layerwise", {scales = {["0"] = 4, ["1"] = 32, ["2"] = 2}})
    local h = model(x)
    local first, second = h:sum(), h:pow(2):sum()
    first:backward()
    collectgarbage()
    for _ = 1, 2 do raises("the graph was freed", second.backward, second) end
    ls:remove()
  end)

  it("after a backward that ended with an error, and after a parameter was released", function()
    local model, x = chain(3, 4), hm.randn {3, 4}
    local want = gradients(model, function() return model(x):sum() end)
    local ls = amp.layer_scale(model, "layerwise", {scales = {["0"] = 4, ["1"] = 32, ["2"] = 2}})
    local h = model[1](x)
    h:register_hook(function() error "boom" end)
    local loss = model[3](model[2](h)):sum()
    raises("boom", loss.backward, loss)
    assert_equal_grads(gradients(model, function() return model(x):sum() end), want)
    local old = model[3].bias
    model[3].bias = nn.Parameter(old:detach():clone())
    old:release()
    assert_equal_grads(gradients(model, function() return model(x):sum() end), want)
    ls:remove()
  end)

  it("after memory ran out anywhere in a backward", function()
    local model, x = chain(3, 4), hm.randn {3, 4}
    local want = gradients(model, function() return model(x):sum() end)
    local ls = amp.layer_scale(model, "layerwise", {scales = {["0"] = 4, ["1"] = 32, ["2"] = 2}})
    for _, fail_at in ipairs {core.alloc_fail_at, core.lua_alloc_fail_at} do
      local failed = 0
      for n = 1, 60 do
        local loss = model(x):sum()
        fail_at(n)
        local ok, why = pcall(loss.backward, loss)
        fail_at(0)
        if not ok then
          failed = failed + 1
          assert.matches("memory", why)
        end
      end
      assert.is_true(failed > 20, tostring(failed))
      assert_equal_grads(gradients(model, function() return model(x):sum() end), want)
    end
    ls:remove()
  end)

  it("a graph that outlives the layer scale", function()
    local model, x = chain(3, 4), hm.randn {3, 4}
    local want = gradients(model, function() return model(x):sum() end)
    local ls = amp.layer_scale(model, "layerwise", {init_scale = 16})
    local loss = model(x):sum()
    ls:remove()
    assert_equal_grads(gradients(model, function() return loss end), want)
    local again = amp.layer_scale(model, "layerwise", {init_scale = 16})
    loss = model(x):sum()
    again:remove()
    local other = amp.layer_scale(chain(1, 4), "layerwise") -- plans are made for others; these layers are nobody's now
    assert_equal_grads(gradients(model, function() return loss end), want)
    other:remove()
  end)
end)

-- ====== Range ======

describe("layer_scale: range", function()
  --- A deep float16 network whose gradients shrink by a factor in each layer.
  local function deep(n, width, gain)
    hm.manual_seed(5)
    local model = chain(n, width)
    for i = 1, n do
      core.no_grad(function()
        model[i].weight:normal_(0, gain / math.sqrt(width))
        model[i].bias:zero_()
      end)
    end
    return model
  end

  local function first_gradient(model, x, seed)
    model:zero_grad()
    local loss = amp.autocast("float16", function()
      local h = x
      for i = 1, #model do h = model[i](h) * 8 end -- keeps values near 1: their gradients shrink on the way back
      return (h:float() * seed):sum()
    end)
    loss:backward()
    return model[1].weight.grad
  end

  local function zeros_of(t) return core.census(t).zeros end

  it("gradients that vanish in float16 arrive, close to those of float32", function()
    local n, width = 20, devices.pick(32, 16)
    local model = deep(n, width, 0.05)
    local x = hm.randn {8, width}
    local seed = hm.randn {8, width} * 1e-3
    -- without autocast: float32
    model:zero_grad()
    local h = x
    for i = 1, n do h = model[i](h) * 8 end
    (h * seed):sum():backward()
    local want = model[1].weight.grad
    assert.is_true(want:abs():max():item() > 0)
    local plain = first_gradient(model, x, seed)
    assert.equal(plain:numel(), zeros_of(plain))
    local ls = amp.layer_scale(model, "adaptive", {accum_upper_bound = 2.0 ^ 40})
    local got = first_gradient(model, x, seed)
    assert.equal(0, core.census(got).inf_count)
    near(got, want, 0.05, want:abs():max():item() * 0.02)
    assert.is_true(ls:get_scale "10" > 1)
    ls:remove()
    -- the same by hand, through scales that grow towards the first layer
    local scales = {}
    for i = 1, n do scales[tostring(i - 1)] = 2.0 ^ (2 * (n - i)) end
    ls = amp.layer_scale(model, "layerwise", {scales = scales})
    near(first_gradient(model, x, seed), want, 0.05, want:abs():max():item() * 0.02)
    ls:remove()
  end)

  it("the example: what no one scale saves arrives, a few percent off at most", function()
    local example = require "examples.layer_scale"
    hm.manual_seed(8)
    local x, y = hm.randn {16, 784}, hm.randint(0, 10, {16}, {dtype = "int64"})
    local rows = example.compare(16, x, y)
    assert.equal(16, #rows)
    assert.equal(1, rows[1].plain)
    assert.is_true(rows[1].scaled > 0.9, "with one scale: " .. rows[1].scaled)
    for _, row in ipairs(rows) do
      assert.is_true(row.layered < 1e-3, row.name)
      assert.is_true(row.off < 0.06, ("%s: %g"):format(row.name, row.off))
    end
    assert.is_true(rows[1].carried > 2.0 ^ 30)
  end)

  it("a layer carries its scale inside, and what lies before it that of the layer that made it", function()
    local model, seen = chain(3, 4), {}
    local ls = amp.layer_scale(model, "layerwise", {scales = {["0"] = 2, ["1"] = 8, ["2"] = 32}})
    local x = hm.randn {2, 4}
    local h1 = model[1](x)
    local h2 = model[2](h1)
    h1:register_hook(function(g) seen[1] = g:clone() end)
    h2:register_hook(function(g) seen[2] = g:clone() end)
    local y = model[3](h2)
    y:register_hook(function(g) seen[3] = g:clone() end)
    y:sum():backward()
    same(seen[3], hm.ones {2, 4})
    same(seen[2], hm.ones({2, 4}):matmul(model[3].weight) * 8)
    same(seen[1], hm.ones({2, 4}):matmul(model[3].weight):matmul(model[2].weight) * 2)
    assert.same({["0"] = 2.0, ["1"] = 8.0, ["2"] = 32.0}, ls:carried())
    ls:remove()
  end)

  it("what several layers made carries the smallest of their scales; what the loss reads carries none", function()
    local seen
    local model = model_of({{"a", nn.Linear(4, 4)}, {"b", nn.Linear(4, 4)}, {"c", nn.Linear(4, 4)}}, function(self, x)
      local h = self.a(x) + self.b(x)
      h:register_hook(function(g) seen = g:clone() end)
      return self.c(h)
    end)
    local ls = amp.layer_scale(model, "layerwise", {scales = {a = 64, b = 4, c = 256}})
    local x = hm.randn {2, 4}
    model(x):sum():backward()
    same(seen, hm.ones({2, 4}):matmul(model.c.weight) * 4)
    assert.same({a = 64.0, b = 4.0, c = 256.0}, ls:carried())
    ls:remove()
  end)
end)

-- ====== With a scaler ======

describe("layer_scale: with a GradScaler on top", function()
  it("scale, unscale_, step and update are the scaler's; gradients are true in between", function()
    hm.manual_seed(4)
    local model, x = chain(3, 4), hm.randn {3, 4}
    local want = gradients(model, function() return model(x):sum() end)
    local scaler = amp.GradScaler {init_scale = 256, growth_interval = 1}
    local ls = amp.layer_scale(model, "layerwise", {scaler = scaler, init_scale = 8})
    local opt = optim.SGD(model:parameters(), {lr = 0})
    model:zero_grad()
    ls:scale(model(x):sum()):backward()
    same(model[1].weight.grad, want["0.weight"] * 256)
    ls:unscale_(opt)
    same(model[1].weight.grad, want["0.weight"])
    assert.is_true((ls:step(opt)))
    local record = ls:update()
    assert.equal("grow", record.scaler.event)
    assert.equal(512, scaler:get_scale())
    ls:remove()
  end)

  it("an overflow moves the scaler and the layer", function()
    local model, x = chain(2, 4), hm.ones {3, 4}
    local scaler = amp.GradScaler {init_scale = 256}
    local ls = amp.layer_scale(model, "layerwise", {scaler = scaler, init_scale = 8})
    local opt = optim.SGD(model:parameters(), {lr = 0.1})
    model[2].bias:register_hook(function(g) return g * inf end)
    ls:scale(model(x):sum()):backward()
    local stepped, record = ls:step(opt)
    assert.is_false(stepped)
    assert.equal(256, record.scale)
    ls:update()
    assert.equal(128, scaler:get_scale())
    assert.same({["0"] = 8.0, ["1"] = 4.0}, ls:get_scales())
    ls:remove()
  end)

  it("float16 parameters, where allowed", function()
    local model, x = chain(2, 4):half(), hm.ones({3, 4}, {dtype = "float16"})
    local ls = amp.layer_scale(model, "layerwise", {allow_f16_grads = true, init_scale = 64})
    local opt = optim.SGD(model:parameters(), {lr = 0.1})
    model(x):sum():backward()
    assert.is_true((ls:step(opt)))
    ls:remove()
    ls = amp.layer_scale(model, "layerwise")
    model(x):sum():backward()
    raises("unscale FP16 gradients", ls.step, ls, opt)
    ls:remove()
  end)
end)

-- ====== State, text, removal ======

describe("layer_scale: state", function()
  it("goes on where it was", function()
    hm.manual_seed(6)
    local function run(ls, model, opt, bad, n)
      for i = 1, n do
        opt:zero_grad()
        model(hm.ones {1, 3}):sum():backward()
        if bad[i] then model[1].weight.grad:mul_(inf) end
        ls:step(opt)
        ls:update()
      end
    end
    local function make()
      local model = chain(2, 3)
      return amp.layer_scale(model, "layerwise", {init_scale = 64, growth_interval = 3}), model,
        optim.SGD(model:parameters(), {lr = 0})
    end
    local a, model_a, opt_a = make()
    run(a, model_a, opt_a, {false, true, false, false}, 4)
    local saved = a:state_dict()
    local path = os.tmpname()
    assert(hm.save(path, saved))
    local b, model_b, opt_b = make()
    b:load_state_dict(assert(hm.load(path)))
    os.remove(path)
    assert.same(a:get_scales(), b:get_scales())
    assert.equal(tostring(a):gsub("carried.*", ""), tostring(b):gsub("carried.*", ""))
    run(a, model_a, opt_a, {true, false, false, false}, 4)
    run(b, model_b, opt_b, {true, false, false, false}, 4)
    assert.same(a:state_dict(), b:state_dict())
    assert.equal(64, saved.layers["1"].state.scale * 0.5) -- grew once, and the copy is its own
    a:remove()
    b:remove()
  end)

  it("refuses a state of others, and changes nothing then", function()
    local ls = amp.layer_scale(chain(2, 3), "layerwise", {init_scale = 8})
    local good = ls:state_dict()
    local function with(change)
      local s = ls:state_dict()
      change(s)
      return s
    end
    raises("expected a table made by state_dict()", ls.load_state_dict, ls, {scale = 3})
    raises("made by rule 'adaptive'", ls.load_state_dict, ls, with(function(s) s.rule = "adaptive" end))
    raises("no scaled layer \"9\"", ls.load_state_dict, ls, with(function(s) s.layers["9"] = s.layers["0"] end))
    raises("has no layer '1'", ls.load_state_dict, ls, with(function(s) s.layers["1"] = nil end))
    raises("layer '1' has no scale", ls.load_state_dict, ls, with(function(s) s.layers["1"].state.scale = -1 end))
    raises("'steps' must be integer", ls.load_state_dict, ls, with(function(s) s.steps = "x" end))
    assert.same(good, ls:state_dict())
    ls:remove()
  end)

  it("prints a table", function()
    local model = model_of({{"conv", nn.Conv2d(1, 2, 3)}, {"fc", nn.Linear(2, 2)}}, function(self, x)
      return self.fc(self.conv(x):mean({3, 4}))
    end)
    local ls = amp.layer_scale(model, "layerwise", {scales = {conv = 1024}})
    local opt = optim.SGD(model:parameters(), {lr = 0})
    model(hm.ones {1, 1, 4, 4}):sum():backward()
    model.conv.weight.grad:mul_(inf)
    ls:step(opt)
    ls:update()
    local lines = {}
    for line in (tostring(ls) .. "\n"):gmatch("(.-)\n") do lines[#lines + 1] = line end
    assert.equal("LayerScale  rule layerwise  layers 2  steps 1  skipped 1 (last: step 1, conv)", lines[1])
    assert.matches("^  layer%s+kind%s+scale%s+carried%s+overflows$", lines[2])
    assert.matches("^  conv%s+Conv2d%s+512%s+1024%s+1$", lines[3])
    assert.matches("^  fc%s+Linear%s+1%s+1%s+0$", lines[4])
    ls:remove()
    assert.matches("removed", tostring(ls))
  end)

  it("remove takes everything out of the model, and may be called again", function()
    local model, x = chain(2, 3), hm.ones {1, 3}
    local ls = amp.layer_scale(model, "layerwise", {init_scale = 4})
    assert.equal("layer_scale", model[1](x).grad_fn)
    ls:remove()
    ls:remove()
    assert.is_false(model[1]._hooks)
    assert.equal("linear", model[1](x).grad_fn)
    for _, name in ipairs {"scale", "unscale_", "step", "update", "check", "set_rule"} do
      raises(name .. ": this layer scale was removed", ls[name], ls)
    end
  end)

  it("a model and its layer scale can be collected", function()
    local weak = setmetatable({}, {__mode = "v"})
    do
      local model = chain(2, 3)
      weak.ls = amp.layer_scale(model, "layerwise")
      weak.model = model
      model(hm.ones {1, 3}):sum():backward()
    end
    for _ = 1, 3 do collectgarbage() end
    assert.is_nil(weak.ls)
    assert.is_nil(weak.model)
  end)

  it("check: what differs is told, and everything is put back", function()
    local model = chain(2, 3)
    local ls = amp.layer_scale(model, "layerwise", {init_scale = 4})
    local x = hm.ones {1, 3}
    model(x):sum():backward()
    local before = model[1].weight.grad
    local calls = 0
    local report = ls:check(function()
      calls = calls + 1
      return model(x):sum() * calls
    end)
    assert.is_false(report.equal)
    assert.equal(1, report.worst.difference)
    assert.is_true(rawequal(before, model[1].weight.grad))
    assert.same({["0"] = 4.0, ["1"] = 4.0}, ls:get_scales())
    raises("expected a function", ls.check, ls, 3)
    raises("not a loss", ls.check, ls, function() return 3 end)
    assert.is_true(rawequal(before, model[1].weight.grad))
    assert.is_true(ls:check(function() return nn.functional.dropout(model(x), 0.5, true):sum() end).equal) -- the same random numbers
    ls:remove()
  end)
end)

-- ====== Refusals ======

describe("layer_scale: refuses", function()
  local model
  before_each(function() model = model_of({{"fc", nn.Linear(2, 2)}, {"act", nn.ReLU()}}, function(self, x)
    return self.fc(x)
  end) end)

  it("wrong arguments and options, with the closest name", function()
    raises("expected a module", amp.layer_scale, 3, "layerwise")
    raises("unknown rule 'layerwize', did you mean 'layerwise'", amp.layer_scale, model, "layerwize")
    raises("a rule must be a name or a table, not nil", amp.layer_scale, model)
    raises("needs update", amp.layer_scale, model, {})
    raises("init must be a function", amp.layer_scale, model, {update = print, init = 3})
    raises({"unknown option 'growth_intervall', did you mean 'growth_interval'", "rule 'layerwise'"},
      amp.layer_scale, model, "layerwise", {growth_intervall = 3})
    raises("'growth_factor' must be number", amp.layer_scale, model, "layerwise", {growth_factor = "2"})
    raises("growth_factor must be at least 1", amp.layer_scale, model, "layerwise", {growth_factor = 0.5})
    raises({"no scaled layer \"fd\"", "did you mean 'fc'"}, amp.layer_scale, model, "layerwise", {scales = {fd = 3}})
    raises("must be a positive finite number", amp.layer_scale, model, "layerwise", {scales = {fc = -3}})
    raises("must be a positive finite number", amp.layer_scale, model, "layerwise", {init_scale = 0})
    raises("n_uf_threshold must lie between", amp.layer_scale, model, "adaptive", {n_uf_threshold = 1})
    raises("must be a table", amp.layer_scale, model, "layerwise", 3)
    raises("must be an amp.GradScaler", amp.layer_scale, model, "layerwise", {scaler = {}})
    raises("too late", amp.layer_scale, model, "layerwise", {scaler = amp.GradScaler {async = true}})
    local ls = amp.layer_scale(model, "layerwise") -- nothing was left behind by those
    raises("no scaled layer \"fcc\"", ls.get_scale, ls, "fcc")
    raises("positive finite", ls.set_scale, ls, "fc", inf)
    ls:remove()
  end)

  it("layers that are none", function()
    raises({"no module 'fcc'", "did you mean 'fc'"}, amp.layer_scale, model, "layerwise", {layers = {"fcc"}})
    raises("must be a module of the model", amp.layer_scale, model, "layerwise", {layers = {nn.Linear(1, 1)}})
    raises("has no parameters", amp.layer_scale, model, "layerwise", {layers = {"act"}})
    raises("no layers with parameters", amp.layer_scale, nn.ReLU(), "layerwise")
  end)

  it("a layer that is scaled already", function()
    local ls = amp.layer_scale(model, "layerwise")
    raises("fc (Linear) is scaled already", amp.layer_scale, model, "adaptive")
    ls:remove()
    amp.layer_scale(model, "adaptive"):remove()
  end)

  it("a layer that changes its input in place", function()
    local Rude = nn.class("Rude")
    function Rude:init() self.fc = nn.Linear(2, 2) end
    function Rude:forward(x) return self.fc(x:relu_()) end
    local net = model_of({{"first", nn.Linear(2, 2)}, {"rude", Rude()}}, function(self, x)
      return self.rude(self.first(x))
    end)
    local ls = amp.layer_scale(net, "layerwise", {layers = {"first", "rude"}})
    raises({"layer rude (Rude) changes its input in place", "hint"}, net, hm.ones {1, 2})
    ls:remove()
    ls = amp.layer_scale(net, "layerwise") -- its Linear alone is fine
    assert.is_true(ls:check(function() return net(hm.ones {1, 2}):sum() end).equal)
    ls:remove()
  end)
end)

-- ====== What it stands on ======

describe("core.graph_parts and core.on_backward", function()
  local function gate(t)
    local y = core.no_grad(t.detach, t)
    core.record_custom("cut here", {t}, {y}, function(g) return g end)
    return y
  end

  it("parts are what gradients are added in", function()
    local a, b = hm.randn({2}, {requires_grad = true}), hm.randn({2}, {requires_grad = true})
    local h = gate(a * 2)
    local y = gate(h + b) * h:sum()
    local z = gate(y) + a -- leads to a as well: the part above joins the part of a
    local found = core.graph_parts("cut here", {z}, {z, y, h, a, b, hm.ones {1}})
    assert.same({3, 3, 1}, {#found.cuts // 3, #found.asked // 2, #found.leaves + 1})
    local at = {z = found.asked[1], y = found.asked[2], h = found.asked[3], a = found.asked[4], b = found.asked[5]}
    assert.equal(at.z, at.a)
    assert.equal(at.y, at.h) -- by the sum of h that y is multiplied by
    assert.equal(at.h, at.b)
    assert.are_not.equal(at.z, at.y)
    assert.equal(2, found.n)
    assert.equal(0, found.asked[6])
    local seen = {}
    for i = 1, #found.cuts, 3 do seen[#seen + 1] = ("%d %d"):format(found.cuts[i + 1], found.cuts[i + 2]) end
    table.sort(seen)
    local want = {("%d %d"):format(at.z, at.y), ("%d %d"):format(at.y, at.y), ("%d %d"):format(at.h, at.a)}
    table.sort(want)
    assert.same(want, seen)
    found = core.graph_parts("other", {z})
    assert.equal(1, found.n)
    assert.same({0, 2}, {#found.cuts, #found.leaves})
    assert.same({n = 0, cuts = {}, leaves = {}, asked = {}}, core.graph_parts("x", {hm.ones {1}}))
  end)

  it("a long graph", function()
    local a = hm.ones({1}, {requires_grad = true})
    local y = a
    for i = 1, 3000 do y = i % 3 == 0 and gate(y) or y + 1 end
    local found = core.graph_parts("cut here", {y})
    assert.equal(1001, found.n)
    assert.equal(3000, #found.cuts)
  end)

  it("hears of each walk, and its end", function()
    local a, heard = hm.ones({1}, {requires_grad = true}), {}
    core.on_backward(function(roots, inputs)
      heard[#heard + 1] = {#roots, inputs and #inputs}
      return function() heard[#heard + 1] = "end" end
    end)
    local y = a * 2
    y:backward()
    autograd.grad({a * 1, a * 3}, a)
    raises("no graph", hm.ones({1}).backward, hm.ones {1})
    core.on_backward(nil)
    a:sum():backward()
    assert.same({{1}, "end", {2, 1}, "end", {1}, "end"}, heard)
    raises("must be a function or nil", core.on_backward, 3)
  end)
end)
