--- amp/apex.lua -- NVIDIA Apex's amp: initialize with opt levels O0 to O3, scale_loss, master_params.
--
--     local model, opt = amp.initialize(model, opt, {opt_level = "O2"})
--     amp.scale_loss(loss, opt, function(scaled) scaled:backward() end)
--     opt:step()
--
-- or, as a guard:  do local scaled, scope <close> = amp.scale_loss(loss, opt); scaled:backward() end
--
--          parameters            computes in    masters   loss scale
--     O0   float32               float32        no        1
--     O1   as they are           by autocast    no        dynamic
--     O2   float16, batch norms  float16        yes       dynamic
--          float32
--     O3   float16               float16        no        1
--
-- What initialize does is bound to the models and optimizers given: forward of each model casts its floating arguments
-- and runs in autocast where the level says so; results are float32.  Optimizers stay the same objects, on other
-- tensors where parameters were cast; states that they have are taken along.  opt:step() answers whether it stepped: it
-- leaves one step out after a scale_loss that found an overflow.
--
-- The end of scale_loss unscales the gradients, checks them, adds them to those that were there, and moves the scale.
-- Each loss_id has a scale of its own.  With masters, unscaled gradients are those of amp.master_params(opt); .grad of
-- the model's parameters stays scaled.
--
-- Other than in Apex: levels act in the forward of the models given, not on every function of the program; under O1
-- results are float32, too; a static scale skips steps that overflow, except 1 without masters, where nothing is
-- checked; the scale has a floor of 1 unless min_loss_scale says otherwise; keep_batchnorm_fp32 concerns all batch
-- norms.

local core = require "halfmoon.core"
local errors = require "halfmoon.errors"
local grad_scaler = require "halfmoon.amp.grad_scaler"
local loss_grads = require "halfmoon.amp.loss_grads"
local optimizer_class = require "halfmoon.optim.optimizer"
local nested = require "halfmoon.amp.nested"
local options = require "halfmoon.options"

local raise, describe = errors.raise, errors.describe

local apex = {}

-- ====== Properties ======

local LEVELS = {
  O0 = {cast_model_type = "float32", patch_functions = false, master_weights = false, loss_scale = 1.0},
  O1 = {patch_functions = true, loss_scale = "dynamic"},
  O2 = {
    cast_model_type = "half", patch_functions = false, keep_batchnorm_fp32 = true, master_weights = true,
    loss_scale = "dynamic",
  },
  O3 = {
    cast_model_type = "half", patch_functions = false, keep_batchnorm_fp32 = false, master_weights = false,
    loss_scale = 1.0,
  },
}

local spec = {
  opt_level = {"string", "O1"},
  enabled = {"boolean", true},
  cast_model_type = {"string"},
  patch_functions = {"boolean"},
  patch_torch_functions = {"boolean"},
  keep_batchnorm_fp32 = {"boolean|string"},
  master_weights = {"boolean|string"},
  loss_scale = {"number|string"},
  cast_model_outputs = {"string"},
  num_losses = {"integer", 1, options.at_least(1)},
  verbosity = {"integer", 1, options.at_least(0)},
  min_loss_scale = {"number", nil, options.at_least(0)},
  max_loss_scale = {"number", 2.0 ^ 24, options.above(0)},
  dtype = {"string", "float16"},
  policy = {"string|table", "dynamic"},
  growth_interval = {"integer", 2000, options.at_least(1)},
}

--- A switch as command lines give it: true, "True", "false".
local function to_boolean(name, value)
  if type(value) ~= "string" then return value end
  local lower = value:lower()
  if lower ~= "true" and lower ~= "false" then
    raise("initialize: option '%s' must be true or false, not %s", name, describe(value))
  end
  return lower == "true"
end

local function to_scale(value)
  local scale = value == "dynamic" and value or tonumber(value)
  if scale == "dynamic" or (scale and scale > 0 and scale < math.huge) then return scale end
  raise("initialize: option 'loss_scale' must be \"dynamic\" or a positive number, not %s", describe(value))
end

local function to_dtype(name, value)
  local dtype = errors.long_dtype[value]
  if dtype == "float16" or dtype == "bfloat16" or dtype == "float32" then return dtype end
  raise("initialize: option '%s' must be float16, bfloat16 or float32, not %s", name, describe(value))
end

--- Refuses what an opt level cannot have.
local function check_overrides(level, given, p)
  if p.patch_functions and level ~= "O1" then
    raise("initialize: patch_functions is for O1 alone; %s casts the model", level)
  end
  if level ~= "O1" then return end
  for _, name in ipairs {"cast_model_type", "keep_batchnorm_fp32", "master_weights"} do
    if given[name] ~= nil and given[name] ~= false then
      raise("initialize: O1 leaves parameters as they are, so %s does not fit it\n  hint: O2 has float16 parameters "
        .. "with float32 masters", name)
    end
  end
end

--- The level's properties with what was given instead.
local function properties(given)
  local o = options.check("initialize", given, spec)
  local level = LEVELS[o.opt_level]
  if not level then
    raise("initialize: unknown opt_level %s: there are O0, O1, O2 and O3, with the letter O, not the digit zero",
      describe(o.opt_level))
  end
  local p = {level = o.opt_level}
  for name, value in pairs(level) do p[name] = value end
  for name in pairs(spec) do
    if o[name] ~= nil then p[name] = o[name] end
  end
  if p.patch_torch_functions ~= nil then p.patch_functions = p.patch_torch_functions end
  p.dtype = to_dtype("dtype", p.dtype)
  p.keep_batchnorm_fp32 = to_boolean("keep_batchnorm_fp32", p.keep_batchnorm_fp32)
  p.master_weights = to_boolean("master_weights", p.master_weights)
  p.loss_scale = to_scale(p.loss_scale)
  if p.cast_model_type == "half" then p.cast_model_type = p.dtype end
  if p.cast_model_type then p.cast_model_type = to_dtype("cast_model_type", p.cast_model_type) end
  p.cast_model_outputs = to_dtype("cast_model_outputs", p.cast_model_outputs or "float32")
  check_overrides(p.level, given or {}, p)
  return p
end

-- ====== Models ======

--- The method of a module's class, which an instance may hide.
local function class_method(model, name) return getmetatable(model).__index[name] end

--- Gives a model a forward that casts.
local function wrap_forward(model, p)
  local forward = rawget(model, "forward") or class_method(model, "forward")
  if p.patch_functions then
    rawset(model, "forward", function(self, ...)
      return nested.cast_all(p.cast_model_outputs, core.autocast(p.dtype, forward, self, ...))
    end)
  elseif p.cast_model_type then
    rawset(model, "forward", function(self, ...)
      return nested.cast_all(p.cast_model_outputs, forward(self, nested.cast_all(p.cast_model_type, ...)))
    end)
  end
end

--- State dicts in float32, and masters that follow a state that is loaded.
local function wrap_state(model, handle)
  local get, set = class_method(model, "state_dict"), class_method(model, "load_state_dict")
  rawset(model, "state_dict", function(self, ...) return nested.cast(get(self, ...), "float32") end)
  rawset(model, "load_state_dict", function(self, ...)
    local report = set(self, ...)
    core.no_grad(function()
      for _, pairs_of in pairs(handle.masters) do
        for _, entry in ipairs(pairs_of) do entry.master:copy_(entry.param) end
      end
    end)
    return report
  end)
end

local function check_model(model)
  if type(model) ~= "table" or not model.__is_module then
    raise("initialize: expected a module or an array of modules, came %s", describe(model))
  end
  for name, p in model:named_parameters() do
    if p.dtype == "float16" or p.dtype == "bfloat16" then
      raise("initialize: parameter %s is %s already\n  hint: give the model in float32; the opt level casts it", name,
        describe(p))
    end
  end
end

--- Casts a model's parameters.  moved: old parameter -> new one.
local function cast_model(model, p, moved)
  local kept, before = {}, {}
  for name, param in model:named_parameters() do before[name] = param end
  if p.keep_batchnorm_fp32 then
    for _, module in model:named_modules() do
      if module.__class:find("^BatchNorm") then
        for name, value, kind in module:fields() do
          if kind ~= "module" then kept[#kept + 1] = {module, name, value} end
        end
      end
    end
  end
  model:to(p.cast_model_type)
  for _, entry in ipairs(kept) do entry[1][entry[2]] = entry[3] end
  for name, param in model:named_parameters() do
    if param ~= before[name] then moved[before[name]] = param end
  end
end

-- ====== Optimizers ======

--- A float32 copy of a parameter, to be trained in its place.
local function master_of(param, entries)
  if param.dtype == "float32" or not param.requires_grad then return param end
  local master = param:detach():float():clone()
  master.requires_grad = true
  local name = core.get_name(param)
  if name then core.set_name(master, name) end
  entries[#entries + 1] = {param = param, master = master}
  return master
end

--- The parameters that an optimizer is to train instead of those given.
local function replaced(params, moved, entries)
  local list = {}
  for i, param in ipairs(params) do
    param = moved[param] or param
    list[i] = entries and master_of(param, entries) or param
  end
  return list
end

--- Moves an optimizer to other tensors.  Options and states come along.
local function move_optimizer(optimizer, moved, entries)
  local groups = {}
  for i, group in ipairs(optimizer.param_groups) do
    groups[i] = {params = replaced(group.params, moved, entries)}
    for name, value in pairs(group) do groups[i][name] = value end
  end
  local new = require("halfmoon.optim")[optimizer.name](groups)
  new:load_state_dict(optimizer:state_dict())
  optimizer.core, optimizer.param_groups = new.core, new.param_groups
end

--- step(), zero_grad() and add_param_group() of an optimizer that amp looks after.
local function wrap_optimizer(optimizer, handle, entries)
  local base = optimizer_class.Optimizer
  handle.masters[optimizer] = entries
  optimizer.step = function(self, ...)
    if handle.skip[self] then
      handle.skip[self] = nil
      return false
    end
    base.step(self, ...)
    core.no_grad(function()
      for _, entry in ipairs(entries) do entry.param:copy_(entry.master) end
    end)
    return true
  end
  optimizer.zero_grad = function(self)
    base.zero_grad(self)
    for _, entry in ipairs(entries) do entry.param.grad = nil end
  end
  optimizer.add_param_group = function(self, group)
    if handle.properties.master_weights and type(group) == "table" and type(group.params) == "table" then
      local own = {}
      for name, value in pairs(group) do own[name] = value end
      own.params = replaced(group.params, {}, entries)
      group = own
    end
    base.add_param_group(self, group)
  end
end

local function check_optimizer(optimizer, known)
  if type(optimizer) ~= "table" or not optimizer.core or not optimizer.param_groups then
    raise("initialize: expected an optimizer (hm.optim) or an array of them, came %s", describe(optimizer))
  end
  if known[optimizer] then raise("initialize: this optimizer has been through amp.initialize already") end
end

-- ====== initialize ======

---@class ApexHandle
---@field properties table
---@field scalers GradScaler[] one for each loss, from 1
---@field masters table<Optimizer, {param: Tensor, master: Tensor}[]>
---@field skip table<Optimizer, boolean> whether the next step is to be left out
---@field scaled table<Optimizer, boolean> whether gradients are scaled, after delay_unscale

local handles = setmetatable({}, {__mode = "k"}) -- optimizer -> handle
local latest ---@type ApexHandle? of the last initialize(), for state_dict()

local function make_scaler(p)
  local dynamic = p.loss_scale == "dynamic"
  local given = {policy = dynamic and p.policy or "static", min_scale = p.min_loss_scale, max_scale = p.max_loss_scale}
  if dynamic then
    given.init_scale = math.min(2.0 ^ 16, p.max_loss_scale)
    given.growth_interval = p.growth_interval
  else
    given.init_scale = p.loss_scale
    given.min_scale, given.max_scale = nil, nil
  end
  given.allow_f16_grads = true
  local scaler = grad_scaler.new(given)
  scaler.warned = p.dtype == "bfloat16"
  return scaler
end

local function as_list(value, is_one)
  if value == nil then return {} end
  if is_one(value) then return {value} end
  if type(value) == "table" and getmetatable(value) == nil then return value end
  return {value}
end

local function is_module(value) return type(value) == "table" and value.__is_module == true end
local function is_optimizer(value) return type(value) == "table" and value.core ~= nil end

--- Prepares models and optimizers for mixed precision as an opt level says.  Call it once, after the optimizers are
--- made.  Models and optimizers are changed and returned as they came: one, or an array.
--- Options: opt_level = "O1", enabled = true, loss_scale ("dynamic" or a number), num_losses = 1, min_loss_scale,
--- max_loss_scale = 2^24, keep_batchnorm_fp32, master_weights, cast_model_type, cast_model_outputs = "float32",
--- verbosity = 1 (0: silent), dtype = "float16" (or "bfloat16"), policy = "dynamic", growth_interval = 2000.
---@param models Module|Module[]
---@param optimizers Optimizer|Optimizer[]|nil
---@param opts table?
---@return Module|Module[] models
---@return Optimizer|Optimizer[]|nil optimizers
function apex.initialize(models, optimizers, opts)
  local p = properties(opts)
  local model_list, optimizer_list = as_list(models, is_module), as_list(optimizers, is_optimizer)
  for _, model in ipairs(model_list) do check_model(model) end
  for _, optimizer in ipairs(optimizer_list) do check_optimizer(optimizer, handles) end
  local weak = {__mode = "k"}
  local handle = {
    properties = p, scalers = {}, masters = setmetatable({}, weak), skip = setmetatable({}, weak),
    scaled = setmetatable({}, weak),
  }
  latest = handle
  for _, optimizer in ipairs(optimizer_list) do handles[optimizer] = handle end
  if not p.enabled then return models, optimizers end
  for i = 1, p.num_losses do handle.scalers[i] = make_scaler(p) end
  local moved = {}
  for _, model in ipairs(model_list) do
    if p.cast_model_type then
      cast_model(model, p, moved)
      wrap_state(model, handle)
    end
    wrap_forward(model, p)
  end
  for _, optimizer in ipairs(optimizer_list) do
    local entries = {}
    if next(moved) or p.master_weights then
      move_optimizer(optimizer, moved, p.master_weights and entries or nil)
    end
    wrap_optimizer(optimizer, handle, entries)
  end
  return models, optimizers
end

--- The parameters that an optimizer updates: the float32 masters under O2, else the model's own.  Clip these.
---@param optimizer Optimizer
---@return Tensor[]
function apex.master_params(optimizer)
  local list = {}
  loss_grads.each(optimizer, function(p) list[#list + 1] = p end)
  return list
end

-- ====== scale_loss ======

--- Takes scaled gradients of the model over to the masters.
local function to_masters(handle, optimizer)
  for _, entry in ipairs(handle.masters[optimizer]) do
    entry.master.grad = entry.param.grad and entry.param.grad:float()
  end
end

--- Lays gradients aside before backward, unless those there wait to be unscaled with the new ones.
local function prepare(handle, list)
  local fresh = {}
  for _, optimizer in ipairs(list) do
    if not handle.scaled[optimizer] then
      fresh[#fresh + 1] = optimizer
      for _, entry in ipairs(handle.masters[optimizer]) do entry.param.grad = nil end
    end
  end
  return loss_grads.take(fresh), fresh
end

local function say_skip(handle, id, scaler)
  if handle.properties.verbosity < 1 then return end
  io.stderr:write(("halfmoon: Gradient overflow.  Skipping step, loss scaler %d reducing loss scale to %.14g\n")
    :format(id, scaler:get_scale()))
end

--- Unscales, checks, adds up; marks the optimizers whose next step is to be left out.
local function finish(handle, list, id, aside)
  local scaler, bad = handle.scalers[id + 1], false
  core.no_grad(function()
    for _, optimizer in ipairs(list) do
      to_masters(handle, optimizer)
      scaler:unscale_(optimizer)
      local record = scaler:checked(optimizer)
      if record and record.found_inf then
        bad = true
        grad_scaler.note_skip(scaler, record)
      end
      handle.scaled[optimizer] = nil
    end
  end)
  loss_grads.put(aside)
  if bad then
    for _, optimizer in ipairs(list) do handle.skip[optimizer] = true end
  end
  scaler:update()
  if bad then say_skip(handle, id, scaler) end
end

local scope_spec = {
  loss_id = {"integer", 0, options.at_least(0)}, delay_unscale = {"boolean", false},
  delay_overflow_check = {"boolean", false},
}

--- The handle of some optimizers.
local function handle_of(list)
  local handle = handles[list[1]]
  for _, optimizer in ipairs(list) do
    if not handles[optimizer] or handles[optimizer] ~= handle then
      raise("scale_loss: expected optimizers that went through amp.initialize together, came %s\n"
        .. "  hint: model, opt = amp.initialize(model, opt, {opt_level = \"O1\"})", describe(optimizer))
    end
  end
  if not handle then raise("scale_loss: expected an optimizer that went through amp.initialize, came nothing") end
  return handle
end

local Scope = {}
Scope.__index = Scope
Scope.__name = "ScaleLoss"

--- Ends the scope: unscales and checks.  After an error in the scope nothing is done but putting gradients back.
function Scope:__close(failed)
  if self.closed then return end
  self.closed = true
  if not self.aside then return end
  if failed ~= nil then
    if not self.delayed then loss_grads.restore(self.fresh, self.aside) end
    return
  end
  if self.delayed then
    for _, optimizer in ipairs(self.list) do self.handle.scaled[optimizer] = true end
  else
    finish(self.handle, self.list, self.id, self.aside)
  end
end

--- Ends the scope before its block does.
function Scope:close() self:__close() end

--- Opens a scope; returns the scaled loss and the scope.
local function open(loss, optimizers, opts)
  if not core.is_tensor(loss) then raise("scale_loss: expected a loss, came %s", describe(loss)) end
  opts = options.check("scale_loss", opts, scope_spec)
  local list = loss_grads.list(optimizers)
  local handle = handle_of(list)
  local p, scope = handle.properties, setmetatable({list = list, handle = handle, id = opts.loss_id}, Scope)
  if not p.enabled then return loss, scope end
  local scaler = handle.scalers[opts.loss_id + 1]
  if not scaler then
    raise("scale_loss: loss_id %d is out of range: there are %d losses, ids count from 0\n"
      .. "  hint: amp.initialize(model, opt, {num_losses = %d})", opts.loss_id, #handle.scalers, opts.loss_id + 1)
  end
  if not p.master_weights and p.loss_scale == 1 then return nested.cast(loss, "float32"), scope end
  scope.delayed = opts.delay_unscale
  if scope.delayed then scope.aside = {} else scope.aside, scope.fresh = prepare(handle, list) end
  return scaler:scale(loss), scope
end

--- amp.scale_loss(loss, optimizers [, {loss_id, delay_unscale}] [, fn]): a scope that scales a loss and, at its end,
--- unscales and checks the gradients.  fn gets the scaled loss; without fn: local scaled, scope <close> =
--- amp.scale_loss(...). loss_id: from 0, which of the scales (initialize's num_losses).  delay_unscale: leave the
--- gradients scaled, to add more with the same scale; the next scope without it unscales them all.
---@param loss Tensor
---@param optimizers Optimizer|Optimizer[] that went through amp.initialize
---@param opts {loss_id: integer?, delay_unscale: boolean?}|function|nil
---@param fn nil|fun(scaled: Tensor): ...
---@return any ... what fn returns; or the scaled loss and the scope
function apex.scale_loss(loss, optimizers, opts, fn)
  if fn == nil and type(opts) == "function" then opts, fn = nil, opts end
  if fn == nil then return open(loss, optimizers, opts) end
  if type(fn) ~= "function" then raise("scale_loss: expected a function, came %s", describe(fn)) end
  local scaled, scope = open(loss, optimizers, opts)
  local _ <close> = scope
  return fn(scaled)
end

-- ====== State ======

local function want_latest(where)
  if not latest then raise("%s: amp.initialize has not been called", where) end
  return latest
end

--- The scales of the last amp.initialize: {loss_scaler0 = {loss_scale =, unskipped =}, ...}.
---@return table<string, {loss_scale: number, unskipped: integer}>
function apex.state_dict()
  local saved = {}
  for i, scaler in ipairs(want_latest("state_dict").scalers) do
    local state = scaler:state_dict()
    saved[("loss_scaler%d"):format(i - 1)] = {loss_scale = state.scale, unskipped = state._growth_tracker}
  end
  return saved
end

--- Takes over a state made by amp.state_dict().  Another number of losses is said on the terminal; as many are taken as
--- there are.
---@param saved table
function apex.load_state_dict(saved)
  local handle = want_latest("load_state_dict")
  if type(saved) ~= "table" then raise("load_state_dict: expected a table, came %s", describe(saved)) end
  local found = {}
  for name, state in pairs(saved) do
    local id = type(name) == "string" and name:match("^loss_scaler(%d+)$")
    if not id then
      raise("load_state_dict: unknown key %s; keys are loss_scaler0, loss_scaler1, ...", describe(name))
    end
    if type(state) ~= "table" or type(state.loss_scale) ~= "number" then
      raise("load_state_dict: %s must be {loss_scale =, unskipped =}, came %s", name, describe(state))
    end
    found[#found + 1] = {index = math.tointeger(id) + 1, state = state}
  end
  if #found ~= #handle.scalers then
    io.stderr:write(("halfmoon: amp.load_state_dict: the state has %d loss scalers, amp.initialize made %d\n")
      :format(#found, #handle.scalers))
  end
  for _, entry in ipairs(found) do
    local scaler = handle.scalers[entry.index]
    if scaler then
      scaler:load_state_dict {scale = entry.state.loss_scale, _growth_tracker = entry.state.unskipped}
    end
  end
end

return apex
