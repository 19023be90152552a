--- amp/layer_rules/init.lua -- hm.amp.layer_rules: rules of amp.layer_scale by name, or as tables.
--
-- A rule is a table:
--     name     string
--     options  names and defaults of its own options (leave it out to take any)
--     init     function(layer, opts) -> state, a table of plain numbers and strings; state.scale is the first scale.
--              layer: {name, kind (the class of the module), index (from 1, in the order of the modules), terms}
--     update   function(state, event, opts) -> next scale; after each step.
--              event: found_inf (in this layer's parameters), skipped (the step, whoever overflowed), inf_count, nan_count,
--              step (from 1), scale
--     backward function(state, event, opts) -> factor; when a gradient reaches the layer, in each backward.
--              event: incoming (the scale that the gradient carries already), terms, dtype, and two functions that
--              measure when they are called, and wait for the device: grad() and weight() -> {count, norm, amax,
--              finite (false: it has NaN or infinities)}; weight() gives nil where the module has no weight.  grad() of a
--              linear layer with an activation of its own is of the largest that the activation can make of the gradient
-- With update alone, gradients inside the layer carry state.scale, whatever they carried before.  With backward they
-- carry the incoming scale times the factor; update is then optional, and what it returns is only shown.
-- terms: how many products are added for one element of the input's gradient, of linear layers and convolutions; nil for
-- others.  Options that were not given have the rule's defaults; those given must have the default's type.
--
-- A rule that raises or returns no positive finite number stops nothing: the scale stays (the factor is 1), and the
-- first time it is said on the terminal.

local errors = require "halfmoon.errors"
local options = require "halfmoon.options"

local raise, describe = errors.raise, errors.describe

local rules = {}

local NAMES = {"adaptive", "layerwise"}

--- The names of the rules that come with the library.
---@return string[]
function rules.names() return table.move(NAMES, 1, #NAMES, 1, {}) end

--- nil if it has the form of a rule, else what is wrong.
local function complaint(rule)
  if type(rule) ~= "table" then return "a rule must be a name or a table, not " .. describe(rule) end
  if rule.update == nil and rule.backward == nil then
    return "a rule needs update = function(state, event, opts) ... return scale end, or backward"
  end
  for _, name in ipairs {"init", "update", "backward"} do
    if rule[name] ~= nil and type(rule[name]) ~= "function" then return name .. " must be a function" end
  end
  if rule.name ~= nil and type(rule.name) ~= "string" then return "name must be a string" end
  if rule.options ~= nil and type(rule.options) ~= "table" then
    return "options must be a table of names and defaults"
  end
end

--- A rule by name or as a table; raises where there is none.
---@param where string for messages
---@param rule string|table
---@return LayerRule
function rules.resolve(where, rule)
  if type(rule) == "string" then
    for _, name in ipairs(NAMES) do
      if rule == name then return rules[name] end
    end
    local near = errors.closest(rule, NAMES)
    raise("%s: unknown rule '%s'%s\n  known: %s; a table will do too", where, rule,
      near and (", did you mean '%s'?"):format(near) or "", table.concat(NAMES, ", "))
  end
  local wrong = complaint(rule)
  if wrong then raise("%s: %s", where, wrong) end
  return rule
end

--- The options that a rule sees: those given, checked, else its defaults.
---@param where string
---@param rule LayerRule
---@param given table
---@param also string[] further names, for messages
---@return table
function rules.options(where, rule, given, also)
  local opts, known = {}, table.move(also, 1, #also, 1, {})
  for name, default in pairs(rule.options or {}) do
    opts[name] = default
    known[#known + 1] = name
  end
  table.sort(known)
  where = ("%s (rule '%s')"):format(where, rule.name or "custom")
  for name, value in pairs(given) do
    local default = rule.options and rule.options[name]
    if rule.options and default == nil then options.unknown(where, name, known) end
    opts[name] = default == nil and value or options.value(where, name, value, {type(default)})
  end
  return opts
end

---@class LayerRule
---@field name string?
---@field options table?
---@field init nil|fun(layer: table, opts: table): table
---@field update nil|fun(state: table, event: table, opts: table): number
---@field backward nil|fun(state: table, event: table, opts: table): number

return setmetatable(rules, {
  __index = function(self, name)
    for _, known in ipairs(NAMES) do
      if name == known then
        local rule = require("halfmoon.amp.layer_rules." .. name)
        rawset(self, name, rule)
        return rule
      end
    end
  end,
})
