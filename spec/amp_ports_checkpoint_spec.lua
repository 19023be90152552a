-- amp_ports_checkpoint_spec.lua -- what PyTorch's tests assert of checkpointing with mixed precision, under the ids K1 to K6, and of
-- hm.checkpoint beside it.
--
-- What is left out, with the reason, stands in spec/reference/amp_ports.lua.

local hm = require "halfmoon"
local core = require "halfmoon.core"
local numbers = require "spec.support.numbers"
local devices = require "spec.support.devices"
local expect = require "spec.support.expect"

local nn, amp, optim = hm.nn, hm.amp, hm.optim
local same, raises = numbers.assert_same, expect.raises

local function block(width)
  return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
end

--- The gradients of a model after one backward of fn().
local function grads(model, fn)
  model:zero_grad()
  fn():float():sum():backward()
  local list = {}
  for name, p in model:named_parameters() do list[name] = p.grad end
  return list
end

local function assert_same_grads(a, b)
  local n = 0
  for name, g in pairs(a) do
    same(g, b[name], name)
    n = n + 1
  end
  assert(n > 0)
end

describe("checkpoint as in PyTorch", function()
  for _, low in ipairs {"bf16", "f16"} do
    it("K1: the second run has the forward's region, on or off, in " .. low, function()
      local model = block(6)
      local x = hm.randn({4, 6})
      for _, enabled in ipairs {true, false} do
        local seen = {}
        local function fn(h)
          local state = amp.autocast_state()
          seen[#seen + 1] = ("%s %s"):format(state.enabled, state.enabled and state.dtype or "")
          return model(h)
        end
        local y = amp.autocast({dtype = low, enabled = enabled}, hm.checkpoint, fn, x)
        assert.equal(enabled and (low == "f16" and "float16" or "bfloat16") or "float32", y.dtype)
        amp.autocast(low == "f16" and "bf16" or "f16", function() y:float():sum():backward() end)
        assert.equal(2, #seen)
        assert.equal(seen[1], seen[2])
      end
    end)
  end

  it("K1: overrides of classes and the cache flag are those of the forward, too", function()
    local x, w = hm.randn({3, 3}, {requires_grad = true}), hm.randn({3, 3}, {requires_grad = true})
    local seen = {}
    local function fn(h)
      local y = h:matmul(w)
      seen[#seen + 1] = {y.dtype, amp.autocast_state().cache_enabled}
      return y:tanh() * y
    end
    local y = amp.autocast({dtype = "f16", cache_enabled = false, ops = {matmul = "f32"}}, hm.checkpoint, fn, x)
    y:sum():backward()
    assert.same({{"float32", false}, {"float32", false}}, seen)
  end)

  it("K2: dropout inside the region gives the gradients of the run without it", function()
    local model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.4), nn.Linear(8, 8))
    local x = hm.randn({16, 8}, {requires_grad = true})
    for _, low in ipairs {"f16", "bf16", "off"} do
      local options = {dtype = low ~= "off" and low or nil, enabled = low ~= "off"}
      hm.manual_seed(8)
      local want = grads(model, function() return amp.autocast(options, model, x) end)
      hm.manual_seed(8)
      local got = grads(model, function() return amp.autocast(options, hm.checkpoint, model, x) end)
      assert_same_grads(want, got)
    end
  end)

  it("K2: the stream of random numbers outside goes on as if there were no second run", function()
    local model = nn.Dropout(0.5)
    local x = hm.ones({64}, {requires_grad = true})
    hm.manual_seed(1)
    hm.checkpoint(model, x)
    local state = hm.rand({4})
    hm.manual_seed(1)
    local y = hm.checkpoint(model, x)
    y:sum():backward()
    same(hm.rand({4}), state)
  end)

  it("K3: preserve_rng_state = false runs", function()
    local model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    local x = hm.randn({4, 4}, {requires_grad = true})
    local y = amp.autocast("f16", hm.checkpoint, {preserve_rng_state = false}, model, x)
    y:float():sum():backward()
    assert.is_not_nil(x.grad)
  end)

  it("K4: another count or kind of tensors in the second run is an error", function()
    local x = hm.randn({4, 4}, {requires_grad = true})
    for _, change in ipairs {"count", "shape", "dtype"} do
      local runs = 0
      local y = hm.checkpoint(function(h)
        runs = runs + 1
        if runs == 2 and change == "count" then h = h:sigmoid() end
        if runs == 2 and change == "shape" then h = hm.cat({h, h}, 1) end
        if runs == 2 and change == "dtype" then h = h:double() end
        return h:tanh():float():sum()
      end, x)
      raises("checkpoint", function() y:backward() end)
    end
  end)

  it("K5: equal gradients, with detached tensors, shared parameters, tables, and no-grad inputs", function()
    local model = block(6)
    local x = hm.randn({4, 6})
    local shared = model[1].weight
    local function fn(h, more)
      local y = model(h) + h:matmul(shared) * more.scale
      return y + y:detach(), {inner = y * 2}
    end
    local function total(y, extra) return y:float() + extra.inner:float() end
    for _, low in ipairs {"f16", "bf16"} do
      local want = grads(model, function() return total(amp.autocast(low, fn, x, {scale = 3})) end)
      local got = grads(model, function() return total(amp.autocast(low, hm.checkpoint, fn, x, {scale = 3})) end)
      assert_same_grads(want, got)
    end
  end)

  it("K5: autograd.grad and keeping the graph work", function()
    local model = block(4)
    local x = hm.randn({2, 4}, {requires_grad = true})
    local y = amp.autocast("f16", hm.checkpoint, model, x):float():sum()
    local first = hm.autograd.grad(y, {x}, {retain_graph = true})[1]
    local second = hm.autograd.grad(y, {x})[1]
    same(first, second)
    same(first, hm.autograd.grad(amp.autocast("f16", model, x):float():sum(), {x})[1])
  end)

  it("K5: less memory at the peak", devices.cpu_only("the peak is about sizes", function()
    local model, x = {}, hm.randn({4096, 64}, {requires_grad = true})
    for i = 1, 6 do model[i] = block(64) end
    local function peak(how)
      collectgarbage() collectgarbage()
      core.reset_peak()
      local y = amp.autocast("f16", function()
        local h = x
        for i = 1, #model do h = how(model[i], h) end
        return h
      end)
      y:float():sum():backward()
      return core.memory_stats().peak
    end
    local function plain(m, h) return m(h) end
    peak(plain)
    local without, with = peak(plain), peak(hm.checkpoint)
    assert(with < 0.9 * without, ("%d of %d bytes"):format(with, without))
  end))

  it("K6: nested regions give exact gradients", function()
    local model = nn.Sequential(block(6), block(6), block(6))
    local x = hm.randn({4, 6}, {requires_grad = true})
    local function nested(depth, h)
      if depth > 3 then return h end
      return hm.checkpoint(function(g) return nested(depth + 1, model[depth](g)) end, h)
    end
    for _, low in ipairs {"f16", "bf16"} do
      local want = grads(model, function() return amp.autocast(low, model, x) end)
      local got = grads(model, function() return amp.autocast(low, nested, 1, x) end)
      assert_same_grads(want, got)
    end
    -- a region of another dtype inside a checkpointed one
    local function mixed(how)
      return amp.autocast("f16", how, function(h)
        h = model[1](h)
        h = amp.autocast("bf16", how, model[2], h)
        return amp.autocast({enabled = false}, how, model[3], h:float())
      end, x)
    end
    local want = grads(model, function() return mixed(function(fn, ...) return fn(...) end) end)
    assert_same_grads(want, grads(model, function() return mixed(hm.checkpoint) end))
  end)

  it("a whole step with a scaler, an overflow included, is as without checkpoint", function()
    local function run(how)
      hm.manual_seed(2)
      local model = nn.Sequential(block(8), block(8), nn.Linear(8, 3))
      local opt = optim.AdamW(model:parameters(), {lr = 1e-2})
      local scaler = amp.GradScaler {init_scale = 2 ^ 24, growth_interval = 3}
      local skipped = 0
      for _ = 1, 14 do
        local x, y = hm.randn({16, 8}), hm.randint(0, 3, {16})
        opt:zero_grad()
        local loss = amp.autocast("f16", function()
          local h = how(model[2], how(model[1], x))
          return nn.functional.cross_entropy(model[3](h), y)
        end)
        scaler:scale(loss):backward()
        if not scaler:step(opt) then skipped = skipped + 1 end
        scaler:update()
      end
      return model, skipped, scaler:get_scale()
    end
    local a, skips_a, scale_a = run(function(m, h) return m(h) end)
    local b, skips_b, scale_b = run(hm.checkpoint)
    assert(skips_a > 0)
    assert.equal(skips_a, skips_b)
    assert.equal(scale_a, scale_b)
    for name, t in pairs(a:state_dict()) do same(t, b:state_dict()[name], name) end
  end)
end)
