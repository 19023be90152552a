-- Modules: what is registered and under which names, state dicts, modes, conversion, text; layers and losses against
-- plain loops; first values;
-- clipping.

local hm = require "halfmoon"
local core = require "halfmoon.core"
local fixed = require "spec.support.inputs"
local numbers = require "spec.support.numbers"
local raises = require "spec.support.raises"

local nn = hm.nn
local F = nn.functional
local filled, names_of, keys = fixed.filled, fixed.names_of, fixed.keys

local Net = nn.class("Net")
function Net:init()
  self.conv = nn.Conv2d(1, 4, 3, {padding = 1})
  self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4, {bias = false}))
  self.scale = nn.Parameter(hm.ones {1})
  self:register_buffer("mean", hm.zeros {3})
  self.layers = nn.ModuleList {nn.Linear(2, 2)}
end

describe("modules", function()
  it("register parameters, modules and buffers in order of first assignment", function()
    local net = Net()
    assert.same({"scale", "conv.weight", "conv.bias", "body.0.weight", "body.0.bias", "body.2.weight", "layers.0.weight", "layers.0.bias"},
      names_of(net:named_parameters()))
    assert.same({"mean"}, names_of(net:named_buffers()))
    assert.same({"", "conv", "body", "body.0", "body.1", "body.2", "layers", "layers.0"}, names_of(net:named_modules()))
    assert.equal(8, #net:parameters())
    assert.equal(1, #net:buffers())
    assert.equal(3, #net:children())
    assert.is_true(rawequal(net:parameters()[1], net.scale))
  end)

  it("forget what is replaced or set to nil, and keep its place", function()
    local net = Net()
    net.conv = nn.Linear(1, 1)
    assert.equal("conv.weight", names_of(net:named_parameters())[2])
    assert.same({1, 1}, net.conv.weight.shape)
    net.body = nil
    net.scale = nil
    assert.same({"conv.weight", "conv.bias", "layers.0.weight", "layers.0.bias"}, names_of(net:named_parameters()))
    net.body = nn.Linear(2, 2)
    assert.equal("body.weight", names_of(net:named_parameters())[3])
    net.mean = nil
    assert.same({}, names_of(net:named_buffers()))
    assert.same({"conv.bias", "conv.weight"}, (function(state)
      local found = {}
      for _, name in ipairs(keys(state)) do if name:find("^conv") then found[#found + 1] = name end end
      return found
    end)(net:state_dict()))
  end)

  it("take plain tensors as what they are", function()
    local M = nn.class("M")
    function M:init()
      self.plain = hm.ones({2}, {requires_grad = true})
      self.made = nn.Parameter(hm.ones({2}))
      self.frozen = nn.Parameter(hm.ones({2}), false)
    end
    local m = M()
    assert.same({"made", "frozen"}, names_of(m:named_parameters()))
    assert.is_true(m.made.requires_grad)
    assert.is_false(m.frozen.requires_grad)
    raises("Parameter: expected a tensor", nn.Parameter, 3)
  end)

  it("count a shared parameter once, and write it under both names", function()
    local M = nn.class("M")
    function M:init()
      self.a = nn.Linear(2, 2)
      self.b = nn.Linear(2, 2)
      self.b.weight = self.a.weight
    end
    local m = M()
    assert.same({"a.weight", "a.bias", "b.bias"}, names_of(m:named_parameters()))
    assert.same({"a.bias", "a.weight", "b.bias", "b.weight"}, keys(m:state_dict()))
    m:to("float64")
    assert.is_true(rawequal(m.a.weight, m.b.weight))
    assert.equal("float64", m.b.weight.dtype)
  end)

  it("inherit", function()
    local Base = nn.class("Base")
    function Base:init(n) self.fc = nn.Linear(n, 1) end
    function Base:forward(x) return self.fc(x) end
    local Derived = nn.class("Derived", Base)
    function Derived:init(n)
      Base.init(self, n)
      self.extra_fc = nn.Linear(1, 1)
    end
    local d = Derived(3)
    assert.same({2, 1}, d(hm.ones {2, 3}).shape)
    assert.same({"fc.weight", "fc.bias", "extra_fc.weight", "extra_fc.bias"}, names_of(d:named_parameters()))
    raises({"has no forward", "Empty:forward"}, nn.class("Empty")())
    raises("nn.class: the name must be a string", nn.class)
  end)

  it("pass several arguments and results through a call", function()
    local Two = nn.class("Two")
    function Two:forward(a, b, c) return c, b, a, select("#", a, b, c) end -- luacheck: ignore 212
    assert.same({3, nil, 1, 3}, {Two()(1, nil, 3)})
  end)

  it("apply visits children first; train and eval reach everything", function()
    local net, seen = Net(), {}
    assert.is_true(rawequal(net, net:apply(function(m) seen[#seen + 1] = m.__class end)))
    assert.same({"Conv2d", "Linear", "ReLU", "Linear", "Sequential", "Linear", "ModuleList", "Net"}, seen)
    assert.is_true(net.training)
    assert.is_true(rawequal(net, net:eval()))
    for _, m in net:named_modules() do assert.is_false(m.training) end
    net:train()
    for _, m in net:named_modules() do assert.is_true(m.training) end
    net:train(false)
    assert.is_false(net.body[1].training)
  end)

  it("convert floating tensors only", function()
    local net = Net()
    net:register_buffer("count", hm.zeros({}, {dtype = "i64"}))
    local before = net.scale
    assert.is_true(rawequal(net, net:to("float32")))
    assert.is_true(rawequal(before, net.scale))
    net:half()
    for _, p in net:named_parameters() do
      assert.equal("float16", p.dtype)
      assert.is_true(p.requires_grad)
      assert.is_true(p.is_leaf)
    end
    assert.equal("float16", net.mean.dtype)
    assert.equal("int64", net.count.dtype)
    assert.equal("bfloat16", net:to {dtype = "bf16"}.scale.dtype)
    assert.equal("float64", net:double().scale.dtype)
    raises("to", net.to, net, {dtype = "f17"})
    raises("unknown option", net.to, net, {dtpe = "f16"})
  end)

  it("zero_grad and requires_grad_ reach all parameters", function()
    local net = nn.Linear(2, 2)
    net(hm.ones {1, 2}):sum():backward()
    assert(net.weight.grad and net.bias.grad)
    net:zero_grad()
    assert.is_nil(net.weight.grad)
    net:requires_grad_(false)
    assert.is_false(net(hm.ones {1, 2}).requires_grad)
    net:requires_grad_()
    assert.is_true(net(hm.ones {1, 2}).requires_grad)
  end)

  it("print as a tree", function()
    assert.equal("Linear(8 -> 4)", tostring(nn.Linear(8, 4)))
    assert.equal("Linear(8 -> 4, no bias)", tostring(nn.Linear(8, 4, {bias = false})))
    assert.equal([[
Net(
  (conv): Conv2d(1 -> 4, kernel 3x3, padding 1)
  (body): Sequential(
    (0): Linear(8 -> 8)
    (1): ReLU()
    (2): Linear(8 -> 4, no bias)
  )
  (layers): ModuleList(
    (0): Linear(2 -> 2)
  )
)]], tostring(Net()))
    assert.truthy(tostring(nn.Conv2d(2, 4, {3, 5}, {stride = 2, groups = 2, dilation = {1,
      2}})):find("kernel 3x5, stride 2, dilation 1x2, groups 2", 1, true))
    assert.equal("class Net", tostring(Net))
  end)
end)

describe("Sequential and ModuleList", function()
  it("hold modules at positions from 1", function()
    local a, b = nn.ReLU(), nn.Tanh()
    local s = nn.Sequential(a, b)
    assert.equal(2, #s)
    assert.is_true(rawequal(a, s[1]))
    s:append(nn.Sigmoid())
    assert.equal(3, #s)
    assert.equal(2, #nn.Sequential {a, b})
    numbers.assert_same(nn.Sequential()(hm.ones {2}), {1, 1})
    numbers.assert_near(s(hm.tensor {-1, 1}), {0.5, 1 / (1 + math.exp(-0.7615941559557649))}, 1e-6)
    raises({"entry 2", "hint: activations are modules too"}, nn.Sequential, nn.ReLU(), function() end)
    raises("entry 1", nn.ModuleList, {3})
    raises("cannot be called", nn.ModuleList {a}, hm.ones {1})
    local list = nn.ModuleList {a}
    list:append(b)
    assert.equal(2, #list)
  end)
end)

describe("state dicts", function()
  it("share memory with the module and are outside the graph", function()
    local m = nn.Linear(2, 2)
    local state = m:state_dict()
    assert.is_false(state.weight.requires_grad)
    core.no_grad(function() m.weight:fill_(3) end)
    numbers.assert_same(state.weight, {3, 3, 3, 3})
  end)

  it("are loaded by copying, with conversion", function()
    local a, b = Net(), Net()
    local weight = b.conv.weight
    local report = b:load_state_dict(a:state_dict())
    assert.same({missing = {}, unexpected = {}}, report)
    assert.is_true(rawequal(weight, b.conv.weight))
    numbers.assert_same(b.conv.weight, a.conv.weight)
    assert.is_true(b.conv.weight.requires_grad)
    local half = nn.Linear(2, 2):half()
    half:load_state_dict {weight = hm.full({2, 2}, 0.1), bias = hm.zeros {2}}
    assert.equal("float16", half.weight.dtype)
    assert.equal(hm.tensor({0.1}, {dtype = "f16"}):item(), half.weight[1][1]:item())
  end)

  it("that do not fit change nothing, and all complaints come at once", function()
    local m = nn.Linear(2, 3)
    local before = m.weight:detach():clone()
    local message = raises({"load_state_dict: the state does not fit Linear", "missing: bias", "unexpected: extra, wait",
      "wrong shape: weight: the module has [3,2], the file has [2,2]"}, m.load_state_dict, m,
      {weight = hm.ones {2, 2}, extra = hm.ones {1}, wait = hm.ones {1}})
    assert(message)
    numbers.assert_same(m.weight, before)
    raises("expected a tensor", m.load_state_dict, m, {weight = 3, bias = hm.ones {3}})
    raises("expected a table", m.load_state_dict, m, 3)
    raises("unknown option", m.load_state_dict, m, {}, {strikt = false})
  end)

  it("may be partial with strict = false, but shapes must agree", function()
    local m = nn.Linear(2, 3)
    local report = m:load_state_dict({bias = hm.ones {3}, more = hm.ones {1}}, {strict = false})
    assert.same({missing = {"weight"}, unexpected = {"more"}}, report)
    numbers.assert_same(m.bias, {1, 1, 1})
    raises("wrong shape", m.load_state_dict, m, {bias = hm.ones {2}}, {strict = false})
  end)
end)

describe("layers", function()
  it("Linear: x times the transpose of weight, plus bias, for any leading dims", function()
    local m = nn.Linear(5, 3)
    for _, lead in ipairs {{}, {4}, {2, 3}} do
      local shape = table.move(lead, 1, #lead, 1, {})
      shape[#shape + 1] = 5
      local x = filled(shape, 1)
      local y = m(x)
      shape[#shape] = 3
      assert.same(shape, y.shape)
      local xs, w, b, want = numbers.flat(x), m.weight:totable(), m.bias:totable(), {}
      for r = 1, #xs // 5 do
        for o = 1, 3 do
          local s = b[o]
          for i = 1, 5 do s = s + xs[(r - 1) * 5 + i] * w[o][i] end
          want[#want + 1] = s
        end
      end
      numbers.assert_near(y, want, 1e-5, 1e-6)
    end
    raises("whole number", nn.Linear, 0, 3)
    raises("whole number", nn.Linear, 2.5, 3)
    raises("whole number", nn.Linear, 2)
    assert.is_nil(nn.Linear(2, 2, {bias = false}).bias)
    assert.equal("float64", nn.Linear(2, 2, {dtype = "f64"}).weight.dtype)
  end)

  it("Conv2d and MaxPool2d: shapes for strides, padding, dilation and groups", function()
    local x = filled({2, 4, 9, 7}, 2)
    for _, row in ipairs {
      {{6, 3, {}}, {2, 6, 7, 5}}, {{6, 3, {padding = 1}}, {2, 6, 9, 7}}, {{6, {3, 1}, {stride = {2, 1}, padding = {1, 0}}}, {2, 6, 5, 7}},
      {{6, 3, {groups = 2, dilation = 2}}, {2, 6, 5, 3}}, {{6, 2, 2}, {2, 6, 4, 3}},
    } do
      assert.same(row[2], nn.Conv2d(4, row[1][1], row[1][2], type(row[1][3]) == "number" and {stride = row[1][3]} or row[1][3])(x).shape)
    end
    assert.same({2, 4, 4, 3}, nn.MaxPool2d(2)(x).shape)
    assert.same({2, 4, 8, 6}, nn.MaxPool2d(2, {stride = 1})(x).shape)
    assert.same({2, 4, 5, 4}, nn.MaxPool2d(3, {stride = 2, padding = 1})(x).shape)
    assert.same({2, 252}, nn.Flatten()(x).shape)
    assert.same({8, 9, 7}, nn.Flatten(1, 2)(x).shape)
    raises("kernel size is missing", nn.Conv2d, 1, 2)
    raises("groups", nn.Conv2d, 3, 4, 3, {groups = 2})
    raises("padding 2 is more than half", nn.MaxPool2d, 3, {padding = 2})
    raises("channels differ", nn.Conv2d(3, 4, 3), x)
    raises("hint: images are [N, C, H, W]", nn.Conv2d(7, 4, 3), x)
    raises("hint: x:unsqueeze(2)", nn.Conv2d(1, 4, 3), hm.zeros {2, 9, 7})
  end)

  it("Conv2d: values against plain loops", function()
    local m = nn.Conv2d(2, 3, 3, {padding = 1, stride = 2})
    local x = filled({2, 2, 5, 6}, 3)
    local xs, w, b = x:totable(), m.weight:totable(), m.bias:totable()
    local want = {}
    for n = 1, 2 do
      for o = 1, 3 do
        for i = 0, 2 do
          for j = 0, 2 do
            local s = b[o]
            for c = 1, 2 do
              for u = 1, 3 do
                for v = 1, 3 do
                  local row = xs[n][c][2 * i - 1 + u]
                  s = s + (row and row[2 * j - 1 + v] or 0) * w[o][c][u][v]
                end
              end
            end
            want[#want + 1] = s
          end
        end
      end
    end
    local y = m(x)
    assert.same({2, 3, 3, 3}, y.shape)
    numbers.assert_near(y, want, 1e-5, 1e-6)
  end)

  it("activations: modules and functions agree", function()
    local x = hm.tensor {-2, -0.5, 0, 0.5, 2}
    for class, fn in pairs {ReLU = "relu", Tanh = "tanh", Sigmoid = "sigmoid", SiLU = "silu", GELU = "gelu"} do
      numbers.assert_same(nn[class]()(x), F[fn](x))
      numbers.assert_same(nn[class]()(x), x[fn](x))
    end
    numbers.assert_same(F.relu(x), {0, 0, 0, 0.5, 2})
    numbers.assert_near(nn.GELU {approximate = "tanh"}(x), {-0.0454023, -0.1542860, 0, 0.3457140, 1.9545977}, 1e-5, 1e-6)
    numbers.assert_near(F.gelu(x), {-0.0455003, -0.1542688, 0, 0.3457312, 1.9544997}, 1e-5, 1e-6)
    raises("none, tanh", nn.GELU, {approximate = "fast"})
  end)
end)

describe("losses", function()
  it("mse_loss and l1_loss: all reductions", function()
    local x, y = hm.tensor {{1, 2}, {3, 5}}, hm.tensor {{0, 2}, {5, 1}}
    assert.equal((1 + 0 + 4 + 16) / 4, F.mse_loss(x, y):item())
    assert.equal(21, F.mse_loss(x, y, {reduction = "sum"}):item())
    numbers.assert_same(F.mse_loss(x, y, {reduction = "none"}), {1, 0, 4, 16})
    assert.equal(7 / 4, F.l1_loss(x, y):item())
    assert.equal(7, nn.L1Loss {reduction = "sum"}(x, y):item())
    assert.equal(5.25, nn.MSELoss()(x, y):item())
    raises({"mse_loss: shapes differ", "f32[2,2]", "f32[2]", "hint"}, F.mse_loss, x, hm.ones {2})
  end)

  it("cross_entropy: reductions, ignored rows, smoothing, higher dims", function()
    local logits = filled({4, 3}, 5)
    local target = hm.tensor({2, 0, -100, 1}, {dtype = "i64"})
    local rows, t = logits:totable(), {3, 1, nil, 2}
    local function row_loss(row, class, smoothing)
      local sum, mean = 0, 0
      for _, v in ipairs(row) do sum = sum + math.exp(v) end
      for _, v in ipairs(row) do mean = mean + (math.log(sum) - v) / #row end
      return (1 - smoothing) * (math.log(sum) - row[class]) + smoothing * mean
    end
    for _, smoothing in ipairs {0, 0.1} do
      local want, sum = {}, 0
      for i = 1, 4 do
        want[i] = t[i] and row_loss(rows[i], t[i], smoothing) or 0
        sum = sum + want[i]
      end
      local opts = {label_smoothing = smoothing}
      numbers.assert_near(F.cross_entropy(logits, target, {reduction = "none", label_smoothing = smoothing}), want, 1e-5, 1e-6)
      numbers.assert_near(F.cross_entropy(logits, target, opts), sum / 3, 1e-5)
      numbers.assert_near(nn.CrossEntropyLoss {reduction = "sum", label_smoothing = smoothing}(logits, target), sum, 1e-5)
    end
    local wide = logits:t():contiguous():view(1, 3, 2, 2)
    numbers.assert_near(F.cross_entropy(wide, target:view(1, 2, 2)), F.cross_entropy(logits, target), 1e-6)
    assert.equal(0, F.cross_entropy(logits, hm.full({4}, 7, {dtype = "i64"}), {ignore_index = 7, reduction = "sum"}):item())
    raises({"int64", "f32[4]", "hint: target:to('int64')"}, F.cross_entropy, logits, hm.zeros {4})
    raises("hint: target:squeeze(2)", F.cross_entropy, logits, target:view(4, 1))
    raises("hint: logits and target come from batches", F.cross_entropy, logits, target:narrow(1, 1, 3))
    raises("hint: logits:unsqueeze(1)", F.cross_entropy, logits[1], target[1])
    raises("between 0 and 1", F.cross_entropy, logits, target, {label_smoothing = 2})
  end)
end)

describe("first values", function()
  local function bounds(t) return t:min():item(), t:max():item() end

  it("of layers lie within 1 / sqrt(fan in) and fill that range", function()
    hm.manual_seed(3)
    for _, case in ipairs {{nn.Linear(100, 300), 0.1}, {nn.Conv2d(4, 200, 5), 0.1}, {nn.Conv2d(8, 200, 5, {groups = 2}), 0.1}} do
      for _, name in ipairs {"weight", "bias"} do
        local low, high = bounds(case[1][name])
        assert(low >= -case[2] and low < -0.9 * case[2], low)
        assert(high <= case[2] and high > 0.9 * case[2], high)
      end
      assert(math.abs(case[1].weight:mean():item()) < 0.01 * case[2] * 5)
    end
  end)

  it("depend on manual_seed alone", function()
    hm.manual_seed(9)
    local a = nn.Linear(7, 5)
    hm.manual_seed(9)
    numbers.assert_same(nn.Linear(7, 5).weight, a.weight)
  end)

  it("nn.init fills in place, outside the graph", function()
    local w = nn.Parameter(hm.zeros {64, 32, 3, 3})
    assert.same({32 * 9, 64 * 9}, {nn.init.fans(w)})
    local low, high
    nn.init.kaiming_uniform_(w, {a = math.sqrt(5)})
    low, high = bounds(w)
    local bound = math.sqrt(3) * math.sqrt(2 / 6) / math.sqrt(288)
    assert(low >= -bound and low < -0.95 * bound and high <= bound and high > 0.95 * bound)
    nn.init.kaiming_normal_(w, {nonlinearity = "relu", mode = "fan_out"})
    local std = math.sqrt((w * w):mean():item())
    assert(math.abs(std - math.sqrt(2 / 576)) < 0.02 * std)
    nn.init.xavier_uniform_(w)
    low, high = bounds(w)
    bound = math.sqrt(6 / (288 + 576))
    assert(low >= -bound and high <= bound and high > 0.95 * bound)
    nn.init.constant_(w, 2)
    assert.equal(2, w:max():item())
    assert.is_true(w.is_leaf)
    assert.is_true(w.requires_grad)
    nn.init.zeros_(w)
    assert.equal(0, w:abs():max():item())
    raises("at least 2 dims", nn.init.kaiming_uniform_, hm.zeros {3})
    raises("nonlinearity", nn.init.kaiming_uniform_, w, {nonlinearity = "swish"})
  end)
end)

describe("nn.utils", function()
  local function with_grads()
    local a, b, c = hm.zeros({2}, {requires_grad = true}), hm.zeros({1}, {requires_grad = true}), hm.zeros({1}, {requires_grad = true})
    a.grad, b.grad = hm.tensor {3, 0}, hm.tensor {4}
    return {a, b, c}
  end

  it("clip_grad_norm_ returns the norm before, as a float32 tensor of no dims", function()
    local list = with_grads()
    local norm = nn.utils.clip_grad_norm_(list, 1)
    assert.equal(5, norm:item())
    assert.same({}, norm.shape)
    assert.equal("float32", norm.dtype)
    numbers.assert_near(list[1].grad, {0.6, 0}, 1e-5)
    numbers.assert_near(list[2].grad, {0.8}, 1e-5)
    assert.is_nil(list[3].grad)
    list = with_grads()
    nn.utils.clip_grad_norm_(list, 10)
    numbers.assert_same(list[1].grad, {3, 0})
    assert.equal(3, nn.utils.clip_grad_norm_(list[1], 10):item())
    assert.equal(0, nn.utils.clip_grad_norm_({}, 1):item())
  end)

  it("clip_grad_norm_ hides no NaN and no infinity", function()
    local list = with_grads()
    list[1].grad = hm.tensor {0 / 0, 1}
    local norm = nn.utils.clip_grad_norm_(list, 1):item()
    assert(norm ~= norm)
    local g = list[2].grad:item()
    assert(g ~= g)
    list = with_grads()
    list[1].grad = hm.tensor {math.huge, 1}
    assert.equal(math.huge, nn.utils.clip_grad_norm_(list, 1):item())
    list = with_grads()
    list[1].grad = hm.tensor {math.huge, 1}
    raises("nothing was clipped", nn.utils.clip_grad_norm_, list, 1, {error_if_nonfinite = true})
    numbers.assert_same(list[2].grad, {4})
    raises("at least 0", nn.utils.clip_grad_norm_, list, -1)
    raises("entry 1", nn.utils.clip_grad_norm_, {3}, 1)
  end)

  it("clip_grad_value_ limits every element", function()
    local list = with_grads()
    list[1].grad = hm.tensor {-3, 0.25}
    nn.utils.clip_grad_value_(list, 0.5)
    numbers.assert_same(list[1].grad, {-0.5, 0.25})
    numbers.assert_same(list[2].grad, {0.5})
    raises("at least 0", nn.utils.clip_grad_value_, list, -1)
  end)
end)

describe("a network", function()
  it("has gradients of all its layers, against differences of the loss", function()
    hm.manual_seed(4)
    local Small = nn.class("Small")
    function Small:init()
      self.conv = nn.Conv2d(1, 2, 3, {padding = 1, dtype = "f64"})
      self.fc = nn.Linear(2 * 2 * 2, 3, {dtype = "f64"})
    end
    function Small:forward(x) return self.fc(self.conv(x):max_pool2d(2):tanh():flatten(2)) end
    local m = Small()
    local x, y = filled({2, 1, 4, 4}, 6, {dtype = "f64"}), hm.tensor({2, 0}, {dtype = "i64"})
    hm.autograd.gradcheck(function() return F.cross_entropy(m(x), y) end, m:parameters(), {eps = 1e-5, atol = 1e-7, rtol = 1e-4})
  end)

  it("pools as plain loops do", function()
    local x = filled({1, 2, 4, 4}, 8)
    local rows, want = x:totable(), {}
    for c = 1, 2 do
      for i = 1, 3, 2 do
        for j = 1, 3, 2 do
          local r = rows[1][c]
          want[#want + 1] = math.max(r[i][j], r[i][j + 1], r[i + 1][j], r[i + 1][j + 1])
        end
      end
    end
    numbers.assert_same(nn.MaxPool2d(2)(x), want)
  end)
end)
