--- nn/linear.lua -- Linear, Embedding, and layers that only move or drop entries: Identity, Flatten, Unflatten, Dropout.
--
-- First values are PyTorch's: Linear uniform within 1 / sqrt(inputs) (He's rule with a = sqrt 5), Embedding normal.

local core = require "halfmoon.core"
local arguments = require "halfmoon.arguments"
local class = require "halfmoon.nn.class"
local common = require "halfmoon.nn.common"
local errors = require "halfmoon.errors"
local options = require "halfmoon.options"
local F = require "halfmoon.nn.functional"

local raise, describe = errors.raise, errors.describe
local want_size, uniform, activation_of = common.want_size, common.uniform, common.activation_of

local layers = {}

-- ====== Linear ======

local linear_spec = common.with_factory {
  bias = {"boolean", true}, activation = {"string", nil, arguments.activations},
}

---@class Linear: Module
---@field weight Tensor [out, in]
---@field bias Tensor? [out]
---@field activation "relu"|"gelu_tanh"|false|nil
local Linear = class.class("Linear")

--- nn.Linear(in, out, {bias = true, activation = "relu"|"gelu_tanh", dtype =, device =}): x times the transpose of weight, plus
--- bias.  The activation, where one is given, is applied by the same op: values and gradients are those of nn.ReLU() or
--- nn.GELU{approximate = "tanh"} behind the layer (to the bit on the CPU), relu without a tensor between the two; on CUDA it is one
--- pass where cublasLt has it.
---@param inputs integer
---@param outputs integer
---@param opts {bias: boolean, activation: "relu"|"gelu_tanh", dtype: string, device: string}?
function Linear:init(inputs, outputs, opts)
  opts = options.check("nn.Linear", opts, linear_spec)
  self.in_features = want_size("nn.Linear", "the number of inputs", inputs)
  self.out_features = want_size("nn.Linear", "the number of outputs", outputs)
  local bound = 1 / math.sqrt(self.in_features)
  self.weight = uniform({self.out_features, self.in_features}, bound, opts)
  if opts.bias then self.bias = uniform({self.out_features}, bound, opts) end
  self.activation = opts.activation or false
end

--- x [..., in] -> [..., out].
---@param x Tensor
---@return Tensor
function Linear:forward(x)
  if not self.activation then return F.linear(x, self.weight, self.bias) end
  return F.linear(x, self.weight, self.bias, activation_of(self))
end

function Linear:extra()
  local activation = activation_of(self)
  return ("%d -> %d%s%s"):format(self.in_features, self.out_features, self.bias and "" or ", no bias",
    activation and ", " .. activation or "")
end

layers.Linear = Linear

-- ====== Embedding ======

local embedding_spec = common.with_factory {padding_idx = {"integer"}}

---@class Embedding: Module
---@field weight Tensor [ids, size]
local Embedding = class.class("Embedding")

--- nn.Embedding(ids, size, {padding_idx =, dtype =, device =}): a row of weight for each id, from 0.  The row padding_idx
--- begins as zeros and is not trained.
---@param ids integer
---@param size integer
---@param opts {padding_idx: integer, dtype: string, device: string}?
function Embedding:init(ids, size, opts)
  opts = options.check("nn.Embedding", opts, embedding_spec)
  self.num_embeddings = want_size("nn.Embedding", "the number of ids", ids)
  self.embedding_dim = want_size("nn.Embedding", "the size of a row", size)
  local padding = opts.padding_idx
  if padding and (padding >= self.num_embeddings or padding < -self.num_embeddings) then
    raise("nn.Embedding: padding_idx %d is not among the ids 0 to %d", padding, self.num_embeddings - 1)
  end
  if padding and padding < 0 then padding = padding + self.num_embeddings end
  self.padding_idx = padding
  self.options = padding and {padding_idx = padding}
  self:reset_parameters(opts)
end

--- Draws new first values: normal numbers, and zeros for padding_idx.
function Embedding:reset_parameters(opts)
  local _ <close> = core.no_grad()
  if opts then
    local shape = {self.num_embeddings, self.embedding_dim}
    self.weight = class.Parameter(core.empty(shape, {dtype = opts.dtype, device = opts.device}))
  end
  self.weight:normal_(0, 1)
  if self.padding_idx then self.weight:narrow(1, self.padding_idx + 1, 1):fill_(0) end
end

--- ids [...] -> [..., size].
---@param index Tensor ids from 0, int64 or int32
---@return Tensor
function Embedding:forward(index) return F.embedding(index, self.weight, self.options or nil) end

function Embedding:extra()
  return ("%d ids -> %d%s"):format(self.num_embeddings, self.embedding_dim,
    self.padding_idx and (", padding_idx %d"):format(self.padding_idx) or "")
end

layers.Embedding = Embedding

-- ====== Layers without parameters ======

---@class Identity: Module
local Identity = class.class("Identity")

--- nn.Identity(): gives back what it is given.  Arguments of the constructor are ignored.
function Identity:init() end -- luacheck: ignore 212

--- Gives back its arguments.
---@param ... any
---@return any ...
function Identity:forward(...) return ... end -- luacheck: ignore 212

layers.Identity = Identity

---@class Flatten: Module
local Flatten = class.class("Flatten")

--- nn.Flatten([first = 2 [, last = -1]]): joins dims.
---@param first integer?
---@param last integer?
function Flatten:init(first, last) self.first, self.last = first or 2, last or -1 end

--- x with the dims from first to last joined.
---@param x Tensor
---@return Tensor
function Flatten:forward(x) return x:flatten(self.first, self.last) end

function Flatten:extra()
  return (self.first ~= 2 or self.last ~= -1) and ("dims %d to %d"):format(self.first, self.last) or ""
end

layers.Flatten = Flatten

---@class Unflatten: Module
local Unflatten = class.class("Unflatten")

--- nn.Unflatten(dim, sizes): splits a dim into several; one size may be -1.
---@param dim integer from 1, negative from the end
---@param sizes integer[]
function Unflatten:init(dim, sizes)
  if not math.tointeger(dim) then raise("nn.Unflatten: the dim must be a whole number, not %s", describe(dim)) end
  if type(sizes) ~= "table" or #sizes == 0 then
    raise("nn.Unflatten: the sizes must be an array, not %s", describe(sizes))
  end
  self.dim, self.sizes = math.tointeger(dim), table.move(sizes, 1, #sizes, 1, {})
end

--- x with the dim split.
---@param x Tensor
---@return Tensor
function Unflatten:forward(x) return x:unflatten(self.dim, self.sizes) end

function Unflatten:extra() return ("dim %d into %s"):format(self.dim, common.by(self.sizes)) end

layers.Unflatten = Unflatten

-- ====== Dropout ======

-- A module that calls a function of (x, p, training).
local function dropout(name, fn)
  local new = class.class(name)
  function new:init(p)
    if type(p) == "table" then p = options.check("nn." .. name, p, {p = {"number"}}).p end
    self.p = common.want_share("nn." .. name, p == nil and 0.5 or p)
  end
  function new:forward(x) return fn(x, self.p, self.training) end
  function new:extra() return ("p %g"):format(self.p) end
  layers[name] = new
end

--- nn.Dropout(p = 0.5): zeros with probability p in training, the rest divided by 1 - p.
dropout("Dropout", F.dropout)
--- nn.Dropout2d(p = 0.5): whole channels of [N, C, ...] become zero together in training.
dropout("Dropout2d", F.dropout2d)

return layers
