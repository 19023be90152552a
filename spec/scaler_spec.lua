-- scaler_spec.lua -- GradScaler: the four steps, the state machine and its wording, records, bounds, options, state dicts.
-- PyTorch's own tests stand in scaler_pytorch_spec.lua.

local hm = require "halfmoon"
local numbers = require "spec.support.numbers"
local expect = require "spec.support.expect"

local nn, optim, amp = hm.nn, hm.optim, hm.amp
local same, near, raises = numbers.assert_same, numbers.assert_near, expect.raises
local inf, nan = math.huge, 0 / 0

local function leaf(values, dtype) return hm.tensor(values, {dtype = dtype, requires_grad = true}) end

--- A parameter with a gradient, its optimizer and a scaler.
local function with_grad(grad, options, dtype)
  local p = leaf({1, 2, 3}, dtype)
  p.grad = hm.tensor(grad, {dtype = dtype})
  return p, optim.SGD({p}, {lr = 1}), amp.GradScaler(options or {init_scale = 4})
end

-- ====== The four steps ======

describe("scale", function()
  it("gives float32 for half losses, so that it does not overflow; float64 stays", function()
    local s = amp.GradScaler {init_scale = 65536}
    local x = leaf({4.0}, "f16")
    local y = s:scale(x:sum())
    assert.equal("float32", y.dtype)
    assert.equal(262144.0, y:item())
    assert.equal("float32", s:scale(x * 1).dtype)
    assert.equal("float64", s:scale(hm.tensor({1.0}, {dtype = "f64"})).dtype)
    raises("scale: a floating tensor was expected", s.scale, s, hm.tensor({1}, {dtype = "i64"}))
  end)

  it("also inside autocast", function()
    local s = amp.GradScaler {init_scale = 2 ^ 20}
    amp.autocast("f16", function()
      assert.equal(2 ^ 21, s:scale(hm.tensor(2.0, {dtype = "f16"})):item())
    end)
  end)
end)

describe("step", function()
  it("leaves .grad unscaled, a skipped one leaves it scaled", function()
    local p, opt, scaler = with_grad {4, 8, 12}
    scaler:step(opt)
    same(p.grad, {1, 2, 3})
    same(p, {0, 0, 0})
    scaler:update()
    p.grad = hm.tensor {4, inf, 8}
    scaler:step(opt)
    same(p.grad, {4, inf, 8})
    same(p, {0, 0, 0})
  end)

  it("a skipped one leaves state and step counts of the optimizer alone", function()
    local p = leaf {1, 2}
    local opt, scaler = optim.AdamW({p}, {lr = 0.1}), amp.GradScaler {init_scale = 4}
    p.grad = hm.tensor {4, 4}
    scaler:step(opt)
    scaler:update()
    local before, value = opt:state_dict().state[1].exp_avg:clone(), p:detach():clone()
    p.grad = hm.tensor {4, nan}
    assert.is_false((scaler:step(opt)))
    same(opt:state_dict().state[1].exp_avg, before)
    assert.equal(1, opt:state_dict().state[1].step)
    same(p, value)
  end)

  it("on an optimizer without gradients does nothing and says so", function()
    local p = leaf {1}
    local opt, scaler = optim.SGD({p}, {lr = 1}), amp.GradScaler {init_scale = 4, growth_interval = 1}
    local stepped, record = scaler:step(opt)
    assert.is_false(stepped)
    assert.is_true(record.empty)
    assert.is_false(record.found_inf)
    assert.equal("hold", scaler:update().event)
    assert.equal(4, scaler:get_scale())
    scaler:step(opt)
    scaler:step(opt) -- not an error: nothing was stepped
    scaler:unscale_(opt)
    scaler:unscale_(opt)
    p.grad = hm.tensor {4.0}
    assert.is_true((scaler:step(opt)))
    assert.is_nil(select(2, scaler:step(optim.SGD({leaf {1}}, {lr = 1}))).culprits[1])
  end)

  it("finds an infinity that only unscaling makes", function()
    local p, opt, scaler = with_grad({1e38, 1, 1}, {init_scale = 2 ^ -10, min_scale = 0})
    local stepped, record = scaler:step(opt)
    assert.is_false(stepped)
    assert.equal(1, record.inf_count)
    assert.equal("backoff", scaler:update().event)
    p.grad = hm.tensor {1e30, 1, 1}
    scaler:unscale_(opt)
    assert.is_true((scaler:step(opt)))
  end)

  it("refuses float16 gradients, unless allowed", function()
    local p, opt, scaler = with_grad({4, 4, 4}, nil, "f16")
    local message = raises({"Attempting to unscale FP16 gradients.", "parameter 1", "f16[3]", "allow_f16_grads"}, scaler.step, scaler, opt)
    assert.is_string(message)
    raises("Attempting to unscale FP16 gradients.", scaler.unscale_, scaler, opt)
    same(p, {1, 2, 3})
    local allowed = amp.GradScaler {init_scale = 4, allow_f16_grads = true}
    assert.is_true((allowed:step(opt)))
    same(p, {0, 1, 2})
    local q, opt2, scaler2 = with_grad({4, 4, 4}, nil, "bf16")
    assert.is_true((scaler2:step(opt2)))
    same(q, {0, 1, 2})
  end)

  it("refuses closures and things that are no optimizer", function()
    local _, opt, scaler = with_grad {4, 4, 4}
    raises("Closure use is not currently supported", scaler.step, scaler, opt, function() end)
    raises("Closure use is not currently supported", scaler.step, scaler, opt, {closure = function() end})
    raises({"step: unknown option 'max_nrom'", "max_norm"}, scaler.step, scaler, opt, {max_nrom = 1})
    raises("option 'max_norm' must be above 0", scaler.step, scaler, opt, {max_norm = -1})
    raises("expected an optimizer", scaler.step, scaler, nn.Linear(2, 2))
    raises("expected an optimizer", scaler.unscale_, scaler, nil)
    raises("expected an optimizer", scaler.step, scaler, {})
  end)

  it("with max_norm is unscale_ and clip_grad_norm_", function()
    for _, max in ipairs {0.1, 0.5, 100} do
      local function run(inside)
        local p, q = leaf {1, 2, 3}, leaf {4}
        local opt, scaler = optim.AdamW({p, q}, {lr = 0.1}), amp.GradScaler {init_scale = 64}
        local norm
        for k = 1, 3 do
          p.grad, q.grad = hm.tensor {64 * k, -32, 16}, hm.tensor {100}
          if inside then
            local _, record = scaler:step(opt, {max_norm = max})
            norm = record.norm
          else
            scaler:unscale_(opt)
            norm = nn.utils.clip_grad_norm_({p, q}, max):item()
            scaler:step(opt)
          end
          scaler:update()
        end
        return p, q, norm
      end
      local p1, q1, n1 = run(true)
      local p2, q2, n2 = run(false)
      near(p1, numbers.flat(p2), 1e-6)
      near(q1, numbers.flat(q2), 1e-6)
      near(p1.grad, numbers.flat(p2.grad), 1e-6)
      assert(numbers.near(n1, n2, 1e-6))
    end
  end)

  it("after unscale_, max_norm clips the gradients as they are then", function()
    local p, opt, scaler = with_grad {12, 16, 0}
    scaler:unscale_(opt)
    same(p.grad, {3, 4, 0})
    scaler:step(opt, {max_norm = 1})
    near(p, {0.4, 1.2, 3}, 1e-6)
  end)
end)

-- ====== The state machine ======

describe("the state machine", function()
  local TWICE = "unscale_() has already been called on this optimizer since the last update()."
  local AFTER = "unscale_() is being called after step()."
  local STEPPED = "step() has already been called since the last update()."

  it("refuses unscale_ twice, unscale_ after step, step twice, with PyTorch's words; update() starts anew", function()
    local p, opt, scaler = with_grad {4, 4, 4}
    scaler:unscale_(opt)
    raises({TWICE, "hint"}, scaler.unscale_, scaler, opt)
    same(p.grad, {1, 1, 1})
    scaler:step(opt)
    raises({AFTER, "hint"}, scaler.unscale_, scaler, opt)
    raises({STEPPED, "hint"}, scaler.step, scaler, opt)
    same(p, {0, 1, 2})
    scaler:update()
    p.grad = hm.tensor {4, 4, 4}
    scaler:unscale_(opt)
    scaler:step(opt)
    scaler:update()
    p.grad = hm.tensor {4, 4, 4}
    scaler:step(opt)
    raises(STEPPED, scaler.step, scaler, opt)
    raises(AFTER, scaler.unscale_, scaler, opt)
  end)

  it("is kept for each optimizer and each scaler alone", function()
    local _, a, scaler = with_grad {4, 4, 4}
    local _, b = with_grad {4, 4, 4}
    scaler:unscale_(a)
    scaler:unscale_(b)
    scaler:step(a)
    scaler:step(b)
    raises(STEPPED, scaler.step, scaler, b)
    local other = amp.GradScaler {init_scale = 4}
    other:step(a)
  end)

  it("an error leaves it where it was", function()
    local p, opt, scaler = with_grad({4, 4, 4}, nil, "f16")
    for _ = 1, 2 do raises("Attempting to unscale FP16 gradients.", scaler.unscale_, scaler, opt) end
    p.requires_grad = false
    assert.is_true(select(2, scaler:step(opt)).empty)
  end)

  it("what unscale_ found decides; gradients are not looked at again", function()
    local p, opt, scaler = with_grad {4, inf, 4}
    scaler:unscale_(opt)
    p.grad:fill_(1)
    assert.is_false((scaler:step(opt)))
    same(p, {1, 2, 3})
    assert.equal("backoff", scaler:update().event)
  end)

  it("unscale_ without step is legal, update() uses what it found", function()
    local _, opt, scaler = with_grad {4, inf, 4}
    scaler:unscale_(opt)
    assert.equal("backoff", scaler:update().event)
    assert.equal(2, scaler:get_scale())
  end)

  it("update() without any check holds, and counts for nothing", function()
    local s = amp.GradScaler {init_scale = 4, growth_interval = 1}
    for _ = 1, 3 do assert.equal("hold", s:update().event) end
    assert.equal(4, s:get_scale())
  end)

  it("step() after a skipped step without update() works, by the scale those gradients were made with; the policy hears of both", function()
    local p = leaf {1.0}
    local heard = {}
    local opt = optim.SGD({p}, {lr = 1})
    local scaler = amp.GradScaler {init_scale = 4, policy = {
      update = function(_, event)
        heard[#heard + 1] = {event.found_inf, event.scale, event.step}
        return event.found_inf and 2 or 16
      end,
    }}
    scaler:scale((p * inf):sum()):backward()
    assert.is_false((scaler:step(opt)))
    opt:zero_grad()
    scaler:scale(p:sum()):backward()
    assert.is_true((scaler:step(opt)))
    same(p, {0})
    raises(STEPPED, scaler.step, scaler, opt)
    local record = scaler:update()
    assert.same({{true, 4.0, 1}, {false, 4.0, 2}}, heard)
    assert.equal(16, record.new_scale)
  end)

  it("gradients are unscaled by the scale they were made with, though set_scale came between", function()
    local p = leaf {1.0}
    local opt, scaler = optim.SGD({p}, {lr = 1}), amp.GradScaler {init_scale = 4}
    scaler:scale(p:sum()):backward()
    scaler:set_scale(64)
    local _, record = scaler:step(opt)
    assert.equal(4, record.scale)
    same(p, {0})
  end)

  it("an optimizer that is collected is forgotten", function()
    local scaler = amp.GradScaler {init_scale = 4}
    for _ = 1, 20 do
      local _, opt = with_grad {4, 4, 4}
      scaler:step(opt)
      opt = nil -- luacheck: ignore 311
      collectgarbage()
    end
    assert.equal(4, scaler:update().old_scale)
  end)
end)

describe("a disabled scaler", function()
  it("passes everything through", function()
    local s = amp.GradScaler {enabled = false}
    assert.is_false(s:is_enabled())
    local x = leaf {1, 2}
    assert.equal(x, s:scale(x))
    local list = {x, "anything"}
    assert.equal(list, s:scale(list))
    local opt = optim.SGD({x}, {lr = 1})
    x.grad = hm.tensor {1, inf}
    s:unscale_(opt)
    s:unscale_(opt)
    local stepped, record = s:step(opt)
    assert.is_true(stepped)
    assert.is_false(record.found_inf)
    s:step(opt)
    assert.equal("hold", s:update().event)
    assert.equal(1, s:get_scale())
    assert.same({}, s:state_dict())
    s:load_state_dict {}
    s:load_state_dict {scale = 3}
    assert.equal(1, s:get_scale())
    s:update(7)
    assert.equal(1, s:get_scale())
    same(s:scale(x * 2), {x[1]:item() * 2, -inf})
  end)

  it("still clips where step() is asked to", function()
    local p, opt, scaler = with_grad({3, 4, 0}, {enabled = false})
    scaler:step(opt, {max_norm = 1})
    near(p, {0.4, 1.2, 3}, 1e-6)
  end)
end)

-- ====== Records ======

describe("the record of a step", function()
  it("counts, and lists culprits in backward order by name, nearest the loss first", function()
    hm.manual_seed(1)
    local model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    local opt, scaler = optim.SGD(model:parameters(), {lr = 1}), amp.GradScaler {init_scale = 4}
    local x = hm.ones({3, 4})
    scaler:scale(model(x):sum()):backward()
    hm.no_grad(function()
      model[1].weight.grad[{1, 1}] = nan
      model[3].weight.grad[{2, 2}] = inf
      model[3].weight.grad[{2, 3}] = -inf
      model[5].weight.grad[{1, 4}] = inf
    end)
    local stepped, record = scaler:step(opt)
    assert.is_false(stepped)
    assert.is_false(record.stepped)
    assert.is_true(record.found_inf)
    assert.equal(3, record.inf_count)
    assert.equal(1, record.nan_count)
    assert.equal(4, record.scale)
    local names = {}
    for i, c in ipairs(record.culprits) do names[i] = ("%s %d %d"):format(c.name, c.inf_count, c.nan_count) end
    assert.same({"4.weight 1 0", "2.weight 2 0", "0.weight 0 1"}, names)
    assert.equal(model[5].weight, record.culprits[1].param)
    scaler:update()
    local text = tostring(scaler)
    assert.matches("skipped 1", text, 1, true)
    assert.matches("4.weight", text, 1, true)
    assert.equal("4.weight", scaler:record()[1].culprit)
  end)

  it("a real overflow in float16 names the layer it came from", function()
    hm.manual_seed(1)
    local model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    local opt, scaler = optim.SGD(model:parameters(), {lr = 1}), amp.GradScaler {init_scale = 2 ^ 24}
    local loss = amp.autocast("f16", function() return model(hm.ones({3, 4})):float():sum() end)
    scaler:scale(loss):backward()
    local stepped, record = scaler:step(opt)
    assert.is_false(stepped)
    assert.equal("1", record.culprits[1].name:match("^(%d)%."))
  end)

  it("without names gives the number of the parameter", function()
    local a, b = leaf {1}, leaf {1}
    local opt, scaler = optim.SGD({a, b}, {lr = 1}), amp.GradScaler {init_scale = 4}
    a.grad, b.grad = hm.tensor {1}, hm.tensor {nan}
    local _, record = scaler:step(opt)
    assert.equal("parameter 2", record.culprits[1].name)
  end)

  it("has norm and amax of the unscaled gradients", function()
    local _, opt, scaler = with_grad {12, -16, 0}
    local stepped, record = scaler:step(opt)
    assert.is_true(stepped)
    assert(numbers.near(record.norm, 5, 1e-6))
    assert.equal(4, record.amax)
    assert.same({}, record.culprits)
  end)
end)

describe("update", function()
  local function go(scaler, opt, p, bad)
    p.grad = hm.tensor {bad and inf or 1, 1, 1}
    scaler:step(opt)
    return scaler:update()
  end

  it("says what it did: grow, hold, backoff", function()
    local p, opt, scaler = with_grad({1, 1, 1}, {init_scale = 8, growth_interval = 2})
    assert.same({old_scale = 8.0, new_scale = 8.0, event = "hold"}, go(scaler, opt, p))
    assert.same({old_scale = 8.0, new_scale = 16.0, event = "grow"}, go(scaler, opt, p))
    assert.same({old_scale = 16.0, new_scale = 8.0, event = "backoff"}, go(scaler, opt, p, true))
  end)

  it("keeps the scale within its bounds and says floor or cap", function()
    local p, opt, scaler = with_grad({1, 1, 1}, {init_scale = 2, min_scale = 1, max_scale = 4, growth_interval = 1})
    assert.equal("grow", go(scaler, opt, p).event)
    assert.same({old_scale = 4.0, new_scale = 4.0, event = "cap"}, go(scaler, opt, p))
    assert.equal("backoff", go(scaler, opt, p, true).event)
    assert.equal("backoff", go(scaler, opt, p, true).event)
    assert.same({old_scale = 1.0, new_scale = 1.0, event = "floor"}, go(scaler, opt, p, true))
  end)

  it("the bounds are 1 and 2^24, widened by init_scale; 0 and huge switch them off; one that excludes init_scale is refused", function()
    assert.same({1.0, 2.0 ^ 24}, {amp.GradScaler():bounds()})
    assert.same({0.25, 2.0 ^ 24}, {amp.GradScaler({init_scale = 0.25}):bounds()})
    assert.same({1.0, 2.0 ^ 30}, {amp.GradScaler({init_scale = 2 ^ 30}):bounds()})
    assert.same({0.0, inf}, {amp.GradScaler({min_scale = 0, max_scale = inf}):bounds()})
    raises({"min_scale 8 excludes init_scale 4", "hint"}, amp.GradScaler, {init_scale = 4, min_scale = 8})
    raises({"max_scale 2 excludes init_scale 4", "hint"}, amp.GradScaler, {init_scale = 4, max_scale = 2})
    local p, opt, scaler = with_grad({1, 1, 1}, {init_scale = 2, min_scale = 0})
    for _ = 1, 200 do go(scaler, opt, p, true) end
    assert.equal(2.0 ^ -126, scaler:get_scale()) -- never zero, the reciprocal stays finite
  end)

  it("update(new_scale) sets it, keeps the tracker, clears the records, clamps", function()
    local p, opt, scaler = with_grad({4, 4, 4}, {init_scale = 4, growth_interval = 3})
    scaler:step(opt)
    scaler:update()
    assert.equal(1, scaler:state_dict()._growth_tracker)
    p.grad = hm.tensor {4, 4, 4}
    scaler:step(opt)
    local record = scaler:update(32)
    assert.equal("grow", record.event)
    assert.equal(32, scaler:get_scale())
    assert.equal(1, scaler:state_dict()._growth_tracker)
    p.grad = hm.tensor {32, 32, 32}
    scaler:step(opt)
    scaler:update(hm.tensor(64.0))
    assert.equal(64, scaler:get_scale())
    assert.equal("cap", scaler:update(2 ^ 60).event)
    for _, bad in ipairs {0, -1, nan, inf, "8"} do raises("new_scale must be a positive finite number", scaler.update, scaler, bad) end
    raises("new_scale must be one number without gradient", scaler.update, scaler, hm.ones({2}))
    raises("new_scale must be one number without gradient", scaler.update, scaler, leaf(1.0))
  end)

  it("record() keeps the life of the scale", function()
    local p, opt, scaler = with_grad({1, 1, 1}, {init_scale = 8, growth_interval = 1})
    go(scaler, opt, p)
    go(scaler, opt, p, true)
    go(scaler, opt, p)
    local history = scaler:record()
    assert.equal(3, #history)
    assert.same({"grow", "backoff", "grow"}, {history[1].event, history[2].event, history[3].event})
    assert.same({1, 2, 3}, {history[1].step, history[2].step, history[3].step})
    assert.equal("backoff", scaler:record(2)[1].event)
  end)
end)

describe("options", function()
  it("are checked, with PyTorch's names", function()
    raises({"GradScaler", "'growth_factr'", "growth_factor"}, amp.GradScaler, {growth_factr = 2})
    raises("growth_factor", amp.GradScaler, {growth_factor = 1})
    raises("backoff_factor", amp.GradScaler, {backoff_factor = 1})
    raises("backoff_factor", amp.GradScaler, {backoff_factor = 0})
    raises("growth_interval", amp.GradScaler, {growth_interval = 0})
    raises("growth_interval", amp.GradScaler, {growth_interval = 1.5})
    raises("init_scale", amp.GradScaler, {init_scale = 0})
    raises("init_scale", amp.GradScaler, {init_scale = nan})
    raises("init_scale", amp.GradScaler, {init_scale = inf})
    raises("enabled", amp.GradScaler, {enabled = 1})
    raises("'dtype'", amp.GradScaler, {dtype = "int8"})
    raises("options must be a table", amp.GradScaler, 3)
    assert.equal(65536, amp.GradScaler():get_scale())
  end)

  it("dtype bfloat16 checks only: the scale stays 1", function()
    local p, opt, scaler = with_grad({1, nan, 1}, {dtype = "bfloat16"})
    assert.equal(1, scaler:get_scale())
    assert.is_false((scaler:step(opt)))
    scaler:update()
    assert.equal(1, scaler:get_scale())
    same(p, {1, 2, 3})
  end)

  it("a state dict with the policy's state goes on where it was; a damaged one is refused whole", function()
    local p, opt, scaler = with_grad({1, 1, 1}, {init_scale = 8, growth_interval = 3})
    for _ = 1, 2 do
      p.grad = hm.tensor {1, 1, 1}
      scaler:step(opt)
      scaler:update()
    end
    local saved = scaler:state_dict()
    assert.equal("dynamic", saved.policy)
    assert.equal(2, saved.policy_state.clean)
    local other = amp.GradScaler {growth_interval = 9}
    other:load_state_dict(saved)
    p.grad = hm.tensor {1, 1, 1}
    other:step(opt)
    assert.same({old_scale = 8.0, new_scale = 16.0, event = "grow"}, other:update())
    local third = amp.GradScaler()
    local before = third:state_dict()
    raises("The source state dict is empty", third.load_state_dict, third, {})
    raises("'scale' is missing", third.load_state_dict, third, {growth_factor = 3.0})
    raises("growth_factor", third.load_state_dict, third, {scale = 3.0, growth_factor = 0.5})
    raises("scale", third.load_state_dict, third, {scale = nan})
    raises("_growth_tracker", third.load_state_dict, third, {scale = 3.0, _growth_tracker = -1})
    raises("expected a table", third.load_state_dict, third, 5)
    assert.same(before, third:state_dict())
  end)

  it("setters and getters", function()
    local s = amp.GradScaler {init_scale = 4}
    s:set_growth_interval(7)
    assert.equal(7, s:get_growth_interval())
    raises("growth_factor", s.set_growth_factor, s, 0.5)
    s:set_scale(2 ^ 40)
    assert.equal(2.0 ^ 24, s:get_scale())
    raises("set_scale", s.set_scale, s, -1)
    assert.matches("scale 16777216", tostring(s), 1, true)
    assert.matches("disabled", tostring(amp.GradScaler {enabled = false}), 1, true)
  end)

  it("a scaler does not keep itself alive", function()
    local box = setmetatable({amp.GradScaler()}, {__mode = "v"})
    collectgarbage()
    collectgarbage()
    assert.is_nil(box[1])
  end)
end)
