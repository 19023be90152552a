--- nn/common.lua -- what the files of layers share: checking sizes, making parameters, cutting tensors up, text for the
--- one-line form.

local core = require "halfmoon.core"
local class = require "halfmoon.nn.class"
local errors = require "halfmoon.errors"

local raise = errors.raise

local common = {}

--- A declaration of options with dtype and device, which every layer that has parameters takes.
---@param spec OptionSpec
---@return OptionSpec
function common.with_factory(spec)
  spec.dtype, spec.device = {"string", "float32"}, {"string"}
  return spec
end

--- A size given to a constructor: a whole number from 1.
---@param where string
---@param name string what it is called in the message
---@param value any
---@return integer
function common.want_size(where, name, value)
  local size = math.tointeger(value)
  if not size or size < 1 then
    raise("%s: %s must be a whole number from 1, not %s", where, name, errors.describe(value))
  end
  return size
end

--- The name of the activation that a linear layer applies itself, or nil.  Subclasses may keep other things in that field.
---@param layer Linear
---@return string?
function common.activation_of(layer)
  local activation = layer.activation
  return type(activation) == "string" and activation or nil
end

--- A probability given to a constructor.
---@param where string
---@param value any
---@return number
function common.want_share(where, value)
  if type(value) ~= "number" or not (value >= 0 and value <= 1) then
    raise("%s: the probability must lie between 0 and 1, not %s", where, errors.describe(value))
  end
  return value
end

--- A parameter with uniform numbers in [-bound, bound).
---@param shape integer[]
---@param bound number
---@param opts {dtype: string, device: string?}
---@return Tensor
function common.uniform(shape, bound, opts)
  local _ <close> = core.no_grad()
  return class.Parameter(core.empty(shape, {dtype = opts.dtype, device = opts.device}):uniform_(-bound, bound))
end

--- A parameter with one value everywhere.
---@param shape integer[]
---@param value number
---@param opts {dtype: string, device: string?}
---@return Tensor
function common.filled(shape, value, opts)
  return class.Parameter(core.full(shape, value, {dtype = opts.dtype, device = opts.device}))
end

-- ====== Cutting up ======

-- Views of a tensor exist without these; but each view's gradient is as wide as the tensor, zeros but for one part, and they
-- are added up.  Cut by one node, the parts' gradients are joined once.

local split -- (x, dim, size or nil): made at the first call, since autograd needs files that need this one

--- The parts of x along a dim, as views: of a size (the last may be smaller), or its entries where none is given.
local function parts_of(x, dim, size)
  return size and x:split(size, dim) or x:unbind(dim)
end

--- Joins the gradients of parts; zeros stand for those that nothing asked for.
local function join(ctx, ...)
  local grads, some = {...}, nil
  for i = 1, ctx.n do some = some or grads[i] end
  for i = 1, ctx.n do
    if not grads[i] then
      local shape = some.shape
      if ctx.size then shape[ctx.dim] = math.min(ctx.size, ctx.total - (i - 1) * ctx.size) end
      grads[i] = core.zeros(shape, {dtype = some.dtype, device = some.device})
    end
  end
  return (ctx.size and core.cat or core.stack)(grads, ctx.dim)
end

--- parts_of(), by one node where a gradient is wanted.
local function cut(x, dim, size)
  if not (x.requires_grad and core.is_grad_enabled()) then return parts_of(x, dim, size) end
  split = split or require("halfmoon.autograd").Function("split", {
    forward = function(ctx, t, at, by)
      local parts = parts_of(t, at, by)
      ctx.dim, ctx.size, ctx.n, ctx.total = at, by, #parts, t:size(at)
      return table.unpack(parts)
    end,
    backward = join,
  })
  return {split(x, dim, size)}
end

--- x in `count` equal pieces along a dim, as views.
---@param x Tensor its size along the dim must be a multiple of count
---@param count integer
---@param dim integer
---@return Tensor ...
function common.pieces(x, count, dim) return table.unpack(cut(x, dim, x:size(dim) // count)) end

--- The entries of x along a dim, which disappears, as views.
---@param x Tensor
---@param dim integer
---@return Tensor[]
function common.steps(x, dim) return cut(x, dim) end

-- ====== Text ======

--- "3x5" of an array of sizes.
---@param sizes integer[]
---@return string
function common.by(sizes) return table.concat(sizes, "x") end

--- ", stride 2" or ", stride 2x1"; nothing where all numbers are the default.
---@param name string
---@param sizes integer[]
---@param default integer
---@return string
function common.unless(name, sizes, default)
  local alike, plain = true, true
  for _, size in ipairs(sizes) do
    alike = alike and size == sizes[1]
    plain = plain and size == default
  end
  if plain then return "" end
  return (", %s %s"):format(name, alike and tostring(sizes[1]) or common.by(sizes))
end

return common
