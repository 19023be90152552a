--- nn/containers.lua -- modules made of modules or parameters: Sequential, ModuleList, ModuleDict, ParameterList,
--- ParameterDict.
--
-- Lua positions count from 1; in state dicts position i is key i-1, as in PyTorch's files.

local core = require "halfmoon.core"
local class = require "halfmoon.nn.class"
local errors = require "halfmoon.errors"

local containers = {}

--- The length operator of a container that is an array.
local function length(self) return rawlen(self) end

--- Refuses to be called: the class holds things and computes nothing.
local function no_call(name, hint)
  return function()
    errors.raise("%s cannot be called: it only holds %s\n  hint: %s", name,
      name:find("^Parameter") and "parameters" or "modules", hint)
  end
end

--- Puts modules (or one array of them) behind those that are there.
local function append(self, where, ...)
  local list = {...}
  if #list == 1 and type(list[1]) == "table" and not class.is_module(list[1]) then list = list[1] end
  for i, module in ipairs(list) do
    if not class.is_module(module) then
      errors.raise("%s: entry %d is %s, not a module%s", where, i, errors.describe(module),
        type(module) == "function" and "\n  hint: activations are modules too, e.g. nn.ReLU()" or "")
    end
    self[rawlen(self) + 1] = module
  end
  return self
end

---@class Sequential: Module
local Sequential = class.class("Sequential")

--- nn.Sequential(a, b, ...) or nn.Sequential{a, b, ...}: calls one after the other.
function Sequential:init(...) append(self, "nn.Sequential", ...) end

function Sequential:forward(x, ...)
  local first = self[1]
  if not first then return x, ... end
  x = first(x, ...)
  for i = 2, rawlen(self) do x = self[i](x) end
  return x
end

--- Puts modules at the end; returns the container.
---@param ... Module
---@return Sequential
function Sequential:append(...) return append(self, "Sequential:append", ...) end
Sequential.add = Sequential.append
Sequential.__instance.__len = length

containers.Sequential = Sequential

---@class ModuleList: Module
local ModuleList = class.class("ModuleList")

--- nn.ModuleList{a, b, ...}: an array whose modules are registered.
function ModuleList:init(...) append(self, "nn.ModuleList", ...) end

--- Puts modules at the end; returns the list.
---@param ... Module
---@return ModuleList
function ModuleList:append(...) return append(self, "ModuleList:append", ...) end
ModuleList.__instance.__len = length
ModuleList.forward = no_call("ModuleList", "call its entries, for _, layer in ipairs(self.layers) do x = layer(x) end")

containers.ModuleList = ModuleList

-- ====== By name ======

--- Sets entries from a table of names, in order of the names, or from an array of {name, value} pairs, in their order.
local function update(self, where, entries, is_fit, wanted)
  if entries == nil then return self end
  if type(entries) ~= "table" then
    errors.raise("%s: expected a table of names, not %s", where, errors.describe(entries))
  end
  local pairs_of = entries
  if entries[1] == nil then
    pairs_of = {}
    for name, value in pairs(entries) do pairs_of[#pairs_of + 1] = {name, value} end
    table.sort(pairs_of, function(a, b) return tostring(a[1]) < tostring(b[1]) end)
  end
  for i, entry in ipairs(pairs_of) do
    local name, value
    if type(entry) == "table" and not class.is_module(entry) then name, value = entry[1], entry[2] end
    if type(name) ~= "string" or name == "" or name:find(".", 1, true) then
      errors.raise("%s: entry %d has no name: expected {name = %s} or {{name, %s}, ...}, names without dots", where, i,
        wanted, wanted)
    end
    if not is_fit(value) then
      errors.raise("%s: '%s' is %s, not a %s", where, name, errors.describe(value), wanted)
    end
    if rawget(self, name) == nil and self[name] ~= nil then
      errors.raise("%s: the name '%s' is taken by a method of modules", where, name)
    end
    self[name] = value
  end
  return self
end

--- Makes a class of containers by name.
local function dict(name, is_fit, wanted)
  local new = class.class(name)
  local where = "nn." .. name
  function new:init(entries) self:update(entries) end
  function new:update(entries)
    return update(self, where, entries, is_fit, wanted)
  end
  function new:items()
    local names, i = self._names, 0
    return function()
      while i < #names do
        i = i + 1
        local value = rawget(self, names[i])
        if value ~= nil then return names[i], value end
      end
    end
  end
  function new:keys()
    local list = {}
    for key in self:items() do list[#list + 1] = key end
    return list
  end
  function new:values()
    local list = {}
    for _, value in self:items() do list[#list + 1] = value end
    return list
  end
  new.__instance.__len = function(self) return #self:keys() end
  new.forward = no_call(name, "use its entries, self.parts.name or for name, part in self.parts:items()")
  containers[name] = new
end

--- nn.ModuleDict{name = module, ...} or nn.ModuleDict{{"name", module}, ...}: modules by name, in order of their names or in
--- the order of the pairs.  dict.name is a module; items(), keys() and values() walk in order; update() adds.
dict("ModuleDict", class.is_module, "module")

--- nn.ParameterDict{name = parameter, ...} or {{"name", parameter}, ...}: parameters by name; plain tensors become parameters.
dict("ParameterDict", core.is_tensor, "tensor")

local plain_update = containers.ParameterDict.update

--- Adds or replaces parameters; plain tensors become parameters.
---@param entries table {name = tensor} or {{name, tensor}, ...}
---@return Module self
function containers.ParameterDict:update(entries)
  plain_update(self, entries)
  for name, t in self:items() do
    if not class.is_parameter(t) then self[name] = class.Parameter(t) end
  end
  return self
end

-- ====== Parameters in an array ======

---@class ParameterList: Module
local ParameterList = class.class("ParameterList")

--- nn.ParameterList{t, u, ...}: an array of parameters; plain tensors become parameters.
---@param list Tensor[]?
function ParameterList:init(list)
  for _, t in ipairs(list or {}) do self:append(t) end
end

--- Puts a parameter at the end; returns the list.
---@param t Tensor
---@return ParameterList
function ParameterList:append(t)
  if not core.is_tensor(t) then
    errors.raise("nn.ParameterList: entry %d is %s, not a tensor", rawlen(self) + 1, errors.describe(t))
  end
  self[rawlen(self) + 1] = class.is_parameter(t) and t or class.Parameter(t)
  return self
end

ParameterList.__instance.__len = length
ParameterList.forward = no_call("ParameterList", "use its entries, self.scales[1]")

containers.ParameterList = ParameterList

return containers
