--- amp/layer_gates.lua -- private to amp.layer_scale: gradients that carry scales, and why their sums stay exact.
--
-- A gate is a function in the graph that gives back its input and, in backward, multiplies the gradient by a number.
-- Each tensor that goes into or comes out of a scaled layer passes one.  Gates cut the graph into parts.  Inside of a
-- part gradients are added freely (residual sums, a tensor used twice, a weight used by two layers), so the rule is:
--
--     every part has one scale in one backward, and a gate from part a to part b multiplies by scale(b) / scale(a).
--
-- By that a stored gradient is the true one times the scale of its part, whatever the topology.  The parts are found
-- before each backward, in one pass over the graph (core.graph_parts).  The parts of the roots have scale 1, and so has
-- every part in which a gradient can be seen from outside: tensors asked for by autograd.grad, and leaves that are no
-- parameters of a scaled model.  Parameters have a hook that divides by the scale of their part.  All other parts get
-- their scale from the layers: before backward, where a rule knows it, else from the first gradient that comes in; later
-- ones are converted to it.
--
-- Backward through graphs that were made under several layer scales at once follows one plan for all.

local core = require "halfmoon.core"

local gates = {}

--- The name of gates in the graph: core.graph_parts cuts there, and tensor.grad_fn shows it.
gates.NAME = "layer_scale"

---@class GradPart
---@field scale number? what gradients in this part are multiplied by, in the backward that runs; nil: not known yet
---@field inside ScaledLayer[]? layers that this part is the inside of
---@field makers ScaledLayer[]? layers whose results lie in this part

---@class Gate
---@field layer ScaledLayer
---@field leaving boolean true: at a result of the layer; false: at an argument
---@field above GradPart? in a backward that runs: where the gradient comes from
---@field below GradPart? and where it goes

local live = setmetatable({}, {__mode = "k"}) -- LayerScale -> true
local gate_of = setmetatable({}, {__mode = "k"}) -- backward function -> Gate
local made = setmetatable({}, {__mode = "k"}) -- what a gate of an argument gave back -> true
local part_of = setmetatable({}, {__mode = "k"}) -- parameter with a hook -> its part in the backward that runs, or false
local holds = setmetatable({}, {__mode = "k"}) -- parameter with a hook -> {hook, count of layer scales that hold it}

-- ====== In backward ======

--- The gradient below a gate.
local function pass(gate, g)
  local above, below = gate.above, gate.below
  if not above then return g end -- no plan: the layer scale was removed
  if not below.scale then
    local factor = gate.leaving and gate.layer.owner:factor_of(gate.layer, g, above.scale) or 1.0
    below.scale = above.scale * factor
  end
  if gate.leaving then gate.layer.carried = below.scale end
  local ratio = below.scale / above.scale
  if ratio == 1 then return g end
  return g * ratio
end

--- Gives t back through a gate, if it wants a gradient.
---@param layer ScaledLayer
---@param leaving boolean
---@param t Tensor
---@return Tensor
function gates.put(layer, leaving, t)
  if not t.requires_grad or not core.is_grad_enabled() then return t end
  local gate = {layer = layer, leaving = leaving}
  local function backward(g)
    if g then return pass(gate, g) end
  end
  local y = core.no_grad(t.detach, t)
  gate_of[backward] = gate
  core.record_custom(gates.NAME, {t}, {y}, backward)
  if not leaving then made[y] = true end
  return y
end

--- Was this tensor given to a layer by a gate, and has the layer changed it in place?
---@param t Tensor
---@return boolean
function gates.overwritten(t) return made[t] == true and t.grad_fn ~= gates.NAME end

--- Makes a parameter's gradient true, once however many layer scales hold it: one plan serves all.  handle.remove() ends
--- this hold, and takes the hook away with the last one.
---@param param Tensor
---@return {remove: fun()} handle
function gates.hold(param)
  local weak = setmetatable({param}, {__mode = "v"}) -- the hook must not keep its parameter
  local hold = holds[param]
  if not hold then
    hold = {count = 0, hook = param:register_hook(function(g)
      local part = weak[1] and part_of[weak[1]]
      if part and part.scale and part.scale ~= 1 then return g / part.scale end
    end)}
    holds[param], part_of[param] = hold, false
  end
  hold.count = hold.count + 1
  return {remove = function()
    hold.count = hold.count - 1
    if hold.count > 0 then return end
    hold.hook:remove()
    if weak[1] then holds[weak[1]], part_of[weak[1]] = nil, nil end
  end}
end

-- ====== The plan of a backward ======

--- Notes a layer in a list of a part, once.
local function add(part, list, layer)
  part[list] = part[list] or {}
  for _, other in ipairs(part[list]) do
    if other == layer then return end
  end
  table.insert(part[list], layer)
end

--- The smallest scale that some layers want, of those that know theirs.
local function smallest(layers)
  local least
  for _, layer in ipairs(layers or {}) do
    local scale = layer.owner:scale_of(layer)
    if scale and (not least or scale < least) then least = scale end
  end
  return least
end

--- Cuts the graph.  Result: {n, cuts, asked, leaves} of core.graph_parts, and the parameters that stand in `asked`
--- behind the roots and inputs.
local function cut(roots, inputs)
  local asked, held = table.move(roots, 1, #roots, 1, {}), {}
  table.move(inputs, 1, #inputs, #asked + 1, asked)
  for param in pairs(part_of) do held[#held + 1] = param end
  table.move(held, 1, #held, #asked + 1, asked)
  return core.graph_parts(gates.NAME, roots, asked), held
end

--- cut(), after a look for parameters that have no hook yet, as to() leaves them, if there are leaves without one.
local function cut_anew(roots, inputs)
  local found, held = cut(roots, inputs)
  if #found.leaves == 0 then return found, held end
  local added = false
  for scale in pairs(live) do added = scale:hold_parameters() or added end
  if added then return cut(roots, inputs) end
  return found, held
end

--- Scale 1 where gradients are seen from outside; what parts the parameters lie in.  A parameter that is a root or asked
--- for is divided by its hook, as ever.
local function place_tensors(found, parts, roots, inputs, held)
  local before, seen = {}, #roots + #inputs
  for _, number in ipairs(found.leaves) do parts[number].scale = 1.0 end
  for i = 1, seen do
    local t = roots[i] or inputs[i - #roots]
    local number = found.asked[i]
    if number > 0 and (i <= #roots or part_of[t] == nil) then parts[number].scale = 1.0 end
  end
  for i, param in ipairs(held) do
    before[param] = part_of[param]
    part_of[param] = parts[found.asked[seen + i]] or false
  end
  return before
end

--- Tells gates what lies above and below them, and parts which layers they belong to.  Result: {gate, what it knew
--- before}: a backward may be called by a hook inside of another.
local function place_gates(cuts, parts)
  local here = {}
  for i = 1, #cuts, 3 do
    local gate = gate_of[cuts[i]]
    here[#here + 1] = {gate, gate.above, gate.below}
    gate.above, gate.below = parts[cuts[i + 1]], parts[cuts[i + 2]]
    if live[gate.layer.owner] then
      add(gate.leaving and gate.below or gate.above, "inside", gate.layer)
      if gate.leaving then add(gate.above, "makers", gate.layer) end
    end
  end
  return here
end

--- Called before each backward.  Returns what ends the plan.
local function begin(roots, inputs)
  if next(live) == nil then
    core.on_backward(nil)
    return
  end
  inputs = inputs or {}
  local found, held = cut_anew(roots, inputs)
  local parts = {}
  for i = 1, found.n do parts[i] = {} end
  local before = place_tensors(found, parts, roots, inputs, held)
  local here = place_gates(found.cuts, parts)
  for _, part in ipairs(parts) do
    part.scale = part.scale or smallest(part.inside) or (not part.inside and smallest(part.makers)) or nil
  end
  return function()
    for leaf, part in pairs(before) do
      if part_of[leaf] ~= nil then part_of[leaf] = part end
    end
    for _, entry in ipairs(here) do entry[1].above, entry[1].below = entry[2], entry[3] end
  end
end

--- Plans follow this layer scale from now on.
---@param scale LayerScale
function gates.open(scale)
  live[scale] = true
  core.on_backward(begin)
end

--- Plans no longer do.
---@param scale LayerScale
function gates.close(scale)
  live[scale] = nil
  if next(live) == nil then core.on_backward(nil) end
end

return gates
