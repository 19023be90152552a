--- amp/fp8.lua -- amp.DelayedScaling: how amp.autocast("fp8") scales what it rounds to 8 bits.
--
--     local recipe = amp.DelayedScaling {margin = 0, amax_history_len = 16}
--     for x, y in loader:batches() do
--       local loss
--       do local _ <close> = amp.autocast {dtype = "fp8", recipe = recipe}
--         loss = nn.functional.cross_entropy(model(x), y)
--       end
--       loss:backward()
--       opt:step()
--     end
--     print(recipe:report(model))
--
-- The region is an emulation on the CPU: the factors of matrix products, convolutions and attention are rounded to
-- e4m3 and computed with in float32, and the gradient that arrives at a product to e5m2.  It shows what 8-bit training
-- does to a model; it saves neither time nor memory.
--
-- Delayed scaling (the rule of NVIDIA's Transformer Engine): each factor and each gradient has a scale of its own, found
-- from the largest magnitudes of the last amax_history_len steps:  scale = largest number of the format / amax /
-- 2^margin.  A step ends when the next outermost region with the recipe is entered.  Scales begin at 1; a step whose
-- amax is zero or not finite leaves a scale alone.  Under no_grad nothing is noted.
--
-- hm.checkpoint goes inside the region, not around it: what is computed again then uses the scales of the forward, if
-- backward comes before the next region begins.
--
-- A product is known by its weight (the second operand, where it is a parameter), else by its place among the products
-- without one, counted from the entry of the outermost region.  So a model whose weightless products (attention, say)
-- come in another order each step, or two such models under one recipe, mix up those slots: give each its own recipe.

local core = require "halfmoon.core"
local errors = require "halfmoon.errors"
local options = require "halfmoon.options"

local raise, describe = errors.raise, errors.describe

local FORMATS = {hybrid = true, e4m3 = true}
local ALGORITHMS = {max = true, most_recent = true}

local spec = {
  margin = {"integer", 0},
  format = {"string", "hybrid"},
  amax_history_len = {"integer", 1024},
  amax_compute_algo = {"string", "max"},
}

--- A recipe with checked settings, named as options() names them.
local function recipe_of(o)
  return core.fp8_new(o.margin, o.amax_history_len, o.format == "hybrid", o.amax_compute_algo == "most_recent")
end

--- amp.DelayedScaling([{margin, format, amax_history_len, amax_compute_algo}]): a recipe for amp.autocast{dtype = "fp8",
--- recipe = ...}.  format "hybrid" rounds factors to e4m3 and gradients to e5m2, "e4m3" both to e4m3; amax_compute_algo
--- "max" takes the largest magnitude of the history, "most_recent" the newest.
---@param opts {margin: integer?, format: string?, amax_history_len: integer?, amax_compute_algo: string?}?
---@return DelayedScaling
local function new(opts)
  opts = options.check("DelayedScaling", opts, spec)
  local format = opts.format:lower()
  if format == "e5m2" then
    raise("DelayedScaling: format \"e5m2\" alone has too few digits for weights and activations\n  "
      .. "hint: \"hybrid\" uses it for gradients")
  end
  if not FORMATS[format] then
    raise("DelayedScaling: format must be \"hybrid\" or \"e4m3\", not %s", describe(opts.format))
  end
  if not ALGORITHMS[opts.amax_compute_algo] then
    raise("DelayedScaling: amax_compute_algo must be \"max\" or \"most_recent\", not %s", describe(opts.amax_compute_algo))
  end
  opts.format = format
  return recipe_of(opts)
end

---@class DelayedScaling
---@field sites fun(self: DelayedScaling): table[] every product so far: {op, name, weighted, position, slots}
---@field find fun(self: DelayedScaling, weight: Tensor): integer[] which of them are known by a weight
---@field options fun(self: DelayedScaling): table margin, format, amax_history_len and amax_compute_algo
---@field forget fun(self: DelayedScaling) begins anew: all scales are 1 again
---@field expect fun(self: DelayedScaling, site: table) a product of sites() that is still to come, for load_state_dict
local methods = core.fp8_recipe.__index

--- Names of sites by the parameters of modules: number of the site -> name.
local function names_of(recipe, ...)
  local names = {}
  for _, module in ipairs {...} do
    if type(module) ~= "table" or not module.__is_module then
      raise("report: expected modules, came %s", describe(module))
    end
    for name, param in module:named_parameters() do
      for _, i in ipairs(recipe:find(param)) do names[i] = names[i] or name end
    end
  end
  return names
end

--- Every slot in the order in which its product first came by: {name, op, slot, format, scale, amax}.  A product is
--- named after its weight, as the modules given have it (or hm knows it), else "attention #1": op and place.
---@param ... Module
---@return {name: string, op: string, slot: string, format: string, scale: number, amax: number}[]
function methods:slots(...)
  local names, list = names_of(self, ...), {}
  for i, site in ipairs(self:sites()) do
    local name = names[i] or site.name
      or (site.weighted and "%s with weight %d" or "%s #%d"):format(site.op, site.weighted and i or site.position + 1)
    for _, slot in ipairs(site.slots) do
      list[#list + 1] = {name = name, op = site.op, slot = slot.name, format = slot.format, scale = slot.scale,
        amax = slot.amax}
    end
  end
  return list
end

--- All slots as text: name, slot, format, the last amax and the scale in use.
---@param ... Module for the names of parameters
---@return string
function methods:report(...)
  local o, lines = self:options(), {}
  lines[1] = ("DelayedScaling: format %s, margin %d, history %d, %s"):format(o.format, o.margin, o.amax_history_len,
    o.amax_compute_algo)
  local slots, width = self:slots(...), 0
  for _, slot in ipairs(slots) do width = math.max(width, #slot.name) end
  for _, slot in ipairs(slots) do
    lines[#lines + 1] = ("  %-" .. width .. "s  %-8s  %s  amax %-10.4g scale %.6g"):format(slot.name, slot.slot,
      slot.format, slot.amax, slot.scale)
  end
  if #slots == 0 then lines[2] = "  no product has come by yet" end
  return table.concat(lines, "\n")
end

--- Scales and histories of all slots, for hm.save.
---@return table
function methods:state_dict()
  local state = {options = self:options(), sites = self:sites()}
  for _, site in ipairs(state.sites) do site.name = nil end
  return state
end

--- Takes over a state; margin, history length and algorithm stay the recipe's own.  Slots are matched by the order in
--- which their products come by, which the same model repeats.  Nothing changes if the state does not fit.
---@param state table
function methods:load_state_dict(state)
  if type(state) ~= "table" or type(state.sites) ~= "table" or type(state.options) ~= "table" then
    raise("load_state_dict: expected what DelayedScaling:state_dict() gave, came %s", describe(state))
  end
  local now = self:options()
  if state.options.format ~= now.format then
    raise("load_state_dict: the state is of format %s, the recipe has %s", describe(state.options.format),
      describe(now.format))
  end
  local trial = recipe_of(now)
  for _, site in ipairs(state.sites) do trial:expect(site) end
  self:forget()
  for _, site in ipairs(state.sites) do self:expect(site) end
end

local metatable = core.fp8_recipe

--- The settings and how many products the recipe knows.
function metatable.__tostring(self)
  local o = self:options()
  return ("DelayedScaling(%s, margin %d, history %d, %s; %d products)"):format(o.format, o.margin, o.amax_history_len,
    o.amax_compute_algo, #self:sites())
end

return {DelayedScaling = new, default_recipe = core.fp8_default}
