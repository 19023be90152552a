--- autograd.lua -- hm.autograd: gradients by hand, functions with their own backward, and looking for the first NaN.
-- The checks and whole derivatives (gradcheck, jacobian, ...) are in derivatives.lua.

local core = require "halfmoon.core"
local derivatives = require "halfmoon.derivatives"
local errors = require "halfmoon.errors"
local options = require "halfmoon.options"

local raise, describe = errors.raise, errors.describe

local autograd = {
  --- autograd.grad(outputs, inputs, {grad_outputs, retain_graph, create_graph, allow_unused}) -> array of gradients
  grad = core.grad,
  --- autograd.detect_anomaly([{inf = boolean}] [, fn, ...]): a scope, or a call of fn in one.  Ops recorded inside note
  --- their line, and backward inside stops at the first op whose backward makes a NaN (inf = true: or an infinity),
  --- with that line and the module path.  For debugging: each gradient is looked through.
  detect_anomaly = core.detect_anomaly,
}
for name, fn in pairs(derivatives) do autograd[name] = fn end

-- ====== Functions with a backward of their own ======

---@class FunctionContext
---@field needs_input_grad boolean[] for each argument of forward: is it a tensor that wants a gradient?
local Context = {}
Context.__index = Context

--- Keeps tensors (and nils) for backward.  In forward, once.
---@param ... Tensor?
function Context:save_for_backward(...)
  local kept = table.pack(...)
  for i = 1, kept.n do
    if kept[i] ~= nil and not core.is_tensor(kept[i]) then
      raise("%s: save_for_backward takes tensors, came %s\n  hint: keep other values as fields, ctx.name = value", self.name,
        describe(kept[i]))
    end
  end
  self.kept = kept
end

--- The tensors that were kept.  In backward; each call asks whether one was changed in place since.
---@return Tensor? ...
function Context:saved()
  if not self.kept then raise("%s: saved() was called, but forward kept nothing with save_for_backward", self.name) end
  if not self.places then return table.unpack(self.kept, 1, self.kept.n) end
  local tensors, list = core.custom_saved(), {}
  for k, i in ipairs(self.places) do list[i] = tensors[k] end
  return table.unpack(list, 1, self.kept.n)
end

--- Says that outputs carry no gradient (an index, a mask).  In forward, before it returns them.
---@param ... Tensor
function Context:mark_non_differentiable(...) self.plain = {...} end

-- Hands the kept tensors over to the graph: returns them as an array, and remembers their places.
local function hand_over(ctx)
  local tensors, places = {}, {}
  if not ctx.kept then return tensors end
  for i = 1, ctx.kept.n do
    if ctx.kept[i] then
      tensors[#tensors + 1] = ctx.kept[i]
      places[#tensors] = i
    end
  end
  ctx.places, ctx.kept = places, {n = ctx.kept.n}
  return tensors
end

local function is_among(list, t)
  for _, other in ipairs(list or {}) do
    if rawequal(other, t) then return true end
  end
  return false
end

-- The outputs as tensors of their own: an input that is returned is copied.  Second result: which carry no gradient.
local function check_outputs(name, ctx, inputs, outputs)
  local plain = {}
  for i = 1, outputs.n do
    local y = outputs[i]
    if not core.is_tensor(y) then raise("%s: forward returned %s, not a tensor", name, describe(y)) end
    plain[i] = is_among(ctx.plain, y)
    if is_among(inputs, y) then outputs[i] = core.no_grad(y.clone, y) end
  end
  return plain
end

-- Runs a backward that cannot be differentiated itself: under create_graph its results lead to an error.
local function run_once(name, backward, ctx, ...)
  if not core.is_grad_enabled() then return backward(ctx, ...) end
  local grads = table.pack(core.no_grad(backward, ctx, ...))
  local sources, made = {}, {}
  for i = 1, select("#", ...) do
    local g = select(i, ...)
    if g then sources[#sources + 1] = g end
  end
  if ctx.places then
    for _, t in ipairs(core.custom_saved()) do sources[#sources + 1] = t end
  end
  for i = 1, grads.n do
    if core.is_tensor(grads[i]) then
      if is_among(sources, grads[i]) then grads[i] = core.no_grad(grads[i].clone, grads[i]) end
      made[#made + 1] = grads[i]
    end
  end
  core.record_custom(name .. "_backward", sources, made, function()
    raise("backward: %s was declared once_differentiable: this gradient cannot be differentiated once more", name)
  end)
  return table.unpack(grads, 1, grads.n)
end

local function apply(name, def, ...)
  local ctx = setmetatable({name = name, needs_input_grad = {}}, Context)
  local arguments, inputs, position = table.pack(...), {}, {}
  for i = 1, arguments.n do
    local is_tensor = core.is_tensor(arguments[i])
    ctx.needs_input_grad[i] = is_tensor and arguments[i].requires_grad and core.is_grad_enabled() or false
    if is_tensor then
      inputs[#inputs + 1] = arguments[i]
      position[#inputs] = i
    end
  end
  local outputs = table.pack(core.no_grad(def.forward, ctx, ...))
  local plain = check_outputs(name, ctx, inputs, outputs)
  local n, count = arguments.n, #inputs -- the closure below must hold no tensor: it lives as long as the graph
  core.record_custom(name, inputs, table.move(outputs, 1, outputs.n, 1, {}), function(...)
    local grads
    if def.once_differentiable then grads = table.pack(run_once(name, def.backward, ctx, ...))
    else grads = table.pack(def.backward(ctx, ...)) end
    if grads.n > n then
      raise("%s: backward returned %d gradients, forward took %d arguments", name, grads.n, n)
    end
    local by_input = {}
    for i = 1, count do by_input[i] = grads[position[i]] end
    return table.unpack(by_input, 1, count)
  end, hand_over(ctx), plain)
  return table.unpack(outputs, 1, outputs.n)
end

local function_spec = {
  forward = {"function"}, backward = {"function"}, once_differentiable = {"boolean", false},
}

--- Makes a function with a backward of its own.  forward(ctx, ...) computes without recording; backward(ctx, g1, ...)
--- takes the gradients of the outputs (nil where none arrived) and returns one gradient (or nil) for each argument of
--- forward.  Made of ops, backward can itself be differentiated, under create_graph; say once_differentiable = true
--- where that would be wrong.
---     local Square = autograd.Function("Square", {
---       forward = function(ctx, x) ctx:save_for_backward(x); return x * x end,
---       backward = function(ctx, g) return 2 * ctx:saved() * g end,
---     })
---     local y = Square(x)
--- ctx: save_for_backward(...), saved(), mark_non_differentiable(...), needs_input_grad[i], and fields of your own.
---@param name string
---@param def {forward: function, backward: function, once_differentiable: boolean?}
---@return function
function autograd.Function(name, def)
  if type(name) ~= "string" then raise("autograd.Function: the name must be a string, not %s", describe(name)) end
  def = options.check("autograd.Function", def, function_spec)
  if not def.forward or not def.backward then raise("autograd.Function: %s needs forward and backward", name) end
  return function(...) return apply(name, def, ...) end
end

return autograd
