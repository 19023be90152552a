--- elementwise.lua -- hm.elementwise: a function of tensors made of a formula, in one pass on any device.
--
--     local mish = hm.elementwise("y = x * tanhf(log1pf(expf(x)))")
--     local scaled = hm.elementwise("y = beta * x * x", {params = {beta = 1}, grad = "gx = g * 2 * beta * x"})
--     local loss = mish(x):add(scaled(x, {beta = 0.5})):sum()
--
-- The formula is C: RESULT = an expression of names, numbers, + - * / ! ?: && ||, comparisons and functions of
-- kernels/math.h under their plain names or C's (tanh, tanhf).  Names are inputs, in order of first appearance.  `/` is
-- true division, also of whole numbers.  Each step is rounded to the type computed in (float32 for half types), so that
-- the CPU and a GPU agree to the bit.
--
-- Here the formula becomes a tree (expr.lua), and the tree a list of steps (kernels/expression.h), in which equal
-- subexpressions are computed once.  Gradients are such functions too: differentiated symbolically, or given.

local core = require "halfmoon.core"
local errors = require "halfmoon.errors"
local expr = require "halfmoon.expr"
local options = require "halfmoon.options"

local raise = errors.raise

-- ====== The language ======

local CONSTANTS = {INFINITY = math.huge, NAN = 0 / 0, M_PI = math.pi}

-- Name of a step -> {kind, operands}.
local STEPS, FUNCTIONS = {}, {}
for kind, step in ipairs(core.expression_steps()) do
  STEPS[step.name] = {kind = kind, operands = step.operands}
  if step.name:match("^%a") and step.name ~= "copy" and step.name ~= "neg" then FUNCTIONS[step.name] = step.operands end
end

-- Functions that stand for a formula: {parameters, tree}.  Those that are ops too have the op's formula.
local MACROS = {}
for name, text in pairs {
  max = "a > b || a != a ? a : b",
  min = "a < b || a != a ? a : b",
  relu = "a < 0 ? 0 : a",
  sigmoid = "1 / (1 + exp(-a))",
  rsqrt = "1 / sqrt(a)",
  square = "a * a",
  sign = "a > 0 ? 1 : (a < 0 ? -1 : a)",
} do
  MACROS[name] = expr.parse(text)
  FUNCTIONS[name] = expr.names(MACROS[name]).b and 2 or 1
end

-- C's names that differ from ours.
local ALIASES = {fabs = "abs", fmax = "max", fmin = "min"}

local function function_names()
  local names = {}
  for name in pairs(FUNCTIONS) do names[#names + 1] = name end
  table.sort(names)
  return names
end

-- Our name for a function that the formula names, or nil.
local function canonical(name)
  for _, n in ipairs {name, name:match("^(.+)f$")} do
    n = ALIASES[n] or n
    if FUNCTIONS[n] then return n end
  end
end

-- A tree with names replaced by trees: names[name] is the tree.
local function substitute(e, names)
  local kind = e[1]
  if kind == "id" then return names[e[2]] or e end
  if kind == "num" then return e end
  if kind == "neg" or kind == "not" then return {kind, substitute(e[2], names)} end
  if kind == "bin" then return {kind, e[2], substitute(e[3], names), substitute(e[4], names)} end
  if kind == "if" then
    return {kind, substitute(e[2], names), substitute(e[3], names), substitute(e[4], names)}
  end
  local args = {}
  for i, a in ipairs(e[3]) do args[i] = substitute(a, names) end
  return {kind, e[2], args}
end

-- Checks calls and turns them into those that steps and derivatives know.
local function settle(e, text)
  local kind = e[1]
  if kind == "num" or kind == "id" then return e end
  if kind == "neg" or kind == "not" then return {kind, settle(e[2], text)} end
  if kind == "bin" then return {kind, e[2], settle(e[3], text), settle(e[4], text)} end
  if kind == "if" then return {kind, settle(e[2], text), settle(e[3], text), settle(e[4], text)} end
  local name = canonical(e[2])
  if not name then
    local names = function_names()
    local near = errors.closest(e[2], names)
    expr.fail_at(text, e.at, ("there is no function '%s'%s"):format(e[2],
      near and (", did you mean '%s'?"):format(near) or "; known: " .. table.concat(names, " ")))
  end
  if #e[3] ~= FUNCTIONS[name] then
    expr.fail_at(text, e.at, ("%s takes %d argument%s, got %d"):format(e[2], FUNCTIONS[name],
      FUNCTIONS[name] == 1 and "" or "s", #e[3]))
  end
  local args = {}
  for i, a in ipairs(e[3]) do args[i] = settle(a, text) end
  if MACROS[name] then return substitute(MACROS[name], {a = args[1], b = args[2]}) end
  return {"call", name, args}
end

-- Reads "y = ..." -> "y", tree, {names in order of first appearance}, {name -> place}.
local function read_formula(where, text, wanted)
  local name, from = text:match("^%s*([%a_][%w_]*)%s*=()[^=]")
  if not name then
    raise("%s: a formula like \"%s\" is wanted, got %s", where, wanted, errors.describe(text))
  end
  text = text:gsub("%s*;%s*$", "")
  local ok, result, names, places = pcall(function()
    local tree, order, at = expr.parse(text, from), {}, {}
    expr.walk(tree, function(n)
      if n[1] == "id" and not CONSTANTS[n[2]] then
        if not at[n[2]] then order[#order + 1] = n[2] end
        at[n[2]] = math.min(at[n[2]] or math.huge, n.at)
      end
    end)
    table.sort(order, function(a, b) return at[a] < at[b] end)
    return settle(tree, text), order, at
  end)
  if not ok then raise("%s: %s", where, tostring(result)) end
  return name, result, names, places
end

-- Raises with a place in the formula marked.
local function refuse(where, text, at, message, ...)
  local _, marked = pcall(expr.fail_at, text, at, message:format(...))
  raise("%s: %s", where, marked)
end

-- ====== Trees to steps ======

-- Numbers every distinct subexpression: nodes[k] = {kind of step, operand, ...}, {input = i} or {constant = v}.
local function number_nodes(tree, position)
  local nodes, by_tree, by_key = {}, {}, {}
  local visit

  local function node(key, value)
    if not by_key[key] then
      nodes[#nodes + 1] = value
      by_key[key] = #nodes
    end
    return by_key[key]
  end
  local function constant(v) return node(("c%a/%s"):format(v, v ~= v), {constant = v + 0.0}) end
  local function step(name, ...)
    local operands = {...}
    for i, a in ipairs(operands) do operands[i] = visit(a) end
    return node(name .. " " .. table.concat(operands, " "), {kind = STEPS[name].kind, table.unpack(operands)})
  end

  function visit(e)
    if by_tree[e] then return by_tree[e] end
    local kind, n = e[1]
    if kind == "num" then n = constant(tonumber(e[2]))
    elseif kind == "id" and position[e[2]] then n = node("i" .. e[2], {input = position[e[2]]})
    elseif kind == "id" then n = constant(CONSTANTS[e[2]])
    elseif kind == "neg" and e[2][1] == "num" then n = constant(-tonumber(e[2][2]))
    elseif kind == "neg" then n = step("neg", e[2])
    elseif kind == "not" then n = step("!", e[2])
    elseif kind == "bin" then n = step(e[2], e[3], e[4])
    elseif kind == "if" then n = step("?:", e[2], e[3], e[4])
    else n = step(e[2], table.unpack(e[3])) end
    by_tree[e] = n
    return n
  end

  local root = visit(tree)
  if not nodes[root].kind then nodes[#nodes + 1] = {kind = STEPS.copy.kind, root} end
  return nodes
end

-- Gives every step a register, which is free again once nothing reads it.
-- -> constants, number of registers, flat list of steps
local function allocate(nodes, inputs)
  local last, slot, constants = {}, {}, {}
  for k, node in ipairs(nodes) do
    for _, from in ipairs(node) do last[from] = k end
    if node.input then slot[k] = node.input - 1 end
    if node.constant then
      slot[k] = inputs + #constants
      constants[#constants + 1] = node.constant
    end
  end
  local free, registers, steps = {}, 0, {}
  for k, node in ipairs(nodes) do
    if node.kind then
      local from = {}
      for i = 1, 3 do from[i] = slot[node[i] or node[1]] end
      local seen = {}
      for _, n in ipairs(node) do
        if nodes[n].kind and last[n] == k and not seen[n] then free[#free + 1] = slot[n] end
        seen[n] = true
      end
      slot[k] = 0xffff
      if k < #nodes then
        slot[k] = table.remove(free)
        if not slot[k] then
          slot[k] = inputs + #constants + registers
          registers = registers + 1
        end
      end
      table.move({node.kind, slot[k], from[1], from[2], from[3]}, 1, 5, #steps + 1, steps)
    end
  end
  return constants, registers, steps
end

local LOGICAL = {["=="] = true, ["!="] = true, ["<"] = true, ["<="] = true, [">"] = true, [">="] = true,
  ["&&"] = true, ["||"] = true}

local function gives_bool(tree) return tree[1] == "not" or (tree[1] == "bin" and LOGICAL[tree[2]]) or false end

-- ====== Functions ======

---@class Elementwise
---@field name string
---@field formula string the formula it was made of
---@field inputs string[] names of the inputs, in the order of the arguments
---@field params table<string, number> the parameters' defaults
local Elementwise = {__name = "halfmoon.Elementwise"}
Elementwise.__index = Elementwise

local CLASSES = {follow = "T", promote = "P", float32 = "F", low = "L"}

-- inputs: names of the tensors; params: sorted names of the parameters, whose values come after the tensors.
local function make(name, tree, inputs, params, class)
  local self = {name = name, tree = tree, inputs = inputs, param_names = params, gradients = {}, given = {}}
  local position, all = {}, {}
  for _, list in ipairs {inputs, params} do
    for _, input in ipairs(list) do
      all[#all + 1] = input
      position[input] = #all
    end
  end
  local constants, registers, steps = allocate(number_nodes(tree, position), #all)
  local ok, handle = pcall(core.expression_new, name, all, class, gives_bool(tree), constants, registers, steps)
  if not ok then raise("%s", (tostring(handle):gsub("^[^\n]-:%d+: ", ""))) end
  self.handle = handle
  return setmetatable(self, Elementwise)
end

-- Name of the upstream gradient that no input has.
local function fresh(self, name)
  local used = {}
  for _, list in ipairs {self.inputs, self.param_names} do
    for _, input in ipairs(list) do used[input] = true end
  end
  while used[name] do name = name .. "_" end
  return name
end

-- Those of a list of names that a tree uses.
local function used_of(tree, list)
  local names, used = expr.names(tree), {}
  for _, name in ipairs(list) do
    if names[name] then used[#used + 1] = name end
  end
  return used
end

-- A gradient as a function; g and out: the names of the upstream gradient and of the result in its tree.
local function make_gradient(self, tree, g, out)
  local candidates = table.move(self.inputs, 1, #self.inputs, 2, {g})
  if out then candidates[#candidates + 1] = out end
  local used = used_of(tree, candidates)
  if #used == 0 then return {zero = true} end
  return {f = make(self.name, tree, used, used_of(tree, self.param_names), "T"), g = g, out = out}
end

-- The gradient by input number i: {plain, graph}; `graph` is for create_graph and does not read the result.
-- nil: there is none.
local function gradient(self, i)
  local known = self.gradients[i]
  if known ~= nil then return known or nil end
  local input, given = self.inputs[i], self.given[self.inputs[i]]
  local found = false
  if given then
    local plain = make_gradient(self, given.tree, "g", given.out)
    local whole = given.out and substitute(given.tree, {[given.out] = self.tree})
    found = {plain = plain, graph = whole and make_gradient(self, whole, "g") or plain}
  elseif given == nil then
    local g = fresh(self, "g")
    local d = expr.diff(self.tree, input)
    if not d then
      raise("%s: the derivative by %s is not known\n  hint: give it: grad = {%s = \"g * ...\"}, or grad = false",
        self.name, input, input)
    end
    local plain = expr.is_zero(d) and {zero = true} or make_gradient(self, expr.mul({"id", g}, d), g)
    found = {plain = plain, graph = plain}
  end
  self.gradients[i] = found
  return found or nil
end

-- What backward needs of a call: the tensors that some wanted gradient reads, and their versions.
local function keep(operands, inputs, wanted, y)
  local kept = {}
  local function take(name, t)
    if not kept[name] then
      local alias = t:detach()
      kept[name] = {tensor = t, alias = alias, version = core.expression_version(alias)}
    end
  end
  for _, w in ipairs(wanted) do
    for _, which in ipairs {w.plain, w.graph} do
      for _, name in ipairs(which.f and which.f.inputs or {}) do
        if name == which.out then
          take(name, y)
          kept[name].tensor = nil -- the result's graph would keep itself alive; `graph` does not read it
        end
        for i, input in ipairs(inputs) do
          if input == name and core.is_tensor(operands[i]) then take(name, operands[i]) end
        end
      end
    end
  end
  return kept
end

-- The value of one gradient, given the upstream one.
local function evaluate(self, which, g, kept, values, graph)
  if which.zero then return core.zeros(g.shape, {dtype = g.dtype, device = g.device}) end
  local f, args = which.f, {}
  for i, name in ipairs(f.inputs) do
    local k = kept[name]
    if name == which.g then
      args[i] = g
    elseif not k then
      args[i] = values[name] -- a number
    else
      if core.expression_version(k.alias) ~= k.version then
        raise("backward: %s of %s, %s, was changed in place after it was saved\n"
          .. "  hint: use the form that makes a new tensor", name, self.name, errors.describe(k.alias))
      end
      args[i] = graph and k.tensor or k.alias
    end
  end
  return f:apply(args, values)
end

-- Makes y the result of a node, unless no gradient by an input that wants one is known.
local function record(self, operands, values, y)
  local tensors, wanted = {}, {}
  for i = 1, #self.inputs do
    local t = operands[i]
    if core.is_tensor(t) and t.requires_grad then
      local found = gradient(self, i)
      if found then
        tensors[#tensors + 1] = t
        wanted[#tensors] = found
      end
    end
  end
  if #tensors == 0 then return end
  local kept = keep(operands, self.inputs, wanted, y)
  core.record_custom(self.name, tensors, {y}, function(g)
    local graph, grads = core.is_grad_enabled(), {}
    for k, w in ipairs(wanted) do grads[k] = evaluate(self, graph and w.graph or w.plain, g, kept, values, graph) end
    return table.unpack(grads, 1, #tensors)
  end)
end

-- operands: tensors and numbers by position; values: parameters (and number inputs) by name.
function Elementwise:apply(operands, values)
  local all, n = table.move(operands, 1, #self.inputs, 1, {}), #self.inputs
  for i, name in ipairs(self.param_names) do all[n + i] = values[name] end
  local y, wanted = core.expression_call(self.handle, table.unpack(all, 1, n + #self.param_names))
  if wanted then record(self, operands, values, y) end
  return y
end

-- Parameters of a call: the defaults and what a last table sets.
local function read_params(self, given)
  if not given then return self.params end
  local values = {}
  for name, value in pairs(self.params) do values[name] = value end
  for name, value in pairs(given) do
    if self.params[name] == nil then options.unknown(self.name, name, self.param_names) end
    if type(value) ~= "number" then
      raise("%s: parameter '%s' must be a number, not %s", self.name, name, errors.describe(value))
    end
    values[name] = value
  end
  return values
end

-- Tensors alone, the common case.
local function call_plain(self, ...)
  local y, wanted = core.expression_call(self.handle, ...)
  if wanted then record(self, {...}, self.params, y) end
  return y
end

function Elementwise:__call(...)
  local n, given = select("#", ...)
  local plain = n == #self.inputs and #self.param_names == 0
  for i = 1, plain and n or 0 do plain = plain and type((select(i, ...))) == "userdata" end
  if plain then return call_plain(self, ...) end
  local operands = {...}
  if n > 0 and type(operands[n]) == "table" then
    given = operands[n]
    operands[n], n = nil, n - 1
  end
  if n ~= #self.inputs then
    raise("%s: %d input%s wanted (%s), got %d\n  %s", self.name, #self.inputs, #self.inputs == 1 and " is" or "s are",
      table.concat(self.inputs, ", "), n, self.formula)
  end
  local values = read_params(self, given)
  for i = 1, n do
    if type(operands[i]) == "number" then
      if values == self.params then values = setmetatable({}, {__index = self.params}) end
      values[self.inputs[i]] = operands[i]
    end
  end
  return self:apply(operands, values)
end

function Elementwise:__tostring() return ("%s: %s"):format(self.name, self.formula) end

-- ====== Options ======

local SPEC = {
  inputs = {"table"},
  params = {"table"},
  grad = {"string|table|boolean"},
  cast = {"string", "follow", options.one_of("follow", "promote", "float32", "low")},
  name = {"string", "elementwise"},
}

-- Checks params -> table of numbers, sorted names.
local function check_params(where, params)
  local values, names = {}, {}
  for name, value in pairs(params or {}) do
    if type(name) ~= "string" or not name:match("^[%a_][%w_]*$") then
      raise("%s: params must be names with numbers, got the key %s", where, errors.describe(name))
    end
    if type(value) ~= "number" then
      raise("%s: parameter '%s' must be a number, not %s", where, name, errors.describe(value))
    end
    values[name] = value
    names[#names + 1] = name
  end
  table.sort(names)
  return values, names
end

-- The inputs' names: as they appear, or as given.
local function choose_inputs(where, text, out, order, places, opts, params)
  local appear, position = {}, {}
  for _, name in ipairs(order) do
    if name == out then refuse(where, text, places[name], "%s is the result and cannot be read", name) end
    if params[name] == nil then appear[#appear + 1] = name end
  end
  for name in pairs(params) do
    if not places[name] then raise("%s: parameter '%s' does not occur in the formula\n  %s", where, name, text) end
  end
  if not opts.inputs then return appear end
  for i, name in ipairs(opts.inputs) do
    if not places[name] or params[name] ~= nil then
      raise("%s: input '%s' does not occur in the formula\n  %s", where, tostring(name), text)
    end
    if position[name] then raise("%s: input '%s' is listed twice", where, name) end
    position[name] = i
  end
  for _, name in ipairs(appear) do
    if not position[name] then
      local near = errors.closest(name, opts.inputs)
      refuse(where, text, places[name], "'%s' is no input and no parameter%s", name,
        near and (", did you mean '%s'?"):format(near) or "")
    end
  end
  return table.move(opts.inputs, 1, #opts.inputs, 1, {})
end

-- Reads one given gradient.
local function read_gradient(where, self, out, input, text)
  if type(text) ~= "string" then
    raise("%s: the gradient by %s must be a formula or false, not %s", where, input, errors.describe(text))
  end
  local whole = text:match("^%s*[%a_][%w_]*%s*=[^=]") and text or ("g%s = %s"):format(input, text)
  local _, tree, order, places = read_formula(where, whole, ("g%s = g * ..."):format(input))
  if out == "g" then raise("%s: the name g stands for the gradient of the result; call the result otherwise", where) end
  local known = {g = true, [out] = true}
  for _, list in ipairs {self.inputs, self.param_names} do
    for _, name in ipairs(list) do
      if name == "g" then raise("%s: the name g stands for the gradient of the result; call the input otherwise", where) end
      known[name] = true
    end
  end
  for _, name in ipairs(order) do
    if not known[name] then refuse(where, whole, places[name], "there is no '%s' in the formula", name) end
  end
  if not places.g then
    raise("%s: the gradient by %s does not use g, the gradient of %s\n  %s", where, input, out, whole)
  end
  return {tree = tree, out = places[out] and out or nil}
end

-- opts.grad -> self.given[input] = {tree, out}, false (none), nil (derived)
local function read_gradients(where, self, out, grad)
  if grad == false then
    for _, input in ipairs(self.inputs) do self.given[input] = false end
    return
  end
  if type(grad) == "string" then
    local name = grad:match("^%s*g([%a_][%w_]*)%s*=[^=]")
    if not name and #self.inputs == 1 then name = self.inputs[1] end
    if not name then raise("%s: grad must be like \"g%s = g * ...\", got %q", where, self.inputs[1], grad) end
    grad = {[name] = grad}
  elseif grad == true then
    raise("%s: option 'grad' must be a formula, a table of formulas or false", where)
  end
  for name, text in pairs(grad or {}) do
    local position
    for i, input in ipairs(self.inputs) do position = position or (input == name and i) end
    if not position then options.unknown(where .. ": grad", name, self.inputs) end
    self.given[name] = text ~= false and read_gradient(where, self, out, name, text)
  end
end

--- hm.elementwise(formula [, {inputs, params, grad, cast, name}]) -> a function of tensors (and numbers), computed in
--- one pass on any device.
---
--- inputs: their names in the order of the arguments; by default as they appear.  params: numbers that a call may set
--- in a last table, with their defaults.  grad: by default derivatives are found symbolically; a formula
--- "gx = g * ..." or a table {x = "g * ...", y = false} gives them, where g is the gradient of the result and the
--- result's name may be used; false: not differentiable.  cast: what autocast does, "follow" (nothing), "promote",
--- "float32" (compute and answer in float32) or "low" (cast to the region's dtype).
---@param formula string like "y = x * tanhf(log1pf(expf(x)))"
---@param opts {inputs: string[]?, params: table<string, number>?, grad: string|table|false|nil, cast: string?, name: string?}?
---@return Elementwise
local function elementwise(formula, opts)
  opts = options.check("elementwise", opts, SPEC)
  local where = opts.name
  if type(formula) ~= "string" then
    raise("%s: the formula must be a string, not %s", where, errors.describe(formula))
  end
  local params, param_names = check_params(where, opts.params)
  local out, tree, order, places = read_formula(where, formula, "y = x * tanh(x)")
  local inputs = choose_inputs(where, formula, out, order, places, opts, params)
  if #inputs == 0 then raise("%s: the formula has no input\n  %s", where, formula) end
  local self = make(where, tree, inputs, param_names, CLASSES[opts.cast])
  self.formula, self.params = formula, params
  read_gradients(where, self, out, opts.grad)
  return self
end

return elementwise
