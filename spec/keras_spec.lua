-- keras_spec.lua -- amp.LossScaleOptimizer in both generations of its API, by the tests of Keras 3 and tf-keras, and dtype policies:
-- mixed_float16, mixed_bfloat16.

local hm = require "halfmoon"
local numbers = require "spec.support.numbers"
local expect = require "spec.support.expect"

local nn, optim, amp = hm.nn, hm.optim, hm.amp
local F = nn.functional
local same, near, raises = numbers.assert_same, numbers.assert_near, expect.raises
local inf, nan = math.huge, 0 / 0

local function leaf(values, dtype) return hm.tensor(values, {dtype = dtype, requires_grad = true}) end

local function sgd(p, options) return optim.SGD({p}, options or {lr = 0.5}) end

-- ====== Keras 3 ======

describe("as in Keras 3", function()
  it("a finite step", function()
    local v = leaf {1, 2, 3, 4}
    local opt = amp.LossScaleOptimizer(sgd(v))
    local grads = {hm.tensor {1, 6, 7, 2} * opt.loss_scale}
    local stepped = opt:apply(grads, {v})
    assert.is_true(stepped)
    same(v, {0.5, -1, -0.5, 3})
    assert.equal(1, opt.iterations)
  end)

  it("an infinite step leaves the variables", function()
    for _, bad in ipairs {inf, nan} do
      local v = leaf {1, 2, 3, 4}
      local opt = amp.LossScaleOptimizer(sgd(v))
      local stepped, record = opt:apply({hm.tensor {bad, 6, 7, 2}}, {v})
      assert.is_false(stepped)
      assert.equal(1, record.inf_count + record.nan_count)
      same(v, {1, 2, 3, 4})
      assert.equal(2.0 ^ 14, opt.loss_scale)
      assert.equal(0, opt.iterations)
      assert.equal(1, opt.attempts)
    end
  end)

  it("downscaling: 400 to 25 after four infinite steps", function()
    local v = leaf {1, 2, 3, 4}
    local opt = amp.LossScaleOptimizer(sgd(v), {initial_scale = 400})
    for _ = 1, 4 do opt:apply({hm.full({4}, inf)}, {v}) end
    assert.equal(25, opt.loss_scale)
  end)

  it("upscaling: 2 to 32 after eight clean steps, growing every second", function()
    local v = leaf {1, 2, 3, 4}
    local opt = amp.LossScaleOptimizer(sgd(v), {initial_scale = 2, dynamic_growth_steps = 2})
    for _ = 1, 8 do opt:apply({hm.tensor {1, 6, 7, 2}}, {v}) end
    assert.equal(32, opt.loss_scale)
    assert.equal(0, opt.dynamic_counter)
  end)

  it("iterations count the steps made", function()
    local v = leaf {1, 2, 3, 4}
    local opt = amp.LossScaleOptimizer(sgd(v, {lr = 0}))
    assert.equal(0, opt.iterations)
    opt:apply({hm.ones({4})}, {v})
    opt:apply({hm.full({4}, nan)}, {v})
    opt:apply({hm.ones({4})}, {v})
    assert.equal(2, opt.iterations)
  end)

  it("scale_loss multiplies, in float32, also a loss that is a function", function()
    local opt = amp.LossScaleOptimizer(sgd(leaf {1}))
    same(opt:scale_loss(hm.tensor(3.0)), {3 * 2 ^ 15})
    assert.equal("float32", opt:scale_loss(hm.tensor(3.0, {dtype = "f16"})).dtype)
    same(opt:scale_loss(function() return hm.tensor(2.0) end)(), {2 ^ 16})
  end)

  it("scale_loss, grad, apply; and apply_gradients, which unscales here, too", function()
    for _, how in ipairs {"apply", "apply_gradients"} do
      local v = leaf {1, 2}
      local opt = amp.LossScaleOptimizer(sgd(v))
      local grads = hm.autograd.grad(opt:scale_loss((v * v):sum()), {v})
      if how == "apply" then opt:apply(grads, {v}) else opt:apply_gradients {{grads[1], v}} end
      same(v, {0, 0})
    end
  end)

  it("serialisation: the state goes on, the configuration tells the options", function()
    local v = leaf {1, 2}
    local opt = amp.LossScaleOptimizer(optim.Adam({v}, {lr = 0.1}), {initial_scale = 8, dynamic_growth_steps = 3})
    for _ = 1, 2 do opt:apply({hm.tensor {1, 2}}, {v}) end
    local other = amp.LossScaleOptimizer(optim.Adam({leaf {1, 2}}, {lr = 0.1}), {initial_scale = 4, dynamic_growth_steps = 3})
    other:load_state_dict(opt:state_dict())
    assert.equal(8, other.loss_scale)
    assert.equal(2, other.iterations)
    assert.equal(2, other.dynamic_counter)
    assert.equal(2, other.inner_optimizer:state_dict().state[1].step)
    assert.same({name = "LossScaleOptimizer", inner_optimizer = "Adam", initial_scale = 8, dynamic = true, dynamic_growth_steps = 3},
      opt:get_config())
    local path = os.tmpname()
    assert(hm.save(path, opt:state_dict()))
    other:load_state_dict(assert(hm.load(path)))
    os.remove(path)
    assert.equal(2, other.dynamic_counter)
  end)

  it("refuses unknown options", function()
    raises({"unknown option", "initial_scale"}, amp.LossScaleOptimizer, sgd(leaf {1}), {initial_scal = 2})
    raises("dynamic_growth_steps", amp.LossScaleOptimizer, sgd(leaf {1}), {dynamic_growth_steps = 0})
    raises("expected an optimizer", amp.LossScaleOptimizer, "sgd")
  end)
end)

-- ====== tf-keras ======

describe("as in tf-keras", function()
  --- Minimizes sum(v) once, in the words of the tutorials.
  local function minimize(opt, v, loss)
    loss = loss or v:sum()
    local grads = hm.autograd.grad(opt:get_scaled_loss(loss), {v})
    grads = opt:get_unscaled_gradients(grads)
    return opt:apply_gradients {{grads[1], v}}
  end

  it("a fixed scale", function()
    local v = leaf {5}
    local opt = amp.LossScaleOptimizer(sgd(v, {lr = 2}), {dynamic = false, initial_scale = 10})
    assert.equal(10, opt.loss_scale)
    assert.is_false(opt.dynamic)
    assert.is_nil(opt.dynamic_counter)
    minimize(opt, v)
    same(v, {3})
    minimize(opt, v, v:sum() * inf)
    same(v, {3})
    assert.equal(10, opt.loss_scale)
  end)

  it("a dynamic scale: grows, and falls by an infinite or a NaN gradient", function()
    local v = leaf {5}
    local opt = amp.LossScaleOptimizer(sgd(v, {lr = 2}), {initial_scale = 2, dynamic_growth_steps = 1})
    minimize(opt, v)
    same(v, {3})
    assert.equal(4, opt.loss_scale)
    minimize(opt, v, v:sum() * inf)
    same(v, {3})
    assert.equal(2, opt.loss_scale)
    minimize(opt, v, v:sum() * nan)
    same(v, {3})
    assert.equal(1, opt.loss_scale)
    minimize(opt, v, v:sum() * inf)
    assert.equal(1, opt.loss_scale) -- the floor
    minimize(opt, v)
    same(v, {1})
    assert.equal(2, opt.loss_scale)
  end)

  it("a float16 loss is scaled in float32", function()
    local v = leaf({1, 2}, "f16")
    local opt = amp.LossScaleOptimizer(sgd(v, {lr = 0}), {initial_scale = 2 ^ 20})
    local scaled = opt:get_scaled_loss(v:sum())
    assert.equal("float32", scaled.dtype)
    same(scaled, {3 * 2 ^ 20})
  end)

  it("clipping between unscaling and applying", function()
    local v = leaf {1, 1, 1}
    local opt = amp.LossScaleOptimizer(sgd(v, {lr = 1}))
    local grads = hm.autograd.grad(opt:get_scaled_loss((v * hm.tensor {10, -4, 0.5}):sum()), {v})
    grads = opt:unscale(grads)
    grads[1] = grads[1]:clamp(-1, 1)
    opt:apply_gradients {{grads[1], v}}
    same(v, {0, 2, 0.5})
  end)

  it("gradients that are missing stay so, and other parameters stay where they are", function()
    local a, b, c = leaf {1}, leaf {1}, leaf {1}
    local opt = amp.LossScaleOptimizer(optim.SGD({a, b, c}, {lr = 1}))
    c.grad = hm.tensor {5}
    local grads = hm.autograd.grad(opt:get_scaled_loss(a:sum()), {a, b}, {allow_unused = true})
    grads = opt:get_unscaled_gradients(grads)
    assert.is_nil(grads[2])
    assert.is_true((opt:apply_gradients {{grads[1], a}, {nil, b}}))
    same(a, {0})
    same(b, {1})
    same(c, {1})
    same(c.grad, {5})
    raises("expected a parameter of the optimizer", opt.apply_gradients, opt, {{grads[1], leaf {1}}})
    raises("expected {gradient, variable}", opt.apply_gradients, opt, {a})
  end)

  it("says once that scaling or unscaling was forgotten", function()
    local v = leaf {1}
    local opt = amp.LossScaleOptimizer(sgd(v, {lr = 1}))
    local said = expect.stderr(function()
      for _ = 1, 3 do opt:apply_gradients {{hm.tensor {1}, v}} end
    end)
    assert.equal(1, select(2, said:gsub("without get_scaled_loss", "")))
    same(v, {-2})
    said = expect.stderr(function()
      for _ = 1, 2 do opt:apply_gradients {{hm.autograd.grad(opt:get_scaled_loss(v:sum() * 0.125), {v})[1], v}} end
    end)
    assert.equal(1, select(2, said:gsub("without get_unscaled_gradients", "")))
    said = expect.stderr(function() minimize(opt, v) end)
    assert.equal("", said)
  end)

  it("nesting, and wrapping an optimizer twice, are errors", function()
    local inner = sgd(leaf {1})
    local opt = amp.LossScaleOptimizer(inner)
    raises("cannot wrap another", amp.LossScaleOptimizer, opt)
    raises("inside another LossScaleOptimizer already", amp.LossScaleOptimizer, inner)
  end)

  it("options of both generations, and what excludes what", function()
    assert.equal(128, amp.LossScaleOptimizer(sgd(leaf {1}), 128).loss_scale)
    assert.equal(2.0 ^ 15, amp.LossScaleOptimizer(sgd(leaf {1}), "dynamic").loss_scale)
    assert.equal(64, amp.LossScaleOptimizer(sgd(leaf {1}), {loss_scale = 64}).loss_scale)
    raises("initial_scale must be given", amp.LossScaleOptimizer, sgd(leaf {1}), {dynamic = false})
    raises("dynamic_growth_steps must be left out", amp.LossScaleOptimizer, sgd(leaf {1}),
      {dynamic = false, initial_scale = 2, dynamic_growth_steps = 3})
    raises("one or the other", amp.LossScaleOptimizer, sgd(leaf {1}), {loss_scale = 2, dynamic = true})
    raises("loss_scale must be", amp.LossScaleOptimizer, sgd(leaf {1}), "fixed")
  end)

  it("a checkpoint goes on where it was", function()
    local v = leaf {1, 2}
    local opt = amp.LossScaleOptimizer(optim.SGD({v}, {lr = 1, momentum = 1}), {initial_scale = 1, dynamic_growth_steps = 2})
    minimize(opt, v)
    local saved, at = opt:state_dict(), v:detach():clone()
    saved.inner.state[1].momentum_buffer = saved.inner.state[1].momentum_buffer:clone()
    minimize(opt, v)
    local want, scale = v:detach():clone(), opt.loss_scale
    hm.no_grad(function() v:copy_(at) end)
    opt.scaler:set_scale(64)
    opt:load_state_dict(saved)
    minimize(opt, v)
    same(v, want)
    assert.equal(scale, opt.loss_scale)
  end)
end)

describe("LossScaleOptimizer", function()
  it("works with backward and step(), clips, and hands on what it does not know", function()
    local v = leaf {3, 4}
    local opt = amp.LossScaleOptimizer(sgd(v, {lr = 1}))
    assert.equal(1, opt.param_groups[1].lr)
    opt.param_groups[1].lr = 0.5
    opt:scale_loss((v * v):sum() / 2):backward()
    local stepped, record = opt:step {max_norm = 1}
    assert.is_true(stepped)
    near(v, {2.7, 3.6}, 1e-6)
    assert(math.abs(record.norm - 5) < 1e-5)
    assert.equal("hold", record.update.event)
    opt:zero_grad()
    assert.is_nil(v.grad)
    assert.is_true(select(2, opt:step()).empty)
    assert.equal(1, opt.attempts)
    assert.matches("LossScaleOptimizer(SGD", tostring(opt), 1, true)
    raises("can only be read", function() opt.loss_scale = 3 end)
    local scheduler = optim.lr_scheduler.StepLR(opt.inner_optimizer, {step_size = 1, gamma = 0.5})
    scheduler:step(true)
    assert.equal(0.25, opt.param_groups[1].lr)
  end)

  it("unscale() without an argument unscales .grad in place, for clipping", function()
    local v = leaf {1, 1}
    local opt = amp.LossScaleOptimizer(sgd(v, {lr = 1}))
    opt:scale_loss((v * hm.tensor {3, 4}):sum()):backward()
    opt:unscale()
    same(v.grad, {3, 4})
    opt:step()
    same(v, {-2, -3})
  end)

  it("takes any policy", function()
    local v = leaf {1}
    local opt = amp.LossScaleOptimizer(sgd(v, {lr = 0}), {policy = {
      update = function(_, event) return event.found_inf and 3 or 5 end,
    }})
    opt:apply({hm.tensor {1}}, {v})
    assert.equal(5, opt.loss_scale)
    opt:apply({hm.tensor {inf}}, {v})
    assert.equal(3, opt.loss_scale)
  end)

  it("trains under mixed_float16 as a float32 run does", function()
    local function run(mixed)
      hm.manual_seed(4)
      local model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
      if mixed then amp.set_policy(model, "mixed_float16") end
      local opt = optim.Adam(model:parameters(), {lr = 1e-2})
      if mixed then opt = amp.LossScaleOptimizer(opt) end
      local x, y, loss = hm.randn({32, 6}), hm.randint(0, 3, {32}), nil
      for _ = 1, 20 do
        opt:zero_grad()
        loss = F.cross_entropy(model(x):float(), y)
        if mixed then opt:scale_loss(loss):backward() else loss:backward() end
        opt:step()
      end
      return loss:item()
    end
    local want, got = run(false), run(true)
    assert(math.abs(want - got) < 1e-2, ("%g for %g"):format(got, want))
  end)
end)

-- ====== Dtype policies ======

describe("dtype policies", function()
  after_each(function() amp.set_global_policy "float32" end)

  it("have a compute and a variable dtype", function()
    local p = amp.Policy "mixed_float16"
    assert.same({"mixed_float16", "float16", "float32"}, {p.name, p.compute_dtype, p.variable_dtype})
    p = amp.Policy "mixed_bfloat16"
    assert.same({"bfloat16", "float32"}, {p.compute_dtype, p.variable_dtype})
    p = amp.Policy "f16"
    assert.same({"float16", "float16", "float16"}, {p.name, p.compute_dtype, p.variable_dtype})
    assert.equal(p, amp.Policy(p))
    assert.matches("computes in float16", tostring(p), 1, true)
    raises({"unknown dtype policy \"mixed_float8\"", "mixed_float16"}, amp.Policy, "mixed_float8")
    raises("unknown dtype policy", amp.Policy, "int64")
  end)

  it("a module computes in the compute dtype and keeps float32 variables", function()
    for _, case in ipairs {{"mixed_float16", "float16"}, {"mixed_bfloat16", "bfloat16"}} do
      local layer = amp.set_policy(nn.Linear(3, 2), case[1])
      assert.equal("float32", layer.weight.dtype)
      local x = hm.randn({4, 3})
      local y = layer(x)
      assert.equal(case[2], y.dtype)
      same(y, F.linear(x:to(case[2]), layer.weight:to(case[2]), layer.bias:to(case[2])))
      y:float():sum():backward()
      assert.equal("float32", layer.weight.grad.dtype)
      assert.equal(case[1], amp.get_policy(layer).name)
    end
  end)

  it("a float16 policy has float16 variables; statistics of batch norms stay float32", function()
    local model = amp.set_policy(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), "float16")
    assert.equal("float16", model[1].weight.dtype)
    assert.equal("float32", model[2].running_mean.dtype)
    assert.equal("float16", model(hm.randn({5, 3})).dtype)
    local shared = nn.Linear(3, 3)
    local twice = amp.set_policy(nn.Sequential(shared, shared), "float16")
    assert.equal(twice[1].weight, twice[2].weight)
    assert.equal(2, #twice:parameters())
  end)

  it("one layer may have another policy", function()
    local model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    amp.set_policy(model, "mixed_float16")
    amp.set_policy(model[3], "float32")
    local seen = {}
    for i = 1, 3 do model[i]:register_forward_hook(function(_, _, y) seen[i] = y.dtype end) end
    assert.equal("float32", model(hm.randn({2, 3})).dtype)
    assert.same({"float16", "float16", "float32"}, seen)
    assert.is_false(amp.autocast_state().enabled)
  end)

  it("the global one counts for modules made while it holds, losses aside", function()
    local before = nn.Linear(3, 2)
    amp.set_global_policy "mixed_float16"
    assert.equal("mixed_float16", amp.global_policy().name)
    local inside, loss = nn.Sequential(nn.Linear(3, 2)), nn.MSELoss()
    amp.set_global_policy "float32"
    local after = nn.Linear(3, 2)
    local x = hm.randn({4, 3})
    assert.equal("float32", before(x).dtype)
    assert.equal("float16", inside(x).dtype)
    assert.equal("float32", after(x).dtype)
    assert.is_nil(amp.get_policy(after))
    assert.is_nil(amp.get_policy(loss))
    assert.equal("float16", inside[1](x).dtype)
    local copy = inside:clone()
    assert.equal("float16", copy(x).dtype)
  end)

  it("classes of one's own take it too, with their own forward; float64 and integers pass", function()
    amp.set_global_policy "mixed_float16"
    local Net = nn.class "Net"
    function Net:init() self.fc = nn.Linear(2, 2) end
    function Net:forward(x, ids, wide, more) return {x.dtype, ids.dtype, wide.dtype, more.x.dtype, self.fc(x).dtype} end
    local net = Net()
    assert.same({"float16", "int64", "float64", "float16", "float16"},
      net(hm.ones({1, 2}), hm.ones({1}, {dtype = "i64"}), hm.ones({1}, {dtype = "f64"}), {x = hm.ones({1})}))
    raises("expected a module", amp.set_policy, 3, "float32")
  end)
end)
