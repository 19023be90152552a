--- amp/layer_scale.lua -- amp.layer_scale: a scale for each layer instead of one for the loss.
--
--     local ls = amp.layer_scale(model, "adaptive")
--     for x, y in loader:batches() do
--       opt:zero_grad()
--       local loss = amp.autocast("float16", function() return F.cross_entropy(model(x), y) end)
--       ls:scale(loss):backward()                 -- loss:backward() does as well, without a scaler
--       local stepped, record = ls:step(opt)
--       ls:update()
--     end
--
-- Inside of each scaled layer gradients carry a scale, and between layers they do; gradients of parameters are always
-- true, and so are those of the model's inputs and of whatever else autograd.grad is asked for.  Residual sums, tensors
-- that are used several times, layers used twice and weights used by two layers are right by construction (see
-- layer_gates.lua); with powers of two, float32 gradients are the same to the bit as without.  What a user's own hooks
-- and retain_grad see of tensors between layers carries a scale.
--
-- Rules are small tables (amp/layer_rules).  With {scaler = amp.GradScaler{...}} a scale of the loss comes on top: then
-- all gradients are true times that scale until the scaler takes it away, and step() and update() are the scaler's.
-- A backward follows the scales that are there when it begins.

local core = require "halfmoon.core"
local class = require "halfmoon.nn.class"
local errors = require "halfmoon.errors"
local gates = require "halfmoon.amp.layer_gates"
local grad_scaler = require "halfmoon.amp.grad_scaler"
local options = require "halfmoon.options"
local rules = require "halfmoon.amp.layer_rules"

local raise, describe = errors.raise, errors.describe

---@class ScaledLayer
---@field name string
---@field module Module
---@field owner LayerScale
---@field index integer
---@field kind string the module's class
---@field terms integer? products added for one element of the input's gradient
---@field slope number? the steepest of the activation that the module applies itself, if that is above 1
---@field state table the rule's
---@field carried number? the scale of gradients inside, in the last backward
---@field overflows integer updates in which a gradient of its parameters was not finite
---@field found {inf_count: integer, nan_count: integer}? since the last update

---@class LayerScale
---@field model Module
---@field rule LayerRule
---@field opts table options that the rule sees
---@field layers ScaledLayer[]
---@field scaler GradScaler
---@field forced table<ScaledLayer, number>? scales in the place of the rule's, in check()
local LayerScale = {}
LayerScale.__index = LayerScale

local taken = setmetatable({}, {__mode = "k"}) -- module that is scaled -> true

-- ====== Which layers ======

--- The parameters of a module and of those below it: {[param] = the module that it belongs to}.  module:parameters()
--- would name them anew.
local function owners(module)
  local found = {}
  for _, below in module:named_modules() do
    for _, value, kind in below:fields() do
      if kind == "parameter" then found[value] = found[value] or below end
    end
  end
  return found
end

--- Does a module have parameters, and none of them belongs to a module below it?
local function is_leaf(module)
  local any = false
  for _, owner in pairs(owners(module)) do
    if owner ~= module then return false end
    any = true
  end
  return any
end

--- How many products a linear layer or convolution adds for one element of its input's gradient; nil for others.
local function terms_of(module)
  local weight = rawget(module, "weight")
  if not core.is_tensor(weight) then return end
  local shape, taps = weight.shape, 1
  for d = 3, #shape do taps = taps * shape[d] end
  if rawget(module, "in_features") and #shape == 2 then return shape[1] end
  if not rawget(module, "in_channels") or #shape < 3 then return end
  if module.__class:find("Transpose", 1, true) then return shape[2] * taps end
  return shape[1] // (rawget(module, "groups") or 1) * taps
end

-- By the activation that a linear layer applies itself: how much larger a gradient may become on its way back through it.
local SLOPES = {gelu_tanh = 1.13}

--- The layers of opts.layers, or the leaves, in the order of the modules: {{name, module}, ...}.
local function choose(model, wanted)
  local names, known, list, chosen = {}, {}, {}, {}
  for name, module in model:named_modules() do
    names[module], known[#known + 1] = name, name
  end
  for i, layer in ipairs(wanted or {}) do
    if type(layer) == "string" then
      local near = errors.closest(layer, known)
      local found
      for module, name in pairs(names) do found = found or (name == layer and module) end
      if not found then
        raise("layer_scale: layers[%d]: the model has no module '%s'%s", i, layer,
          near and (", did you mean '%s'?"):format(near) or "")
      end
      layer = found
    end
    if not class.is_module(layer) or not names[layer] then
      raise("layer_scale: layers[%d] must be a module of the model or its name, not %s", i, describe(layer))
    end
    if not next(owners(layer)) then
      raise("layer_scale: layers[%d], '%s' (%s), has no parameters\n  hint: scales belong to layers that are trained; "
        .. "what lies between them needs none", i, names[layer], layer.__class)
    end
    chosen[layer] = true
  end
  for name, module in model:named_modules() do
    if (wanted and chosen[module]) or (not wanted and is_leaf(module)) then
      list[#list + 1] = {name ~= "" and name or module.__class, module}
    end
  end
  if #list == 0 then raise("layer_scale: %s has no layers with parameters", model.__class) end
  return list
end

-- ====== Rules ======

--- Says something once on the terminal.
local function say_fault(self, layer, what, message)
  if self.told[message] then return end
  self.told[message] = true
  io.stderr:write(("halfmoon: layer-scale rule '%s' failed for layer %s: %s\n  %s; said once\n"):format(
    self.rule.name or "custom", layer.name, message, what))
end

local function positive(value) return type(value) == "number" and value > 0 and value < math.huge end

--- What a function of the rule returns, if it is a scale; else nil and why not.
local function ask(layer, fn, event, opts)
  local ok, value = pcall(fn, layer.state, event, opts)
  if not ok then return nil, tostring(value) end
  if not positive(value) then return nil, ("returned %s; a scale is positive and finite"):format(describe(value)) end
  return value + 0.0
end

--- Makes the state of a layer; raises if the rule's init does.
local function begin_state(self, layer, where)
  local told = {name = layer.name, kind = layer.kind, index = layer.index, terms = layer.terms}
  local ok, state = true, {}
  if self.rule.init then ok, state = pcall(self.rule.init, told, self.opts) end
  if not ok then raise("%s: rule '%s' failed in init: %s", where, self.rule.name or "custom", tostring(state)) end
  if type(state) ~= "table" then
    raise("%s: rule '%s': init returned %s, not a table", where, self.rule.name or "custom", describe(state))
  end
  if state.scale == nil then state.scale = 1.0 end
  if not positive(state.scale) then
    raise("%s: the scale of layer '%s' must be a positive finite number, not %s", where, layer.name,
      describe(state.scale))
  end
  layer.state = state
end

--- The scale that gradients inside a layer are to have, if that is known before they come; for layer_gates.lua.
function LayerScale:scale_of(layer)
  if self.forced then return self.forced[layer] end
  if not self.rule.backward then return layer.state.scale end
end

--- Statistics of a tensor, by reductions on its device and one wait: {count, norm, amax, finite}.
local function measure(t)
  local count = t:numel()
  if count == 0 then return {count = 0, norm = 0.0, amax = 0.0, finite = true} end
  t = t:detach()
  if t.dtype ~= "float64" then t = t:float() end
  local norm, high, low = table.unpack(core.stack({t:norm(), t:max(), t:min()}, 1):totable())
  local amax = math.max(math.abs(high), math.abs(low))
  local finite = norm < math.huge and amax < math.huge -- false for NaN
  return {count = count, norm = norm, amax = amax, finite = finite}
end

--- What a gradient that comes to a layer is multiplied by; for layer_gates.lua.
function LayerScale:factor_of(layer, g, incoming)
  if self.removed or self.forced or not self.rule.backward then return 1.0 end
  local weight = rawget(layer.module, "weight")
  local event = {incoming = incoming, terms = layer.terms, kind = layer.kind, dtype = g.dtype}
  function event.grad()
    local seen, slope = measure(g), layer.slope or 1.0
    seen.norm, seen.amax = seen.norm * slope, seen.amax * slope
    return seen
  end
  function event.weight() return core.is_tensor(weight) and measure(weight) or nil end
  local _ <close> = core.no_grad()
  local factor, why = ask(layer, self.rule.backward, event, self.opts)
  if factor then return factor end
  say_fault(self, layer, "its gradients pass as they are", why)
  return 1.0
end

-- ====== Gates and hooks ======

--- fn put to every tensor in a value that wants a gradient; tables are gone into, other things pass.
local function map(value, fn)
  if core.is_tensor(value) then return value.requires_grad and fn(value) or value end
  if type(value) ~= "table" or getmetatable(value) ~= nil then return value end
  local new = {}
  for k, v in pairs(value) do new[k] = map(v, fn) end
  return new
end

local function map_all(fn, ...)
  local list = table.pack(...)
  for i = 1, list.n do list[i] = map(list[i], fn) end
  return table.unpack(list, 1, list.n)
end

--- Puts gates around a layer; the result is its handles.
local function surround(layer)
  local function enter(t) return gates.put(layer, false, t) end
  local function leave(t) return gates.put(layer, true, t) end
  local function look(t)
    if gates.overwritten(t) then
      raise("layer_scale: layer %s (%s) changes its input in place, so what came before would not learn of it\n"
        .. "  hint: use the form that makes a new tensor, or leave the layer out of {layers = ...}", layer.name,
        layer.kind)
    end
    return t
  end
  local module = layer.module
  return module:register_forward_pre_hook(function(_, ...) return map_all(enter, ...) end),
    module:register_forward_hook(function(_, inputs, ...)
      map_all(look, table.unpack(inputs, 1, inputs.n))
      return map_all(leave, ...)
    end)
end

--- Hooks every parameter of the model that has no hook yet; for layer_gates.lua, too: to() makes new parameters.
---@return boolean added were there any?
function LayerScale:hold_parameters()
  local home = {}
  for _, layer in ipairs(self.layers) do -- the innermost layer wins: parents come first
    for param in pairs(owners(layer.module)) do home[param] = layer end
  end
  local added = false
  for param in pairs(owners(self.model)) do
    if not self.holds[param] then
      self.holds[param], added = gates.hold(param), true
    end
    self.home[param] = home[param]
  end
  return added
end

-- ====== Making one ======

local spec = {layers = {"table"}, scaler = {"table"}, allow_f16_grads = {"boolean"}}

--- The own options and those of the rule.
local function split(given)
  local own, extra = {}, {}
  if given ~= nil and type(given) ~= "table" then
    raise("layer_scale: options must be a table, not %s", describe(given))
  end
  for name, value in pairs(given or {}) do
    if spec[name] then own[name] = value else extra[name] = value end
  end
  return options.check("layer_scale", own, spec), extra
end

--- Options of a rule, and a check of the names in `scales`.
local function rule_options(where, self, rule, extra)
  local opts = rules.options(where, rule, extra, options.names(spec))
  local known = {}
  for i, layer in ipairs(self.layers) do known[i] = layer.name end
  for name, scale in pairs(type(opts.scales) == "table" and opts.scales or {}) do
    if not self.by_name[name] then
      local near = type(name) == "string" and errors.closest(name, known)
      raise("%s: scales: there is no scaled layer %s%s\n  known: %s", where, describe(name),
        near and (", did you mean '%s'?"):format(near) or "", table.concat(known, ", "))
    end
    if not positive(scale) then
      raise("%s: scales: the scale of '%s' must be a positive finite number, not %s", where, name, describe(scale))
    end
  end
  return opts
end

--- A scaler that only checks, unless one was given.
local function scaler_for(own)
  local scaler = own.scaler
  if not scaler then
    return grad_scaler.new {dtype = "float32", allow_f16_grads = own.allow_f16_grads} -- its scale is 1 and stays there
  end
  if own.allow_f16_grads ~= nil then
    raise("layer_scale: allow_f16_grads is an option of the scaler that was given\n"
      .. "  hint: amp.GradScaler{allow_f16_grads = true}")
  end
  if type(scaler.step) ~= "function" or type(scaler.update) ~= "function" then
    raise("layer_scale: option 'scaler' must be an amp.GradScaler, not %s", describe(scaler))
  end
  if scaler.async then
    raise("layer_scale: a scaler with async = true tells of overflows too late for layers to move their scales\n"
      .. "  hint: make the scaler without async")
  end
  return scaler
end

--- amp.layer_scale(model, rule [, opts]): gives each layer a scale of its own, moved by a rule: "layerwise", "adaptive",
--- or a table (see amp/layer_rules).  Layers are the innermost modules with parameters, or opts.layers, modules or their
--- names.  opts.scaler: a GradScaler whose scale comes on top.  Further options are the rule's.
---@param model Module
---@param rule string|LayerRule
---@param opts {layers: (Module|string)[]?, scaler: GradScaler?, allow_f16_grads: boolean?, [string]: any}?
---@return LayerScale
local function new(model, rule, opts)
  if not class.is_module(model) then raise("layer_scale: expected a module, not %s", describe(model)) end
  rule = rules.resolve("layer_scale", rule)
  local own, extra = split(opts)
  local self = setmetatable({
    model = model, rule = rule, layers = {}, by_name = {}, told = {}, handles = {}, steps = 0, skipped = 0,
    holds = setmetatable({}, {__mode = "k"}), home = setmetatable({}, {__mode = "k"}), scaler = scaler_for(own),
  }, LayerScale)
  for i, entry in ipairs(choose(model, own.layers)) do
    local name, module = entry[1], entry[2]
    if taken[module] then
      raise("layer_scale: %s (%s) is scaled already\n  hint: call remove() of the other layer scale first", name,
        module.__class)
    end
    local layer = {name = name, module = module, owner = self, index = i, kind = module.__class, overflows = 0}
    layer.terms, layer.slope = terms_of(module), SLOPES[rawget(module, "activation")]
    self.layers[i], self.by_name[name] = layer, layer
  end
  self.opts = rule_options("layer_scale", self, rule, extra)
  for _, layer in ipairs(self.layers) do begin_state(self, layer, "layer_scale") end
  for _, layer in ipairs(self.layers) do
    taken[layer.module] = true
    local before, after = surround(layer)
    table.move({before, after}, 1, 2, #self.handles + 1, self.handles)
  end
  self:hold_parameters()
  gates.open(self)
  return self
end

--- Takes gates and hooks out of the model.  Graphs that were made before still give true gradients.  May be called again.
function LayerScale:remove()
  if self.removed then return end
  self.removed = true
  for _, handle in ipairs(self.handles) do handle.remove() end
  for _, handle in pairs(self.holds) do handle.remove() end
  for _, layer in ipairs(self.layers) do taken[layer.module] = nil end
  self.handles, self.holds = {}, {}
  gates.close(self)
end

-- ====== A step ======

--- Raises after remove().
local function want_open(self, where)
  if self.removed then raise("%s: this layer scale was removed from its model", where) end
end

--- The loss as it goes into backward: float32, and times the scale of the scaler, if one was given.
---@param outputs Tensor|table
---@return Tensor|table
function LayerScale:scale(outputs, ...)
  want_open(self, "scale")
  return self.scaler:scale(outputs, ...)
end

--- Takes the scaler's scale out of the gradients, in place, and checks them: for clipping, before step().
---@param optimizer Optimizer
function LayerScale:unscale_(optimizer, ...)
  want_open(self, "unscale_")
  return self.scaler:unscale_(optimizer, ...)
end

--- Notes which layers have gradients that are not finite, and names them in the record.
local function note_culprits(self, record)
  local seen = {}
  record.layers = {}
  for _, culprit in ipairs(record.culprits or {}) do
    local layer = self.home[culprit.param]
    culprit.layer = layer and layer.name
    if layer then
      layer.found = layer.found or {inf_count = 0, nan_count = 0}
      layer.found.inf_count = layer.found.inf_count + culprit.inf_count
      layer.found.nan_count = layer.found.nan_count + culprit.nan_count
      if not seen[layer] then table.insert(record.layers, layer.name) end
      seen[layer] = true
    end
  end
end

--- Checks the gradients and steps the optimizer, or skips it if one of any layer is not finite.
---@param optimizer Optimizer
---@param opts table? as GradScaler's step
---@return boolean stepped
---@return table record as GradScaler's; culprits have `layer`, and `layers` are the names of those, nearest the loss first
function LayerScale:step(optimizer, opts)
  want_open(self, "step")
  local stepped, record = self.scaler:step(optimizer, opts)
  if record.empty then return stepped, record end
  self.checked = true
  note_culprits(self, record)
  if not stepped then
    self.overflowed = true
    self.last_skip = {step = self.steps + 1, name = record.layers[1]}
  end
  return stepped, record
end

--- Moves the scale of one layer; returns what happened.
local function move(self, layer)
  local old, found = layer.state.scale, layer.found
  if found then layer.overflows = layer.overflows + 1 end
  layer.found = nil
  if not self.rule.update then return {old_scale = old, new_scale = old, event = "hold"} end
  local before = {}
  for k, v in pairs(layer.state) do before[k] = v end
  local scale, why = ask(layer, self.rule.update, {
    found_inf = found ~= nil, skipped = self.overflowed == true, inf_count = found and found.inf_count or 0,
    nan_count = found and found.nan_count or 0, step = self.steps, scale = old,
  }, self.opts)
  if not scale then
    layer.state = before -- half an update is none
    say_fault(self, layer, ("its scale stays %.14g"):format(old), why)
    return {old_scale = old, new_scale = old, event = "fault", message = why}
  end
  layer.state.scale = scale
  return {old_scale = old, new_scale = scale, event = scale > old and "grow" or scale < old and "backoff" or "hold"}
end

--- Ends the iteration: each layer moves its scale by the rule, and the scaler, if one was given, its own.
---@return {skipped: boolean, layers: table<string, table>, scaler: table} record layers: {old_scale, new_scale, event} by name
function LayerScale:update(...)
  want_open(self, "update")
  local record = {skipped = self.overflowed == true, layers = {}}
  if self.checked then
    self.steps = self.steps + 1
    if record.skipped then self.skipped = self.skipped + 1 end
    for _, layer in ipairs(self.layers) do record.layers[layer.name] = move(self, layer) end
  end
  self.checked, self.overflowed = nil, nil
  record.scaler = self.scaler:update(...)
  return record
end

-- ====== Reading and setting ======

--- The layer of a name; raises with the closest known one.
local function layer_of(self, where, name)
  local layer = self.by_name[name]
  if layer then return layer end
  local known = {}
  for i, other in ipairs(self.layers) do known[i] = other.name end
  local near = type(name) == "string" and errors.closest(name, known)
  raise("%s: there is no scaled layer %s%s\n  known: %s", where, describe(name),
    near and (", did you mean '%s'?"):format(near) or "", table.concat(known, ", "))
end

--- The scale of a layer by name: what its gradients carry, of rules without backward; else its last factor.
---@param name string
---@return number
function LayerScale:get_scale(name) return layer_of(self, "get_scale", name).state.scale end

--- The scales of all layers by name.
---@return table<string, number>
function LayerScale:get_scales()
  local scales = {}
  for _, layer in ipairs(self.layers) do scales[layer.name] = layer.state.scale end
  return scales
end

--- What gradients inside the layers carried in the last backward, by name; layers that none reached are left out.
---@return table<string, number>
function LayerScale:carried()
  local scales = {}
  for _, layer in ipairs(self.layers) do scales[layer.name] = layer.carried end
  return scales
end

--- Sets the scale of a layer, for rules that keep it.
---@param name string
---@param scale number
function LayerScale:set_scale(name, scale)
  local layer = layer_of(self, "set_scale", name)
  if self.rule.backward then
    raise("set_scale: rule '%s' finds its scales in each backward", self.rule.name or "custom")
  end
  if not positive(scale) then
    raise("set_scale: the scale must be a positive finite number, not %s", describe(scale))
  end
  layer.state.scale = scale + 0.0
end

--- Changes the rule; scales stay where both rules keep them.
---@param rule string|LayerRule
---@param opts table? options of the rule
function LayerScale:set_rule(rule, opts)
  want_open(self, "set_rule")
  rule = rules.resolve("set_rule", rule)
  local checked = rule_options("set_rule", self, rule, opts or {})
  local old_rule, old_opts, old = self.rule, self.opts, {}
  for i, layer in ipairs(self.layers) do old[i] = layer.state end
  self.rule, self.opts, self.told = rule, checked, {}
  local ok, why = pcall(function()
    for _, layer in ipairs(self.layers) do begin_state(self, layer, "set_rule") end
  end)
  if not ok then
    self.rule, self.opts = old_rule, old_opts
    for i, layer in ipairs(self.layers) do layer.state = old[i] end
    error(why, 0)
  end
  if old_rule.backward or rule.backward then return end
  for i, layer in ipairs(self.layers) do
    local given = type(checked.scales) == "table" and checked.scales[layer.name]
    if not given then layer.state.scale = old[i].scale end
  end
end

-- ====== Proof ======

--- The gradients of all parameters after a backward of fn() under given scales.
local function gradients(self, fn, scales, random)
  self.forced = scales
  core.set_random_states(random)
  for _, p in ipairs(self.model:parameters()) do p.grad = nil end
  local loss = fn()
  if not core.is_tensor(loss) then raise("check: the function returned %s, not a loss", describe(loss)) end
  loss:backward()
  local grads = {}
  for name, p in self.model:named_parameters() do grads[name] = p.grad end
  return grads
end

--- The largest |a - b| over the largest |a| in float32; 0 only if they are equal.
local function difference(a, b)
  if not a or not b then return a == b and 0 or math.huge end
  local d = (a:float() - b:float()):abs():max():item()
  if d == 0 then return 0 end
  local most = a:float():abs():max():item()
  return d == d and most > 0 and d / most or math.huge
end

--- Proves that gradients do not depend on the scales: runs fn(), which makes a loss of the model, and its backward with
--- all scales 1 and again with powers of two from 1/8 to 128, and compares.  In float32 all is equal to the bit; in float16 the difference
--- shows what the scales change.  Gradients, scales and random states are left as they were; statistics that a forward
--- keeps (batch norm) are not.
---@param fn fun(): Tensor
---@return {equal: boolean, worst: {name: string, difference: number}, differences: table<string, number>}
function LayerScale:check(fn)
  want_open(self, "check")
  if type(fn) ~= "function" then raise("check: expected a function that makes a loss, not %s", describe(fn)) end
  local ones, powers, aside, carried = {}, {}, {}, self:carried()
  for i, layer in ipairs(self.layers) do ones[layer], powers[layer] = 1.0, 2.0 ^ ((7 * i) % 11 - 3) end
  local params, random = self.model:parameters(), core.random_states()
  for _, p in ipairs(params) do aside[p] = p.grad end
  local ok, plain, scaled = pcall(function()
    local plain = gradients(self, fn, ones, random)
    return plain, gradients(self, fn, powers, random)
  end)
  self.forced = nil
  core.set_random_states(random)
  for _, p in ipairs(params) do p.grad = aside[p] end
  for _, layer in ipairs(self.layers) do layer.carried = carried[layer.name] end
  if not ok then error(plain, 0) end
  local report = {equal = true, differences = {}, worst = {difference = 0}}
  for name in self.model:named_parameters() do
    local d = difference(plain[name], scaled[name])
    report.differences[name] = d
    report.equal = report.equal and d == 0
    if d > report.worst.difference or not report.worst.name then report.worst = {name = name, difference = d} end
  end
  return report
end

-- ====== State ======

--- The rule's name, the state of each layer by name, and the counters.  A scaler that was given has a state of its own.
---@return table
function LayerScale:state_dict()
  local layers = {}
  for _, layer in ipairs(self.layers) do
    local state = {}
    for k, v in pairs(layer.state) do state[k] = v end
    layers[layer.name] = {state = state, overflows = layer.overflows}
  end
  return {
    rule = self.rule.name or "custom", layers = layers, steps = self.steps, skipped = self.skipped,
    last_skip = self.last_skip and {step = self.last_skip.step, name = self.last_skip.name},
  }
end

--- Takes over a state made by state_dict() under the same rule, with the same layers.
---@param saved table
function LayerScale:load_state_dict(saved)
  local where = "load_state_dict"
  if type(saved) ~= "table" or type(saved.layers) ~= "table" then
    raise("%s: expected a table made by state_dict() of a layer scale, not %s", where, describe(saved))
  end
  if saved.rule ~= (self.rule.name or "custom") then
    raise("%s: the state was made by rule '%s', this is '%s'\n  hint: set_rule first", where, tostring(saved.rule),
      self.rule.name or "custom")
  end
  for name, entry in pairs(saved.layers) do
    layer_of(self, where, name)
    if type(entry) ~= "table" or type(entry.state) ~= "table" or not positive(entry.state.scale) then
      raise("%s: the state of layer '%s' has no scale", where, name)
    end
  end
  for _, layer in ipairs(self.layers) do
    if not saved.layers[layer.name] then raise("%s: the state has no layer '%s'", where, layer.name) end
  end
  for _, name in ipairs {"steps", "skipped"} do
    options.value(where, name, saved[name], {"integer", nil, options.at_least(0)})
  end
  for _, layer in ipairs(self.layers) do
    local entry = saved.layers[layer.name]
    layer.state, layer.found = {}, nil
    for k, v in pairs(entry.state) do layer.state[k] = v end
    layer.overflows = math.tointeger(entry.overflows) or 0
  end
  self.steps, self.skipped = math.tointeger(saved.steps), math.tointeger(saved.skipped)
  local last = saved.last_skip
  self.last_skip = type(last) == "table" and {step = last.step, name = last.name} or nil
  self.checked, self.overflowed = nil, nil
end

-- ====== Text ======

--- A table of the layers: their scale, what gradients inside carried in the last backward, and overflows.
function LayerScale:__tostring()
  local last = self.last_skip
  local head = ("LayerScale  rule %s  layers %d  steps %d  skipped %d%s%s"):format(self.rule.name or "custom",
    #self.layers, self.steps, self.skipped,
    last and (" (last: step %d%s)"):format(last.step, last.name and ", " .. last.name or "") or "",
    self.removed and "  removed" or "")
  local rows, width, lines = {{"layer", "kind", "scale", "carried", "overflows"}}, {}, {head}
  for _, layer in ipairs(self.layers) do
    rows[#rows + 1] = {
      layer.name, layer.kind, ("%.6g"):format(layer.state.scale), layer.carried and ("%.6g"):format(layer.carried) or "-",
      tostring(layer.overflows),
    }
  end
  for _, row in ipairs(rows) do
    for i, text in ipairs(row) do width[i] = math.max(width[i] or 0, #text) end
  end
  for _, row in ipairs(rows) do
    local parts = {}
    for i, text in ipairs(row) do
      local pad = (" "):rep(width[i] - #text)
      parts[i] = i <= 2 and text .. pad or pad .. text
    end
    lines[#lines + 1] = "  " .. table.concat(parts, "  ")
  end
  return table.concat(lines, "\n")
end

return {new = new, LayerScale = LayerScale}
