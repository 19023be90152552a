-- MultiheadAttention, TransformerEncoderLayer, TransformerEncoder: against plain loops, gradients by differences, masks, dropout,
-- dtypes inside autocast, what is refused, short trainings.  Values against PyTorch stand in nn_torch_spec.

local hm = require "halfmoon"
local gradients = require "spec.support.gradients"
local fixed = require "spec.support.inputs"
local learn = require "spec.support.learning"
local numbers = require "spec.support.numbers"
local raises = require "spec.support.raises"

local nn, optim, amp = hm.nn, hm.optim, hm.amp
local F = nn.functional
local filled, names_of = fixed.filled, fixed.names_of

-- ====== Attention by loops ======

--- y = x W^T + b for one row.
local function project(row, weight, bias, first, count)
  local out = {}
  for o = 1, count do
    local s = bias and bias[first + o] or 0
    for i = 1, #row do s = s + row[i] * weight[first + o][i] end
    out[o] = s
  end
  return out
end

--- Self-attention of x [T][E] (one sample) by loops; allowed(t, s) says who may see whom.  Returns y [T][E], weights [H][T][S].
local function attention_by_loops(m, x, allowed)
  local weight, bias, size = m.in_proj_weight:totable(), m.in_proj_bias:totable(), m.embed_dim
  local q, k, v, mixed, weights = {}, {}, {}, {}, {}
  for t, row in ipairs(x) do
    q[t], k[t] = project(row, weight, bias, 0, size), project(row, weight, bias, size, size)
    v[t], mixed[t] = project(row, weight, bias, 2 * size, size), {}
  end
  for h = 1, m.num_heads do
    weights[h] = {}
    local from = (h - 1) * m.head_dim
    for t = 1, #x do
      local e, sum = {}, 0
      for s = 1, #x do
        local dot = 0
        for d = from + 1, from + m.head_dim do dot = dot + q[t][d] * k[s][d] end
        e[s] = allowed(t, s) and math.exp(dot / math.sqrt(m.head_dim)) or 0
        sum = sum + e[s]
      end
      for s = 1, #x do e[s] = sum > 0 and e[s] / sum or 0 end
      weights[h][t] = e
      for d = from + 1, from + m.head_dim do
        mixed[t][d] = 0
        for s = 1, #x do mixed[t][d] = mixed[t][d] + e[s] * v[s][d] end
      end
    end
  end
  local y, out, out_bias = {}, m.out_proj.weight:totable(), m.out_proj.bias:totable()
  for t = 1, #x do y[t] = project(mixed[t], out, out_bias, 0, size) end
  return y, weights
end

describe("MultiheadAttention", function()
  it("equals plain loops: plain, causal, masked, padded", function()
    hm.manual_seed(1)
    local m = nn.MultiheadAttention(6, 3, {batch_first = true, dtype = "f64"})
    m.in_proj_bias = nn.Parameter(filled({18}, 1, {dtype = "f64"}))
    local x = filled({1, 4, 6}, 2, {dtype = "f64"})
    local mask = hm.tensor({{0, 1, 0, 0}, {1, 0, 0, 0}, {0, 0, 0, 1}, {1, 1, 1, 1}}):bool()
    local padding = hm.tensor({{0, 0, 0, 1}}):bool()
    local masked = mask:totable()
    for _, case in ipairs {
      {{}, function() return true end}, {{is_causal = true}, function(t, s) return s <= t end},
      {{attn_mask = mask}, function(t, s) return not masked[t][s] end},
      {{attn_mask = mask:unsqueeze(1):expand(3, 4, 4)}, function(t, s) return not masked[t][s] end},
      {{key_padding_mask = padding}, function(_, s) return s < 4 end},
      {{attn_mask = mask, key_padding_mask = padding}, function(t, s) return not masked[t][s] and s < 4 end},
      {{attn_mask = mask, key_padding_mask = padding, is_causal = true}, function(t, s) return not masked[t][s] and s <= t and s < 4 end},
    } do
      local want, weights = attention_by_loops(m, x:totable()[1], case[2])
      local y, w = m(x, x, x, case[1])
      numbers.assert_near(y[1], want, 1e-9, 1e-9, "with weights")
      local mean = hm.tensor(weights, {dtype = "f64"})
      numbers.assert_near(w[1], mean:mean(1), 1e-9, 1e-9, "weights")
      case[1].average_attn_weights = false
      numbers.assert_near(select(2, m(x, x, x, case[1]))[1], mean, 1e-9, 1e-9, "weights by head")
      case[1].need_weights = false
      local plain, none = m(x, x, x, case[1])
      assert.is_nil(none)
      numbers.assert_near(plain[1], want, 1e-6, 1e-7, "without weights") -- blocks may accumulate in another order
    end
  end)

  it("needs no key and value where they are the query, and no batch", function()
    hm.manual_seed(2)
    local m = nn.MultiheadAttention(4, 2)
    local x = filled({3, 2, 4}, 3)
    local y = m(x)
    assert.same({3, 2, 4}, y.shape)
    numbers.assert_near(m(x, x:clone(), x:clone()), y, 1e-6, 1e-6) -- three tensors: three products
    local same = x:clone()
    numbers.assert_near(m(x, same), y, 1e-6, 1e-6) -- two
    local alone, weights = m(x:select(2, 1))
    assert.same({3, 4}, alone.shape)
    assert.same({3, 3}, weights.shape)
    numbers.assert_near(alone, y:select(2, 1), 1e-6, 1e-6)
    local turned = nn.MultiheadAttention(4, 2, {batch_first = true})
    turned:load_state_dict(m:state_dict())
    numbers.assert_near(turned(x:transpose(1, 2)):transpose(1, 2), y, 1e-6, 1e-6)
    numbers.assert_near(turned(x:select(2, 1)), alone, 1e-6, 1e-6)
  end)

  it("has gradients by every input, weight and float mask", function()
    hm.manual_seed(3)
    local m = nn.MultiheadAttention(4, 2, {kdim = 3, batch_first = true, dtype = "f64"})
    local q, k, v = filled({2, 3, 4}, 4, {dtype = "f64"}), filled({2, 2, 3}, 5, {dtype = "f64"}), filled({2, 2, 4}, 6, {dtype = "f64"})
    local mask = filled({3, 2}, 7, {dtype = "f64"})
    for _, need in ipairs {true, false} do
      gradients.check(function(a, b, c, d, weight, bias)
        m.k_proj_weight, m.in_proj_bias = weight, bias
        return (m(a, b, c, {attn_mask = d, need_weights = need}))
      end, {q, k, v, mask, m.k_proj_weight:detach(), filled({12}, 8, {dtype = "f64"})}, 1e-6)
    end
    local self = nn.MultiheadAttention(4, 2, {dtype = "f64"})
    gradients.check(function(a, weight)
      self.in_proj_weight = weight
      return (self(a, a, a, {need_weights = false, is_causal = true}))
    end, {filled({3, 2, 4}, 9, {dtype = "f64"}), self.in_proj_weight:detach()}, 1e-6)
    gradients.check_second(function(a) return (self(a, a, a, {is_causal = true})) end, {filled({2, 1, 4}, 10, {dtype = "f64"})}, 1e-5)
  end)

  it("gives zeros where no key takes part, and finite gradients", function()
    hm.manual_seed(4)
    local m = nn.MultiheadAttention(4, 2, {bias = false})
    for _, need in ipairs {true, false} do
      local x = filled({3, 1, 4}, 11):requires_grad_()
      local y = m(x, x, x, {key_padding_mask = hm.ones({1, 3}):bool(), need_weights = need})
      numbers.assert_same(y, hm.zeros {3, 1, 4})
      m:zero_grad()
      y:sum():backward()
      assert.equal(0, x.grad:isfinite():logical_not():sum():item())
      assert.equal(0, m.in_proj_weight.grad:isfinite():logical_not():sum():item())
    end
  end)

  it("drops weights in training only", function()
    hm.manual_seed(5)
    local m = nn.MultiheadAttention(4, 2, {dropout = 0.5})
    local x = filled({8, 2, 4}, 12)
    local y, weights = m(x)
    assert((y - m(x)):abs():max():item() > 0)
    assert(weights:eq(0):sum():item() > 0)
    assert((m(x, x, x, {need_weights = false}) - m(x, x, x, {need_weights = false})):abs():max():item() > 0)
    m:eval()
    numbers.assert_same(m(x), m(x))
    numbers.assert_near(m(x, x, x, {need_weights = false}), m(x), 1e-6, 1e-6)
  end)

  it("says what does not fit, with the path", function()
    local m = nn.Sequential(nn.MultiheadAttention(4, 2))
    local x = hm.ones {3, 2, 4}
    raises({"last dim of query must be 4", "in Sequential.0 (MultiheadAttention 4, 2 heads)"}, m, hm.ones {3, 2, 5})
    m = m[1]
    raises({"attn_mask must be [3,3] or [4,3,3]", "came bool[2,3]"}, m, x, x, x, {attn_mask = hm.ones({2, 3}):bool()})
    raises("key_padding_mask must be [2,3]", m, x, x, x, {key_padding_mask = hm.ones({3, 2}):bool()})
    raises("must be bool (true: takes no part) or floating", m, x, x, x, {attn_mask = hm.ones({3, 3}):long()})
    raises({"one length", "hint: inputs are [length, N, size]"}, m, x, hm.ones {5, 2, 4}, x)
    raises("as many dims", m, x, hm.ones {5, 4}, x)
    raises("[length, N, size] or [length, size]", m, hm.ones {4})
    raises("must be a tensor", m, 3)
    raises("unknown option 'mask'", m, x, x, x, {mask = x})
    raises("cannot be split into 3 heads", nn.MultiheadAttention, 4, 3)
    assert.equal("MultiheadAttention(4, 2 heads, keys 3, values 4, batch first",
      (tostring(nn.MultiheadAttention(4, 2, {kdim = 3, batch_first = true})):match("^[^\n]*")))
  end)
end)

-- ====== Encoder ======

describe("TransformerEncoderLayer", function()
  it("is made of its parts, norms behind or before", function()
    hm.manual_seed(6)
    local x = filled({3, 2, 4}, 13)
    for _, first in ipairs {false, true} do
      local m = nn.TransformerEncoderLayer(4, 2, {dim_feedforward = 6, norm_first = first, activation = "gelu"}):eval()
      local function feed(h) return m.linear2(F.gelu(m.linear1(h))) end
      local want
      if first then
        local h = m.norm1(x)
        local y = x + m.self_attn(h, h, h)
        want = y + feed(m.norm2(y))
      else
        local y = m.norm1(x + m.self_attn(x, x, x))
        want = m.norm2(y + feed(y))
      end
      numbers.assert_near(m(x), want, 1e-5, 1e-6)
    end
  end)

  it("names parameters as PyTorch does", function()
    assert.same({"self_attn.in_proj_weight", "self_attn.in_proj_bias", "self_attn.out_proj.weight", "self_attn.out_proj.bias",
      "linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias", "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"},
      names_of(nn.TransformerEncoderLayer(4, 2):named_parameters()))
    local bare = nn.TransformerEncoderLayer(4, 2, {bias = false})
    for name in bare:named_parameters() do assert.falsy(name:find("bias")) end
    assert.same({2048, 4}, bare.linear1.weight.shape)
    assert.equal("TransformerEncoderLayer(4, 2 heads, gelu, norm first",
      (tostring(nn.TransformerEncoderLayer(4, 2, {activation = "gelu", norm_first = true})):match("^[^\n]*")))
  end)

  it("takes functions and modules as activation, masks as tensors or options", function()
    hm.manual_seed(7)
    local x, mask = filled({3, 2, 4}, 14), hm.ones({3, 3}):triu(1):bool()
    local m = nn.TransformerEncoderLayer(4, 2, {dim_feedforward = 6, activation = F.silu, dropout = 0})
    local other = nn.TransformerEncoderLayer(4, 2, {dim_feedforward = 6, activation = nn.SiLU(), dropout = 0})
    other:load_state_dict(m:state_dict())
    numbers.assert_same(m(x), other(x))
    numbers.assert_near(m(x, mask), m(x, {is_causal = true}), 1e-6, 1e-6)
    numbers.assert_same(m(x, mask), m(x, {src_mask = mask}))
    raises("must be \"relu\", \"gelu\", \"gelu_tanh\" or a function", nn.TransformerEncoderLayer, 4, 2, {activation = "selu"})
    raises("unknown option", m, x, {mask = mask})
    raises({"last dim of query", "in TransformerEncoderLayer.self_attn"}, m, hm.ones {3, 2, 5})
  end)

  it("causal layers do not look ahead", function()
    hm.manual_seed(8)
    local m = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, {dim_feedforward = 6, batch_first = true}), 2):eval()
    local x = filled({1, 5, 4}, 15)
    local other = x:clone()
    other[1][5]:fill_(9)
    local y, z = m(x, {is_causal = true}), m(other, {is_causal = true})
    numbers.assert_same(y:narrow(2, 1, 4), z:narrow(2, 1, 4))
    assert((y[1][5] - z[1][5]):abs():max():item() > 0.01)
  end)
end)

describe("TransformerEncoder", function()
  it("copies its layer: the same first values, memory of their own", function()
    local layer = nn.TransformerEncoderLayer(4, 2, {dim_feedforward = 6})
    local m = nn.TransformerEncoder(layer, 3, {norm = nn.LayerNorm(4)})
    assert.equal(3 * 12 + 2, #m:parameters())
    local names = names_of(m:named_parameters())
    assert.equal("layers.0.self_attn.in_proj_weight", names[1])
    assert.equal("norm.bias", names[#names])
    numbers.assert_same(m.layers[1].linear1.weight, m.layers[3].linear1.weight)
    m:requires_grad_()
    hm.no_grad(function() m.layers[1].linear1.weight:fill_(0) end)
    assert(m.layers[3].linear1.weight:abs():max():item() > 0)
    assert(layer.linear1.weight:abs():max():item() > 0)
    raises("expected a layer", nn.TransformerEncoder, 3, 2)
    raises("whole number", nn.TransformerEncoder, layer)
    raises("must be a module", nn.TransformerEncoder, layer, 2, {norm = {}})
  end)
end)

-- ====== Low dtypes and training ======

describe("transformers in low dtypes", function()
  for _, dtype in ipairs {"float16", "bfloat16"} do
    it("inside autocast and converted: " .. dtype, function()
      hm.manual_seed(9)
      local m = nn.TransformerEncoderLayer(8, 2, {dim_feedforward = 12, dropout = 0})
      local x = filled({5, 2, 8}, 16)
      local want = m(x, {is_causal = true})
      local y, inner = amp.autocast(dtype, function() return m(x, {is_causal = true}), (m.self_attn(x)) end)
      assert.equal("float32", y.dtype) -- a layer norm ends it
      assert.equal(dtype, inner.dtype)
      numbers.assert_near(y, want, 0, dtype == "float16" and 1e-2 or 8e-2)
      y:sum():backward()
      for name, p in m:named_parameters() do assert.equal("float32", p.grad.dtype, name) end
      m:to(dtype)
      local padding = hm.tensor({{0, 0, 0, 0, 1}, {0, 0, 0, 0, 0}}):bool()
      local low = m(x:to(dtype), {src_key_padding_mask = padding, src_mask = filled({5, 5}, 17, {dtype = dtype})})
      assert.equal(dtype, low.dtype)
      low:sum():backward()
      assert.equal(dtype, m.linear1.weight.grad.dtype)
    end)
  end
end)

describe("a transformer learns", function()
  --- Gives back its input one place later.  Returns first and last losses and how many steps were skipped.
  local function train(dtype, steps)
    hm.manual_seed(10)
    local Net = nn.class("Net")
    function Net:init()
      self.embedding = nn.Embedding(6, 16)
      self.places = nn.Parameter(hm.randn {8, 16} * 0.1)
      self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2,
        {dim_feedforward = 32, batch_first = true, dropout = 0.05, norm_first = true}), 2, {norm = nn.LayerNorm(16)})
      self.head = nn.Linear(16, 6)
    end
    function Net:forward(ids)
      return self.head(self.encoder(self.embedding(ids) + self.places, {is_causal = true}))
    end
    local net = Net()
    local ids = hm.randint(0, 6, {8, 8})
    local target = hm.cat({hm.zeros({8, 1}, {dtype = "i64"}), ids:narrow(2, 1, 7)}, 2)
    local opt = optim.AdamW(net:parameters(), {lr = 0.02})
    return learn(opt, dtype, steps, function() return F.cross_entropy(net(ids):transpose(2, 3), target) end)
  end

  for _, dtype in ipairs {"f32", "f16", "bf16"} do
    it("in 20 steps, " .. dtype, function()
      local first, last, skipped = train(dtype, 20)
      assert(last < 0.5 * first, ("%g to %g"):format(first, last))
      assert(skipped <= 3, skipped)
    end)
  end
end)
