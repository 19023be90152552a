--- derivatives.lua -- part of hm.autograd: derivatives checked against finite differences, and whole derivatives of
-- functions (jacobian, hessian, vjp, jvp).

local core = require "halfmoon.core"
local errors = require "halfmoon.errors"
local options = require "halfmoon.options"

local raise, describe = errors.raise, errors.describe

local derivatives = {}

-- ====== Finite differences ======

local check_spec = {
  eps = {"number", 1e-6, options.above(0)}, atol = {"number", 1e-5, options.at_least(0)},
  rtol = {"number", 1e-3, options.at_least(0)}, raise_exception = {"boolean", true},
}

-- The floating tensors that fn returns, flattened.
local function flat_outputs(fn, inputs)
  local outputs, list = table.pack(fn(table.unpack(inputs))), {}
  for i = 1, outputs.n do
    local y = outputs[i]
    if core.is_tensor(y) and y:is_floating_point() then list[#list + 1] = y:reshape(-1) end
  end
  return list
end

-- Where the inputs lie that want a gradient; all of them must be float64.
local function wanted_inputs(who, inputs)
  local wanted = {}
  for i, t in ipairs(inputs) do
    if core.is_tensor(t) and t.requires_grad then
      if t.dtype ~= "float64" then raise("%s: input %d must be float64, came %s", who, i, describe(t)) end
      wanted[#wanted + 1] = i
    end
  end
  if #wanted == 0 then raise("%s: no input wants a gradient", who) end
  return wanted
end

-- values[o]: array of the values of output o.
local function evaluate(fn, inputs)
  return core.no_grad(function()
    local values = flat_outputs(fn, inputs)
    for o, y in ipairs(values) do values[o] = y:totable() end
    return values
  end)
end

-- numeric[o][j]: derivative of value j of output o by element e of the flat view of an input.
local function differences(fn, inputs, flat, e, eps)
  local x = flat[e]:item()
  flat[e] = x + eps
  local above = evaluate(fn, inputs)
  flat[e] = x - eps
  local below = evaluate(fn, inputs)
  flat[e] = x
  for o, values in ipairs(above) do
    for j, v in ipairs(values) do values[j] = (v - below[o][j]) / (2 * eps) end
  end
  return above
end

-- analytic[n][o][j]: the gradient of value j of output o by the wanted input n, as an array (nil: none).
local function gradients(fn, inputs, leaves)
  local analytic = {}
  for n = 1, #leaves do analytic[n] = {} end
  for o, y in ipairs(flat_outputs(fn, inputs)) do
    for n = 1, #leaves do analytic[n][o] = {} end
    for j = 1, y.requires_grad and y:numel() or 0 do
      local grads = core.grad({y:narrow(1, j, 1)}, leaves, {retain_graph = true, allow_unused = true})
      for n = 1, #leaves do analytic[n][o][j] = grads[n] and grads[n]:reshape(-1):totable() end
    end
  end
  return analytic
end

-- Compares all; returns the first difference as a message.
local function first_difference(who, fn, inputs, opts)
  local wanted, leaves = wanted_inputs(who, inputs), {}
  for n, i in ipairs(wanted) do leaves[n] = inputs[i] end
  local analytic = core.enable_grad(gradients, fn, inputs, leaves)
  for n, i in ipairs(wanted) do
    local t = inputs[i]:detach()
    if not t:is_contiguous() then raise("%s: input %d must be contiguous, came strides %s", who, i, table.concat(t:stride(), ",")) end
    local flat = t:view(-1)
    for e = 1, t:numel() do
      for o, values in ipairs(differences(fn, inputs, flat, e, opts.eps)) do
        for j, numeric in ipairs(values) do
          local row = analytic[n][o][j]
          local came = row and row[e] or 0
          if not (came == numeric or math.abs(numeric - came) <= opts.atol + opts.rtol * math.abs(numeric)) then
            return ("%s: input %d, element %d, by output %d, element %d: backward gives %.9g, finite differences give %.9g")
              :format(who, i, e, o, j, came, numeric)
          end
        end
      end
    end
  end
end

--- Compares the gradient of each value that fn(inputs...) gives with finite differences.  Raises where they differ
--- (or returns false and the message, with raise_exception = false).
---@param fn fun(...: Tensor): ...: Tensor may return several
---@param inputs Tensor[] those that want a gradient: float64 and contiguous
---@param opts {eps: number?, atol: number?, rtol: number?, raise_exception: boolean?}?
---@return boolean ok
---@return string? message
function derivatives.gradcheck(fn, inputs, opts)
  opts = options.check("gradcheck", opts, check_spec)
  local message = first_difference("gradcheck", fn, inputs, opts)
  if not message then return true end
  if opts.raise_exception then raise("%s", message) end
  return false, message
end

-- Fixed weights for the values of an output, away from 0.
local function fixed_weights(y)
  local list = {}
  for i = 1, y:numel() do list[i] = math.cos(1.7 * i) + (i % 2 == 0 and 0.3 or -0.2) end
  return core.tensor(list, {dtype = "f64", device = y.device}):view(y.shape)
end

--- Compares second derivatives with finite differences of the first: gradcheck of (inputs, gradients of the outputs) ->
--- gradients of the inputs.
---@param fn fun(...: Tensor): ...: Tensor
---@param inputs Tensor[] those that want a gradient: float64 and contiguous
---@param grad_outputs Tensor[]? the gradients that come in; fixed ones when left out
---@param opts {eps: number?, atol: number?, rtol: number?, raise_exception: boolean?}?
---@return boolean ok
---@return string? message
function derivatives.gradgradcheck(fn, inputs, grad_outputs, opts)
  opts = options.check("gradgradcheck", opts, check_spec)
  local wanted, n = wanted_inputs("gradgradcheck", inputs), #inputs
  local all = table.move(inputs, 1, n, 1, {})
  for o, y in ipairs(core.no_grad(function()
    local list = {}
    for _, t in ipairs {fn(table.unpack(inputs))} do
      if core.is_tensor(t) and t:is_floating_point() then list[#list + 1] = t end
    end
    return list
  end)) do
    local g = grad_outputs and grad_outputs[o] or fixed_weights(y)
    all[n + o] = g:detach():clone():requires_grad_()
  end
  local function first(...)
    local given = {...}
    return core.enable_grad(function()
      local outputs, grads = {}, {}
      for _, y in ipairs {fn(table.unpack(given, 1, n))} do
        if core.is_tensor(y) and y:is_floating_point() then
          outputs[#outputs + 1] = y
          grads[#outputs] = given[n + #outputs]
        end
      end
      local leaves = {}
      for k, i in ipairs(wanted) do leaves[k] = given[i] end
      local found = core.grad(outputs, leaves, {grad_outputs = grads, create_graph = true, allow_unused = true})
      local list = {}
      for k = 1, #leaves do list[#list + 1] = found[k] end
      return table.unpack(list)
    end)
  end
  local message = first_difference("gradgradcheck", first, all, opts)
  if not message then return true end
  if opts.raise_exception then raise("%s", message) end
  return false, message
end

-- ====== Whole derivatives ======

local function as_list(who, inputs)
  if core.is_tensor(inputs) then return {inputs}, true end
  if type(inputs) ~= "table" or #inputs == 0 then
    raise("%s: inputs must be a tensor or an array of tensors, came %s", who, describe(inputs))
  end
  return inputs, false
end

-- Tensors of their own that want gradients, inside the graph of the given ones under create_graph.
local function fresh(inputs, create)
  local list = {}
  for i, t in ipairs(inputs) do
    list[i] = create and t.requires_grad and t:view_as(t) or t:detach():requires_grad_()
  end
  return list
end

local function one_output(who, y)
  if not core.is_tensor(y) then raise("%s: the function must return one tensor, came %s", who, describe(y)) end
  return y
end

local function or_zeros(g, x) return g or core.zeros(x.shape, {dtype = x.dtype, device = x.device}) end

local create_spec = {create_graph = {"boolean", false}}

--- The jacobian of fn at inputs: for each input a tensor of shape [output dims..., input dims...].
---@param fn fun(...: Tensor): Tensor
---@param inputs Tensor|Tensor[]
---@param opts {create_graph: boolean?}?
---@return Tensor|Tensor[] a single tensor for a single input
function derivatives.jacobian(fn, inputs, opts)
  opts = options.check("jacobian", opts, create_spec)
  local given, single = as_list("jacobian", inputs)
  local list = core.enable_grad(function()
    local xs, rows = fresh(given, opts.create_graph), {}
    local y = one_output("jacobian", fn(table.unpack(xs)))
    local flat = y:reshape(-1)
    for i = 1, #xs do rows[i] = {} end
    for j = 1, flat:numel() do
      local grads = y.requires_grad and core.grad({flat:narrow(1, j, 1)}, xs,
        {retain_graph = true, create_graph = opts.create_graph, allow_unused = true}) or {}
      for i, x in ipairs(xs) do rows[i][j] = or_zeros(grads[i], x) end
    end
    for i, x in ipairs(xs) do
      local shape = y.shape
      table.move(x.shape, 1, #x.shape, #shape + 1, shape)
      rows[i] = #rows[i] > 0 and core.stack(rows[i], 1):reshape(shape) or core.zeros(shape, {dtype = x.dtype, device = x.device})
    end
    return rows
  end)
  if single then return list[1] end
  return list
end

--- The hessian of a function with one value: [input dims..., input dims...]; for an array of n inputs an n x n array.
---@param fn fun(...: Tensor): Tensor with one element
---@param inputs Tensor|Tensor[]
---@param opts {create_graph: boolean?}?
---@return Tensor|Tensor[][]
function derivatives.hessian(fn, inputs, opts)
  opts = options.check("hessian", opts, create_spec)
  local given, single = as_list("hessian", inputs)
  local rows = {}
  for i = 1, #given do
    rows[i] = derivatives.jacobian(function(...)
      local y = one_output("hessian", fn(...))
      if y:numel() ~= 1 then raise("hessian: the function must return one value, came %s", describe(y)) end
      local x = select(i, ...)
      if not y.requires_grad then return or_zeros(nil, x) end
      return or_zeros(core.grad({y}, {x}, {create_graph = true, allow_unused = true})[1], x)
    end, given, opts)
  end
  if single then return rows[1][1] end
  return rows
end

--- fn(inputs...) and its gradients by the inputs, where v is the gradient of its result (ones for one value).
---@param fn fun(...: Tensor): Tensor
---@param inputs Tensor|Tensor[]
---@param v Tensor?
---@return Tensor output
---@return Tensor|Tensor[] gradients
function derivatives.vjp(fn, inputs, v)
  local given, single = as_list("vjp", inputs)
  local y, grads = core.enable_grad(function()
    local xs = fresh(given)
    local out = one_output("vjp", fn(table.unpack(xs)))
    local found = out.requires_grad and core.grad({out}, xs, {grad_outputs = v and {v}, allow_unused = true}) or {}
    for i, x in ipairs(xs) do found[i] = or_zeros(found[i], x) end
    return out:detach(), found
  end)
  if single then return y, grads[1] end
  return y, grads
end

--- fn(inputs...) and how it changes as the inputs change along v: the jacobian times v, found by two backward walks, so
--- fn's ops must have second derivatives.
---@param fn fun(...: Tensor): Tensor
---@param inputs Tensor|Tensor[]
---@param v Tensor|Tensor[] of the inputs' shapes
---@return Tensor output
---@return Tensor change
function derivatives.jvp(fn, inputs, v)
  local given = as_list("jvp", inputs)
  local along = as_list("jvp", v)
  return core.enable_grad(function()
    local xs = fresh(given)
    local y = one_output("jvp", fn(table.unpack(xs)))
    if not y.requires_grad then return y:detach(), or_zeros(nil, y) end
    local u = core.zeros(y.shape, {dtype = y.dtype, device = y.device, requires_grad = true})
    local grads = core.grad({y}, xs, {grad_outputs = {u}, create_graph = true, allow_unused = true})
    local sums, weights = {}, {}
    for i = 1, #xs do
      if grads[i] and grads[i].requires_grad then
        sums[#sums + 1] = grads[i]
        weights[#sums] = along[i]
      end
    end
    if #sums == 0 then return y:detach(), or_zeros(nil, y) end
    local change = core.grad(sums, {u}, {grad_outputs = weights, allow_unused = true})[1]
    return y:detach(), or_zeros(change, y)
  end)
end

return derivatives
