--- tensor.lua -- functions and methods of tensors that are no rows of the op table: those of linalg.lua, einsum.lua,
--- rearrange.lua and indexing.lua, and here comparing, statistics, tensors like others, random draws, and what a dtype
--- holds.
--
-- Requiring it gives tensors their methods; it returns what becomes functions of hm.

local core = require "halfmoon.core"
local arguments = require "halfmoon.arguments"
local errors = require "halfmoon.errors"
local options = require "halfmoon.options"

local raise, describe = errors.raise, errors.describe
local want_tensor, whole = arguments.want_tensor, arguments.whole

---@class halfmoon
local M = {}

for _, part in ipairs {"linalg", "einsum", "rearrange", "indexing"} do
  for name, fn in pairs(require("halfmoon." .. part)) do M[name] = fn end
end

-- Methods of the C module that people also look for as functions.
for _, name in ipairs {"split", "chunk", "narrow", "select", "numel", "is_floating_point"} do
  M[name] = core.Tensor[name]
end

local methods = {} -- names of this file's functions that are methods too

-- ====== Comparing ======

local close_spec = {rtol = {"number", 1e-5}, atol = {"number", 1e-8}, equal_nan = {"boolean", false}}

--- True where |x - y| <= atol + rtol * |y|; equal infinities are close, NaN to NaN only with equal_nan.
---@param x Tensor
---@param y Tensor|number
---@param opts {rtol: number, atol: number, equal_nan: boolean}? 1e-5 and 1e-8 unless given
---@return Tensor
function M.isclose(x, y, opts)
  want_tensor("isclose", "x", x)
  opts = options.check("isclose", opts, close_spec)
  local _ <close> = core.no_grad()
  local close = core.eq(x, y)
  if opts.equal_nan then close = close:logical_or(x:isnan():logical_and(core.isnan(y))) end
  local distance = core.abs(x - y)
  local allowed = (core.is_tensor(y) and y:abs() or math.abs(y)) * opts.rtol + opts.atol
  local within = distance:le(allowed)
  return close:logical_or(within:logical_and(distance:isfinite()))
end
methods.isclose = true

--- Whether all entries are close (isclose).
---@param x Tensor
---@param y Tensor|number
---@param opts {rtol: number, atol: number, equal_nan: boolean}?
---@return boolean
function M.allclose(x, y, opts) return M.isclose(x, y, opts):all():item() end
methods.allclose = true

--- Whether two tensors have one shape and equal entries.
---@param x Tensor
---@param y Tensor
---@return boolean
function M.equal(x, y)
  want_tensor("equal", "x", x)
  want_tensor("equal", "y", y)
  if not arguments.same_shape(x, y) then return false end
  local _ <close> = core.no_grad()
  return core.eq(x, y):all():item()
end
methods.equal = true

-- ====== Arithmetic ======

--- x limited to [min, max]: clamp.
---@param x Tensor
---@param min number?
---@param max number?
---@return Tensor
function M.clip(x, min, max) return core.clamp(x, min, max) end
methods.clip = true

--- Logarithm of e^x + e^y, without overflow.
---@param x Tensor
---@param y Tensor|number
---@return Tensor
function M.logaddexp(x, y)
  want_tensor("logaddexp", "x", x)
  if not core.is_tensor(y) then y = core.full({}, y, {dtype = x.dtype, device = x.device}) end
  local wide = core.no_grad(function() return core.maximum(x, y) end) -- tells shape and dtype
  if not wide:is_floating_point() then
    raise("logaddexp: needs a floating dtype, came %s and %s\n  hint: x:float()", describe(x), describe(y))
  end
  local shape = wide.shape
  return core.stack({x:to(wide.dtype):expand(shape), y:to(wide.dtype):expand(shape)}, 1):logsumexp(1):to(wide.dtype)
end
methods.logaddexp = true

-- ====== Statistics ======

local spread_spec = {dim = {"integer|table"}, correction = {"number", 1}, keepdim = {"boolean", false}}

local function spread(op, row, x, dim, opts)
  want_tensor(op, "x", x)
  if type(dim) == "table" and dim[1] == nil and next(dim) ~= nil then dim, opts = nil, dim end
  opts = options.check(op, opts, spread_spec)
  if dim == nil then dim = opts.dim end
  local mean = core.mean(x, {dim = dim, keepdim = opts.keepdim})
  return row(x, {dim = dim, correction = opts.correction, keepdim = opts.keepdim}), mean
end

--- Variance and mean over dims (all when none is given).
---@param x Tensor
---@param dim integer|integer[]?
---@param opts {dim: integer|integer[], correction: number, keepdim: boolean}?
---@return Tensor var
---@return Tensor mean
function M.var_mean(x, dim, opts) return spread("var_mean", core.var, x, dim, opts) end
methods.var_mean = true

--- Standard deviation and mean over dims (all when none is given).
---@param x Tensor
---@param dim integer|integer[]?
---@param opts {dim: integer|integer[], correction: number, keepdim: boolean}?
---@return Tensor std
---@return Tensor mean
function M.std_mean(x, dim, opts) return spread("std_mean", core.std, x, dim, opts) end
methods.std_mean = true

-- ====== Tensors like others ======

local like_spec = {dtype = {"string"}, device = {"string"}, requires_grad = {"boolean", false}}

local function like(op, x, opts)
  want_tensor(op, "x", x)
  opts = options.check(op, opts, like_spec)
  return {dtype = opts.dtype or x.dtype, device = opts.device or x.device, requires_grad = opts.requires_grad}
end

--- A tensor of zeros with the shape, dtype and device of x.
---@param x Tensor
---@param opts {dtype: string, device: string, requires_grad: boolean}?
---@return Tensor
function M.zeros_like(x, opts)
  opts = like("zeros_like", x, opts)
  return core.zeros(x.shape, opts)
end

--- A tensor of ones with the shape, dtype and device of x.
---@param x Tensor
---@param opts {dtype: string, device: string, requires_grad: boolean}?
---@return Tensor
function M.ones_like(x, opts)
  opts = like("ones_like", x, opts)
  return core.ones(x.shape, opts)
end

--- A tensor with undefined contents and the shape, dtype and device of x.
---@param x Tensor
---@param opts {dtype: string, device: string, requires_grad: boolean}?
---@return Tensor
function M.empty_like(x, opts)
  opts = like("empty_like", x, opts)
  return core.empty(x.shape, opts)
end

--- A tensor filled with one value, with the shape, dtype and device of x.
---@param x Tensor
---@param value number
---@param opts {dtype: string, device: string, requires_grad: boolean}?
---@return Tensor
function M.full_like(x, value, opts)
  opts = like("full_like", x, opts)
  return core.full(x.shape, value, opts)
end

--- Random numbers, uniform in [0, 1), with the shape, dtype and device of x.
---@param x Tensor
---@param opts {dtype: string, device: string, requires_grad: boolean}?
---@return Tensor
function M.rand_like(x, opts)
  opts = like("rand_like", x, opts)
  return core.rand(x.shape, opts)
end

--- Random numbers, normal with mean 0 and deviation 1, with the shape, dtype and device of x.
---@param x Tensor
---@param opts {dtype: string, device: string, requires_grad: boolean}?
---@return Tensor
function M.randn_like(x, opts)
  opts = like("randn_like", x, opts)
  return core.randn(x.shape, opts)
end

--- Random integers from low to high - 1, with the shape, dtype and device of x.
---@param x Tensor
---@param low integer
---@param high integer excluded
---@param opts {dtype: string, device: string}?
---@return Tensor
function M.randint_like(x, low, high, opts)
  opts = like("randint_like", x, opts)
  return core.randint(low, high, x.shape, {dtype = opts.dtype, device = opts.device})
end

--- The tensor in the dtype and on the device of y; itself if there is nothing to do.
---@param x Tensor
---@param y Tensor
---@return Tensor
function core.Tensor.type_as(x, y)
  want_tensor("type_as", "y", y)
  return x:to {dtype = y.dtype, device = y.device}
end

local factory_spec = {dtype = {"string"}, device = {"string"}, requires_grad = {"boolean", false}}

--- base to the powers from start to stop, n of them at equal distances.
---@param start number
---@param stop number
---@param n integer
---@param base number|table? default 10; options may stand here
---@param opts {dtype: string, device: string, requires_grad: boolean}?
---@return Tensor
function M.logspace(start, stop, n, base, opts)
  if type(base) == "table" then base, opts = nil, base end
  opts = options.check("logspace", opts, factory_spec)
  local powers = core.pow(base or 10.0, core.linspace(start, stop, n, {dtype = "float64", device = opts.device}))
  powers = powers:to(opts.dtype or "float32")
  return opts.requires_grad and powers:requires_grad_() or powers
end

-- ====== Random draws ======

local randperm_spec = {dtype = {"string", "int64"}, device = {"string"}}

--- The numbers 0 to n - 1 in a random order.
---@param n integer
---@param opts {dtype: string, device: string}? int64 unless a dtype is given
---@return Tensor
function M.randperm(n, opts)
  n = whole("randperm", "n", n, 0)
  opts = options.check("randperm", opts, randperm_spec)
  return M.argsort(core.rand({n}, {dtype = "float64", device = opts.device})):to(opts.dtype)
end

--- 1 with the probability that stands in x, else 0; of x's shape and dtype.
---@param x Tensor probabilities
---@return Tensor
function M.bernoulli(x)
  want_tensor("bernoulli", "x", x)
  if not x:is_floating_point() then raise("bernoulli: the probabilities must be floating, came %s", describe(x)) end
  local _ <close> = core.no_grad()
  return core.rand(x.shape, {dtype = x.dtype == "float64" and x.dtype or "float32",
    device = x.device}):lt(x):to(x.dtype)
end
methods.bernoulli = true

-- ====== What a dtype holds ======

local FLOATS = { -- bits of the whole, of the significand with the hidden one, the exponent of the smallest normal [, max]
  float64 = {64, 53, -1022}, float32 = {32, 24, -126}, float16 = {16, 11, -14}, bfloat16 = {16, 8, -126},
  float8_e4m3 = {8, 4, -6, 448.0}, float8_e5m2 = {8, 3, -14},
}
local INTEGERS = {int64 = {64, math.mininteger, math.maxinteger}, int32 = {32, -2147483648, 2147483647}, uint8 = {8, 0,
  255}}

--- What a floating dtype holds: eps (the distance from 1 to the next number), max, min, tiny (the smallest normal
--- number), smallest_subnormal, bits.
---@param dtype string|Tensor
---@return table facts
function M.finfo(dtype)
  local name = errors.long_dtype[core.is_tensor(dtype) and dtype.dtype or dtype or "float32"]
  local facts = FLOATS[name]
  if not facts then
    raise("finfo: needs a floating dtype, not %s%s", describe(dtype), INTEGERS[name] and "\n  hint: iinfo" or "")
  end
  local bits, digits, least = facts[1], facts[2], facts[3]
  local max = facts[4] or (2.0 - 2.0 ^ (1 - digits)) * 2.0 ^ (1 - least)
  return {dtype = name, bits = bits, eps = 2.0 ^ (1 - digits), max = max, min = -max, tiny = 2.0 ^ least,
    smallest_subnormal = 2.0 ^ (least - digits + 1)}
end

--- What an integer dtype holds: min, max, bits.
---@param dtype string|Tensor
---@return {dtype: string, bits: integer, min: integer, max: integer}
function M.iinfo(dtype)
  local name = errors.long_dtype[core.is_tensor(dtype) and dtype.dtype or dtype]
  local facts = INTEGERS[name]
  if not facts then
    raise("iinfo: needs an integer dtype, not %s%s", describe(dtype), FLOATS[name] and "\n  hint: finfo" or "")
  end
  return {dtype = name, bits = facts[1], min = facts[2], max = facts[3]}
end

for name in pairs(methods) do core.Tensor[name] = M[name] end

return M
