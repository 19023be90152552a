-- amp_ports_scaler_spec.lua -- what PyTorch's tests assert of GradScaler beyond scaler_pytorch_spec.lua: ids G4, G9 in float16, G14,
-- G17, G19, G20, G22 and S2; the recipes of its documentation; and the whole interface in one place.
--
-- Where the others are, and what is left out with the reason, stands in spec/reference/amp_ports.lua.

local hm = require "halfmoon"
local numbers = require "spec.support.numbers"
local expect = require "spec.support.expect"

local nn, optim, amp = hm.nn, hm.optim, hm.amp
local same, near, raises = numbers.assert_same, numbers.assert_near, expect.raises
local inf, nan = math.huge, 0 / 0

local function leaf(values, dtype) return hm.tensor(values, {dtype = dtype, requires_grad = true}) end

describe("GradScaler as in PyTorch", function()
  it("G4, S2: rows that come twice are summed and flagged: 64000 + 64000 in float16", function()
    for _, case in ipairs {{{1, 1}, true}, {{1, 2}, false}} do
      local table_of = leaf({{0.0}, {0.0}, {0.0}}, "f16")
      local opt = optim.SGD({table_of}, {lr = 0})
      local scaler = amp.GradScaler {init_scale = 1, allow_f16_grads = true}
      local rows = nn.functional.embedding(hm.tensor(case[1], {dtype = "i64"}), table_of)
      rows:backward(hm.full({2, 1}, 64000, {dtype = "f16"}))
      local stepped, record = scaler:step(opt)
      assert.equal(not case[2], stepped)
      assert.equal(case[2] and 1 or 0, record.inf_count)
    end
  end)

  it("G4: values of an embedding's gradient are divided; inf and NaN in a row are flagged", function()
    for _, bad in ipairs {1, inf, nan} do
      local w = leaf {{1.0, 1.0}, {1.0, 1.0}, {1.0, 1.0}}
      local opt, scaler = optim.SGD({w}, {lr = 1}), amp.GradScaler {init_scale = 4}
      local rows = nn.functional.embedding(hm.tensor({0, 2}, {dtype = "i64"}), w)
      rows:backward(hm.tensor {{4, 8}, {4 * bad, 4}})
      scaler:unscale_(opt)
      if bad == 1 then same(w.grad, {1, 2, 0, 0, 1, 1}) end
      assert.equal(bad == 1, (scaler:step(opt)))
    end
  end)

  it("G9: a gradient penalty under autocast in float16 follows a float32 run", function()
    local function run(mixed)
      hm.manual_seed(12)
      local model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
      local opt = optim.SGD(model:parameters(), {lr = 0.05})
      local scaler = amp.GradScaler {enabled = mixed, init_scale = 128, growth_interval = 2}
      for _ = 1, 4 do
        local x, y = hm.randn({8, 6}, {requires_grad = true}), hm.randn({8, 1})
        local function forward(fn) return mixed and amp.autocast("f16", fn) or fn() end
        opt:zero_grad()
        local loss = forward(function() return nn.functional.mse_loss(model(x), y) end)
        local scaled = hm.autograd.grad(scaler:scale(loss), model:parameters(), {create_graph = true})
        local total = forward(function()
          local inverse, norm = 1 / scaler:get_scale(), nil
          for _, g in ipairs(scaled) do
            local square = (g * inverse):pow(2):sum()
            norm = norm and norm + square or square
          end
          return loss + norm:sqrt()
        end)
        scaler:scale(total):backward()
        assert.is_true((scaler:step(opt)))
        scaler:update()
      end
      return model
    end
    local want, got = run(false):state_dict(), run(true):state_dict()
    for name, t in pairs(got) do near(t, numbers.flat(want[name]), 2e-2, 3e-3, name) end
  end)

  it("G14: closures are refused in every form", function()
    local p = leaf {1}
    local opt, scaler = optim.SGD({p}, {lr = 1}), amp.GradScaler()
    local closure = function() return p:sum() end
    raises("Closure use is not currently supported if GradScaler is enabled.", scaler.step, scaler, opt, closure)
    raises("Closure use is not currently supported", scaler.step, scaler, opt, {closure = closure})
  end)

  it("G17: leaves of nested containers are scaled, whatever their dtype, and other things are refused", function()
    local s = amp.GradScaler {init_scale = 2}
    local function t(dtype) return hm.tensor({4.0}, {dtype = dtype}) end
    local given = {t(), {t "f16", {deep = t "f64"}}, list = {t "bf16"}}
    s.warned = true
    local out = s:scale(given)
    for _, y in ipairs {out[1], out[2][1], out[2][2].deep, out.list[1]} do same(y, {8}) end
    assert.same({"float32", "float32", "float64", "float32"},
      {out[1].dtype, out[2][1].dtype, out[2][2].deep.dtype, out.list[1].dtype})
    same(given[1], {4})
    raises("iterable of Tensors", s.scale, s, {t(), {3}})
    raises("floating tensor", s.scale, s, hm.ones({1}, {dtype = "i64"}))
  end)

  for _, kind in ipairs {"SGD", "Adam", "AdamW"} do
    it(("G19: step() alone and unscale_() before it give the same losses, gradients, parameters, state: %s"):format(kind), function()
      local function run(apart)
        hm.manual_seed(17)
        local model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        local opt = optim[kind](model:parameters(), {lr = 0.0625})
        local scaler = amp.GradScaler {init_scale = 4, growth_interval = 2}
        local trace = {}
        for i = 1, 6 do
          local x, y = hm.randn({8, 8}), hm.randn({8, 8})
          opt:zero_grad()
          local loss = amp.autocast("f16", function() return nn.functional.mse_loss(model(x), y) end)
          scaler:scale(i == 3 and loss * inf or loss):backward()
          if apart then scaler:unscale_(opt) end
          scaler:step(opt)
          scaler:update()
          trace[i] = {loss:item(), scaler:get_scale()}
        end
        return trace, model, opt
      end
      local t1, m1, o1 = run(false)
      local t2, m2, o2 = run(true)
      assert.same(t1, t2)
      for name, t in pairs(m1:state_dict()) do same(t, m2:state_dict()[name], name) end
      for i, p in ipairs(m1:parameters()) do same(p.grad, m2:parameters()[i].grad) end
      local s1, s2 = o1:state_dict().state, o2:state_dict().state
      for i, entry in pairs(s1) do
        for name, value in pairs(entry) do
          if hm.is_tensor(value) then same(value, s2[i][name], name) else assert.equal(value, s2[i][name]) end
        end
      end
    end)
  end

  it("G20: the trace of four steps: scales 4, 2, 2, 1; trackers 1, 0, 1, 0; gradients 20, inf, 10, inf", function()
    local w = leaf({1.0}, "f16")
    local opt = optim.SGD({w}, {lr = 0})
    local scaler = amp.GradScaler {init_scale = 4, growth_interval = 2, allow_f16_grads = true}
    local scales, trackers, grads = {}, {}, {}
    for i, x in ipairs {5, 20000, 5, 40000} do
      opt:zero_grad()
      scaler:scale((w * hm.tensor({x}, {dtype = "f16"})):sum()):backward()
      grads[i] = w.grad:item()
      scaler:step(opt)
      scaler:update()
      scales[i], trackers[i] = scaler:get_scale(), scaler:state_dict()._growth_tracker
    end
    assert.same({4.0, 2.0, 2.0, 1.0}, scales)
    assert.same({1, 0, 1, 0}, trackers)
    assert.same({20.0, inf, 10.0, inf}, grads)
  end)

  it("G22: a step left out changes neither parameters nor the step count, with a scale or without", function()
    for _, kind in ipairs {"SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Lion"} do
      for _, scale in ipairs {1, 1024} do
        local p = leaf {1, 2}
        local opt, scaler = optim[kind]({p}, {lr = 1}), amp.GradScaler {init_scale = scale}
        p.grad = hm.tensor {inf, 1}
        assert.is_false((scaler:step(opt)))
        same(p, {1, 2})
        assert.is_nil(opt:state_dict().state[1])
      end
    end
  end)
end)

-- ====== The recipes of the documentation ======

describe("the recipes", function()
  local function case()
    hm.manual_seed(30)
    local model = nn.Linear(4, 2)
    return model, optim.SGD(model:parameters(), {lr = 0.5}), hm.randn({8, 4}), hm.randn({8, 2})
  end
  local mse = nn.functional.mse_loss

  it("accumulation: one unscale_, clip, step and update for several losses", function()
    local model, opt, x, y = case()
    local plain, plain_opt = case()
    local scaler = amp.GradScaler {init_scale = 2 ^ 12}
    for part = 0, 3 do
      local xs, ys = x:narrow(1, 1 + 2 * part, 2), y:narrow(1, 1 + 2 * part, 2)
      scaler:scale(mse(model(xs), ys) / 4):backward()
    end
    scaler:unscale_(opt)
    nn.utils.clip_grad_norm_(model:parameters(), 0.1)
    assert.is_true((scaler:step(opt)))
    scaler:update()
    mse(plain(x), y):backward()
    nn.utils.clip_grad_norm_(plain:parameters(), 0.1)
    plain_opt:step()
    near(model.weight, numbers.flat(plain.weight), 1e-5, 1e-7)
  end)

  it("a scheduler is held back while steps are left out", function()
    local model, opt, x, y = case()
    local scheduler = optim.lr_scheduler.StepLR(opt, {step_size = 1, gamma = 0.5})
    local scaler = amp.GradScaler()
    for _, bad in ipairs {false, true, true, false} do
      opt:zero_grad()
      local loss = mse(model(x), y)
      scaler:scale(bad and loss * inf or loss):backward()
      scheduler:step((scaler:step(opt)))
      scaler:update()
    end
    assert.equal(0.125, opt.param_groups[1].lr)
  end)

  it("a checkpoint before the first scale() and after it goes on the same", function()
    for _, used in ipairs {false, true} do
      local model, opt, x, y = case()
      local scaler = amp.GradScaler {init_scale = 8, growth_interval = 3}
      local function step(s)
        opt:zero_grad()
        s:scale(mse(model(x), y)):backward()
        s:step(opt)
        return s:update().new_scale
      end
      if used then for _ = 1, 2 do step(scaler) end end
      local other = amp.GradScaler()
      other:load_state_dict(scaler:state_dict())
      for _ = 1, 4 do assert.equal(step(scaler), step(other)) end
    end
  end)
end)

-- ====== The interface ======

describe("every method", function()
  it("of PyTorch's is there, enabled or not", function()
    for _, enabled in ipairs {true, false} do
      local s = amp.GradScaler {enabled = enabled, growth_factor = 3, backoff_factor = 0.25, growth_interval = 7}
      assert.equal(enabled, s:is_enabled())
      assert.equal(enabled and 65536 or 1, s:get_scale())
      assert.same({3, 0.25, 7}, {s:get_growth_factor(), s:get_backoff_factor(), s:get_growth_interval()})
      s:set_growth_factor(4)
      s:set_backoff_factor(0.5)
      s:set_growth_interval(9)
      assert.same({4, 0.5, 9}, {s:get_growth_factor(), s:get_backoff_factor(), s:get_growth_interval()})
      for name, bad in pairs {growth_factor = 1, backoff_factor = 1, growth_interval = 0} do
        raises(name, s["set_" .. name], s, bad)
      end
    end
  end)

  it("lowering growth_interval below the count of clean steps grows at the next one", function()
    local p = leaf {1}
    local opt, s = optim.SGD({p}, {lr = 0}), amp.GradScaler {init_scale = 4, growth_interval = 100}
    local function go()
      p.grad = hm.tensor {1}
      s:step(opt)
      return s:update().event
    end
    for _ = 1, 5 do assert.equal("hold", go()) end
    s:set_growth_interval(3)
    assert.equal("grow", go())
  end)

  it("checked() tells what the last check found", function()
    local p = leaf {1, 2}
    local opt, s = optim.SGD({p}, {lr = 0}), amp.GradScaler {init_scale = 4}
    assert.is_nil(s:checked(opt))
    p.grad = hm.tensor {12, 16}
    s:unscale_(opt)
    local record = s:checked(opt)
    assert.same({false, false, 5.0, 4.0}, {record.found_inf, record.stepped, record.norm, record.amax})
    s:step(opt)
    assert.is_true(s:checked(opt).stepped)
    s:update()
    assert.is_nil(s:checked(opt))
    p.grad = hm.tensor {1, nan}
    s:unscale_(opt)
    assert.equal("parameter 1", s:checked(opt).culprits[1].name)
  end)
end)
