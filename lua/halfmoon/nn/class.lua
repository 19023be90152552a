--- nn/class.lua -- Module: the base of every model and layer, and nn.class, which makes new kinds of module.
--
-- An instance is a plain table.  Its fields are read directly; the first assignment of a field passes through
-- __newindex, which notes the name in `_names`.  What counts as a child, a parameter or a buffer is decided when the
-- module is walked, by what the fields hold then; so a field may be replaced at any time, and order is always that of
-- first assignment.
--
-- Modules that are being called stand on a stack, one for each coroutine, from which errors raised by ops learn where
-- they happened.

local core = require "halfmoon.core"
local errors = require "halfmoon.errors"

local raise = errors.raise

-- ====== Parameters ======

-- Tensors made by Parameter().  Weak: a parameter lives as long as a module or the user holds it.
local parameters = setmetatable({}, {__mode = "k"})

--- Marks a tensor as a parameter: it will be registered when assigned to a module, and wants a gradient.
--- A tensor that is part of a graph is copied first; any other is taken as it is.
---@param t Tensor
---@param requires_grad boolean? default true
---@return Tensor
local function Parameter(t, requires_grad)
  if not core.is_tensor(t) then raise("Parameter: expected a tensor, not %s", errors.describe(t)) end
  if not t.is_leaf then t = t:detach():clone() end
  t.requires_grad = requires_grad ~= false
  parameters[t] = true
  return t
end

--- Whether a value is a parameter: a tensor that Parameter() made.
---@param x any
---@return boolean
local function is_parameter(x) return parameters[x] == true end

-- ====== The stack of modules being called ======

local stacks = setmetatable({}, {__mode = "k"}) -- coroutine -> {module, ...; n = depth}
local running = coroutine.running
local stack_owner, stack

--- The stack of this coroutine.
local function current_stack()
  local co = running()
  if co ~= stack_owner then
    stack = stacks[co]
    if not stack then
      stack = {n = 0}
      stacks[co] = stack
    end
    stack_owner = co
  end
  return stack
end

-- Closing it takes the innermost module off, on return and on error alike.
local leave = setmetatable({}, {__close = function()
  local s = current_stack()
  s[s.n] = nil
  s.n = s.n - 1
  if s.n == 0 then stack_owner, stack = nil, nil end -- a coroutine that is dropped must not be held here
end})

-- ====== Module ======

---@class Module
---@field training boolean
local Module = {__class = "Module", __is_module = true}

--- Whether a value is a module.
---@param x any
---@return boolean
local function is_module(x) return type(x) == "table" and x.__is_module == true end

--- Notes the name of a field at its first assignment.
local function new_field(self, name, value)
  local names = self._names
  names[#names + 1] = name
  rawset(self, name, value)
end

--- The name under which a field stands in the state dict: Lua position i is key i-1.
local function key_of(name)
  if math.type(name) == "integer" then return tostring(name - 1) end
  return tostring(name)
end

--- forward between the hooks of a module.
local function call_hooked(self, ...)
  local inputs = table.pack(...)
  for _, hook in ipairs(table.move(self._hooks.before, 1, #self._hooks.before, 1, {})) do
    local changed = table.pack(hook.fn(self, table.unpack(inputs, 1, inputs.n)))
    if changed[1] ~= nil then inputs = changed end
  end
  local outputs = table.pack(self:forward(table.unpack(inputs, 1, inputs.n)))
  for _, hook in ipairs(table.move(self._hooks.after, 1, #self._hooks.after, 1, {})) do
    local changed = table.pack(hook.fn(self, inputs, table.unpack(outputs, 1, outputs.n)))
    if changed[1] ~= nil then outputs = changed end
  end
  return table.unpack(outputs, 1, outputs.n)
end

local function call(self, ...)
  local s = current_stack()
  if s.n == 0 then core.pause() end -- what an earlier call dropped is dead by now: a good place for the collector
  s.n = s.n + 1
  s[s.n] = self
  local _ <close> = leave
  if self._hooks then return call_hooked(self, ...) end
  return self:forward(...)
end

--- Calls fn(...) as a part of what a module does: errors inside name the module.
---@param self Module
---@param fn function
---@param ... any
---@return any ...
local function within(self, fn, ...)
  local s = current_stack()
  s.n = s.n + 1
  s[s.n] = self
  local _ <close> = leave
  return fn(...)
end

local function to_text(self) return self:describe() end

--- Called by the constructor with its arguments.
function Module:init() end -- luacheck: ignore 212

--- What the module computes; classes replace it.
function Module:forward()
  raise("%s has no forward: define function %s:forward(x)", self.__class, self.__class)
end

-- Called with each new instance, if set: for the global dtype policy (amp/dtype_policy.lua).
local on_created ---@type fun(module: Module)?

--- Gives a table of methods what makes it a class: called, it makes an instance.
local function finish(new, name, base)
  new.__instance = {
    __index = new, __newindex = new_field, __call = call, __tostring = to_text, __name = name,
    __len = base and base.__instance.__len,
  }
  return setmetatable(new, {
    __index = base,
    __name = name,
    __tostring = function() return "class " .. name end,
    __call = function(self, ...)
      local object = setmetatable({}, self.__instance)
      rawset(object, "_names", {})
      rawset(object, "_buffers", {})
      rawset(object, "_hooks", false)
      rawset(object, "training", true)
      object:init(...)
      if on_created then on_created(object) end
      return object
    end,
  })
end

--- Makes a new kind of module.  Give it init (called by the constructor) and forward:
---     local Net = nn.class("Net")
---     function Net:init(classes) self.fc = nn.Linear(784, classes) end
---     function Net:forward(x) return self.fc(x:flatten(2)) end
---     local net = Net(10)
---@param name string
---@param base table? the class to inherit from; default nn.Module
---@return table class call it to make an instance
local function class(name, base)
  if type(name) ~= "string" then raise("nn.class: the name must be a string, not %s", errors.describe(name)) end
  base = base or Module
  return finish({__class = name}, name, base)
end

finish(Module, "Module")

-- ====== Registering ======

--- Keeps a tensor that is part of the state but not trained: it moves with to() and stands in the state dict.
---@param name string
---@param t Tensor
---@param opts {persistent: boolean}? persistent = false keeps it out of the state dict
function Module:register_buffer(name, t, opts)
  if not core.is_tensor(t) then raise("register_buffer: '%s' must be a tensor, not %s", name, errors.describe(t)) end
  local options = require "halfmoon.options"
  opts = options.check("register_buffer", opts, {persistent = {"boolean", true}})
  self._buffers[name] = opts.persistent and "kept" or "passing"
  self[name] = t
end

--- Registers a child under a name that is made at run time: the same as self[name] = module.
---@param name string|integer
---@param module Module
function Module:register_module(name, module)
  if not is_module(module) then
    raise("register_module: '%s' must be a module, not %s", name, errors.describe(module))
  end
  self[name] = module
end
Module.add_module = Module.register_module

--- Registers a parameter under a name that is made at run time; a plain tensor becomes a parameter.
---@param name string|integer
---@param t Tensor
function Module:register_parameter(name, t)
  if not core.is_tensor(t) then raise("register_parameter: '%s' must be a tensor, not %s", name, errors.describe(t)) end
  self[name] = parameters[t] and t or Parameter(t)
end

--- Adds a hook before or after forward; handle:remove() takes it away.
local function add_hook(self, where, when, fn)
  if type(fn) ~= "function" then raise("%s: expected a function, not %s", where, errors.describe(fn)) end
  if not self._hooks then rawset(self, "_hooks", {before = {}, after = {}}) end
  local list, entry = self._hooks[when], {fn = fn}
  list[#list + 1] = entry
  return {
    remove = function()
      for i, other in ipairs(list) do
        if other == entry then table.remove(list, i) break end
      end
      local hooks = self._hooks
      if hooks and #hooks.before + #hooks.after == 0 then rawset(self, "_hooks", false) end
    end,
  }
end

--- Calls fn(module, ...) with the arguments of each call, before forward.  What fn returns, if anything, takes their place.
---@param fn fun(module: Module, ...): ...
---@return table handle handle:remove() takes the hook away
function Module:register_forward_pre_hook(fn) return add_hook(self, "register_forward_pre_hook", "before", fn) end

--- Calls fn(module, inputs, ...) after forward with its arguments as a table and its results.  What fn returns, if
--- anything, takes the place of the results.
---@param fn fun(module: Module, inputs: table, ...): ...
---@return table handle handle:remove() takes the hook away
function Module:register_forward_hook(fn) return add_hook(self, "register_forward_hook", "after", fn) end

-- ====== Walking ======

--- The module's own fields, in order of first assignment, that hold a child, parameter or buffer.
---@return fun(): any, any, string name, value, and kind: "module", "parameter" or "buffer"
function Module:fields()
  local names, i = self._names, 0
  return function()
    while i < #names do
      i = i + 1
      local name = names[i]
      local value = rawget(self, name)
      local kind = type(value)
      if kind == "table" then
        if is_module(value) then return name, value, "module" end
      elseif kind == "userdata" then
        if parameters[value] then return name, value, "parameter" end
        if self._buffers[name] and core.is_tensor(value) then return name, value, "buffer" end
      end
    end
  end
end

--- Collects {name, value} of one kind, depth first, each tensor or module once.
local function collect(self, kind, prefix, list, seen)
  if kind == "module" then
    if seen[self] then return list end
    seen[self] = true
    list[#list + 1] = {prefix, self}
  end
  local children = {}
  for name, value, what in self:fields() do
    local full = prefix == "" and key_of(name) or prefix .. "." .. key_of(name)
    if what == "module" then
      children[#children + 1] = {full, value}
    elseif what == kind and not seen[value] then
      seen[value] = true
      list[#list + 1] = {full, value}
    end
  end
  for _, child in ipairs(children) do
    if kind == "module" or not seen[child[2]] then
      if kind ~= "module" then seen[child[2]] = true end
      collect(child[2], kind, child[1], list, seen)
    end
  end
  return list
end

local function iterate(list)
  local i = 0
  return function()
    i = i + 1
    local entry = list[i]
    if entry then return entry[1], entry[2] end
  end
end

--- All modules below this one and itself (named ""), parents first.
---@return fun(): string, Module
function Module:named_modules() return iterate(collect(self, "module", "", {}, {})) end

--- All parameters with their full names ("conv.weight"), in order of first assignment.  A tensor that stands in two
--- places comes once.
---@return fun(): string, Tensor
function Module:named_parameters()
  local list = collect(self, "parameter", "", {}, {})
  for _, entry in ipairs(list) do core.set_name(entry[2], entry[1]) end
  return iterate(list)
end

--- All parameters as an array: what optimizers take.
---@return Tensor[]
function Module:parameters()
  local list = {}
  for _, p in self:named_parameters() do list[#list + 1] = p end
  return list
end

--- All buffers with their full names.
---@return fun(): string, Tensor
function Module:named_buffers() return iterate(collect(self, "buffer", "", {}, {})) end

--- All buffers as an array.
---@return Tensor[]
function Module:buffers()
  local list = {}
  for _, b in self:named_buffers() do list[#list + 1] = b end
  return list
end

--- The direct children, in order.
---@return Module[]
function Module:children()
  local list = {}
  for _, value, kind in self:fields() do
    if kind == "module" then list[#list + 1] = value end
  end
  return list
end

--- The direct children with their names.
---@return fun(): string, Module
function Module:named_children()
  local list = {}
  for name, value, kind in self:fields() do
    if kind == "module" then list[#list + 1] = {key_of(name), value} end
  end
  return iterate(list)
end

--- What stands at a full name as in the state dict, and the names of what stands beside it.
local function find(self, full)
  local at, known = self, {}
  for part in full:gmatch("[^.]+") do
    local found
    known = {}
    if not is_module(at) then return nil, known end
    for name, value in at:fields() do
      known[#known + 1] = key_of(name)
      if key_of(name) == part then found = value end
    end
    if found == nil then return nil, known end
    at = found
  end
  return at, known
end

--- find() that raises unless what is there passes a test.
local function find_or_raise(self, where, full, what, test)
  if type(full) ~= "string" then raise("%s: the name must be a string, not %s", where, errors.describe(full)) end
  local found, known = find(self, full)
  if found == nil or not test(found) then
    raise("%s: %s has no %s '%s'\n  known there: %s", where, self.__class, what, full,
      #known > 0 and table.concat(known, ", ") or "nothing")
  end
  return found
end

--- The module of a full name as in the state dict ("body.0"); itself for "".
---@param name string
---@return Module
function Module:get_submodule(name) return find_or_raise(self, "get_submodule", name, "module", is_module) end

--- The parameter of a full name as in the state dict ("body.0.weight").
---@param name string
---@return Tensor
function Module:get_parameter(name)
  return find_or_raise(self, "get_parameter", name, "parameter", is_parameter)
end

--- The buffer of a full name as in the state dict ("bn.running_mean").
---@param name string
---@return Tensor
function Module:get_buffer(name)
  return find_or_raise(self, "get_buffer", name, "buffer", function(found)
    return core.is_tensor(found) and not is_parameter(found)
  end)
end

--- Calls fn(module) for every module below this one, then for itself.
---@param fn fun(module: Module)
---@return Module self
function Module:apply(fn)
  for _, child in ipairs(self:children()) do child:apply(fn) end
  fn(self)
  return self
end

-- ====== State ======

--- Calls visit(owner, field, full name, value, kind) for every place that holds a parameter or buffer.
local function each_place(self, prefix, visit)
  local children = {}
  for name, value, kind in self:fields() do
    local full = prefix .. key_of(name)
    if kind == "module" then
      children[#children + 1] = {full .. ".", value}
    else
      visit(self, name, full, value, kind)
    end
  end
  for _, child in ipairs(children) do each_place(child[2], child[1], visit) end
end

--- each_place() of what belongs into a state dict.
local function each_kept(self, prefix, visit)
  each_place(self, prefix, function(owner, field, full, value, kind)
    if kind == "parameter" or owner._buffers[field] == "kept" then visit(full, value) end
  end)
end

--- Parameters and buffers by full name.  They share memory with the module: clone what should not follow it.
---@param prefix string? put before every name, e.g. "encoder."
---@return table<string, Tensor>
function Module:state_dict(prefix)
  if prefix ~= nil and type(prefix) ~= "string" then
    raise("state_dict: the prefix must be a string, not %s", errors.describe(prefix))
  end
  local state = {}
  each_kept(self, prefix or "", function(full, value) state[full] = value:detach() end)
  return state
end

--- A copy of the module with memory of its own: parameters, buffers and what stands in its tables.  What was shared inside is
--- shared in the copy.
---@return Module
function Module:clone()
  local made = {}
  local function copy(value)
    if made[value] ~= nil then return made[value] end
    if core.is_tensor(value) then
      local new = value:detach():clone()
      if parameters[value] then new = Parameter(new, value.requires_grad) end
      made[value] = new
      return new
    end
    if type(value) ~= "table" or (getmetatable(value) ~= nil and not is_module(value)) then return value end
    local new = setmetatable({}, getmetatable(value))
    made[value] = new
    for k, v in next, value do rawset(new, k, copy(v)) end
    return new
  end
  return copy(self)
end

--- Copies a state dict into the module.  Nothing is copied if anything does not fit.
---@param state table<string, Tensor>
---@param opts {strict: boolean}? strict = false lets names be missing or left over; shapes must always agree
---@return {missing: string[], unexpected: string[]} names that were not in the state, and those the module has not
function Module:load_state_dict(state, opts)
  local options = require "halfmoon.options"
  opts = options.check("load_state_dict", opts, {strict = {"boolean", true}})
  if type(state) ~= "table" then raise("load_state_dict: expected a table, not %s", errors.describe(state)) end
  local missing, unexpected, wrong, places = {}, {}, {}, {}
  each_kept(self, "", function(full, value)
    local new = state[full]
    places[full] = value
    if new == nil then
      missing[#missing + 1] = full
    elseif not core.is_tensor(new) then
      wrong[#wrong + 1] = ("%s: expected a tensor, came %s"):format(full, errors.describe(new))
    elseif table.concat(new.shape, ",") ~= table.concat(value.shape, ",") then
      wrong[#wrong + 1] = ("%s: the module has [%s], the file has [%s]"):format(full, table.concat(value.shape, ","),
        table.concat(new.shape, ","))
    end
  end)
  for name in pairs(state) do
    if not places[name] then unexpected[#unexpected + 1] = tostring(name) end
  end
  table.sort(missing)
  table.sort(unexpected)
  local complaints = {}
  if opts.strict and #missing > 0 then complaints[#complaints + 1] = "missing: " .. table.concat(missing, ", ") end
  if opts.strict and #unexpected > 0 then
    complaints[#complaints + 1] = "unexpected: " .. table.concat(unexpected, ", ")
  end
  table.sort(wrong)
  for _, text in ipairs(wrong) do complaints[#complaints + 1] = "wrong shape: " .. text end
  if #complaints > 0 then
    raise("load_state_dict: the state does not fit %s\n  %s", self.__class, table.concat(complaints, "\n  "))
  end
  core.no_grad(function()
    for full, value in pairs(places) do
      if state[full] then value:copy_(state[full]:to(value.device)) end
    end
  end)
  return {missing = missing, unexpected = unexpected}
end

--- Sets training mode, here and below.
---@param on boolean? default true
---@return Module self
function Module:train(on)
  on = on ~= false
  return self:apply(function(module) module.training = on end)
end

--- Sets evaluation mode, here and below.
---@return Module self
function Module:eval() return self:train(false) end

local half = {float16 = true, bfloat16 = true}

--- Converts parameters and buffers: to("float16"), to("cuda"), to{dtype=, device=}.  A dtype touches floating tensors
--- only; running statistics of normalization (classes with _wide_buffers) stay float32 where others become half.
--- Tensors that change are replaced, so make optimizers afterwards.
---@param target string|{dtype: string?, device: string?}
---@return Module self
function Module:to(target)
  local dtype, device
  if type(target) == "string" then
    dtype = errors.long_dtype[target]
    if not dtype then device = target end
  else
    local options = require "halfmoon.options"
    local opts = options.check(self.__class .. ":to", target, {dtype = {"string"}, device = {"string"}})
    device = opts.device
    dtype = opts.dtype and errors.long_dtype[opts.dtype]
    if opts.dtype and not dtype then raise("%s:to: unknown dtype '%s'", self.__class, opts.dtype) end
  end
  local made = {} -- old tensor -> new one, so that shared parameters stay shared
  each_place(self, "", function(owner, field, _, value, kind)
    local new = made[value]
    if not new then
      local plain = value:detach()
      local wanted = value.dtype:find("float", 1, true) and dtype or nil
      if kind == "buffer" and owner._wide_buffers and half[wanted] then wanted = "float32" end
      new = plain:to{dtype = wanted, device = device}
      if new.dtype == value.dtype and new.device == value.device then
        new = value
      elseif kind == "parameter" then
        new = Parameter(new, value.requires_grad)
      end
      made[value] = new
    end
    owner[field] = new
  end)
  return self
end

--- Floating parameters and buffers in float32.
function Module:float() return self:to("float32") end
--- Floating parameters and buffers in float16.
function Module:half() return self:to("float16") end
--- Floating parameters and buffers in bfloat16.
function Module:bfloat16() return self:to("bfloat16") end
--- Floating parameters and buffers in float64.
function Module:double() return self:to("float64") end
--- Moves the module to the CPU.
function Module:cpu() return self:to("cpu") end
--- Moves the module to a GPU.
---@param index integer? from 0
function Module:cuda(index) return self:to("cuda:" .. (index or 0)) end

--- A table of the modules below this one with the shapes they give, their parameters and bytes; see nn/summary.lua.
---@param shape integer[]|integer[][]|Tensor|Tensor[] of the input or inputs
---@param opts {optimizer: Optimizer, dtype: string, print: boolean}? the dtype of the inputs; print = false only returns it
---@return table summary rows from 1, `total`; prints nicely
function Module:summary(shape, opts) return require("halfmoon.nn.summary")(self, shape, opts) end

--- Sets the gradients of all parameters to nil.
function Module:zero_grad()
  for _, p in self:named_parameters() do p.grad = nil end
end

--- Makes all parameters want a gradient, or not (to freeze them).
---@param on boolean? default true
---@return Module self
function Module:requires_grad_(on)
  for _, p in self:named_parameters() do p.requires_grad = on ~= false end
  return self
end

-- ====== Text ======

--- What stands in the brackets of the one-line form, e.g. "784 -> 10"; layers replace it.
---@return string
function Module:extra() return "" end -- luacheck: ignore 212

--- The module as an indented tree: Linear(784 -> 10).
---@return string
function Module:describe()
  local lines = {}
  for name, value, kind in self:fields() do
    if kind == "module" then
      lines[#lines + 1] = ("  (%s): %s"):format(key_of(name), (value:describe():gsub("\n", "\n  ")))
    end
  end
  local extra = self:extra()
  if #lines == 0 then return ("%s(%s)"):format(self.__class, extra) end
  return ("%s(%s\n%s\n)"):format(self.__class, extra, table.concat(lines, "\n"))
end

-- ====== Where an error happened ======

--- The name of a module below another, or nil.
local function name_below(parent, module)
  for name, other in parent:named_modules() do
    if rawequal(other, module) then return name end
  end
end

--- "Net.fc (Linear 256 -> 10)" while modules are being called, else nil.
---@return string?
local function path()
  local s = stacks[running()]
  if not s or s.n == 0 then return end
  local text = s[1].__class
  for i = 2, s.n do
    local name = name_below(s[i - 1], s[i])
    if name == nil then text = text .. " > " .. s[i].__class elseif name ~= "" then text = text .. "." .. name end
  end
  local extra = s[s.n]:extra()
  if s.n > 1 then
    text = ("%s (%s%s)"):format(text, s[s.n].__class, extra ~= "" and " " .. extra or "")
  elseif extra ~= "" then
    text = text .. " " .. extra
  end
  return text
end

errors.set_path_provider(path)

return {
  Module = Module, class = class, Parameter = Parameter, is_module = is_module, is_parameter = is_parameter,
  path = path, within = within, set_on_created = function(fn) on_created = fn end,
}
