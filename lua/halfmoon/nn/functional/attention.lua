--- nn/functional/attention.lua -- scaled_dot_product_attention.

local core = require "halfmoon.core"
local activation = require "halfmoon.nn.functional.activation"
local arguments = require "halfmoon.arguments"
local errors = require "halfmoon.errors"
local options = require "halfmoon.options"

local raise, describe = errors.raise, errors.describe
local want_tensor = arguments.want_tensor

---@class halfmoon.functional
local F = {}

local attention_spec = {
  attn_mask = {"tensor"}, dropout_p = {"number", 0.0, arguments.share}, is_causal = {"boolean", false},
  scale = {"number"}, enable_gqa = {"boolean", false},
}

--- The tensor as [B, H, T, D]: missing dims before become 1, more than two are joined.
local function four_dims(x)
  local dims = x:dim()
  if dims == 4 then return x end
  local shape = x.shape
  if dims == 2 then return x:reshape(1, 1, shape[1], shape[2]) end
  if dims == 3 then return x:unsqueeze(2) end
  return x:flatten(1, dims - 3)
end

--- The mask beside four_dims(q).
local function mask_dims(mask, q, k)
  local dims = q:dim()
  if mask:dim() > math.max(dims, 2) then
    raise("scaled_dot_product_attention: attn_mask is %s, which has more dims than q, %s", describe(mask), describe(q))
  end
  if dims == 3 and mask:dim() == 3 then return mask:unsqueeze(2) end
  if dims <= 4 or mask:dim() <= 3 then return mask end
  local shape = q.shape
  shape[dims] = k:size(-2)
  return mask:expand(shape):flatten(1, dims - 3)
end

local function check(q, k, v, opts)
  local op = "scaled_dot_product_attention"
  local operands = {q, k, v}
  for i, name in ipairs {"q", "k", "v"} do
    local t = operands[i]
    want_tensor(op, name, t)
    if t:dim() < 2 then raise("%s: %s must be [..., length, size], came %s", op, name, describe(t)) end
  end
  if q:dim() ~= k:dim() or q:dim() ~= v:dim() then
    raise("%s: q, k and v must have as many dims: %s, %s, %s", op, describe(q), describe(k), describe(v))
  end
  if q:size(-1) ~= k:size(-1) then
    raise("%s: sizes differ: q is %s, k is %s\n  %d (last dim of q) must equal %d (last dim of k)", op, describe(q),
      describe(k), q:size(-1), k:size(-1))
  end
  if k:size(-2) ~= v:size(-2) then
    raise("%s: lengths differ: k is %s, v is %s\n  %d (dim -2 of k) must equal %d (dim -2 of v)", op, describe(k),
      describe(v), k:size(-2), v:size(-2))
  end
  local heads = q:dim() > 3 and q:dim() - 2
  if heads and q:size(heads) ~= k:size(heads) and not opts.enable_gqa then
    raise("%s: heads differ: q is %s, k is %s\n  hint: {enable_gqa = true} lets groups of heads share k and v", op,
      describe(q), describe(k))
  end
  if opts.scale and not (opts.scale > 0 and opts.scale < math.huge) then
    raise("%s: scale must be above 0, not %g", op, opts.scale)
  end
end

--- The mask with the triangle of is_causal in it: row t sees keys up to t.
local function with_triangle(mask, rows, columns)
  local allowed = core.ones({rows, columns}, {dtype = "bool", device = mask.device}):tril()
  if mask.dtype == "bool" then return mask:logical_and(allowed) end
  return core.where(allowed, mask, -math.huge)
end

-- A float mask that wants a gradient: the same formula by matmul and softmax, with memory for [B, H, T, S].
local function composite(q, k, v, mask, opts)
  local group = q:size(2) // k:size(2)
  if group > 1 then k, v = k:repeat_interleave(group, 2), v:repeat_interleave(group, 2) end
  local scores = core.matmul(q, k:transpose(-2, -1)) * (opts.scale or 1 / math.sqrt(q:size(4)))
  scores = scores + mask:to(scores.dtype)
  local nothing = scores:detach():amax(-1, true):eq(-math.huge) -- rows in which no key takes part give zeros
  local weights = scores:masked_fill(nothing, 0):softmax(-1):masked_fill(nothing, 0)
  return core.matmul(activation.dropout(weights, opts.dropout_p), v)
end

--- softmax(q k^T * scale + mask) v by blocks, in memory linear in the lengths.  q is [..., H, T, D], k [..., G, S, D],
--- v [..., G, S, E]; with enable_gqa G may divide H.  attn_mask broadcasts to [..., H, T, S]: bool (true: take part) or
--- a float one, added.  is_causal: row t sees keys up to t.  Both may be given.  scale is 1 / sqrt(D) unless given.
--- A float mask that wants a gradient takes memory for [..., H, T, S].
---@param q Tensor
---@param k Tensor
---@param v Tensor
---@param opts {attn_mask: Tensor, dropout_p: number, is_causal: boolean, scale: number, enable_gqa: boolean}?
---@return Tensor
function F.scaled_dot_product_attention(q, k, v, opts)
  opts = options.check("scaled_dot_product_attention", opts, attention_spec)
  check(q, k, v, opts)
  local mask = opts.attn_mask and mask_dims(opts.attn_mask, q, k)
  local shape = q.shape
  local q4, k4, v4 = four_dims(q), four_dims(k), four_dims(v)
  local causal = opts.is_causal
  if mask and causal then mask, causal = with_triangle(mask, q4:size(3), k4:size(3)), false end
  local out
  if mask and mask.requires_grad and core.is_grad_enabled() then
    out = composite(q4, k4, v4, mask, opts)
  else
    out = core.call("attention", q4, k4, v4, mask or nil,
      {causal = causal, scale = opts.scale or 0, dropout = opts.dropout_p})
  end
  if #shape == 4 then return out end
  shape[#shape] = v:size(-1)
  return out:reshape(shape)
end

return F
