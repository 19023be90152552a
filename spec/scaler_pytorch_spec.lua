-- scaler_pytorch_spec.lua -- what PyTorch's own tests assert of GradScaler, under the ids G1 to G13, S1 and S3: state dicts, unscaling,
-- the update rule, clipping, gradient penalty, accumulation, overflow after unscale_, several models and optimizers.

local hm = require "halfmoon"
local numbers = require "spec.support.numbers"
local expect = require "spec.support.expect"

local nn, optim, amp = hm.nn, hm.optim, hm.amp
local same, near, raises = numbers.assert_same, numbers.assert_near, expect.raises
local inf, nan = math.huge, 0 / 0

-- ====== The case that the G tests share: two equal nets, four batches, one of them poisoned ======

local SKIP = 2

local function net()
  return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
end

--- Two nets with the same values, an optimizer for each, and the data.
local function scaling_case(kind, options)
  hm.manual_seed(21)
  local control, scaled = net(), net()
  scaled:load_state_dict(control:state_dict())
  kind, options = kind or "SGD", options or {lr = 1}
  local data = {}
  for i = 1, 4 do data[i] = {hm.randn({8, 8}), hm.randn({8, 8})} end
  return control, scaled, optim[kind](control:parameters(), options), optim[kind](scaled:parameters(), options), data
end

local loss_of = nn.functional.mse_loss

local function assert_same_nets(a, b, rtol, atol)
  local want = a:state_dict()
  for name, t in pairs(b:state_dict()) do near(t, want[name], rtol or 1e-5, atol or 1e-7, name) end
end

--- Runs the control without a scaler (skipping batch SKIP) and the other net with one, in both settings of `enabled`.
-- run(data, model, optimizer, scaler, skip, scaling)
local function scaling_test(run, growths, backoffs, make, atol)
  for _, enabled in ipairs {true, false} do
    local control, scaled, control_opt, scaled_opt, data = (make or scaling_case)()
    local scaler = amp.GradScaler {init_scale = 128, growth_factor = 2, growth_interval = 1, enabled = enabled}
    run(data, control, control_opt, scaler, SKIP, false)
    run(data, scaled, scaled_opt, scaler, SKIP, true)
    local want = enabled and 128 * 2.0 ^ growths * 0.5 ^ backoffs or 1.0
    assert.equal(want, scaler:get_scale())
    assert_same_nets(control, scaled, 1e-5, atol)
  end
end

local function poison(model) hm.no_grad(function() model[2].weight.grad:fill_(inf) end) end

local function leaf(values, dtype) return hm.tensor(values, {dtype = dtype, requires_grad = true}) end

--- A parameter with a gradient, its optimizer and a scaler.
local function with_grad(grad, options, dtype)
  local p = leaf({1, 2, 3}, dtype)
  p.grad = hm.tensor(grad, {dtype = dtype})
  return p, optim.SGD({p}, {lr = 1}), amp.GradScaler(options or {init_scale = 4})
end

-- ====== PyTorch's tests ======

describe("as in PyTorch", function()
  it("G1: options survive a state dict; the scale is used at once", function()
    local s = amp.GradScaler {init_scale = 3, growth_factor = 4, backoff_factor = 0.5, growth_interval = 2}
    local t = amp.GradScaler()
    t:load_state_dict(s:state_dict())
    assert.equal(3, t:get_scale())
    assert.equal(4, t:get_growth_factor())
    assert.equal(0.5, t:get_backoff_factor())
    assert.equal(2, t:get_growth_interval())
    assert.equal(0, t:state_dict()._growth_tracker)
    same(t:scale(hm.tensor {4.0}), {12})
    local path = os.tmpname()
    assert(hm.save(path, {scaler = s}))
    local u = amp.GradScaler()
    u:load_state_dict(assert(hm.load(path)).scaler)
    os.remove(path)
    assert.same(s:state_dict(), u:state_dict())
  end)

  it("G2: unscale_ divides, and finds one inf or NaN anywhere, in any layout and dtype", function()
    local function params()
      local list = {leaf(1.0)}
      list[2] = hm.ones({33}, {requires_grad = true})
      list[3] = hm.ones({5, 7}):t():detach():requires_grad_()
      list[4] = hm.ones({1000}, {requires_grad = true})
      list[5] = hm.ones({2, 3, 4, 4}, {requires_grad = true})
      list[6] = hm.ones({40}, {dtype = "f64", requires_grad = true})
      list[7] = hm.ones({40}, {dtype = "bf16", requires_grad = true})
      return list
    end
    local function give(list, how)
      for k, p in ipairs(list) do
        local g = hm.full(p.shape, 4.0, {dtype = p.dtype})
        if k == 2 then g = hm.full({33, 2}, 4.0):select(2, 1) end -- strided
        if k == 5 then g = hm.full({2, 4, 4, 3}, 4.0):permute(1, 4, 2, 3) end -- channels last
        if k == 3 and how then g = hm.full({7, 5}, 4.0) end
        p.grad = g
      end
    end
    for _, turned in ipairs {false, true} do
      local list = params()
      give(list, turned)
      local opt, scaler = optim.SGD(list, {lr = 1}), amp.GradScaler {init_scale = 4}
      scaler:unscale_(opt)
      for k, p in ipairs(list) do assert(p.grad:eq(1):all():item(), k) end
      local stepped, record = scaler:step(opt)
      assert.is_true(stepped)
      assert.equal(0, record.inf_count + record.nan_count)
    end
    for k = 1, 7 do
      for _, bad in ipairs {inf, -inf, nan} do
        local list = params()
        give(list, false)
        local g = list[k].grad
        local where = {}
        for d, size in ipairs(g.shape) do where[d] = size end
        if #where == 0 then g:fill_(bad) else g[where] = bad end
        local opt, scaler = optim.SGD(list, {lr = 1}), amp.GradScaler {init_scale = 4}
        scaler:unscale_(opt)
        local stepped, record = scaler:step(opt)
        assert.is_false(stepped)
        assert.equal(bad == bad and 1 or 0, record.inf_count)
        assert.equal(bad == bad and 0 or 1, record.nan_count)
        assert.equal(1, #record.culprits)
        assert.equal(k, record.culprits[1].index)
        assert.equal(list[k], record.culprits[1].param)
      end
    end
  end)

  it("G3: the scale after clean steps and after an overflow", function()
    local p = leaf {1.0}
    local opt = optim.SGD({p}, {lr = 0})
    local scaler = amp.GradScaler {init_scale = 4, growth_factor = 2, backoff_factor = 0.25, growth_interval = 2}
    local function go(g)
      p.grad = hm.tensor {g}
      scaler:step(opt)
      scaler:update()
      return {scaler:get_scale(), scaler:state_dict()._growth_tracker}
    end
    assert.same({4.0, 1}, go(1))
    assert.same({8.0, 0}, go(1))
    assert.same({2.0, 0}, go(inf))
  end)

  it("G5: load_state_dict copies the five fields", function()
    for _, used in ipairs {false, true} do
      local s0 = amp.GradScaler {init_scale = 3, growth_factor = 4, backoff_factor = 0.5, growth_interval = 2}
      local s1 = amp.GradScaler {init_scale = 6, growth_factor = 7, backoff_factor = 0.8, growth_interval = 1}
      if used then s1:scale(hm.tensor {4.0}) end
      s1:load_state_dict(s0:state_dict())
      local d = s1:state_dict()
      assert.same({3.0, 4, 0.5, 2, 0}, {d.scale, d.growth_factor, d.backoff_factor, d.growth_interval, d._growth_tracker})
    end
  end)

  it("G5: a state dict of PyTorch's, with its five fields only", function()
    local s = amp.GradScaler()
    s:load_state_dict {scale = 1024.0, growth_factor = 2.0, backoff_factor = 0.5, growth_interval = 3, _growth_tracker = 2}
    local p = leaf {1.0}
    p.grad = hm.tensor {1.0}
    s:step(optim.SGD({p}, {lr = 0}))
    assert.equal("grow", s:update().event)
    assert.equal(2048, s:get_scale())
  end)

  --- A new scaler that goes on with the state of another.
  local function reborn(scaler)
    local other = amp.GradScaler {enabled = scaler:is_enabled()}
    if scaler:is_enabled() then other:load_state_dict(scaler:state_dict()) end
    return other
  end

  it("G6: autocast f16 with a scaler follows a float32 run, also where a state dict makes a new scaler in each step", function()
    for _, kind in ipairs {"SGD", "Adam", "AdamW"} do
      local function run(data, model, opt, scaler, skip, scaling, anew)
        for i, d in ipairs(data) do
          opt:zero_grad()
          local output = scaling and amp.autocast("f16", function() return model(d[1]) end) or model(d[1])
          local loss = loss_of(output:float(), d[2])
          if scaling then
            scaler:scale(loss):backward()
            if i == skip and scaler:is_enabled() then poison(model) end
            scaler:step(opt)
            scaler:update()
            if anew then scaler = reborn(scaler) end
          else
            loss:backward()
            if not scaler:is_enabled() or i ~= skip then opt:step() end
          end
        end
        return scaler
      end
      for _, entry in ipairs {{true, false}, {true, true}, {false, false}, {false, true}} do
        local enabled, anew = entry[1], entry[2]
        local control, scaled, control_opt, scaled_opt, data = scaling_case(kind, {lr = kind == "SGD" and 0.1 or 1e-4})
        local scaler = amp.GradScaler {init_scale = 128, growth_interval = 1, enabled = enabled}
        run(data, control, control_opt, scaler, SKIP, false)
        scaler = run(data, scaled, scaled_opt, scaler, SKIP, true, anew)
        assert.equal(enabled and 512 or 1, scaler:get_scale())
        assert_same_nets(control, scaled, 1e-3, 1e-3)
      end
    end
  end)

  it("G7: clipping scaled gradients against max_norm times the scale", function()
    scaling_test(function(data, model, opt, scaler, skip, scaling)
      for i, d in ipairs(data) do
        opt:zero_grad()
        local loss = loss_of(model(d[1]), d[2])
        if scaling then
          scaler:scale(loss):backward()
          nn.utils.clip_grad_norm_(model:parameters(), 0.2 * scaler:get_scale())
          if i == skip and scaler:is_enabled() then poison(model) end
          scaler:step(opt)
          scaler:update()
        else
          loss:backward()
          nn.utils.clip_grad_norm_(model:parameters(), 0.2)
          if not scaler:is_enabled() or i ~= skip then opt:step() end
        end
      end
    end, 3, 1, nil, 1e-5)
  end)

  for _, inside in ipairs {false, true} do
    it("G8: unscale_, then clip, with an injected inf" .. (inside and "; clipping inside step()" or ""), function()
      scaling_test(function(data, model, opt, scaler, skip, scaling)
        for i, d in ipairs(data) do
          opt:zero_grad()
          local loss = loss_of(model(d[1]), d[2])
          if scaling then
            scaler:scale(loss):backward()
            if i == skip and scaler:is_enabled() then poison(model) end
            if inside then
              scaler:step(opt, {max_norm = 0.2})
            else
              scaler:unscale_(opt)
              nn.utils.clip_grad_norm_(model:parameters(), 0.2)
              scaler:step(opt)
            end
            scaler:update()
          else
            loss:backward()
            nn.utils.clip_grad_norm_(model:parameters(), 0.2)
            if not scaler:is_enabled() or i ~= skip then opt:step() end
          end
        end
      end, 3, 1)
    end)
  end

  it("G9: a gradient penalty through a second-order graph", function()
    scaling_test(function(data, model, opt, scaler, skip, scaling)
      for i, d in ipairs(data) do
        opt:zero_grad()
        local loss = loss_of(model(d[1]), d[2])
        local grads
        if scaling then
          grads = hm.autograd.grad(scaler:scale(loss), model:parameters(), {create_graph = true})
          local inverse = 1 / scaler:get_scale()
          for k, g in ipairs(grads) do grads[k] = g * inverse end
        else
          grads = hm.autograd.grad(loss, model:parameters(), {create_graph = true})
        end
        local norm
        for _, g in ipairs(grads) do
          local square = (g * g):sum()
          norm = norm and norm + square or square
        end
        loss = loss + norm:sqrt()
        if scaling then
          scaler:scale(loss):backward()
          if i == skip and scaler:is_enabled() then poison(model) end
          scaler:step(opt)
          scaler:update()
        else
          loss:backward()
          if not scaler:is_enabled() or i ~= skip then opt:step() end
        end
      end
    end, 3, 1, function() return scaling_case("SGD", {lr = 0.1}) end)
  end)

  it("G10: accumulation over two batches", function()
    scaling_test(function(data, model, opt, scaler, _, scaling)
      for i, d in ipairs(data) do
        local loss = loss_of(model(d[1]), d[2]) / 2
        if scaling then scaler:scale(loss):backward() else loss:backward() end
        if i % 2 == 0 then
          if scaling then
            scaler:step(opt)
            scaler:update()
          else
            opt:step()
          end
          opt:zero_grad()
        end
      end
    end, 2, 0)
  end)

  it("G11: gradients made non-finite after unscale_ are applied, and every parameter shows it", function()
    for _, kind in ipairs {"SGD", "Adam", "AdamW"} do
      for _, bad in ipairs {inf, nan} do
        local _, model, _, opt, data = scaling_case(kind, {lr = 1})
        local scaler = amp.GradScaler {init_scale = 128}
        scaler:scale(loss_of(model(data[1][1]), data[1][2])):backward()
        scaler:unscale_(opt)
        for _, p in ipairs(model:parameters()) do p.grad:copy_(hm.full(p.shape, bad)) end
        local stepped = scaler:step(opt)
        assert.is_true(stepped)
        for _, p in ipairs(model:parameters()) do assert.is_false(p:isfinite():any():item()) end
      end
    end
  end)

  it("G12: growth never makes the scale infinite", function()
    for _, options in ipairs {{max_scale = inf}, {}} do
      options.init_scale, options.growth_factor, options.growth_interval = 1e38, 16, 1
      local p = leaf {1.0}
      local scaler, opt = amp.GradScaler(options), optim.SGD({p}, {lr = 1})
      for _ = 1, 3 do
        p.grad = hm.tensor {1.0}
        assert.is_true((scaler:step(opt)))
        scaler:update()
        assert(scaler:get_scale() < 3.5e38)
        assert(scaler:scale(hm.tensor {1.0}):isfinite():all():item())
      end
    end
  end)

  it("G13: two models, two optimizers, two losses that share a graph; only one overflows", function()
    for _, enabled in ipairs {true, false} do
      hm.manual_seed(5)
      local control0, control1, scaled0, scaled1 = net(), net(), net(), net()
      scaled0:load_state_dict(control0:state_dict())
      scaled1:load_state_dict(control1:state_dict())
      local data = {}
      for i = 1, 4 do data[i] = {hm.randn({8, 8}), hm.randn({8, 8})} end
      local scaler = amp.GradScaler {init_scale = 128, growth_factor = 2, growth_interval = 1, enabled = enabled}
      local function run(model0, model1, scaling)
        local opt0, opt1 = optim.SGD(model0:parameters(), {lr = 0.5}), optim.SGD(model1:parameters(), {lr = 0.5})
        for i, d in ipairs(data) do
          opt0:zero_grad()
          opt1:zero_grad()
          local output0, output1 = model0(d[1]), model1(d[1])
          local loss0 = loss_of(output0 * 0.3 + output1 * 0.7, d[2])
          local loss1 = loss_of(output0 * 0.6 - output1 * 0.4, d[2])
          if scaling then
            scaler:scale(loss0):backward(nil, {retain_graph = true})
            scaler:scale(loss1):backward()
            if i == SKIP and enabled then poison(model1) end
            scaler:unscale_(opt0)
            local first = scaler:step(opt0)
            local second = scaler:step(opt1)
            assert.is_true(first)
            assert.equal(not (i == SKIP and enabled), second)
            scaler:update()
          else
            loss0:backward(nil, {retain_graph = true})
            loss1:backward()
            opt0:step()
            if not enabled or i ~= SKIP then opt1:step() end
          end
        end
      end
      run(control0, control1, false)
      run(scaled0, scaled1, true)
      assert.equal(enabled and 128 * 2 ^ 3 * 0.5 or 1, scaler:get_scale())
      assert_same_nets(control0, scaled0)
      assert_same_nets(control1, scaled1)
    end
  end)

  it("S1: nested containers are scaled and keep their form", function()
    local s = amp.GradScaler {init_scale = 2}
    local function t() return hm.tensor {4.0} end
    local out = s:scale {t(), {t(), name = t()}}
    same(out[1], {8})
    same(out[2][1], {8})
    same(out[2].name, {8})
    raises("outputs must be a Tensor or an iterable of Tensors", s.scale, s, 3)
    raises("outputs must be a Tensor or an iterable of Tensors", s.scale, s, {t(), "x"})
  end)

  it("S3: an infinite gradient skips the step", function()
    local p, opt, scaler = with_grad {1, inf, 1}
    assert.is_false((scaler:step(opt)))
    same(p, {1, 2, 3})
  end)
end)
