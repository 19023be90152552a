-- Layers beyond nn_spec: what they compute where PyTorch's files (nn_torch_spec) do not say it, their options, first values and
-- texts; containers; what modules can do: hooks, names, copies, summaries; nn.init and nn.utils.

local hm = require "halfmoon"
local core = require "halfmoon.core"
local fixed = require "spec.support.inputs"
local numbers = require "spec.support.numbers"
local raises = require "spec.support.raises"

local nn, amp = hm.nn, hm.amp
local F = nn.functional
local filled, names_of, keys = fixed.filled, fixed.names_of, fixed.keys

-- ====== Modules ======

describe("module hooks", function()
  it("see arguments and results, may replace them, and go away", function()
    local m, seen = nn.Linear(2, 2), {}
    local x = hm.ones {1, 2}
    local plain = m(x)
    local before = m:register_forward_pre_hook(function(self, a)
      assert.is_true(rawequal(self, m))
      seen[#seen + 1] = "before"
      return a * 2
    end)
    local after = m:register_forward_hook(function(self, inputs, y)
      assert.is_true(rawequal(self, m))
      assert.equal(1, inputs.n)
      numbers.assert_same(inputs[1], {2, 2})
      seen[#seen + 1] = "after"
      return y - m.bias
    end)
    local quiet = m:register_forward_hook(function() seen[#seen + 1] = "quiet" end)
    numbers.assert_near(m(x), (plain - m.bias) * 2, 1e-6, 1e-6)
    assert.same({"before", "after", "quiet"}, seen)
    before:remove()
    after:remove()
    quiet:remove()
    numbers.assert_same(m(x), plain)
    assert.equal(3, #seen)
    raises("expected a function", m.register_forward_hook, m, 3)
  end)

  it("a hook that raises leaves the module usable, and the message has the path", function()
    local m = nn.Sequential(nn.Linear(2, 2))
    local handle = m[1]:register_forward_hook(function() F.relu(hm.ones {1}):matmul(hm.ones {3}) end)
    raises("in Sequential.0 (Linear 2 -> 2)", m, hm.ones {1, 2})
    handle:remove()
    assert.same({1, 2}, m(hm.ones {1, 2}).shape)
  end)

  it("several results and nils pass through", function()
    local M = nn.class("M")
    function M:forward(a, b) return b, a, nil end -- luacheck: ignore 212
    local m = M()
    local count
    m:register_forward_hook(function(_, inputs, ...) count = {inputs.n, select("#", ...)} end)
    assert.same({n = 3, 2, 1}, table.pack(m(1, 2)))
    assert.same({2, 3}, count)
  end)
end)

describe("modules by name", function()
  local model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.BatchNorm2d(2), nn.ReLU()))

  it("named_children, get_submodule, get_parameter, get_buffer", function()
    assert.same({"0", "1"}, names_of(model:named_children()))
    assert.is_true(rawequal(model, model:get_submodule("")))
    assert.is_true(rawequal(model[2][1], model:get_submodule("1.0")))
    assert.is_true(rawequal(model[1].weight, model:get_parameter("0.weight")))
    assert.is_true(rawequal(model[2][1].running_var, model:get_buffer("1.0.running_var")))
    raises({"no module '1.7'", "known there: 0, 1"}, model.get_submodule, model, "1.7")
    raises("no module '0.weight'", model.get_submodule, model, "0.weight")
    raises("no parameter '1.0.running_var'", model.get_parameter, model, "1.0.running_var")
    raises("no buffer '0.weight'", model.get_buffer, model, "0.weight")
    raises("no module '0.weight.x'", model.get_submodule, model, "0.weight.x")
    raises("must be a string", model.get_submodule, model, 1)
  end)

  it("register_module and register_parameter", function()
    local m = nn.Module()
    m:register_module("part", nn.Linear(1, 1))
    m:add_module("more", nn.ReLU())
    m:register_parameter("scale", hm.ones {2})
    assert.same({"scale", "part.weight", "part.bias"}, names_of(m:named_parameters()))
    assert.same({"part", "more"}, names_of(m:named_children()))
    raises("must be a module", m.register_module, m, "x", 3)
    raises("must be a tensor", m.register_parameter, m, "x", 3)
  end)

  it("state_dict takes a prefix, and leaves buffers out that are not persistent", function()
    local m = nn.Linear(2, 1)
    m:register_buffer("mask", hm.ones {2}, {persistent = false})
    m:register_buffer("mean", hm.ones {2})
    assert.same({"bias", "mean", "weight"}, keys(m:state_dict()))
    assert.same({"net.bias", "net.mean", "net.weight"}, keys(m:state_dict("net.")))
    assert.same({missing = {}, unexpected = {}}, m:load_state_dict(m:state_dict()))
    assert.equal("float16", m:half().mask.dtype)
    assert.same({"mask", "mean"}, names_of(m:named_buffers()))
    raises("prefix", m.state_dict, m, 3)
  end)

  it("load_state_dict reports names in order", function()
    local report = nn.Linear(2, 2):load_state_dict({z = hm.ones {1}, a = hm.ones {1}}, {strict = false})
    assert.same({missing = {"bias", "weight"}, unexpected = {"a", "z"}}, report)
  end)

  it("clone: memory of its own, what was shared stays shared", function()
    local m = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Conv2d(1, 1, 1, {stride = 2}), nn.BatchNorm2d(1))
    m[2].weight = m[1].weight
    m[1].bias.requires_grad = false
    local copy = m:clone()
    assert.same(keys(m:state_dict()), keys(copy:state_dict()))
    assert.is_true(rawequal(copy[1].weight, copy[2].weight))
    assert.is_false(rawequal(copy[1].weight, m[1].weight))
    numbers.assert_same(copy[1].weight, m[1].weight)
    assert.is_false(copy[1].bias.requires_grad)
    assert.is_true(copy[2].bias.requires_grad)
    core.no_grad(function() copy[1].weight:fill_(5) end)
    assert.is_true(m[1].weight:max():item() < 5)
    copy[3].attrs.stride[1] = 7
    assert.equal(2, m[3].attrs.stride[1])
    assert.equal(tostring(m[4]), tostring(copy[4]))
    copy:eval()
    assert.is_true(m.training)
  end)
end)

describe("containers", function()
  it("ModuleDict: by name, in order of the names or of the pairs", function()
    local d = nn.ModuleDict {b = nn.ReLU(), a = nn.Linear(1, 1)}
    assert.same({"a", "b"}, d:keys())
    assert.equal(2, #d)
    d:update {{"z", nn.Tanh()}, {"c", nn.Tanh()}}
    assert.same({"a", "b", "z", "c"}, d:keys())
    assert.same({"a.weight", "a.bias"}, names_of(d:named_parameters()))
    d.b = nil
    assert.same({"a", "z", "c"}, names_of(d:items()))
    assert.equal(3, #d:values())
    assert.equal(0, #nn.ModuleDict())
    raises({"cannot be called", "hint"}, d, hm.ones {1})
    raises("taken by a method", nn.ModuleDict, {train = nn.ReLU()})
    raises("not a module", nn.ModuleDict, {x = 3})
    raises("has no name", nn.ModuleDict, {nn.ReLU()})
    raises("without dots", nn.ModuleDict, {["a.b"] = nn.ReLU()})
  end)

  it("ParameterList and ParameterDict make parameters of plain tensors", function()
    local list = nn.ParameterList {hm.ones {2}, nn.Parameter(hm.ones {3})}
    list:append(hm.zeros {1})
    assert.equal(3, #list)
    assert.same({"0", "1", "2"}, names_of(list:named_parameters()))
    assert.is_true(list[1].requires_grad)
    raises("entry 1", nn.ParameterList, {3})
    raises("cannot be called", list, 1)
    local dict = nn.ParameterDict {w = hm.ones {2}, v = hm.zeros {1}}
    assert.same({"v", "w"}, names_of(dict:named_parameters()))
    assert.is_true(dict.w.requires_grad)
    dict:update {w = hm.zeros {4}}
    assert.same({4}, dict.w.shape)
    assert.is_true(nn.is_parameter(dict.w))
    raises("not a tensor", nn.ParameterDict, {w = 1})
  end)
end)

-- ====== Layers ======

describe("layers that move entries", function()
  it("Identity, Flatten, Unflatten", function()
    local x = filled({2, 6, 4}, 1)
    assert.is_true(rawequal(x, nn.Identity(3)(x)))
    assert.same({2, 24}, nn.Flatten()(x).shape)
    assert.same({2, 2, 3, 4}, nn.Unflatten(2, {2, -1})(x).shape)
    assert.equal("Unflatten(dim 2 into 2x3)", tostring(nn.Unflatten(2, {2, 3})))
    raises("must be an array", nn.Unflatten, 2)
    raises("whole number", nn.Unflatten)
  end)

  it("Dropout: nothing in eval, the right share and scale in training", function()
    hm.manual_seed(1)
    local m = nn.Dropout(0.25)
    local x = hm.ones {100, 100}
    local y = m(x)
    local zeros = y:eq(0):sum():item() / 10000
    assert(math.abs(zeros - 0.25) < 0.03, zeros)
    numbers.assert_near(y:max():item(), 4 / 3, 1e-6)
    assert.is_true(rawequal(x, m:eval()(x)))
    local wide = nn.Dropout2d(0.5)(hm.ones {4, 8, 3, 3}):sum({3, 4})
    for _, v in ipairs(numbers.flat(wide)) do assert(v == 0 or v == 18) end
    assert.equal(0.3, nn.Dropout({p = 0.3}).p)
    raises("between 0 and 1", nn.Dropout, 1.5)
    raises("between 0 and 1", nn.Dropout, "x")
  end)

  it("Embedding: rows by id, the padding row is zero and stays", function()
    hm.manual_seed(2)
    local m = nn.Embedding(5, 3, {padding_idx = -2})
    assert.equal(3, m.padding_idx)
    numbers.assert_same(m.weight[4], {0, 0, 0})
    local ids = hm.tensor({{0, 3}, {4, 0}}, {dtype = "i64"})
    local y = m(ids)
    assert.same({2, 2, 3}, y.shape)
    numbers.assert_same(y[1][1], m.weight[1])
    y:sum():backward()
    numbers.assert_same(m.weight.grad:sum(2), {6, 0, 0, 0, 3})
    assert.equal("Embedding(5 ids -> 3, padding_idx 3)", tostring(m))
    m:reset_parameters()
    numbers.assert_same(m.weight[4], {0, 0, 0})
    raises("not among the ids 0 to 4", nn.Embedding, 5, 3, {padding_idx = 5})
    raises({"int64", "in Embedding 5 ids"}, m, hm.ones {2})
    raises("whole number", nn.Embedding, 0, 3)
  end)
end)

describe("convolution layers", function()
  it("padding by name and by mode", function()
    local x = filled({1, 2, 5, 6}, 3)
    assert.same({1, 3, 5, 6}, nn.Conv2d(2, 3, {3, 4}, {padding = "same"})(x).shape)
    assert.same({1, 3, 3, 4}, nn.Conv2d(2, 3, 3, {padding = "valid"})(x).shape)
    assert.same({1, 3, 6}, nn.Conv1d(2, 3, 4, {padding = "same", dilation = 2})(x:select(3, 1)).shape)
    local ring = nn.Conv2d(2, 3, 3, {padding = 1, padding_mode = "circular"})
    local around = F.pad(x, {1, 1, 1, 1}, {mode = "circular"})
    numbers.assert_same(ring(x), F.conv2d(around, ring.weight, ring.bias))
    assert.equal("Conv2d(2 -> 3, kernel 3x3, padding 1, circular)", tostring(ring))
    assert.equal("Conv1d(2 -> 4, kernel 3, stride 2, groups 2, no bias)",
      tostring(nn.Conv1d(2, 4, 3, {stride = 2, groups = 2, bias = false})))
    raises("needs a stride of 1", nn.Conv2d, 2, 3, 3, {padding = "same", stride = 2})
    raises("\"same\" or \"valid\"", nn.Conv2d, 2, 3, 3, {padding = "full"})
    raises("groups", nn.Conv1d, 3, 4, 3, {groups = 2})
    raises("kernel size is missing", nn.Conv1d, 3, 4)
    raises("must be one of zeros", nn.Conv2d, 2, 3, 3, {padding_mode = "mirror"})
  end)

  it("Conv1d equals Conv2d of height 1", function()
    local one, two = nn.Conv1d(3, 4, 3, {padding = 1, stride = 2}), nn.Conv2d(3, 4, {1, 3}, {padding = {0, 1}, stride = {1, 2}})
    two:load_state_dict {weight = one.weight:detach():unsqueeze(3), bias = one.bias:detach()}
    local x = filled({2, 3, 8}, 4)
    numbers.assert_near(one(x), two(x:unsqueeze(3)):squeeze(3), 1e-6, 1e-6)
    raises({"channels differ", "in Conv1d 3 -> 4"}, one, filled({2, 2, 8}, 4))
  end)

  it("ConvTranspose2d undoes the shape of Conv2d and says what is wrong", function()
    local x = filled({2, 4, 9, 7}, 5)
    local down, up = nn.Conv2d(4, 6, 3, {stride = 2, padding = 1}), nn.ConvTranspose2d(6, 4, 3, {stride = 2, padding = 1})
    assert.same(x.shape, up(down(x)).shape)
    assert.same({6, 4, 3, 3}, up.weight.shape)
    assert.equal("ConvTranspose2d(6 -> 4, kernel 3x3, stride 2, padding 1)", tostring(up))
    raises("output_padding", nn.ConvTranspose2d, 6, 4, 3, {output_padding = 1})
    raises("channels differ", up, x)
  end)

  it("Upsample takes one of size and scale_factor", function()
    assert.same({1, 1, 4, 6}, nn.Upsample {scale_factor = 2}(filled({1, 1, 2, 3}, 1)).shape)
    assert.same({1, 1, 6}, nn.Upsample {size = 6, mode = "linear"}(filled({1, 1, 3}, 1)).shape)
    assert.equal("Upsample(times 2, bilinear, corners aligned)",
      tostring(nn.Upsample {scale_factor = 2, mode = "bilinear", align_corners = true}))
    raises("give one of", nn.Upsample, {})
    raises("not both", nn.Upsample, {size = 2, scale_factor = 2})
  end)
end)

describe("pooling layers", function()
  it("give where values stood with return_indices", function()
    local x = filled({1, 2, 4, 4}, 6)
    local y, index = nn.MaxPool2d(2, {return_indices = true})(x)
    numbers.assert_same(x:flatten(3):gather(3, index:flatten(3)), y:flatten(3))
    local y1, index1 = nn.MaxPool1d(2, {return_indices = true})(x:select(3, 1))
    numbers.assert_same(x:select(3, 1):gather(3, index1), y1)
    local _, index2 = nn.AdaptiveMaxPool2d(2, {return_indices = true})(x)
    assert.same({1, 2, 2, 2}, index2.shape)
  end)

  it("refuse what does not fit", function()
    raises("more than half", nn.MaxPool1d, 2, {padding = 2})
    raises("more than half", nn.AvgPool2d, 2, {padding = 2})
    raises("kernel size", nn.AvgPool1d)
    raises("output size is missing", nn.AdaptiveAvgPool2d)
    raises("unknown option", nn.AdaptiveAvgPool2d, 2, {return_indices = true})
    raises("did you mean 'ceil_mode'", nn.MaxPool1d, 2, {ceil_mod = true})
    assert.equal("MaxPool1d(kernel 3, stride 2, padding 1)", tostring(nn.MaxPool1d(3, {stride = 2, padding = 1})))
    assert.equal("AdaptiveAvgPool2d(to 3x2)", tostring(nn.AdaptiveAvgPool2d {3, 2}))
  end)
end)

-- ====== Normalization ======

describe("batch norm layers", function()
  it("move running statistics in training and read them in eval", function()
    local m = nn.BatchNorm1d(2, {momentum = 0.5})
    local x = hm.tensor {{1, 2}, {3, 6}}
    m(x)
    numbers.assert_near(m.running_mean, {1, 2}, 1e-6)
    numbers.assert_near(m.running_var, {0.5 + 0.5 * 2, 0.5 + 0.5 * 8}, 1e-6)
    assert.equal(1, m.num_batches_tracked:item())
    assert.equal("int64", m.num_batches_tracked.dtype)
    m:eval()
    local before = m.running_mean:clone()
    numbers.assert_near(m(x), {0, 0, 2 / math.sqrt(1.5), 4 / math.sqrt(4.5)}, 1e-4, 1e-6)
    numbers.assert_same(m.running_mean, before)
    assert.equal(1, m.num_batches_tracked:item())
    m:reset_running_stats()
    numbers.assert_same(m.running_var, {1, 1})
    assert.equal(0, m.num_batches_tracked:item())
  end)

  it("momentum = false: the mean of all batches", function()
    local m = nn.BatchNorm1d(1, {momentum = false})
    for _, v in ipairs {1, 2, 6} do m(hm.tensor {{v - 1.0}, {v + 1.0}}) end
    numbers.assert_near(m.running_mean, {3}, 1e-6)
    numbers.assert_near(m.running_var, {2}, 1e-6)
    assert.equal("BatchNorm1d(1, cumulative)", tostring(m))
  end)

  it("without running statistics or weights", function()
    local m = nn.BatchNorm2d(3, {affine = false, track_running_stats = false})
    assert.same({}, keys(m:state_dict()))
    local x = filled({2, 3, 4, 4}, 7)
    numbers.assert_same(m(x), m:eval()(x))
    numbers.assert_near(m(x):mean({1, 3, 4}), {0, 0, 0}, 0, 1e-6)
  end)

  it("keep running statistics in float32 where weights are half", function()
    for _, dtype in ipairs {"float16", "bfloat16"} do
      for _, m in ipairs {nn.BatchNorm2d(3):to(dtype), nn.BatchNorm2d(3, {dtype = dtype})} do
        assert.equal(dtype, m.weight.dtype)
        assert.equal("float32", m.running_mean.dtype)
        assert.equal(dtype, m(filled({2, 3, 4, 4}, 8, {dtype = dtype})).dtype)
        assert.equal(dtype, m:eval()(filled({2, 3, 4, 4}, 8, {dtype = dtype})).dtype)
      end
    end
    assert.equal("float64", nn.BatchNorm2d(3):double().running_var.dtype)
  end)

  it("say what does not fit", function()
    raises({"[N, C, H, W]", "in BatchNorm2d 3"}, nn.BatchNorm2d(3), hm.ones {2, 3})
    raises("[N, C] or [N, C, L]", nn.BatchNorm1d(3), hm.ones {2, 3, 4, 4})
    raises("more than one value", nn.BatchNorm1d(3), hm.ones {1, 3})
    raises("between 0 and 1", nn.BatchNorm1d, 3, {momentum = 2})
    raises("between 0 and 1", nn.BatchNorm1d, 3, {momentum = true})
    raises("made for 3 channels", nn.InstanceNorm2d(3), hm.ones {2, 4, 3, 3})
  end)
end)

describe("row and group norms", function()
  it("normalize what they say, with and without weights", function()
    local x = filled({2, 4, 3}, 9)
    local y = nn.LayerNorm({4, 3}, {elementwise_affine = false})(x)
    numbers.assert_near(y:mean({2, 3}), {0, 0}, 0, 1e-6)
    numbers.assert_near((y * y):mean({2, 3}), {1, 1}, 1e-4)
    assert.same({}, keys(nn.LayerNorm(3, {elementwise_affine = false}):state_dict()))
    assert.same({"weight"}, keys(nn.LayerNorm(3, {bias = false}):state_dict()))
    local r = nn.RMSNorm(3)(x)
    numbers.assert_near((r * r):mean(3), hm.ones {2, 4}, 1e-4)
    assert.same({"weight"}, keys(nn.RMSNorm(3):state_dict()))
    local g = nn.GroupNorm(2, 4)(x)
    numbers.assert_near(g:reshape(2, 2, 6):mean(3), hm.zeros {2, 2}, 0, 1e-6)
    assert.same({}, keys(nn.GroupNorm(2, 4, {affine = false}):state_dict()))
    assert.equal("GroupNorm(4 in 2 groups)", tostring(nn.GroupNorm(2, 4)))
    assert.equal("LayerNorm(4x3, eps 0.01, no bias)", tostring(nn.LayerNorm({4, 3}, {eps = 0.01, bias = false})))
    raises({"must end in [5]", "in LayerNorm 5"}, nn.LayerNorm(5), x)
    raises("cannot be split", nn.GroupNorm, 3, 4)
    raises("normalized shape", nn.RMSNorm)
  end)

  it("give float32 inside autocast, as PyTorch's table says; batch norm follows its input", function()
    local x = filled({2, 4, 3, 3}, 10, {dtype = "f16"})
    local _ <close> = amp.autocast("f16")
    assert.equal("float32", nn.LayerNorm(3)(x).dtype)
    assert.equal("float32", nn.GroupNorm(2, 4)(x).dtype)
    assert.equal("float16", nn.BatchNorm2d(4)(x).dtype)
    assert.equal("float16", nn.Conv2d(4, 2, 3)(x:float()).dtype)
    assert.equal("float16", nn.ConvTranspose2d(4, 2, 3)(x:float()).dtype)
    assert.equal("float32", nn.Upsample {scale_factor = 2}(x).dtype)
    assert.equal("float16", nn.GELU()(x).dtype)
    assert.equal("float32", nn.Softmax(2)(x).dtype)
    assert.equal("float32", nn.MSELoss()(x, x).dtype)
    raises({"binary_cross_entropy_with_logits", "in BCELoss"}, nn.BCELoss(), x, x)
  end)
end)

-- ====== Activations and losses ======

describe("activation modules", function()
  it("check options and print them", function()
    assert.equal("LeakyReLU(negative_slope 0.2)", tostring(nn.LeakyReLU(0.2)))
    assert.equal("Softplus(beta 2)", tostring(nn.Softplus {beta = 2}))
    assert.equal("GELU(approximate tanh)", tostring(nn.GELU {approximate = "tanh"}))
    assert.equal("ELU()", tostring(nn.ELU()))
    raises("takes no arguments", nn.ReLU, {inplace = true})
    raises("unknown option 'slope'", nn.LeakyReLU, {slope = 1})
    raises("above max_val", nn.Hardtanh, {min_val = 2, max_val = 1})
    raises("dim is missing", nn.Softmax)
    raises("whole number", nn.LogSoftmax, 0)
    assert.equal("Softmax(dim -1)", tostring(nn.Softmax {dim = -1}))
  end)

  it("PReLU learns a slope for each channel", function()
    local m = nn.PReLU {num_parameters = 3, init = 0.5}
    local y = m(hm.full({2, 3, 2}, -2))
    assert.equal(-1, y:max():item())
    y:sum():backward()
    numbers.assert_same(m.weight.grad, {-8, -8, -8})
    assert.equal(0.25, nn.PReLU().weight:item())
    assert.equal(2, nn.PReLU(2).num_parameters)
  end)
end)

describe("loss modules", function()
  it("keep tensors among their options as buffers", function()
    local m = nn.CrossEntropyLoss {weight = hm.tensor {1, 2, 3}}
    assert.same({"weight"}, keys(m:state_dict()))
    m:double()
    assert.equal("float64", m.weight.dtype)
    assert.equal("CrossEntropyLoss(label_smoothing 0.1)", tostring(nn.CrossEntropyLoss {label_smoothing = 0.1}))
    assert.equal("HuberLoss(reduction sum)", tostring(nn.HuberLoss {reduction = "sum"}))
    raises("must be one of mean, sum, none", nn.MSELoss, {reduction = "batchmean"})
    raises("must be tensor", nn.NLLLoss, {weight = 3})
    raises({"shapes differ", "in L1Loss"}, nn.L1Loss(), hm.ones {2}, hm.ones {3})
    raises("above 0", nn.HuberLoss, {delta = 0})
  end)
end)

-- ====== First values ======

describe("first values as PyTorch's", function()
  --- Uniform within bound: bounds kept and nearly reached, and the spread of a uniform distribution.
  local function is_uniform(t, bound, what)
    local low, high, std = t:min():item(), t:max():item(), t:std():item()
    assert(low >= -bound and low < -0.9 * bound, what)
    assert(high <= bound and high > 0.9 * bound, what)
    assert(math.abs(std - bound / math.sqrt(3)) < 0.06 * bound, what)
    assert(math.abs(t:mean():item()) < 0.1 * bound, what)
  end

  it("uniform layers", function()
    hm.manual_seed(3)
    is_uniform(nn.Conv1d(4, 300, 5).weight, 1 / math.sqrt(20), "Conv1d")
    is_uniform(nn.Conv1d(4, 300, 5).bias, 1 / math.sqrt(20), "Conv1d bias")
    is_uniform(nn.ConvTranspose2d(60, 8, 3, {groups = 2}).weight, 1 / math.sqrt(4 * 9), "ConvTranspose2d")
    is_uniform(nn.ConvTranspose2d(4, 600, 3, {groups = 2}).bias, 1 / math.sqrt(300 * 9), "ConvTranspose2d bias")
    local lstm = nn.LSTM(5, 100, {num_layers = 2, bidirectional = true})
    for name, p in lstm:named_parameters() do is_uniform(p, 0.1, name) end
    for name, p in nn.GRUCell(30, 100):named_parameters() do is_uniform(p, 0.1, name) end
    local attention = nn.MultiheadAttention(40, 4)
    is_uniform(attention.in_proj_weight, math.sqrt(6 / (40 + 120)), "in_proj_weight")
    is_uniform(attention.out_proj.weight, 1 / math.sqrt(40), "out_proj.weight")
    assert.equal(0, attention.in_proj_bias:abs():max():item())
    assert.equal(0, attention.out_proj.bias:abs():max():item())
    is_uniform(nn.MultiheadAttention(40, 4, {kdim = 30}).k_proj_weight, math.sqrt(6 / 70), "k_proj_weight")
  end)

  it("normal embeddings, norms of ones and zeros", function()
    hm.manual_seed(4)
    local w = nn.Embedding(200, 50).weight
    assert(math.abs(w:std():item() - 1) < 0.05 and math.abs(w:mean():item()) < 0.05)
    for _, m in ipairs {nn.BatchNorm2d(3), nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.InstanceNorm2d(3, {affine = true})} do
      numbers.assert_same(m.weight, {1, 1, 1})
      numbers.assert_same(m.bias, {0, 0, 0})
    end
    numbers.assert_same(nn.BatchNorm2d(2).running_var, {1, 1})
    numbers.assert_same(nn.BatchNorm2d(2).running_mean, {0, 0})
  end)

  it("calculate_gain and fans", function()
    local gain = nn.init.calculate_gain
    assert.equal(1, gain("linear"))
    assert.equal(5 / 3, gain("tanh"))
    assert.equal(math.sqrt(2), gain("relu"))
    assert.equal(0.75, gain("selu"))
    assert.equal(math.sqrt(2 / (1 + 0.2 ^ 2)), gain("leaky_relu", 0.2))
    raises({"unknown nonlinearity", "leaky_relu"}, gain, "swish")
  end)

  it("trunc_normal_, eye_, orthogonal_, xavier", function()
    hm.manual_seed(5)
    local t = hm.empty {100, 60}
    nn.init.trunc_normal_(t)
    assert(t:min():item() >= -2 and t:max():item() <= 2)
    assert(math.abs(t:std():item() - 0.8796) < 0.03, t:std():item()) -- of a normal distribution cut at 2
    nn.init.trunc_normal_(t, {std = 0.02})
    assert(math.abs(t:std():item() - 0.02) < 0.001)
    nn.init.trunc_normal_(t, 0, 1, 3, math.huge)
    assert(t:min():item() >= 3 and math.abs(t:mean():item() - 3.2831) < 0.03, t:mean():item())
    raises("must be below", nn.init.trunc_normal_, t, {a = 1, b = 1})
    numbers.assert_same(nn.init.eye_(hm.empty {2, 3}), {1, 0, 0, 0, 1, 0})
    raises("needs a matrix", nn.init.eye_, hm.empty {2})
    for _, shape in ipairs {{4, 9}, {9, 4}, {5, 5}, {6, 2, 2}} do
      local q = nn.init.orthogonal_(hm.empty(shape), 2):flatten(2)
      local product = shape[1] <= q:size(2) and q:matmul(q:t()) or q:t():matmul(q)
      numbers.assert_near(product, hm.eye(product:size(1)) * 4, 1e-5, 1e-5)
    end
    raises("at least 2 dims", nn.init.orthogonal_, hm.empty {3})
    nn.init.xavier_normal_(t, 2)
    assert(math.abs(t:std():item() - 2 * math.sqrt(2 / 160)) < 0.01)
    assert.equal("float16", nn.init.trunc_normal_(hm.empty({4, 4}, {dtype = "f16"})).dtype)
    local w = nn.Parameter(hm.zeros {3, 3})
    assert.is_true(rawequal(w, nn.init.orthogonal_(w)) and w.is_leaf and w.requires_grad)
  end)
end)

-- ====== Summary and utilities ======

describe("summary", function()
  local function model()
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
  end

  it("has a row for each module and their sums", function()
    local m = model()
    m[1].bias.requires_grad = false
    local mean = m[2].running_mean:clone()
    local s = m:summary({2, 1, 4, 4}, {print = false})
    assert.equal(6, #s)
    assert.same({"", "0", "1", "2", "3", "4"}, {s[1].name, s[2].name, s[3].name, s[4].name, s[5].name, s[6].name})
    assert.same({"Conv2d", "BatchNorm2d"}, {s[2].type, s[3].type})
    assert.same({2, 2, 2, 2}, s[2].output_shape)
    assert.same({2, 3}, s[1].output_shape)
    assert.equal(20, s[2].parameters)
    assert.equal(18, s[2].trainable)
    assert.equal(80, s[2].weight_bytes)
    assert.equal(72, s[2].gradient_bytes)
    assert.equal(4 * 8 + 8, s[3].weight_bytes) -- weight, bias, mean, variance; the count of batches
    assert.equal(0, s[4].parameters)
    assert.equal(20 + 4 + 27, s.total.parameters)
    assert.equal("float32", s[6].dtype)
    assert.is_true(m.training)
    numbers.assert_same(m[2].running_mean, mean)
    local text = tostring(s)
    for _, part in ipairs {"Conv2d", "[2,2,2,2]", "total", "51", "49 of 51 parameters are trained"} do
      assert.truthy(text:find(part, 1, true), part)
    end
    assert.falsy(text:find("optimizer", 1, true))
  end)

  it("tells what an optimizer holds, and knows half modules, ids, several inputs", function()
    local m = model()
    local opt = hm.optim.AdamW(m:parameters())
    assert.equal(0, m:summary({2, 1, 4, 4}, {print = false, optimizer = opt}).total.optimizer_bytes)
    m(hm.ones {2, 1, 4, 4}):sum():backward()
    opt:step()
    local s = m:summary({2, 1, 4, 4}, {print = false, optimizer = opt})
    assert.equal(51 * 8, s.total.optimizer_bytes)
    assert.truthy(tostring(s):find("optimizer", 1, true))
    assert.equal(51 * 2, model():half():summary({2, 1, 4, 4}, {print = false}).total.gradient_bytes)
    local words = nn.Sequential(nn.Embedding(5, 3), nn.LSTM(3, 4))
    assert.same({2, 6, 4}, words:summary({2, 6}, {print = false, dtype = "i64"})[3].output_shape)
    local Two = nn.class("Two")
    function Two:init() self.fc = nn.Linear(2, 2) end
    function Two:forward(a, b) return self.fc(a) + b end
    assert.same({3, 2}, Two():summary({{3, 2}, hm.ones {2}}, {print = false})[1].output_shape)
    raises("whole numbers", m.summary, m, {2, 0.5})
    raises("expected the shape", m.summary, m)
    raises("must be an optimizer", m.summary, m, {1}, {optimizer = {}})
    raises({"channels differ", "in Sequential.0 (Conv2d"}, m.summary, m, {2, 3, 4, 4})
    assert.is_true(m.training)
    assert.is_false(m[1]._hooks)
  end)

  it("counts what is shared once, and prints unless told not to", function()
    local m = nn.Sequential(nn.Linear(2, 2, {bias = false}), nn.Linear(2, 2, {bias = false}))
    m[2].weight = m[1].weight
    local said, real = {}, print
    _G.print = function(...) said[#said + 1] = ... end
    local ok, s = pcall(m.summary, m, {1, 2})
    _G.print = real
    assert(ok, s)
    assert.equal(4, s.total.parameters)
    assert.equal(tostring(s), said[1])
  end)
end)

describe("nn.utils", function()
  it("parameters_to_vector and back", function()
    local m = nn.Linear(2, 3)
    local v = nn.utils.parameters_to_vector(m:parameters())
    assert.same({9}, v.shape)
    assert.is_true(v.requires_grad)
    nn.utils.vector_to_parameters(hm.arange(9):float(), m:parameters())
    numbers.assert_same(m.weight, {0, 1, 2, 3, 4, 5})
    numbers.assert_same(m.bias, {6, 7, 8})
    assert.is_true(m.weight.is_leaf)
    raises("[9]", nn.utils.vector_to_parameters, hm.ones {8}, m:parameters())
    raises("is empty", nn.utils.parameters_to_vector, {})
  end)

  it("pad_sequence", function()
    local pad = nn.utils.rnn.pad_sequence
    local a, b = hm.tensor {1, 2}, hm.tensor {3, 4, 5}
    numbers.assert_same(pad({a, b}), {1, 3, 2, 4, 0, 5})
    numbers.assert_same(pad({a, b}, {batch_first = true, padding_value = 9}), {1, 2, 9, 3, 4, 5})
    numbers.assert_same(pad({a, b}, {batch_first = true, padding_side = "left"}), {0, 1, 2, 3, 4, 5})
    assert.same({3, 2, 4}, pad({hm.ones {2, 4}, hm.ones {3, 4}}).shape)
    local w = hm.ones({2, 2}):requires_grad_()
    pad({w, hm.ones {3, 2}}):sum():backward()
    numbers.assert_same(w.grad, {1, 1, 1, 1})
    raises("differ in dim 1 only", pad, {hm.ones {2, 4}, hm.ones {3, 5}})
    raises("is empty", pad, {})
  end)
end)
