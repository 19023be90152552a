--- nn/functional/linear.lua -- linear, and what moves entries about: embedding, one_hot, pad.

local core = require "halfmoon.core"
local arguments = require "halfmoon.arguments"
local errors = require "halfmoon.errors"
local indexing = require "halfmoon.indexing"
local options = require "halfmoon.options"

local raise, describe = errors.raise, errors.describe
local want_tensor, attempt = arguments.want_tensor, arguments.attempt

---@class halfmoon.functional
local F = {}

-- ====== Linear ======

local function explain_linear(x, weight, bias)
  want_tensor("linear", "x", x)
  want_tensor("linear", "weight", weight)
  if weight:dim() ~= 2 then raise("linear: weight must be [out, in], came %s", describe(weight)) end
  local dims, inner = x:dim(), weight:size(2)
  local features = dims > 0 and x:size(dims) or 1
  if features ~= inner then
    local text = ("linear: inner sizes differ: x is %s, weight is %s\n"
      .. "  %d (last dim of x) must equal %d (dim 2 of weight)")
      :format(describe(x), describe(weight), features, inner)
    if dims > 2 and x:numel() == x:size(1) * inner then
      text = text .. "\n  hint: x:flatten(2) joins the dims after the first to " .. inner
    elseif dims == 4 then
      text = text .. ("\n  hint: x:flatten(2) would have %d features"):format(x:numel() // math.max(1, x:size(1)))
    elseif dims == 2 and x:size(1) == inner then
      text = text .. "\n  hint: x:t() has its dims the other way round"
    end
    raise("%s", text)
  end
  if bias ~= nil then
    want_tensor("linear", "bias", bias)
    if bias:dim() ~= 1 or bias:size(1) ~= weight:size(1) then
      raise("linear: bias must be [%d], one for each row of weight, came %s", weight:size(1), describe(bias))
    end
  end
end

local linear_spec = {activation = {"string", nil, arguments.activations}}
local FUSED = {relu = "linear_relu", gelu_tanh = "linear_gelu_tanh"} -- the rows of the op table that do both

--- linear and an activation, by one op where autocast allows that.
local function activated(x, weight, bias, name)
  if core.autocast_splits(name) then return core[name](F.linear(x, weight, bias)) end
  local ok, y = pcall(core.call, FUSED[name], x, weight, bias)
  if ok then return y end
  explain_linear(x, weight, bias)
  error(type(y) == "string" and y:gsub(FUSED[name] .. ": ", "linear: ", 1) or y, 0)
end

--- x times the transpose of weight, plus bias: x is [..., in], weight [out, in], bias [out] or nil.  activation "relu" or
--- "gelu_tanh" is applied by the same op: values and gradients are those of F.relu or F.gelu{approximate = "tanh"} on the result
--- (to the bit on the CPU), relu without a tensor between the two; on CUDA it is one pass where cublasLt has it.
---@param x Tensor
---@param weight Tensor
---@param bias Tensor?
---@param opts {activation: "relu"|"gelu_tanh"}? or the activation alone
---@return Tensor
function F.linear(x, weight, bias, opts)
  if opts == nil then return (attempt(explain_linear, "linear", x, weight, bias)) end
  local name = opts
  if not FUSED[name] then name = options.check("linear", arguments.positional(opts, "activation"), linear_spec).activation end
  if name == nil then return F.linear(x, weight, bias) end
  return activated(x, weight, bias, name)
end

-- ====== Embedding ======

local embedding_spec = {padding_idx = {"integer"}}

local function explain_embedding(weight, index)
  want_tensor("embedding", "weight", weight)
  want_tensor("embedding", "index", index)
  if index:is_floating_point() then
    raise("embedding: index must hold ids as int64, came %s\n  hint: %s", describe(index),
      weight.dtype == "int64" and "the index comes first, then the weight" or "index:long()")
  end
  if weight:dim() ~= 2 then raise("embedding: weight must be [ids, size], came %s", describe(weight)) end
end

--- Rows of weight [V, E] by id: index [...] of ids from 0 gives [..., E].  The row padding_idx gets no gradient.
---@param index Tensor integers
---@param weight Tensor
---@param opts {padding_idx: integer?}? an id from 0, negative from the end
---@return Tensor
function F.embedding(index, weight, opts)
  local padding = -1
  if opts ~= nil then
    padding = options.check("embedding", opts, embedding_spec).padding_idx or -1
    if opts.padding_idx and core.is_tensor(weight) then
      local ids = weight:size(1)
      if padding < 0 then padding = padding + ids end
      if padding < 0 or padding >= ids then
        raise("embedding: padding_idx %d is not among the ids 0 to %d", opts.padding_idx, ids - 1)
      end
    end
  end
  return (attempt(explain_embedding, "embedding", weight, index, {padding_idx = padding}))
end

--- 1 at each id and 0 elsewhere, in a new last dim of num_classes (the largest id + 1 when left out); int64.
---@param index Tensor integers
---@param num_classes integer?
---@return Tensor
function F.one_hot(index, num_classes) return indexing.one_hot(index, num_classes) end

-- ====== Padding ======

local pad_spec = {
  mode = {"string", "constant", options.one_of("constant", "reflect", "replicate", "circular")},
  value = {"number", 0},
}

--- x with entries added around: pad is {left, right} of the last dim, then of the one before, ...; negative ones cut.
---@param x Tensor
---@param pad integer[]
---@param opts {mode: "constant"|"reflect"|"replicate"|"circular", value: number}? or the mode alone
---@return Tensor
function F.pad(x, pad, opts)
  want_tensor("pad", "x", x)
  if type(pad) ~= "table" then raise("pad: the pads must be an array {left, right, ...}, not %s", describe(pad)) end
  opts = options.check("pad", arguments.positional(opts, "mode"), pad_spec)
  return (core.call("pad", x, {pad = pad, mode = opts.mode, value = opts.value}))
end

return F
