--- linalg.lua -- products of tensors that are made of other ops: mm bmm mv dot outer addmm addmv baddbmm tensordot
--- kron,
--- norms, and diagonals.
--
-- What autocast does to them: addmm, addmv, baddbmm, mm, bmm, mv compute in the low dtype, as matmul; dot and tensordot
-- in the widest dtype of their inputs; norm in float32; outer, kron and diagonals follow their inputs.

local core = require "halfmoon.core"
local arguments = require "halfmoon.arguments"
local errors = require "halfmoon.errors"
local options = require "halfmoon.options"

local raise, describe = errors.raise, errors.describe
local want_tensor, want_dims, dim_of, dims_of = arguments.want_tensor, arguments.want_dims, arguments.dim,
  arguments.dims

---@class halfmoon
local M = {}

-- ====== Matrices and vectors ======

--- Raises unless the inner sizes of a product agree.
local function want_inner(op, x, x_dim, y, y_dim)
  if x:size(x_dim) ~= y:size(y_dim) then
    raise("%s: inner sizes differ: x is %s, y is %s\n  %d (dim %d of x) must equal %d (dim %d of y)", op, describe(x),
      describe(y),
      x:size(x_dim), x_dim, y:size(y_dim), y_dim)
  end
end

--- Matrix product of x [n, k] and y [k, m].
---@param x Tensor
---@param y Tensor
---@return Tensor
function M.mm(x, y)
  want_dims("mm", "x", x, 2, "a matrix [n, k]")
  want_dims("mm", "y", y, 2, "a matrix [k, m]")
  want_inner("mm", x, 2, y, 1)
  return core.matmul(x, y)
end

--- Matrix products of two batches: x [b, n, k] and y [b, k, m].
---@param x Tensor
---@param y Tensor
---@return Tensor
function M.bmm(x, y)
  want_dims("bmm", "x", x, 3, "a batch of matrices [b, n, k]")
  want_dims("bmm", "y", y, 3, "a batch of matrices [b, k, m]")
  if x:size(1) ~= y:size(1) then
    raise("bmm: batches differ: x is %s, y is %s\n  hint: matmul broadcasts", describe(x), describe(y))
  end
  want_inner("bmm", x, 3, y, 2)
  return core.matmul(x, y)
end

--- Product of the matrix x [n, k] and the vector y [k].
---@param x Tensor
---@param y Tensor
---@return Tensor
function M.mv(x, y)
  want_dims("mv", "x", x, 2, "a matrix [n, k]")
  want_dims("mv", "y", y, 1, "a vector [k]")
  want_inner("mv", x, 2, y, 1)
  return core.matmul(x, y)
end

--- fn(x, y, ...) in the wider dtype of x and y, also inside autocast.
local function promoting(fn, x, y, ...)
  if not core.autocast_state().enabled then return fn(x, y, ...) end
  x, y = arguments.promoted(x, y)
  return core.autocast({enabled = false}, fn, x, y, ...)
end

--- Sum of the products of two vectors.
---@param x Tensor
---@param y Tensor
---@return Tensor
function M.dot(x, y)
  want_dims("dot", "x", x, 1, "a vector [k]")
  want_dims("dot", "y", y, 1, "a vector [k]")
  want_inner("dot", x, 1, y, 1)
  if x:is_floating_point() or y:is_floating_point() then return promoting(core.matmul, x, y) end
  return core.sum(x * y)
end

--- All products of an element of the vector x and one of y: [n, m].
---@param x Tensor
---@param y Tensor
---@return Tensor
function M.outer(x, y)
  want_dims("outer", "x", x, 1, "a vector [n]")
  want_dims("outer", "y", y, 1, "a vector [m]")
  return x:unsqueeze(2) * y:unsqueeze(1)
end

-- ====== Products with something added ======

local add_spec = {beta = {"number", 1}, alpha = {"number", 1}}

--- beta * x + alpha * product, where x broadcasts to the product; a beta of 0 leaves x out, NaN and all.
local function added(op, x, product, opts)
  want_tensor(op, "x", x)
  opts = options.check(op, opts, add_spec)
  if opts.alpha ~= 1 then product = product * opts.alpha end
  local shape = product.shape
  if not pcall(x.expand, x, shape) then
    raise("%s: x is %s, which does not broadcast to the product %s", op, describe(x), describe(product))
  end
  if opts.beta == 0 then return product end
  local low = product.dtype == "float16" or product.dtype == "bfloat16"
  if low and x.dtype ~= "float64" and core.autocast_state().enabled then x = x:to(product.dtype) end
  if opts.beta ~= 1 then x = x * opts.beta end
  return x + product
end

--- beta * x + alpha * (a times b): a is [n, k], b [k, m], x broadcasts to [n, m].
---@param x Tensor
---@param a Tensor
---@param b Tensor
---@param opts {beta: number, alpha: number}? 1 and 1 unless given
---@return Tensor
function M.addmm(x, a, b, opts)
  want_dims("addmm", "a", a, 2, "a matrix [n, k]")
  want_dims("addmm", "b", b, 2, "a matrix [k, m]")
  return added("addmm", x, core.matmul(a, b), opts)
end

--- beta * x + alpha * (a times b): a is a matrix [n, k], b a vector [k], x broadcasts to [n].
---@param x Tensor
---@param a Tensor
---@param b Tensor
---@param opts {beta: number, alpha: number}? 1 and 1 unless given
---@return Tensor
function M.addmv(x, a, b, opts)
  want_dims("addmv", "a", a, 2, "a matrix [n, k]")
  want_dims("addmv", "b", b, 1, "a vector [k]")
  return added("addmv", x, core.matmul(a, b), opts)
end

--- beta * x + alpha * (a times b), batch by batch: a is [b, n, k], b [b, k, m], x broadcasts to [b, n, m].
---@param x Tensor
---@param a Tensor
---@param b Tensor
---@param opts {beta: number, alpha: number}? 1 and 1 unless given
---@return Tensor
function M.baddbmm(x, a, b, opts)
  want_dims("baddbmm", "a", a, 3, "a batch of matrices [b, n, k]")
  want_dims("baddbmm", "b", b, 3, "a batch of matrices [b, k, m]")
  return added("baddbmm", x, M.bmm(a, b), opts)
end

-- ====== tensordot, kron ======

--- The dims that are no part of `dims`, in order.
local function others(x, dims)
  local taken, list = {}, {}
  for _, d in ipairs(dims) do taken[d] = true end
  for d = 1, x:dim() do
    if not taken[d] then list[#list + 1] = d end
  end
  return list
end

local function sizes_at(x, dims)
  local sizes, count = {}, 1
  for i, d in ipairs(dims) do
    sizes[i] = x:size(d)
    count = count * sizes[i]
  end
  return sizes, count
end

local function joined(a, b) return table.move(b, 1, #b, #a + 1, table.move(a, 1, #a, 1, {})) end

local function contracted(x, y, x_dims, y_dims)
  local x_free, y_free = others(x, x_dims), others(y, y_dims)
  local x_sizes, rows = sizes_at(x, x_free)
  local y_sizes, columns = sizes_at(y, y_free)
  local _, inner = sizes_at(x, x_dims)
  local left = (x:dim() > 0 and x:permute(joined(x_free, x_dims)) or x):reshape(rows, inner)
  local right = (y:dim() > 0 and y:permute(joined(y_dims, y_free)) or y):reshape(inner, columns)
  return core.matmul(left, right):reshape(joined(x_sizes, y_sizes))
end

--- Sum of products over dims of x paired with dims of y: the last n of x with the first n of y, or those named.
---@param x Tensor
---@param y Tensor
---@param dims integer|integer[][]? n, or {dims of x, dims of y}; 2 when left out
---@return Tensor
function M.tensordot(x, y, dims)
  local op = "tensordot"
  want_tensor(op, "x", x)
  want_tensor(op, "y", y)
  local x_dims, y_dims = {}, {}
  if dims == nil then dims = 2 end
  if type(dims) == "table" then
    if #dims ~= 2 then raise("tensordot: dims must be a number or {dims of x, dims of y}") end
    x_dims, y_dims = dims_of(op, x, dims[1]), dims_of(op, y, dims[2])
  else
    local n = arguments.whole(op, "dims", dims, 0)
    if n > x:dim() or n > y:dim() then
      raise("tensordot: %d dims are more than there are: x is %s, y is %s", n, describe(x), describe(y))
    end
    for i = 1, n do x_dims[i], y_dims[i] = x:dim() - n + i, i end
  end
  if #x_dims ~= #y_dims then raise("tensordot: %d dims of x are paired with %d of y", #x_dims, #y_dims) end
  for i = 1, #x_dims do
    if x:size(x_dims[i]) ~= y:size(y_dims[i]) then
      raise("tensordot: sizes differ: x is %s, y is %s\n  %d (dim %d of x) must equal %d (dim %d of y)", describe(x),
        describe(y),
        x:size(x_dims[i]), x_dims[i], y:size(y_dims[i]), y_dims[i])
    end
  end
  return promoting(contracted, x, y, x_dims, y_dims)
end

--- Kronecker product: every element of x times the whole of y, side by side.
---@param x Tensor
---@param y Tensor
---@return Tensor
function M.kron(x, y)
  want_tensor("kron", "x", x)
  want_tensor("kron", "y", y)
  local dims = math.max(x:dim(), y:dim())
  if dims > 4 then raise("kron: takes tensors of up to 4 dims, came %s and %s", describe(x), describe(y)) end
  local x_shape, y_shape, shape = {}, {}, {}
  for d = 1, dims do
    local from_x, from_y = d - dims + x:dim(), d - dims + y:dim()
    local n, m = from_x > 0 and x:size(from_x) or 1, from_y > 0 and y:size(from_y) or 1
    x_shape[2 * d - 1], x_shape[2 * d] = n, 1
    y_shape[2 * d - 1], y_shape[2 * d] = 1, m
    shape[d] = n * m
  end
  return (x:reshape(x_shape) * y:reshape(y_shape)):reshape(shape)
end

-- ====== Norms ======

local norm_spec = {p = {"number|string", 2}, dim = {"integer|table"}, keepdim = {"boolean", false}}

--- The exponent as a number: "fro" is 2, "inf" and "-inf" are infinities.
local function exponent(p)
  if p == "fro" then return 2.0 end
  if p == "inf" then return math.huge end
  if p == "-inf" then return -math.huge end
  if type(p) ~= "number" or p ~= p then
    raise("norm: p must be a number, \"fro\", \"inf\" or \"-inf\", not %s", describe(p))
  end
  return p + 0.0
end

--- p-norm over dims (all when none is given): (sum of |x|^p)^(1/p).  p may be infinite (the largest |x|), minus
--- infinite (the smallest), 0 (how many are not zero) or "fro", which is 2.
---@param x Tensor
---@param p number|string|table? default 2; {p =, dim =, keepdim =} may stand here
---@param dim integer|integer[]?
---@param keepdim boolean?
---@return Tensor
function M.norm(x, p, dim, keepdim)
  want_tensor("norm", "x", x)
  if type(p) == "table" then
    local opts = options.check("norm", p, norm_spec)
    p, dim, keepdim = opts.p, opts.dim, opts.keepdim
  end
  p = exponent(p == nil and 2 or p)
  if not x:is_floating_point() then
    raise("norm: needs a floating dtype, came %s\n  hint: x:float()", describe(x))
  end
  keepdim = keepdim or false
  if dim ~= nil then dim = dims_of("norm", x, dim) end
  if p == math.huge or p == -math.huge then
    local magnitude = arguments.wide(x):abs()
    return (p > 0 and core.amax or core.amin)(magnitude, {dim = dim, keepdim = keepdim})
  end
  if p < 0 then return x:abs():pow(p):sum{dim = dim, keepdim = keepdim}:pow(1 / p) end
  if p == 0 then x = x:detach() end
  for i, d in ipairs(dim or {}) do dim[i] = d - 1 end
  return (core.call("norm", x, {p = p, dim = dim, keepdim = keepdim}))
end

-- ====== Diagonals ======

--- Where a diagonal of a matrix [n, m] lies in the flattened matrix: first place and length.
local function diagonal_places(n, m, offset)
  local length = offset >= 0 and math.min(n, m - offset) or math.min(n + offset, m)
  return offset >= 0 and offset or -offset * m, math.max(0, length)
end

local function diagonal_index(first, length, step, device)
  return core.arange(length, {device = device}) * step + first
end

--- The diagonal of two dims, as a new last dim (a copy).  offset > 0 lies above the main diagonal, < 0 below it.
---@param x Tensor
---@param offset integer? default 0
---@param dim1 integer? default 1
---@param dim2 integer? default 2
---@return Tensor
function M.diagonal(x, offset, dim1, dim2)
  local op = "diagonal"
  want_tensor(op, "x", x)
  if x:dim() < 2 then raise("diagonal: x must have at least 2 dims, came %s", describe(x)) end
  offset = arguments.whole(op, "the offset", offset or 0)
  local pair = dims_of(op, x, {dim1 or 1, dim2 or 2})
  local free = others(x, pair)
  local n, m = x:size(pair[1]), x:size(pair[2])
  local first, length = diagonal_places(n, m, offset)
  local shape = sizes_at(x, free)
  shape[#shape + 1] = n * m
  local flat = x:permute(joined(free, pair)):reshape(shape)
  return flat:index_select(#shape, diagonal_index(first, length, m + 1, x.device))
end

--- A vector as the diagonal of a matrix that is zero elsewhere, or the diagonal of a matrix as a vector.
---@param x Tensor
---@param offset integer? default 0; above the main diagonal where > 0
---@return Tensor
function M.diag(x, offset)
  want_tensor("diag", "x", x)
  offset = arguments.whole("diag", "the offset", offset or 0)
  if x:dim() == 2 then return M.diagonal(x, offset) end
  if x:dim() ~= 1 then raise("diag: x must be a vector or a matrix, came %s", describe(x)) end
  local n = x:size(1) + math.abs(offset)
  local first, length = diagonal_places(n, n, offset)
  local index = diagonal_index(first, length, n + 1, x.device)
  return core.call("index_select_backward", x, index, {shape = {n * n}, dim = 0}):reshape(n, n)
end

--- Sum of the main diagonal of a matrix.
---@param x Tensor
---@return Tensor
function M.trace(x)
  want_dims("trace", "x", x, 2, "a matrix [n, m]")
  return core.sum(M.diagonal(x))
end

-- ====== Differences ======

local diff_spec = {
  n = {"integer", 1, options.at_least(0)}, dim = {"integer", -1}, prepend = {"tensor"}, append = {"tensor"},
}

--- Each entry along a dim less the one before it, n times over.
---@param x Tensor
---@param n integer|table? default 1; options {n =, dim =, prepend =, append =} may stand here
---@param dim integer? default -1
---@return Tensor
function M.diff(x, n, dim)
  want_tensor("diff", "x", x)
  local opts = options.check("diff", type(n) == "table" and n or {n = n, dim = dim}, diff_spec)
  if x:dim() == 0 then raise("diff: x must have at least 1 dim, came %s", describe(x)) end
  local d = dim_of("diff", x, opts.dim)
  if opts.prepend or opts.append then
    local list = {opts.prepend, x}
    if not opts.prepend then list = {x} end
    list[#list + 1] = opts.append
    x = core.cat(list, d)
  end
  for _ = 1, opts.n do
    local size = x:size(d)
    if size == 0 then break end
    local later, earlier = x:narrow(d, 2, size - 1), x:narrow(d, 1, size - 1)
    if size == 1 then later = earlier end
    x = x.dtype == "bool" and later:logical_xor(earlier) or later - earlier
  end
  return x
end

for name, fn in pairs(M) do core.Tensor[name] = fn end

return M
