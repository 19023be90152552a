-- amp_debug_spec.lua -- amp.debug: the first op that made a value that is not finite, with its module and line; overflows
-- planted in each layer of two models; and what is no fault, such as masks.

local hm = require "halfmoon"
local core = require "halfmoon.core"
local expect = require "spec.support.expect"

local nn, optim, amp = hm.nn, hm.optim, hm.amp
local raises = expect.raises
local F = nn.functional
local inf = math.huge

-- ====== Two models of five layers each ======

-- A layer whose result is multiplied by a gain.  With weights divided by it the function stays as it is, but the gradient
-- of what the layer computed grows by the gain.  (Gradients of weights are float32: those of activations overflow.)
local Gained = nn.class("Gained")

function Gained:init(layer)
  self.layer, self.gain = layer, 1
end

function Gained:forward(x) return self.layer(x) * self.gain end

local Mlp = nn.class("Mlp")

function Mlp:init()
  for k = 1, 5 do self["fc" .. k] = Gained(nn.Linear(8, k == 5 and 4 or 8)) end
end

function Mlp:forward(x)
  for k = 1, 4 do x = self["fc" .. k](x):tanh() end
  return self.fc5(x)
end

local Cnn = nn.class("Cnn")

function Cnn:init()
  for k = 1, 3 do self["conv" .. k] = Gained(nn.Conv2d(k == 1 and 1 or 4, 4, 3, {padding = 1})) end
  self.fc4 = Gained(nn.Linear(4 * 4 * 4, 8))
  self.fc5 = Gained(nn.Linear(8, 4))
end

function Cnn:forward(x)
  for k = 1, 3 do x = self["conv" .. k](x):tanh() end
  x = self.fc4(x:flatten(2)):tanh()
  return self.fc5(x)
end

local function layer_of(model, k) return model["fc" .. k] or model["conv" .. k] end
local function name_of(model, k) return (model["fc" .. k] and "fc" or "conv") .. k end

--- A model, its scaler and optimizer, and a function that runs one step under f16 and returns the record.
local function new_run(class, init_scale)
  hm.manual_seed(3)
  local model = class()
  local opt = optim.SGD(model:parameters(), {lr = 0.01})
  local scaler = amp.GradScaler {init_scale = init_scale}
  local x = class == Cnn and hm.randn({4, 1, 4, 4}) or hm.randn({4, 8})
  local y = hm.tensor({0, 1, 2, 3}, {dtype = "i64"})
  local function step()
    opt:zero_grad()
    local loss = amp.autocast("f16", function() return F.cross_entropy(model(x), y) end)
    scaler:scale(loss):backward()
    local _, record = scaler:step(opt)
    scaler:update()
    return record
  end
  return model, step
end

local function plant_backward(model, k, gain)
  local gained = layer_of(model, k)
  gained.gain = gain
  hm.no_grad(function()
    gained.layer.weight:mul_(1 / gain)
    gained.layer.bias:mul_(1 / gain)
  end)
end

describe("amp.debug", function()
  after_each(function() core.op_watch(nil) end)

  for class, label in pairs {[Mlp] = "mlp", [Cnn] = "cnn"} do
    it("finds nothing in a sound step of the " .. label, function()
      local _, step = new_run(class, 2.0 ^ 10)
      local report, record = amp.debug(step)
      assert.is_false(report.found)
      assert.is_true(record.stepped)
      assert.is_true(report.calls > 20)
      expect.raises("no op made", function() error(tostring(report), 0) end)
    end)

    for k = 1, 5 do
      it(("and the culprits name layer %d of the %s whose backward overflows"):format(k, label), function()
        local model, step = new_run(class, 2.0 ^ 14)
        plant_backward(model, k, 2.0 ^ 14)
        local report, record = amp.debug(step)
        local name = name_of(model, k)
        assert.truthy(record.culprits[1].name:find("^" .. name .. "%.layer%."), record.culprits[1].name)
        assert.is_true(report.found and report.made)
        assert.equal("backward", report.phase)
        assert.truthy(report.module:find(("%s.%s "):format(class == Cnn and "Cnn" or "Mlp", name), 1, true),
          report.module)
        assert.equal("mul", report.backward_of)
        assert.truthy(report.line:find("amp_debug_spec.lua:%d+$"), report.line)
        assert.is_true(report.inf_count > 0)
      end)

      it(("names layer %d of the %s whose forward overflows"):format(k, label), function()
        local model, step = new_run(class, 1)
        hm.no_grad(function() layer_of(model, k).layer.bias:fill_(2.0 ^ 15) end)
        layer_of(model, k).gain = 2.0 ^ 2
        local report = amp.debug(step)
        local name = name_of(model, k)
        assert.is_true(report.found and report.made)
        assert.equal("forward", report.phase)
        assert.truthy(report.module:find("." .. name .. " ", 1, true), report.module)
        assert.truthy(report.line:find("amp_debug_spec.lua:%d+$"), report.line)
        assert.is_true(report.inf_count + report.nan_count > 0)
        for _, x in ipairs(report.inputs) do
          if x.dtype == "float16" then assert.is_true(x.amax > 0 and x.nan_count + x.inf_count == 0) end
        end
      end)

      it(("names layer %d of the %s whose weight does not fit float16"):format(k, label), function()
        local model, step = new_run(class, 1)
        hm.no_grad(function() layer_of(model, k).layer.weight:add_(2.0 ^ 17) end)
        local report = amp.debug(step)
        assert.truthy(report.module:find("." .. name_of(model, k) .. ".layer (", 1, true), report.module)
        assert.equal("forward", report.phase)
        assert.equal("float16", report.outputs[1].dtype)
      end)
    end
  end

  it("tells op, line, shapes, largest values and counts", function()
    local a, b = hm.tensor({1, 2, 4}), hm.tensor({1, 0, 2})
    local line = debug.getinfo(1, "l").currentline + 1
    local report, c = amp.debug(function() return (a + 1) / b end)
    assert.same({1}, {c:isinf():sum():item()})
    assert.same({"div", "forward", true, 1, 0}, {report.op, report.phase, report.made, report.inf_count,
      report.nan_count})
    assert.truthy(report.line:find("amp_debug_spec.lua:" .. line, 1, true))
    assert.is_nil(report.module)
    assert.same({3}, report.inputs[1].shape)
    assert.equal(5, report.inputs[1].amax)
    assert.equal(2, report.inputs[2].amax)
    assert.equal("float32", report.outputs[1].dtype)
    local text = tostring(report)
    for _, part in ipairs {"div made 1 inf", "amp_debug_spec.lua:" .. line, "f32[3]", "amax 5"} do
      assert.truthy(text:find(part, 1, true), text)
    end
  end)

  it("tells a backward op by the line of its forward", function()
    local x = hm.tensor({0, 1}, {requires_grad = true})
    local line = debug.getinfo(1, "l").currentline + 2
    local report = amp.debug(function()
      local y = x:sqrt()
      y:sum():backward()
    end)
    assert.same({"backward", "sqrt", true}, {report.phase, report.backward_of, report.made})
    assert.truthy(report.line:find(":" .. line, 1, true))
    assert.truthy(tostring(report):find("the backward of sqrt", 1, true))
  end)

  it("says so when the forward ran outside", function()
    local x = hm.tensor({0, 1}, {requires_grad = true})
    local loss = x:sqrt():sum()
    local report = amp.debug(function() loss:backward() end)
    assert.is_nil(report.line)
    assert.truthy(tostring(report):find("outside amp.debug", 1, true))
  end)

  it("sees an overflow of a write in place", function()
    local x = hm.tensor({60000, 1}, {dtype = "f16"})
    local report = amp.debug(function() x:mul_(2) end)
    assert.same({"mul", true, 1}, {report.op, report.made, report.inf_count})
    assert.equal(60000, report.inputs[1].amax) -- before the call
  end)

  it("leaves out a destination that is not read", function()
    local x = hm.tensor({0 / 0, 1}, {dtype = "f16"})
    local report = amp.debug(function() x:copy_(hm.tensor({70000, 1})) end)
    assert.same({"copy_", true, 1, 0}, {report.op, report.made, report.inf_count, report.nan_count})
    assert.equal(1, #report.inputs)
    assert.equal(70000, report.inputs[1].amax)
  end)

  it("sees an overflow where gradients are added up", function()
    local x = hm.tensor({1, 0}, {dtype = "f16", requires_grad = true})
    x.grad = hm.tensor({60000, 1}, {dtype = "f16"})
    local report = amp.debug(function() (x * 60000):sum():backward() end)
    assert.same({true, "backward"}, {report.found, report.phase})
  end)

  it("tells what came in from outside", function()
    local x = hm.tensor({1, 0 / 0})
    local report = amp.debug(function() return x * 2 + 1 end)
    assert.same({true, false, "mul", 1}, {report.found, report.made, report.op, report.nan_count})
    assert.truthy(tostring(report):find("mul read 1 nan in", 1, true))
  end)

  it("excuses masks and constants, but not what goes wrong with them", function()
    local scores = hm.tensor({{1, 2}, {3, 4}})
    local mask = hm.tensor({{0, -inf}, {0, 0}})
    local hidden = hm.tensor({{false, true}, {false, false}}, {dtype = "bool"})
    local report = amp.debug(function()
      (scores + mask):softmax(2)
      scores:masked_fill(hidden, -inf):softmax(2)
      scores:masked_fill(hidden, inf):minimum(5)
    end)
    assert.is_false(report.found)
    report = amp.debug(function() return hm.full({2, 2}, -inf):softmax(2) end)
    assert.same({true, true}, {report.found, report.made})
    assert.equal(4, report.nan_count)
  end)

  it("is a scope, too, and costs nothing after it", function()
    do
      local report <close> = amp.debug()
      assert.truthy(tostring(report):find("still looking", 1, true))
      raises("looking already", amp.debug)
      assert.is_false(report.found)
      local _ = hm.tensor({1}) / 0
      assert.is_true(report.found)
    end
    local report = amp.debug()
    report:close()
    report:close()
    local _ = hm.tensor({1, 2}) / 0
    assert.is_false(report.found)
    assert.equal(report.calls, core.op_watch(nil))
  end)

  it("passes arguments, results and errors through", function()
    local report, a, b = amp.debug(function(x, y) return y, x end, 1, nil)
    assert.same({false, nil, 1}, {report.found, a, b})
    local message = raises({"stop here", "amp.debug: div made 1 inf"}, amp.debug, function()
      local _ = hm.tensor({1}) / hm.tensor({0})
      error("stop here", 0)
    end)
    assert.equal("stop here", message:match("^[^\n]+"))
    local value = {}
    local ok, raised = pcall(amp.debug, function() error(value, 0) end)
    assert.same({false, true}, {ok, rawequal(raised, value)})
    raises("expected a function, not 3", amp.debug, 3)
    assert.is_false(amp.debug(function() end).found) -- nothing was left open
  end)

  it("works inside a checkpoint and under detect_anomaly", function()
    local x = hm.tensor({0, 4}, {requires_grad = true})
    local report = amp.debug(function()
      hm.checkpoint(function(t) return t:sqrt() end, x):sum():backward()
    end)
    assert.same({true, "backward"}, {report.found, report.phase})
    raises("detect_anomaly", function()
      hm.autograd.detect_anomaly({inf = true}, function()
        amp.debug(function() x:sqrt():sum():backward() end)
      end)
    end)
  end)
end)
