--- optim/optimizer.lua -- Optimizer: the Lua face of the engine's optimizers, which update all parameters in one call.
--
-- State (moments, step counts) lives in C; a group's options are read and written there through proxies, so that
--     opt.param_groups[1].lr = 0.1
-- takes effect at the next step.

local core = require "halfmoon.core"
local errors = require "halfmoon.errors"
local options = require "halfmoon.options"

local raise, describe = errors.raise, errors.describe

---@class Optimizer
---@field param_groups table[] from 1; fields are the options and `params`
local Optimizer = {}
Optimizer.__index = Optimizer

-- ====== Options ======

local function betas(value)
  if #value == 2 and type(value[1]) == "number" and type(value[2]) == "number" and value[1] >= 0 and value[1] < 1
    and value[2] >= 0 and value[2] < 1 then
    return
  end
  return "must be two numbers from 0 to below 1"
end

--- What C says about the options of a kind, as a declaration.
---@param known table<string, {[1]: number|boolean, [2]: number, [3]: number}>
---@return OptionSpec
local function declare(known)
  local spec = {}
  for name, option in pairs(known) do
    local default, low = option[1], option[2]
    if type(default) == "boolean" then
      spec[name] = {"boolean", default}
    else
      spec[name] = {"number", default, low == 0 and options.at_least(0) or nil}
    end
  end
  if spec.beta1 then
    spec.betas = {"table", {spec.beta1[2], spec.beta2[2]}, betas}
    spec.beta1, spec.beta2 = nil, nil
  end
  if spec.stochastic then
    spec.rounding, spec.stochastic = {"string", "nearest", options.one_of("nearest", "stochastic")}, nil
  end
  return spec
end

--- Options that exclude each other.
local function check(where, o)
  if o.nesterov and (o.momentum <= 0 or o.dampening ~= 0) then
    raise("%s: nesterov needs a momentum above 0 and a dampening of 0", where)
  end
  if o.kahan and o.rounding == "stochastic" then
    raise("%s: kahan and rounding = \"stochastic\" exclude each other", where)
  end
end

-- ====== Groups ======

-- Options that have another form here than in C: how to read one and write one there.  get and set take C names.
local forms = {
  betas = {
    read = function(get) return {get "beta1", get "beta2"} end,
    write = function(set, value) set("beta1", value[1]) set("beta2", value[2]) end,
  },
  rounding = {
    read = function(get) return get "stochastic" and "stochastic" or "nearest" end,
    write = function(set, value) set("stochastic", value == "stochastic") end,
  },
}

--- An option of a group as the user sees it.
local function read(core_optim, index, name)
  local form = forms[name]
  if not form then return core_optim:get(index, name) end
  return form.read(function(c_name) return core_optim:get(index, c_name) end)
end

--- Hands an option on to C's set(name, value).
local function write(set, name, value)
  if forms[name] then forms[name].write(set, value) else set(name, value) end
end

--- Names the optimizers that have what a half-precision parameter without a master asks for.
local function refuse_half(where, spec, given)
  for _, name in ipairs {"kahan", "rounding"} do
    if not spec[name] and type(given) == "table" and given[name] ~= nil then
      raise("%s: the option '%s' is for SGD, Adam and AdamW", where, name)
    end
  end
end

--- A live view of one group.
local function proxy(self, index, params)
  local where = ("%s.param_groups[%d]"):format(self.name, index)
  return setmetatable({}, {
    __name = "ParamGroup",
    __index = function(_, name)
      if name == "params" then return params end
      if self.spec[name] then return read(self.core, index, name) end
    end,
    __newindex = function(_, name, value)
      if name == "params" then raise("%s: the parameters of a group are fixed; use add_param_group", where) end
      local declared = self.spec[name]
      if not declared then options.unknown(where, name, options.names(self.spec)) end
      if value == nil then raise("%s: '%s' cannot be nil", where, name) end
      value = options.value(where, name, value, declared)
      write(function(c_name, v) self.core:set(index, c_name, v) end, name, value)
    end,
    __pairs = function(group)
      local names, i = options.names(self.spec), 0
      return function()
        i = i + 1
        if names[i] then return names[i], group[names[i]] end
      end
    end,
  })
end

--- Adds parameters with options of their own; what is not given is as in the constructor.
---@param group {params: Tensor[]}
function Optimizer:add_param_group(group)
  local where = self.name .. ":add_param_group"
  if type(group) ~= "table" or group.params == nil then
    raise("%s: expected {params = {...}, lr = ...}, not %s", where, describe(group))
  end
  local params = group.params
  if core.is_tensor(params) then params = {params} end
  if type(params) ~= "table" then raise("%s: params must be an array of tensors, not %s", where, describe(params)) end
  local list = {}
  for i, p in ipairs(params) do
    if not core.is_tensor(p) then raise("%s: params[%d] is %s, not a tensor", where, i, describe(p)) end
    if not p.is_leaf then
      raise("%s: params[%d] is the result of an op, %s\n  hint: optimize a leaf: nn.Parameter(t), or t:detach()",
        where, i, describe(p))
    end
    list[i] = p
  end
  local given = {}
  for name, value in pairs(group) do
    if name ~= "params" then given[name] = value end
  end
  refuse_half(where, self.spec, given)
  for name in pairs(self.spec) do
    if given[name] == nil then given[name] = self.defaults[name] end
  end
  given = options.check(where, given, self.spec)
  check(where, given)
  local plain = {}
  for name, value in pairs(given) do write(function(c_name, v) plain[c_name] = v end, name, value) end
  local index = self.core:add_group(list, plain)
  self.param_groups[index] = proxy(self, index, list)
end

-- ====== Steps ======

--- Updates every parameter that has a gradient.
function Optimizer:step(...)
  if select("#", ...) > 0 and type((...)) == "function" then
    raise("%s:step: closures are not supported; compute the loss and call backward before step()", self.name)
  end
  self.core:step()
end

--- Sets the gradients of all parameters to nil.
function Optimizer:zero_grad() self.core:zero_grad() end

-- ====== State ======

--- What a checkpoint needs: {state = {[i] = {step =, exp_avg = ...}}, param_groups = {{lr =, ..., params = {1, 2,
--- ...}}}}.  Parameters are known by their position, from 1.  Tensors share memory with the optimizer.
---@return table
function Optimizer:state_dict()
  local state, groups = {}, {}
  for i = 1, self.core:count() do
    local steps = self.core:param_step(i)
    local entry
    for _, name in ipairs(self.state_names) do
      local t = self.core:state(i, name)
      if t then
        entry = entry or {}
        entry[name] = t
      end
    end
    if entry or steps > 0 then
      entry = entry or {}
      entry.step = steps
      state[i] = entry
    end
  end
  local position = 0
  for g, group in ipairs(self.param_groups) do
    local saved = {params = {}}
    for name, value in pairs(group) do saved[name] = value end
    for i = 1, #group.params do
      position = position + 1
      saved.params[i] = position
    end
    groups[g] = saved
  end
  return {state = state, param_groups = groups}
end

--- Checks everything that load_state_dict is about to set.
local function check_state(self, saved)
  local where = self.name .. ":load_state_dict"
  if type(saved) ~= "table" or type(saved.state) ~= "table" or type(saved.param_groups) ~= "table" then
    raise("%s: expected a table made by state_dict()", where)
  end
  if #saved.param_groups ~= #self.param_groups then
    raise("%s: the optimizer has %d groups, the state has %d", where, #self.param_groups, #saved.param_groups)
  end
  for g, group in ipairs(saved.param_groups) do
    local have, came = #self.param_groups[g].params, type(group.params) == "table" and #group.params or 0
    if have ~= came then raise("%s: group %d has %d parameters, the state has %d", where, g, have, came) end
    for name, value in pairs(group) do
      if name ~= "params" then
        local declared = self.spec[name]
        if not declared then options.unknown(where, name, options.names(self.spec)) end
        options.value(where, name, value, declared)
      end
    end
  end
  for i, entry in pairs(saved.state) do
    local p = math.tointeger(i) and i >= 1 and i <= self.core:count() and self.core:param(i)
    if not p then
      raise("%s: the state has an entry %s, the optimizer has %d parameters", where, tostring(i), self.core:count())
    end
    for _, name in ipairs(self.state_names) do
      local t = entry[name]
      if t ~= nil and not (core.is_tensor(t) and table.concat(t.shape, ",") == table.concat(p.shape, ",")) then
        raise("%s: %s of parameter %d: the parameter is %s, the state is %s", where, name, i, describe(p), describe(t))
      end
    end
  end
end

--- Takes over a state made by state_dict().  Nothing changes if it does not fit.
---@param saved table
function Optimizer:load_state_dict(saved)
  check_state(self, saved)
  for i, entry in pairs(saved.state) do
    for _, name in ipairs(self.state_names) do
      if entry[name] ~= nil then self.core:set_state(i, name, entry[name]) end
    end
    self.core:set_param_step(i, math.tointeger(entry.step) or 0)
  end
  for g, group in ipairs(saved.param_groups) do
    for name, value in pairs(group) do
      if name ~= "params" then self.param_groups[g][name] = value end
    end
  end
end

--- AdamW(lr 0.001, weight_decay 0.01; 6 parameters)
function Optimizer:__tostring()
  local count, parts = 0, {}
  for _, group in ipairs(self.param_groups) do count = count + #group.params end
  for _, name in ipairs {"lr", "momentum", "betas", "weight_decay"} do
    if self.spec[name] and #self.param_groups > 0 then
      local value = self.param_groups[1][name]
      if type(value) == "table" then
        parts[#parts + 1] = ("%s {%g, %g}"):format(name, value[1], value[2])
      elseif value ~= 0 then
        parts[#parts + 1] = ("%s %g"):format(name, value)
      end
    end
  end
  return ("%s(%s; %d parameter%s%s)"):format(self.name, table.concat(parts, ", "), count, count == 1 and "" or "s",
    #self.param_groups > 1 and (" in %d groups"):format(#self.param_groups) or "")
end

-- ====== Kinds ======

--- Makes the constructor of one kind of optimizer.  Options and states are those that C has for it.
---@param name string
---@param c_kind "sgd"|"adam"|"adamw"|"rmsprop"|"adagrad"|"lion"
---@return fun(params: table, options: table?): Optimizer
local function kind(name, c_kind)
  local known = core.optim_kind(c_kind)
  local spec = declare(known.options)
  return function(params, opts)
    local where = "optim." .. name
    local self = setmetatable({
      name = name, core = core.optim_new(c_kind), spec = spec, state_names = known.states, param_groups = {},
    }, Optimizer)
    refuse_half(where, spec, opts)
    self.defaults = options.check(where, opts, spec)
    check(where, self.defaults)
    if core.is_tensor(params) then params = {params} end
    if type(params) ~= "table" then
      raise("%s: expected an array of parameters or of groups, not %s\n  hint: model:parameters()", where,
        describe(params))
    end
    if type(params.parameters) == "function" then
      raise("%s: expected an array of parameters, not a module\n  hint: model:parameters()", where)
    end
    if #params == 0 then raise("%s: the list of parameters is empty", where) end
    if core.is_tensor(params[1]) or type(params[1]) ~= "table" then params = {{params = params}} end
    for _, group in ipairs(params) do self:add_param_group(group) end
    return self
  end
end

return {Optimizer = Optimizer, kind = kind}
