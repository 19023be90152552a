--- autograd.lua -- hm.autograd: gradients by hand, functions with their own backward, and a check of derivatives.

local core = require "halfmoon.core"
local errors = require "halfmoon.errors"
local options = require "halfmoon.options"

local raise, describe = errors.raise, errors.describe

local autograd = {
  --- autograd.grad(outputs, inputs, {grad_outputs, retain_graph, create_graph, allow_unused}) -> array of gradients
  grad = core.grad,
}

-- ====== Functions with a backward of their own ======

---@class FunctionContext
local Context = {}
Context.__index = Context

--- Keeps tensors for backward.
---@param ... Tensor
function Context:save_for_backward(...) self.kept = table.pack(...) end

--- The tensors that were kept.
---@return ... Tensor
function Context:saved()
  if not self.kept then raise("%s: saved() was called, but forward kept nothing with save_for_backward", self.name) end
  return table.unpack(self.kept, 1, self.kept.n)
end

--- Makes a function with a backward of its own.  forward(ctx, ...) computes without recording; backward(ctx, g1, ...)
--- takes the gradients of the outputs and returns one gradient (or nil) for each argument of forward.
---     local Square = autograd.Function("Square", {
---       forward = function(ctx, x) ctx:save_for_backward(x); return x * x end,
---       backward = function(ctx, g) return 2 * ctx:saved() * g end,
---     })
---     local y = Square(x)
---@param name string
---@param def {forward: function, backward: function}
---@return function
function autograd.Function(name, def)
  if type(name) ~= "string" then raise("autograd.Function: the name must be a string, not %s", describe(name)) end
  def = options.check("autograd.Function", def, {forward = {"function"}, backward = {"function"}})
  if not def.forward or not def.backward then raise("autograd.Function: %s needs forward and backward", name) end
  return function(...)
    local ctx = setmetatable({name = name}, Context)
    local arguments = table.pack(...)
    local outputs = table.pack(core.no_grad(def.forward, ctx, ...))
    local inputs, position = {}, {}
    for i = 1, arguments.n do
      if core.is_tensor(arguments[i]) then
        inputs[#inputs + 1] = arguments[i]
        position[#inputs] = i
      end
    end
    for i = 1, outputs.n do
      if not core.is_tensor(outputs[i]) then
        raise("%s: forward returned %s, not a tensor", name, describe(outputs[i]))
      end
      for _, input in ipairs(inputs) do
        if rawequal(outputs[i], input) then outputs[i] = core.no_grad(function() return input:clone() end) break end
      end
    end
    core.record_custom(name, inputs, table.move(outputs, 1, outputs.n, 1, {}), function(...)
      local grads = table.pack(def.backward(ctx, ...))
      local by_input = {}
      for i = 1, #inputs do by_input[i] = grads[position[i]] end
      return table.unpack(by_input, 1, #inputs)
    end)
    return table.unpack(outputs, 1, outputs.n)
  end
end

-- ====== Checking derivatives ======

local check_spec = {
  eps = {"number", 1e-6, options.above(0)}, atol = {"number", 1e-5, options.at_least(0)},
  rtol = {"number", 1e-3, options.at_least(0)},
}

--- Compares the gradients of fn(inputs...) (its sum) with finite differences.  Raises where they differ.
---@param fn fun(...: Tensor): Tensor
---@param inputs Tensor[] float64 tensors that want a gradient
---@param opts {eps: number, atol: number, rtol: number}?
---@return boolean true
function autograd.gradcheck(fn, inputs, opts)
  opts = options.check("gradcheck", opts, check_spec)
  local wanted = {}
  for i, t in ipairs(inputs) do
    if t.requires_grad then
      if t.dtype ~= "float64" then raise("gradcheck: input %d must be float64, came %s", i, describe(t)) end
      wanted[#wanted + 1] = i
    end
  end
  if #wanted == 0 then raise("gradcheck: no input wants a gradient") end
  local function value() return core.no_grad(function() return fn(table.unpack(inputs)):sum():item() end) end
  local leaves = {}
  for n, i in ipairs(wanted) do leaves[n] = inputs[i] end
  local grads = core.grad({fn(table.unpack(inputs)):sum()}, leaves, {allow_unused = true})
  for n, i in ipairs(wanted) do
    local flat = inputs[i]:detach():view(-1)
    local analytic = grads[n] and grads[n]:contiguous():view(-1):totable()
    for e = 1, inputs[i]:numel() do
      local x = flat[e]:item()
      flat[e] = x + opts.eps
      local above = value()
      flat[e] = x - opts.eps
      local below = value()
      flat[e] = x
      local numeric, came = (above - below) / (2 * opts.eps), analytic and analytic[e] or 0
      local close = math.abs(numeric - came) <= opts.atol + opts.rtol * math.abs(numeric)
      if not close then
        raise("gradcheck: input %d, element %d: backward gives %.9g, finite differences give %.9g", i, e, came, numeric)
      end
    end
  end
  return true
end

return autograd
