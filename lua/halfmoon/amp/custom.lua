--- amp/custom.lua -- autocast for functions of one's own: custom_fwd and custom_bwd for autograd.Function (PyTorch),
--- and half_function, float_function, promote_function for any other (Apex).
--
--     local Mul = autograd.Function("Mul", {
--       forward = amp.custom_fwd(function(ctx, a, b) ctx:save_for_backward(a, b); return a:matmul(b) end),
--       backward = amp.custom_bwd(function(ctx, g)
--         local a, b = ctx:saved()
--         return g:matmul(b:t()), a:t():matmul(g)
--       end),
--     })
--
-- Backward runs without autocast; custom_bwd puts it back into the region that forward was called in: on or off, and
-- the dtype.  Overrides of classes (ops = ...) belong to the scope that forward stood in and are not brought back.
-- Casts reach tensors inside tables (nested.lua).

local core = require "halfmoon.core"
local errors = require "halfmoon.errors"
local nested = require "halfmoon.amp.nested"
local options = require "halfmoon.options"

local raise, describe = errors.raise, errors.describe

local custom = {}

local function want_function(where, fn)
  local meta = getmetatable(fn)
  if type(fn) == "function" or (type(meta) == "table" and meta.__call ~= nil) then return end
  raise("%s: expected a function, came %s", where, describe(fn))
end

-- ====== autograd.Function ======

local function want_dtype(where, name)
  local dtype = errors.long_dtype[name]
  if nested.dtypes[dtype] then return dtype end
  raise("%s: cast_inputs must be float32, float16 or bfloat16, came %s", where, describe(name))
end

--- Runs fn in a region like the one that was noted.  (Of "fp8" in float32: its slots are those of the forward.)
local function inside(state, fn, ...)
  if not state.enabled or state.dtype == "fp8" then return core.autocast({enabled = false}, fn, ...) end
  return core.autocast({dtype = state.dtype, cache_enabled = state.cache_enabled}, fn, ...)
end

--- The forward of an autograd.Function under autocast.  Without cast_inputs it runs as the region has it.  With
--- cast_inputs = "f32", inside a region, floating arguments are cast to it and forward runs with autocast off, and so
--- does backward; outside a region nothing is cast.
---@param forward fun(ctx: FunctionContext, ...): ...
---@param opts {cast_inputs: string?}?
---@return fun(ctx: FunctionContext, ...): ...
function custom.custom_fwd(forward, opts)
  want_function("custom_fwd", forward)
  opts = options.check("custom_fwd", opts, {cast_inputs = {"string"}})
  local dtype = opts.cast_inputs and want_dtype("custom_fwd", opts.cast_inputs)
  return function(ctx, ...)
    local state = core.autocast_state()
    if not dtype or not state.enabled then
      ctx.amp_region = state
      return forward(ctx, ...)
    end
    ctx.amp_region = {enabled = false}
    local function cast(t) return t:to(dtype) end
    return core.autocast({enabled = false}, forward, ctx, nested.map_all(cast, ...))
  end
end

--- The backward that belongs to a forward wrapped by custom_fwd: runs in the same region.
---@param backward fun(ctx: FunctionContext, ...): ...
---@return fun(ctx: FunctionContext, ...): ...
function custom.custom_bwd(backward)
  want_function("custom_bwd", backward)
  return function(ctx, ...)
    if not ctx.amp_region then
      raise("custom_bwd: forward was not wrapped by amp.custom_fwd, so the region it ran in is not known")
    end
    return inside(ctx.amp_region, backward, ctx, ...)
  end
end

-- ====== Any function ======

--- A function that casts its arguments inside a region.  choose(...) -> dtype to cast to, or nil.
local function casting(where, fn, choose)
  want_function(where, fn)
  return function(...)
    local state = core.autocast_state()
    local dtype = state.enabled and choose(state, ...)
    if not dtype then return fn(...) end
    return fn(nested.cast_all(dtype, ...))
  end
end

--- A function that, inside amp.autocast, gets its floating arguments in the region's dtype.  Autocast stays on in it.
---@param fn fun(...): ...
---@return fun(...): ...
function custom.half_function(fn)
  return casting("half_function", fn, function(state) return state.dtype == "fp8" and "float32" or state.dtype end)
end

--- A function that, inside amp.autocast, gets its floating arguments in float32.  Autocast stays on in it.
---@param fn fun(...): ...
---@return fun(...): ...
function custom.float_function(fn)
  return casting("float_function", fn, function() return "float32" end)
end

--- A function that, inside amp.autocast, gets its floating arguments in the widest dtype among them.
---@param fn fun(...): ...
---@return fun(...): ...
function custom.promote_function(fn)
  return casting("promote_function", fn, function(_, ...)
    local widest
    nested.map_all(function(t)
      if not widest then widest = t.dtype elseif widest ~= t.dtype then widest = "float32" end
      return t
    end, ...)
    return widest
  end)
end

local function register(kind, where, name)
  local fn = type(where) == "table" and where[name]
  if not fn then raise("register_%s_function: there is no function %s in the table", kind, describe(name)) end
  where[name] = custom[kind .. "_function"](fn)
end

--- Puts half_function around where[name] (Apex): for functions of libraries that know nothing of autocast.
---@param where table
---@param name string
function custom.register_half_function(where, name) register("half", where, name) end

--- Puts float_function around where[name] (Apex).
---@param where table
---@param name string
function custom.register_float_function(where, name) register("float", where, name) end

--- Puts promote_function around where[name] (Apex).
---@param where table
---@param name string
function custom.register_promote_function(where, name) register("promote", where, name) end

--- A scope in which autocast is off: amp.disable_casts(fn, ...), or local _ <close> = amp.disable_casts().
---@param fn function?
---@param ... any
function custom.disable_casts(fn, ...)
  if fn == nil then return core.autocast {enabled = false} end
  return core.autocast({enabled = false}, fn, ...)
end

return custom
