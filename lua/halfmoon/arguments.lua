--- arguments.lua -- reading the arguments of functions of tensors: dims, sizes, options, and what to say when an op
--- refuses.
--
-- An op that refuses its arguments is looked into afterwards: the functions named explain_* know what people usually
-- got wrong, and raise with shapes and hints.  A call that succeeds pays nothing for them.

local core = require "halfmoon.core"
local errors = require "halfmoon.errors"
local options = require "halfmoon.options"

local raise, describe = errors.raise, errors.describe
local is_tensor, run = core.is_tensor, core.call

local M = {}

--- Raises unless x is a tensor.
---@param op string
---@param name string what x is called in the message
---@param x any
function M.want_tensor(op, name, x)
  if not is_tensor(x) then raise("%s: %s must be a tensor, not %s", op, name, describe(x)) end
end

--- A number or an array of two, as an array of two whole numbers of at least `low`.
---@param op string
---@param name string
---@param value any
---@param low integer
---@return integer[]
function M.pair(op, name, value, low)
  local a, b = value, value
  if type(value) == "table" then
    if #value ~= 2 then raise("%s: '%s' must be a number or {height, width}, came an array of %d", op, name, #value) end
    a, b = value[1], value[2]
  end
  local h, w = math.tointeger(a), math.tointeger(b)
  if not h or not w then raise("%s: '%s' must be whole numbers, not %s", op, name, describe(h and b or a)) end
  if h < low or w < low then raise("%s: '%s' must be at least %d, not {%d,%d}", op, name, low, h, w) end
  return {h, w}
end

--- A whole number of at least `low`, if that is given.
---@param op string
---@param name string
---@param value any
---@param low integer?
---@return integer
function M.whole(op, name, value, low)
  local n = math.tointeger(value)
  if not n then raise("%s: %s must be a whole number, not %s", op, name, describe(value)) end
  if low and n < low then raise("%s: %s must be at least %d, not %d", op, name, low, n) end
  return n
end

--- A number or an array of one, as a pair for the ops of two dims: {fill, number}.
---@param op string
---@param name string
---@param value any
---@param low integer
---@param fill integer what the missing height gets
---@return integer[]
function M.single(op, name, value, low, fill)
  local a = value
  if type(value) == "table" then
    if #value ~= 1 then raise("%s: '%s' must be one number, came an array of %d", op, name, #value) end
    a = value[1]
  end
  local n = math.tointeger(a)
  if not n then raise("%s: '%s' must be a whole number, not %s", op, name, describe(a)) end
  if n < low then raise("%s: '%s' must be at least %d, not %d", op, name, low, n) end
  return {fill, n}
end

--- Options given as a bare number, string or array mean the option `name`.
---@param opts any
---@param name string
---@return table?
function M.positional(opts, name)
  local kind = type(opts)
  if kind == "number" or kind == "string" or (kind == "table" and opts[1] ~= nil) then return {[name] = opts} end
  return opts
end

--- Runs a row of the op table; when it raises, explain(operands...) may raise something better.
---@param explain fun(...)
---@param op string
---@param ... any operands, then a table of attributes (dims from 0)
---@return Tensor
---@return Tensor? second what the row gives beside its first result
function M.attempt(explain, op, ...)
  local ok, result, second = pcall(run, op, ...)
  if ok then return result, second end
  explain(...)
  error(result, 0) -- it has its place and path already
end

--- A dim of x, counted from 1.
---@param op string
---@param x Tensor
---@param dim any from 1, negative from the end
---@return integer
function M.dim(op, x, dim)
  local n, d = x:dim(), math.tointeger(dim)
  if not d then raise("%s: the dim must be a whole number, not %s", op, describe(dim)) end
  if d == 0 or d > n or d < -n then
    raise("%s: dim %d is not among the %d of %s\n  hint: dims count from 1, or from -1 at the end", op, d, n,
      describe(x))
  end
  return d > 0 and d or d + n + 1
end

--- A dim or an array of them, as an array counted from 1, each once.
---@param op string
---@param x Tensor
---@param dims any
---@return integer[]
function M.dims(op, x, dims)
  local list, seen = {}, {}
  for i, dim in ipairs(type(dims) == "table" and dims or {dims}) do
    local d = M.dim(op, x, dim)
    if seen[d] then raise("%s: dim %d is given twice", op, d) end
    list[i], seen[d] = d, true
  end
  return list
end

--- Raises unless x is a tensor of so many dims.
---@param op string
---@param name string
---@param x any
---@param dims integer
---@param shape string what the shape should be, for the message
function M.want_dims(op, name, x, dims, shape)
  M.want_tensor(op, name, x)
  if x:dim() ~= dims then raise("%s: %s must be %s, came %s", op, name, shape, describe(x)) end
end

--- Inside autocast a low tensor read as float32, as ops of class float32 read theirs; others as they are.
---@param x Tensor
---@return Tensor
function M.wide(x)
  if core.autocast_state().enabled and (x.dtype == "float16" or x.dtype == "bfloat16") then return x:float() end
  return x
end

local RANK = {float16 = 1, bfloat16 = 1, float32 = 2, float64 = 3}

--- Inside autocast, two floating tensors in the wider of their dtypes, as ops that promote take theirs.
---@param x Tensor
---@param y Tensor
---@return Tensor x
---@return Tensor y
function M.promoted(x, y)
  local a, b = RANK[x.dtype], RANK[y.dtype]
  if x.dtype == y.dtype or not a or not b or not core.autocast_state().enabled then return x, y end
  local wider = a == b and "float32" or (a > b and x.dtype or y.dtype)
  return x:to(wider), y:to(wider)
end

--- "[2,3]" of an array of sizes.
---@param shape integer[]
---@return string
function M.shape_text(shape) return "[" .. table.concat(shape, ",") .. "]" end

--- Whether two tensors have one shape.
---@param a Tensor
---@param b Tensor
---@return boolean
function M.same_shape(a, b) return table.concat(a.shape, ",") == table.concat(b.shape, ",") end

--- A test for the option `reduction`.
M.reductions = options.one_of("mean", "sum", "none")

--- A test for the option `activation` of linear layers.
M.activations = options.one_of("relu", "gelu_tanh")

--- A test for options: between 0 and 1.
---@param v number
---@return string?
function M.share(v)
  if v >= 0 and v <= 1 then return end
  return "must lie between 0 and 1"
end

return M
