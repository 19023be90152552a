--- nn/transformer.lua -- MultiheadAttention, TransformerEncoderLayer, TransformerEncoder.
--
-- Names and layouts of weights are PyTorch's: in_proj_weight [3 E, E] holds the projections of query, key and value one above
-- the other.  As there, a bool mask says true where a place takes NO part; a float mask is added to the scores.

local core = require "halfmoon.core"
local activation_layers = require "halfmoon.nn.activations"
local class = require "halfmoon.nn.class"
local common = require "halfmoon.nn.common"
local errors = require "halfmoon.errors"
local initialize = require "halfmoon.nn.initialize"
local linear = require "halfmoon.nn.linear"
local norm = require "halfmoon.nn.norm"
local options = require "halfmoon.options"
local F = require "halfmoon.nn.functional"

local raise, describe = errors.raise, errors.describe
local want_size = common.want_size
local share = require("halfmoon.arguments").share

local layers = {}

-- ====== MultiheadAttention: parameters ======

local attention_spec = common.with_factory {
  dropout = {"number", 0.0, share}, bias = {"boolean", true}, kdim = {"integer", nil, options.at_least(1)},
  vdim = {"integer", nil, options.at_least(1)}, batch_first = {"boolean", false},
}

---@class MultiheadAttention: Module
---@field in_proj_weight Tensor? [3 E, E], where key and value have the size of query
---@field q_proj_weight Tensor? [E, E], with k_proj_weight [E, kdim] and v_proj_weight [E, vdim] where they have not
---@field in_proj_bias Tensor? [3 E]
---@field out_proj Linear
local MultiheadAttention = class.class("MultiheadAttention")

--- nn.MultiheadAttention(size, heads, {dropout = 0, bias = true, kdim = size, vdim = size, batch_first = false}): attention
--- with several heads.  y, weights = attention(query, key, value, {...}).
---@param size integer E, of query and result
---@param heads integer must divide it
---@param opts table?
function MultiheadAttention:init(size, heads, opts)
  local where = "nn.MultiheadAttention"
  opts = options.check(where, opts, attention_spec)
  size, heads = want_size(where, "the size", size), want_size(where, "the number of heads", heads)
  if size % heads ~= 0 then raise("%s: a size of %d cannot be split into %d heads", where, size, heads) end
  self.embed_dim, self.num_heads, self.head_dim = size, heads, size // heads
  self.kdim, self.vdim = opts.kdim or size, opts.vdim or size
  self.dropout, self.batch_first = opts.dropout, opts.batch_first
  local place = {dtype = opts.dtype, device = opts.device}
  local function projection(rows, columns)
    return initialize.xavier_uniform_(class.Parameter(core.empty({rows, columns}, place)))
  end
  if self.kdim == size and self.vdim == size then
    self.in_proj_weight = projection(3 * size, size)
  else
    self.q_proj_weight = projection(size, size)
    self.k_proj_weight = projection(size, self.kdim)
    self.v_proj_weight = projection(size, self.vdim)
  end
  if opts.bias then self.in_proj_bias = common.filled({3 * size}, 0, opts) end
  self.out_proj = linear.Linear(size, size, {bias = opts.bias, dtype = opts.dtype, device = opts.device})
  if opts.bias then initialize.zeros_(self.out_proj.bias) end
end

-- ====== Projections ======

--- A third of in_proj_bias, or nil.
local function bias_part(self, from, count)
  local bias = self.in_proj_bias
  return bias and bias:narrow(1, from * self.embed_dim + 1, count * self.embed_dim)
end

--- Projections of query, key and value [N, T, E], by as few products as their being the same tensor allows.
local function project(self, query, key, value)
  local size, weight = self.embed_dim, self.in_proj_weight
  if not weight then
    return F.linear(query, self.q_proj_weight, bias_part(self, 0, 1)),
      F.linear(key, self.k_proj_weight, bias_part(self, 1, 1)), F.linear(value, self.v_proj_weight, bias_part(self, 2, 1))
  end
  if rawequal(query, key) and rawequal(key, value) then
    return common.pieces(F.linear(query, weight, self.in_proj_bias), 3, 3)
  end
  local q = F.linear(query, weight:narrow(1, 1, size), bias_part(self, 0, 1))
  if rawequal(key, value) then
    return q, common.pieces(F.linear(key, weight:narrow(1, size + 1, 2 * size), bias_part(self, 1, 2)), 2, 3)
  end
  return q, F.linear(key, weight:narrow(1, size + 1, size), bias_part(self, 1, 1)),
    F.linear(value, weight:narrow(1, 2 * size + 1, size), bias_part(self, 2, 1))
end

--- [N, T, E] as [N, heads, T, E / heads].
local function split_heads(self, x)
  return x:unflatten(3, {self.num_heads, self.head_dim}):transpose(2, 3)
end

-- ====== Masks ======

--- attn_mask as something that broadcasts to [N, heads, T, S].
local function shape_mask(self, mask, n, length, keys)
  local dims, heads = mask:dim(), self.num_heads
  local fits = dims == 2 and mask:size(1) == length and mask:size(2) == keys
  if dims == 3 and mask:size(1) == n * heads and mask:size(2) == length and mask:size(3) == keys then
    return mask:unflatten(1, {n, heads})
  end
  if not fits then
    raise("MultiheadAttention: attn_mask must be [%d,%d] or [%d,%d,%d] (N times heads), came %s", length, keys, n * heads,
      length, keys, describe(mask))
  end
  return mask
end

--- key_padding_mask as [N, 1, 1, S].
local function shape_padding(mask, n, keys)
  local alone = mask:dim() == 1 and n == 1 and mask:size(1) == keys
  if not alone and not (mask:dim() == 2 and mask:size(1) == n and mask:size(2) == keys) then
    raise("MultiheadAttention: key_padding_mask must be [%d,%d], true where a key is padding, came %s", n, keys,
      describe(mask))
  end
  return mask:reshape(n, 1, 1, keys)
end

--- Raises unless a mask is bool or floating.
local function want_mask(name, mask)
  if mask.dtype ~= "bool" and not mask:is_floating_point() then
    raise("MultiheadAttention: %s must be bool (true: takes no part) or floating (added), came %s", name, describe(mask))
  end
end

--- A mask as one that is added.
local function added(mask, like)
  if mask.dtype ~= "bool" then return mask end
  return core.zeros(mask.shape, {dtype = like.dtype, device = mask.device}):masked_fill(mask, -math.huge)
end

--- Both masks in one, as scaled_dot_product_attention takes it: bool (true: takes part) or added; nil where there is none.
local function join_masks(self, opts, q, keys)
  local n, length = q:size(1), q:size(3)
  local mask, padding = opts.attn_mask, opts.key_padding_mask
  if mask then want_mask("attn_mask", mask) end
  if padding then want_mask("key_padding_mask", padding) end
  mask = mask and shape_mask(self, mask, n, length, keys)
  padding = padding and shape_padding(padding, n, keys)
  if mask and padding then
    if mask.dtype == "bool" and padding.dtype == "bool" then
      mask = mask:logical_or(padding)
    else
      mask = added(mask, q) + added(padding, q)
    end
  end
  mask = mask or padding
  if mask and mask.dtype == "bool" then return mask:logical_not() end
  return mask
end

-- ====== MultiheadAttention: forward ======

--- The same formula with the weights kept: result and weights [N, heads, T, S].
local function attend_with_weights(self, q, k, v, mask, causal)
  local scores = core.matmul(q, k:transpose(-2, -1)) * (1 / math.sqrt(self.head_dim))
  if causal then
    local allowed = core.ones({q:size(3), k:size(3)}, {dtype = "bool", device = q.device}):tril()
    scores = scores:masked_fill(allowed:logical_not(), -math.huge)
  end
  if mask and mask.dtype == "bool" then
    scores = scores:masked_fill(mask:logical_not(), -math.huge)
  elseif mask then
    scores = scores + mask
  end
  local weights = scores:softmax(-1)
  if causal or mask then -- rows in which no key takes part give zeros
    local nothing = scores:detach():amax(-1, true):eq(-math.huge)
    weights = scores:masked_fill(nothing, 0):softmax(-1):masked_fill(nothing, 0)
  end
  weights = F.dropout(weights, self.dropout, self.training)
  return core.matmul(weights, v), weights
end

--- Raises unless query, key and value fit together; whether they come without a batch.
local function check_inputs(self, query, key, value)
  local where = "MultiheadAttention"
  for _, entry in ipairs {{"query", query, self.embed_dim}, {"key", key, self.kdim}, {"value", value, self.vdim}} do
    local name, x, size = table.unpack(entry)
    if not core.is_tensor(x) then raise("%s: %s must be a tensor, not %s", where, name, describe(x)) end
    if x:dim() ~= 2 and x:dim() ~= 3 then
      raise("%s: %s must be %s or [length, size], came %s", where, name,
        self.batch_first and "[N, length, size]" or "[length, N, size]", describe(x))
    end
    if x:size(-1) ~= size then raise("%s: the last dim of %s must be %d, came %s", where, name, size, describe(x)) end
  end
  if query:dim() ~= key:dim() or key:dim() ~= value:dim() then
    raise("%s: query, key and value must have as many dims: %s, %s, %s", where, describe(query), describe(key),
      describe(value))
  end
  local alone = query:dim() == 2
  local time, batch = self.batch_first and not alone and 2 or 1, self.batch_first and 1 or 2
  if key:size(time) ~= value:size(time) or (not alone and (key:size(batch) ~= value:size(batch)
    or query:size(batch) ~= key:size(batch))) then
    raise("%s: key and value must have one length, and all one batch: query %s, key %s, value %s%s", where,
      describe(query), describe(key), describe(value), alone and "" or ("\n  hint: inputs are %s (batch_first = %s)")
      :format(self.batch_first and "[N, length, size]" or "[length, N, size]", tostring(self.batch_first)))
  end
  return alone
end

--- query, key and value as [N, T, size]; what was one tensor stays one.
local function to_batches(self, query, key, value, alone)
  if self.batch_first and not alone then return query, key, value end
  local made = {}
  local function turn(x)
    made[x] = made[x] or (alone and x:unsqueeze(1) or x:transpose(1, 2))
    return made[x]
  end
  return turn(query), turn(key), turn(value)
end

local forward_spec = {
  key_padding_mask = {"tensor"}, attn_mask = {"tensor"}, need_weights = {"boolean", true},
  average_attn_weights = {"boolean", true}, is_causal = {"boolean", false},
}

--- query [T, N, E], key [S, N, kdim], value [S, N, vdim] (batch_first: [N, T, E] ...; without a batch [T, E] ...).
--- key_padding_mask [N, S] and attn_mask [T, S] or [N * heads, T, S]: bool, true where a place takes no part, or floating,
--- added.  is_causal: row t sees keys up to t, beside the masks.  need_weights = false is much faster for long sequences
--- and needs no memory for [T, S].  Rows in which no key takes part give zeros.
---@param query Tensor
---@param key Tensor? query unless given
---@param value Tensor? key unless given
---@param opts {key_padding_mask: Tensor, attn_mask: Tensor, need_weights: boolean, average_attn_weights: boolean, is_causal: boolean}?
---@return Tensor y as query
---@return Tensor? weights [N, T, S], the mean of the heads; [N, heads, T, S] with average_attn_weights = false
function MultiheadAttention:forward(query, key, value, opts)
  opts = options.check("MultiheadAttention", opts, forward_spec)
  key = key == nil and query or key
  value = value == nil and key or value
  local alone = check_inputs(self, query, key, value)
  local q, k, v = project(self, to_batches(self, query, key, value, alone))
  q, k, v = split_heads(self, q), split_heads(self, k), split_heads(self, v)
  local mask = join_masks(self, opts, q, k:size(3))
  local y, weights
  if opts.need_weights then
    y, weights = attend_with_weights(self, q, k, v, mask, opts.is_causal)
  else
    y = F.scaled_dot_product_attention(q, k, v,
      {attn_mask = mask, is_causal = opts.is_causal, dropout_p = self.training and self.dropout or 0})
  end
  y = self.out_proj(y:transpose(2, 3):flatten(3, 4))
  if weights and opts.average_attn_weights then weights = weights:mean(2) end
  if alone then return y:squeeze(1), weights and weights:squeeze(1) end
  if not self.batch_first then y = y:transpose(1, 2) end
  return y, weights
end

function MultiheadAttention:extra()
  return ("%d, %d heads%s%s%s"):format(self.embed_dim, self.num_heads,
    self.q_proj_weight and (", keys %d, values %d"):format(self.kdim, self.vdim) or "",
    self.dropout > 0 and (", dropout %g"):format(self.dropout) or "", self.batch_first and ", batch first" or "")
end

layers.MultiheadAttention = MultiheadAttention

-- ====== TransformerEncoderLayer ======

local activations = {relu = F.relu, gelu = F.gelu, gelu_tanh = core.gelu_tanh}
local FUSED = {[F.relu] = "relu", [core.relu] = "relu", [core.gelu_tanh] = "gelu_tanh"} -- what F.linear applies itself

local function is_activation(value)
  if type(value) == "function" or class.is_module(value) or activations[value] then return end
  return "must be \"relu\", \"gelu\", \"gelu_tanh\" or a function"
end

--- Is a module of this very class, with nothing that wants to be called with what goes in or comes out?
local function is_bare(module, kind)
  return getmetatable(module) == kind.__instance and not module._hooks and rawget(module, "forward") == nil
end

--- The activation by the name that F.linear knows, or nil.
local function name_of(activation)
  if type(activation) == "function" then return FUSED[activation] end
  if is_bare(activation, activation_layers.ReLU) then return "relu" end
  if is_bare(activation, activation_layers.GELU) and activation.options.approximate == "tanh" then return "gelu_tanh" end
end

local layer_spec = common.with_factory {
  dim_feedforward = {"integer", 2048, options.at_least(1)}, dropout = {"number", 0.1, share},
  activation = {"string|function|table", "relu", is_activation}, layer_norm_eps = {"number", 1e-5, options.at_least(0)},
  batch_first = {"boolean", false}, norm_first = {"boolean", false}, bias = {"boolean", true},
}

---@class TransformerEncoderLayer: Module
local TransformerEncoderLayer = class.class("TransformerEncoderLayer")

--- nn.TransformerEncoderLayer(size, heads, {dim_feedforward = 2048, dropout = 0.1, activation = "relu"|"gelu"|"gelu_tanh",
--- layer_norm_eps = 1e-5, batch_first = false, norm_first = false, bias = true}): self-attention, then two linear layers, each
--- with dropout, a sum with what came in, and a layer norm behind it (norm_first: before it).  The activation may be a function
--- or a module, too; relu and gelu_tanh are applied by linear1's own op, unless one of the two has hooks.
---@param size integer
---@param heads integer
---@param opts table?
function TransformerEncoderLayer:init(size, heads, opts)
  opts = options.check("nn.TransformerEncoderLayer", opts, layer_spec)
  local place = {dtype = opts.dtype, device = opts.device, bias = opts.bias}
  local function with(more)
    for name, value in pairs(place) do more[name] = value end
    return more
  end
  self.self_attn = MultiheadAttention(size, heads, with {dropout = opts.dropout, batch_first = opts.batch_first})
  self.linear1 = linear.Linear(size, opts.dim_feedforward, with {})
  self.dropout = linear.Dropout(opts.dropout)
  self.linear2 = linear.Linear(opts.dim_feedforward, size, with {})
  self.norm1 = norm.LayerNorm(size, with {eps = opts.layer_norm_eps})
  self.norm2 = norm.LayerNorm(size, with {eps = opts.layer_norm_eps})
  self.dropout1 = linear.Dropout(opts.dropout)
  self.dropout2 = linear.Dropout(opts.dropout)
  self.norm_first = opts.norm_first
  self.activation = activations[opts.activation] or opts.activation
  self.activation_name = type(opts.activation) == "string" and opts.activation or "custom"
end

local layer_forward_spec = {
  src_mask = {"tensor"}, src_key_padding_mask = {"tensor"}, is_causal = {"boolean", false},
}

local function attention_block(self, x, opts)
  local y = self.self_attn(x, x, x, {
    attn_mask = opts.src_mask, key_padding_mask = opts.src_key_padding_mask, need_weights = false,
    is_causal = opts.is_causal,
  })
  return self.dropout1(y)
end

--- linear1 and the activation, by one op where nobody looks at what lies between.
local function widen(self, x)
  local first, name = self.linear1, name_of(self.activation)
  if name and is_bare(first, linear.Linear) and not first.activation then
    return class.within(first, F.linear, x, first.weight, first.bias, name)
  end
  return self.activation(first(x))
end

local function feed_forward(self, x) return self.dropout2(self.linear2(self.dropout(widen(self, x)))) end

--- x [T, N, E] (batch_first: [N, T, E]; without a batch [T, E]).  Masks as MultiheadAttention's attn_mask and
--- key_padding_mask.
---@param x Tensor
---@param opts {src_mask: Tensor, src_key_padding_mask: Tensor, is_causal: boolean}?
---@return Tensor
function TransformerEncoderLayer:forward(x, opts)
  if core.is_tensor(opts) then opts = {src_mask = opts} end
  opts = options.check("TransformerEncoderLayer", opts, layer_forward_spec)
  if self.norm_first then
    x = x + attention_block(self, self.norm1(x), opts)
    return x + feed_forward(self, self.norm2(x))
  end
  x = self.norm1(x + attention_block(self, x, opts))
  return self.norm2(x + feed_forward(self, x))
end

function TransformerEncoderLayer:extra()
  return ("%d, %d heads, %s%s"):format(self.self_attn.embed_dim, self.self_attn.num_heads, self.activation_name,
    self.norm_first and ", norm first" or "")
end

layers.TransformerEncoderLayer = TransformerEncoderLayer

-- ====== TransformerEncoder ======

---@class TransformerEncoder: Module
local TransformerEncoder = class.class("TransformerEncoder")

--- nn.TransformerEncoder(layer, count, {norm = module}): count copies of a layer, one behind the other, then the norm.  The
--- copies begin with the layer's weights, as in PyTorch.
---@param layer Module
---@param count integer
---@param opts {norm: Module}?
function TransformerEncoder:init(layer, count, opts)
  local where = "nn.TransformerEncoder"
  if not class.is_module(layer) then raise("%s: expected a layer, not %s", where, describe(layer)) end
  count = want_size(where, "the number of layers", count)
  if class.is_module(opts) then opts = {norm = opts} end
  opts = options.check(where, opts, {norm = {"table"}})
  if opts.norm and not class.is_module(opts.norm) then
    raise("%s: option 'norm' must be a module, not %s", where, describe(opts.norm))
  end
  local copies = {}
  for i = 1, count do copies[i] = layer:clone() end
  self.layers = require("halfmoon.nn.containers").ModuleList(copies)
  self.num_layers = count
  self.norm = opts.norm
end

local encoder_spec = {mask = {"tensor"}, src_key_padding_mask = {"tensor"}, is_causal = {"boolean", false}}

--- x through all layers.  mask and src_key_padding_mask as MultiheadAttention's attn_mask and key_padding_mask.
---@param x Tensor
---@param opts {mask: Tensor, src_key_padding_mask: Tensor, is_causal: boolean}?
---@return Tensor
function TransformerEncoder:forward(x, opts)
  if core.is_tensor(opts) then opts = {mask = opts} end
  opts = options.check("TransformerEncoder", opts, encoder_spec)
  local inner = {
    src_mask = opts.mask, src_key_padding_mask = opts.src_key_padding_mask, is_causal = opts.is_causal,
  }
  for _, layer in ipairs(self.layers) do x = layer(x, inner) end
  if self.norm then x = self.norm(x) end
  return x
end

layers.TransformerEncoder = TransformerEncoder

return layers
