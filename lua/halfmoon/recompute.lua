--- recompute.lua -- hm.checkpoint: a part of the model that keeps nothing for backward and is run again when it comes.
--
--     local y = hm.checkpoint(block, x)                          -- block(x), for less memory and a second forward
--     local y = hm.checkpoint({preserve_rng_state = false}, block, x)
--
-- The graph is the same as without it, so gradients are the same to the last bit, by whatever way they are asked for
-- (backward, autograd.grad, create_graph, hooks).  The function runs again in the forward's random state and autocast
-- region.  It must do the same both times; what differs is an error.  It must not yield or call backward through its
-- own ops, and what it changes outside (counters, say) it changes twice: core.is_recomputing() tells.
--
-- Tensors among the arguments are kept by the graph (nested calls leave them to the outer one); tensors that fn reaches
-- otherwise are kept as Lua keeps them.

local core = require "halfmoon.core"
local errors = require "halfmoon.errors"
local options = require "halfmoon.options"

local raise, describe = errors.raise, errors.describe

local spec = {preserve_rng_state = {"boolean", true}, determinism_check = {"boolean", true}}

local function is_callable(value)
  if type(value) == "function" then return true end
  local meta = getmetatable(value)
  return type(meta) == "table" and meta.__call ~= nil
end

--- A function that runs fn on given tensors in the places of those among its arguments; and these.
local function again(fn, ...)
  local arguments, tensors, position = table.pack(...), {}, {}
  for i = 1, arguments.n do
    if core.is_tensor(arguments[i]) then
      tensors[#tensors + 1] = arguments[i]
      position[#tensors] = i
      arguments[i] = nil
    end
  end
  return tensors, function(...)
    local list = table.move(arguments, 1, arguments.n, 1, {})
    for k, i in ipairs(position) do list[i] = (select(k, ...)) end
    fn(table.unpack(list, 1, arguments.n))
  end
end

--- Runs fn(...), keeping nothing for backward but the tensors among its arguments; backward runs it again.
---@param opts {preserve_rng_state: boolean?, determinism_check: boolean?} may be left out; both are true by default
---@param fn function|table a function or module
---@param ... any its arguments
---@return any ... what fn returns
local function checkpoint(opts, fn, ...)
  if opts == nil or is_callable(opts) then return checkpoint({}, opts, fn, ...) end
  if type(opts) ~= "table" then raise("checkpoint: expected a function, came %s", describe(opts)) end
  if not is_callable(fn) then raise("checkpoint: expected a function, came %s", describe(fn)) end
  opts = options.check("checkpoint", opts, spec)
  if not core.is_grad_enabled() then return fn(...) end
  local tensors, run_again = again(fn, ...)
  local region = core.region_new(tensors, run_again, opts.preserve_rng_state, opts.determinism_check)
  return core.region_run(region, fn, ...)
end

return checkpoint
