--- nn/containers.lua -- modules made of modules: Sequential, ModuleList.
--
-- Lua positions count from 1; in state dicts position i is key i-1, as in PyTorch's files.

local class = require "halfmoon.nn.class"
local errors = require "halfmoon.errors"

local containers = {}

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
Sequential.__instance.__len = function(self) return rawlen(self) end

containers.Sequential = Sequential

---@class ModuleList: Module
local ModuleList = class.class("ModuleList")

--- nn.ModuleList{a, b, ...}: an array whose modules are registered.
function ModuleList:init(...) append(self, "nn.ModuleList", ...) end

--- Puts modules at the end; returns the list.
---@param ... Module
---@return ModuleList
function ModuleList:append(...) return append(self, "ModuleList:append", ...) end
ModuleList.__instance.__len = function(self) return rawlen(self) end

function ModuleList:forward() -- luacheck: ignore 212
  errors.raise("ModuleList cannot be called: it only holds modules\n"
    .. "  hint: call its entries, for _, layer in ipairs(self.layers) do x = layer(x) end")
end

containers.ModuleList = ModuleList

return containers
