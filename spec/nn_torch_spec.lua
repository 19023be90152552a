-- Models against PyTorch: files in spec/data hold state dicts that PyTorch wrote, inputs, and what it computed from them.  Each
-- state must load by its names and layouts, and outputs and gradients must agree.  spec/data/make_torch_files.py makes the files.

local hm = require "halfmoon"
local devices = require "spec.support.devices"
local numbers = require "spec.support.numbers"

local nn = hm.nn
local FOLDER = debug.getinfo(1, "S").source:match("^@(.*/)") or "spec/"

-- ====== Files ======

--- A file's tensors on this run's device, by what stands before the first dot: {["in"] = {x = ...}, out = ..., state = ...}.
local function read(name)
  local file = assert(hm.load(FOLDER .. "data/torch_" .. name .. ".safetensors"))
  local parts = {}
  for key, t in pairs(file) do
    local part, rest = key:match("^([^.]+)%.(.+)$")
    parts[part] = parts[part] or {}
    parts[part][rest] = t:to(devices.name)
  end
  return parts
end

--- PyTorch's weighted(): a scalar in which every element has a weight of its own.
local function weighted(...)
  local total
  for _, y in ipairs {...} do
    local w, n = {}, y:numel()
    for i = 1, n do w[i] = math.cos((i - 1) * 1.7) + 0.3 end
    local part = (y * hm.tensor(w):reshape(y.shape)):sum()
    total = total and total + part or part
  end
  return total
end

local function near(got, want, what) numbers.assert_near(got, want, 1e-5, 1e-5, what) end

--- Every gradient in the file, of parameters ("fc.weight") and inputs ("in.x"), against those here.
local function same_gradients(file, model, inputs)
  local seen = 0
  for name, want in pairs(file.grad) do
    local input = name:match("^in%.(.*)$")
    local t = input and inputs[input] or model:get_parameter(name)
    assert(t.grad, "no gradient for " .. name)
    assert.same(want.shape, t.grad.shape)
    near(t.grad, want, "gradient of " .. name)
    seen = seen + 1
  end
  for name, p in model:named_parameters() do assert.equal(p.grad ~= nil, file.grad[name] ~= nil, name) end
  assert(seen > 0)
end

--- An input that wants a gradient.
local function leaf(t) return t:detach():clone():requires_grad_() end

-- ====== Models ======

describe("models as PyTorch's", function()
  it("convolutions and batch norm: eval, train, running statistics, gradients", function()
    local file = read "conv_net"
    local model = nn.Sequential(nn.Conv2d(2, 4, 3, {padding = 1, bias = false}), nn.BatchNorm2d(4), nn.ReLU(),
      nn.Conv2d(4, 4, 3, {stride = 2, groups = 2}), nn.GroupNorm(2, 4), nn.PReLU(4),
      nn.ConvTranspose2d(4, 2, 2, {stride = 2}), nn.BatchNorm2d(2, {momentum = false}), nn.MaxPool2d(2), nn.Flatten(),
      nn.Linear(8, 3))
    assert.same({missing = {}, unexpected = {}}, model:load_state_dict(file.state))
    assert.equal(3, model[2].num_batches_tracked:item())
    near(model:eval()(file["in"].x), file.out.eval, "eval")
    local x = leaf(file["in"].x)
    local y = model:train()(x)
    near(y, file.out.train, "train")
    weighted(y):backward()
    same_gradients(file, model, {x = x})
    for name, want in pairs(file.after) do near(model:get_buffer(name), want, name) end
  end)

  it("LSTM: two layers, both directions, given states, gradients", function()
    local file = read "lstm"
    local model = nn.LSTM(3, 4, {num_layers = 2, bidirectional = true})
    model:load_state_dict(file.state)
    local inputs = {x = leaf(file["in"].x), h = leaf(file["in"].h), c = leaf(file["in"].c)}
    local y, states = model(inputs.x, {inputs.h, inputs.c})
    near(y, file.out.y, "y")
    near(states[1], file.out.h, "h")
    near(states[2], file.out.c, "c")
    near(model(inputs.x), file.out.zero, "without states")
    near(model(inputs.x, inputs.h, inputs.c), file.out.y, "states as arguments")
    weighted(y, states[1], states[2]):backward()
    same_gradients(file, model, inputs)
  end)

  it("GRU: two layers, batch first, given states, without a batch, gradients", function()
    local file = read "gru"
    local model = nn.GRU(3, 4, {num_layers = 2, batch_first = true})
    model:load_state_dict(file.state)
    local inputs = {x = leaf(file["in"].x), h = leaf(file["in"].h)}
    local y, h = model(inputs.x, inputs.h)
    near(y, file.out.y, "y")
    near(h, file.out.h, "h")
    near((model(file["in"].x[1])), file.out.alone, "without a batch")
    weighted(y, h):backward()
    same_gradients(file, model, inputs)
  end)

  it("RNN with relu, LSTMCell, GRUCell", function()
    local file = read "cells"
    local given = file["in"]
    local parts = nn.ModuleDict {
      rnn = nn.RNN(3, 4, {nonlinearity = "relu", bias = false, bidirectional = true}), lstm = nn.LSTMCell(3, 4), gru = nn.GRUCell(3, 4),
    }
    parts:load_state_dict(file.state)
    local y, h = parts.rnn(given.sequence)
    near(y, file.out.rnn, "rnn")
    near(h, file.out.rnn_h, "rnn h")
    local lh, lc = parts.lstm(given.x, {given.h, given.c})
    near(lh, file.out.lstm_h, "lstm h")
    near(lc, file.out.lstm_c, "lstm c")
    near(parts.gru(given.x, given.h), file.out.gru_h, "gru")
  end)

  it("MultiheadAttention: masks of both kinds, weights, other sizes of keys and values, gradients", function()
    local file = read "attention"
    local given = file["in"]
    local model = nn.MultiheadAttention(8, 2)
    model:load_state_dict(file.state)
    local mask, padding = given.mask:bool(), given.padding:bool()
    local x = leaf(given.x)
    local y, weights = model(x, x, x, {attn_mask = mask})
    near(y, file.out.self, "self")
    near(weights, file.out.weights, "weights")
    weighted(y):backward()
    same_gradients(file, model, {x = x})
    for _, opts in ipairs {{attn_mask = mask}, {is_causal = true}, {is_causal = true, attn_mask = mask}} do
      for _, need in ipairs {true, false} do
        opts.need_weights = need
        near(model(x, x, x, opts), file.out.self, "causal by mask or option")
      end
    end
    for _, need in ipairs {true, false} do
      local cross, w = model(given.x, given.other, given.other,
        {key_padding_mask = padding, attn_mask = given.floating, average_attn_weights = false, need_weights = need})
      near(cross, file.out.cross, "cross")
      if need then near(w, file.out.cross_weights, "weights by head") else assert.is_nil(w) end
    end
    local wide = nn.MultiheadAttention(8, 4, {kdim = 3, vdim = 6, batch_first = true})
    wide:load_state_dict(file.wide)
    near(wide(given.q, given.key, given.value, {key_padding_mask = padding}), file.out.wide, "wide")
    near(wide(given.q, given.key, given.value, {key_padding_mask = padding, need_weights = false}), file.out.wide, "wide")
  end)

  it("TransformerEncoder and its layer: masks, norm first, gradients", function()
    local file = read "transformer"
    local given = file["in"]
    local model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, {dim_feedforward = 12, batch_first = true, dropout = 0.3}), 2,
      {norm = nn.LayerNorm(8)})
    model:load_state_dict(file.state)
    model:eval()
    local x, mask, padding = leaf(given.x), given.mask:bool(), given.padding:bool()
    local y = model(x, {mask = mask, src_key_padding_mask = padding})
    near(y, file.out.masked, "masked")
    weighted(y):backward()
    same_gradients(file, model, {x = x})
    near(model(x, {is_causal = true, src_key_padding_mask = padding}), file.out.masked, "causal")
    near(model(x), file.out.plain, "plain")
    local first = nn.TransformerEncoderLayer(8, 4,
      {dim_feedforward = 12, norm_first = true, activation = "gelu", layer_norm_eps = 1e-3})
    first:load_state_dict(file.first)
    near(first:eval()(given.sequence), file.out.first, "norm first")
  end)

  it("Embedding, LayerNorm, RMSNorm, Linear: the padding row has no gradient", function()
    local file = read "embedding"
    local model = nn.ModuleDict {
      {"embedding", nn.Embedding(7, 4, {padding_idx = 0})}, {"norm", nn.LayerNorm(4)}, {"rms", nn.RMSNorm(4, {eps = 1e-6})},
      {"head", nn.Linear(4, 7)},
    }
    model:load_state_dict(file.state)
    local y = model.head(model.rms(model.norm(model.embedding(file["in"].ids))))
    near(y, file.out.y, "y")
    weighted(y):backward()
    same_gradients(file, model)
    numbers.assert_same(model.embedding.weight.grad[1], {0, 0, 0, 0})
  end)

  it("write state dicts that PyTorch can read: the same names and shapes", function()
    for name, model in pairs {
      lstm = nn.LSTM(3, 4, {num_layers = 2, bidirectional = true}), attention = nn.MultiheadAttention(8, 2),
    } do
      local file, mine = read(name).state, model:state_dict()
      for key, t in pairs(file) do
        assert(mine[key], key)
        assert.same(t.shape, mine[key].shape)
        assert.equal(t.dtype, mine[key].dtype)
      end
      for key in pairs(mine) do assert(file[key], key) end
    end
  end)
end)

-- ====== Layers and losses ======

describe("layers as PyTorch's", function()
  local file

  local function case(name, layer, input, what)
    it(what or name, function()
      file = file or read "layers"
      if type(layer) == "function" then layer = layer() end
      near((layer(file["in"][input])), file.out[name], name)
    end)
  end

  case("max", nn.MaxPool2d(3, {stride = 2, padding = 1, ceil_mode = true}), "x")
  case("max_dilated", nn.MaxPool2d(2, {stride = 1, dilation = 2}), "x")
  case("avg", nn.AvgPool2d(3, {stride = 2, padding = 1, count_include_pad = false}), "x")
  case("avg_divisor", nn.AvgPool2d(2, {divisor_override = 3, ceil_mode = true}), "x")
  case("max1", nn.MaxPool1d(3, {stride = 2}), "s")
  case("avg1", nn.AvgPool1d(2, {padding = 1}), "s")
  case("adaptive_avg", nn.AdaptiveAvgPool2d {3, 2}, "x")
  case("adaptive_max", nn.AdaptiveMaxPool2d {2, 3}, "x")
  case("nearest", nn.Upsample {scale_factor = 2}, "x")
  case("bilinear", nn.Upsample {size = {3, 6}, mode = "bilinear"}, "x")
  case("corners", nn.Upsample {scale_factor = 1.5, mode = "bilinear", align_corners = true}, "x")
  case("relu6", nn.ReLU6(), "r")
  case("gelu", nn.GELU(), "r")
  case("gelu_tanh", nn.GELU {approximate = "tanh"}, "r")
  case("silu", nn.SiLU(), "r")
  case("softplus", nn.Softplus {beta = 2, threshold = 3}, "r")
  case("elu", nn.ELU(0.5), "r")
  case("leaky", nn.LeakyReLU(0.2), "r")
  case("hardtanh", nn.Hardtanh {min_val = -0.5, max_val = 2}, "r")
  case("mish", nn.Mish(), "r")
  case("softsign", nn.Softsign(), "r")
  case("selu", nn.SELU(), "r")
  case("logsigmoid", nn.LogSigmoid(), "r")
  case("hardsigmoid", nn.Hardsigmoid(), "r")
  case("hardswish", nn.Hardswish(), "r")
  case("glu", nn.GLU(), "r")
  case("softmax", nn.Softmax(1), "r")
  case("logsoftmax", nn.LogSoftmax(2), "r")
  case("softmin", nn.Softmin(-1), "r")

  --- A layer with the weights that stand in the file under a name.
  local function loaded(part, layer)
    return function()
      layer:load_state_dict(file[part])
      return layer
    end
  end

  case("conv1", loaded("conv1", nn.Conv1d(4, 6, 3, {stride = 2, padding = 1, dilation = 2, groups = 2})), "s")
  case("same", loaded("same", nn.Conv2d(4, 2, {3, 2}, {padding = "same", padding_mode = "reflect", bias = false})), "x")
  case("transpose", loaded("transpose", nn.ConvTranspose2d(4, 6, 3,
    {stride = 2, padding = 1, output_padding = 1, groups = 2, dilation = {1, 2}})), "x")

  it("InstanceNorm2d and BatchNorm1d, with running statistics", function()
    file = file or read "layers"
    local instance, one = nn.InstanceNorm2d(4, {affine = true, track_running_stats = true}), nn.BatchNorm1d(4)
    instance:load_state_dict(file.instance)
    one:load_state_dict(file.one)
    near(instance(file["in"].x), file.out.instance, "train")
    for name, want in pairs(file.after) do near(instance[name], want, name) end
    near(instance:eval()(file["in"].x), file.out.instance_eval, "eval")
    near(one(file["in"].r), file.out.one, "[N, C]")
    near(one(file["in"].s), file.out.one_s, "[N, C, L]")
  end)
end)

describe("losses as PyTorch's", function()
  local makers = {
    ce = {function(f, r)
      return nn.CrossEntropyLoss {weight = f.weight, ignore_index = 1, label_smoothing = 0.1, reduction = r}
    end, "x", "ids"},
    nll = {function(f, r) return nn.NLLLoss {weight = f.weight, ignore_index = 0, reduction = r} end, "logs", "ids"},
    mse = {function(_, r) return nn.MSELoss {reduction = r} end, "x", "t"},
    l1 = {function(_, r) return nn.L1Loss {reduction = r} end, "x", "t"},
    smooth = {function(_, r) return nn.SmoothL1Loss {reduction = r, beta = 0.5} end, "x", "t"},
    huber = {function(_, r) return nn.HuberLoss {reduction = r, delta = 0.7} end, "x", "t"},
    bce = {function(f, r) return nn.BCELoss {weight = f.weight, reduction = r} end, "p", "t"},
    logits = {function(f, r) return nn.BCEWithLogitsLoss {weight = f.weight, pos_weight = f.pos, reduction = r} end, "x", "t"},
    kl = {function(_, r) return nn.KLDivLoss {reduction = r} end, "logs", "t"},
    kllog = {function(_, r) return nn.KLDivLoss {reduction = r, log_target = true} end, "logs", "log_t"},
  }
  for name, entry in pairs(makers) do
    it(name .. ": all reductions", function()
      local file = read "losses"
      for _, reduction in ipairs {"mean", "sum", "none", name == "kl" and "batchmean" or nil} do
        local loss = entry[1](file["in"], reduction)(file["in"][entry[2]], file["in"][entry[3]])
        local want = file.out[name .. "_" .. reduction]
        assert.same(want.shape, loss.shape)
        near(loss, want, name .. " " .. reduction)
      end
    end)
  end
end)
