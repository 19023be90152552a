--- amp/scaler_options.lua -- the options of a GradScaler and of its policy: what was given, what is checked, what the
-- policy sees.  Private to amp: grad_scaler.lua and what replays runs through it.

local errors = require "halfmoon.errors"
local options = require "halfmoon.options"

local raise, describe = errors.raise, errors.describe

-- ====== Options ======

local function finite_above(low)
  return function(value)
    if value > low and value < math.huge then return end
    return ("must be above %g and finite"):format(low)
  end
end

local function fraction(value)
  if value > 0 and value < 1 then return end
  return "must lie between 0 and 1"
end

local spec = {
  enabled = {"boolean", true},
  init_scale = {"number", nil, finite_above(0)},
  growth_factor = {"number", 2.0, finite_above(1)},
  backoff_factor = {"number", 0.5, fraction},
  growth_interval = {"integer", 2000, options.at_least(1)},
  min_scale = {"number", nil, options.at_least(0)},
  max_scale = {"number", nil, options.above(0)},
  policy = {"string|table", "dynamic"},
  dtype = {"string", "float16"},
  allow_f16_grads = {"boolean", false},
  async = {"boolean", false},
  trace = {"string|table"},
}
local policy_options = {"growth_factor", "backoff_factor", "growth_interval"}

--- Sorts out what was given: options of the scaler (checked), and further ones for the policy.
local function split_options(given)
  local own, extra = {}, {}
  for name, value in pairs(given or {}) do
    if spec[name] then own[name] = value else extra[name] = value end
  end
  return options.check("GradScaler", own, spec), extra
end

--- Raises for an option that neither the scaler nor the policy knows, or that is not of the default's type.
local function check_extra(where, extra, runner)
  local known = options.names(spec)
  for name in pairs(runner.options or {}) do
    if not spec[name] then known[#known + 1] = name end
  end
  for name, value in pairs(extra) do
    local near, edits
    if type(name) == "string" then near, edits = errors.closest(name, known) end
    local default = runner.options and runner.options[name]
    local declared = default ~= nil
    if declared and type(default) ~= type(value) then
      raise("%s (policy '%s'): option '%s' must be a %s, not %s", where, runner.name, name, type(default),
        describe(value))
    end
    if not declared and (runner.options or type(name) ~= "string" or (near and edits <= 2)) then
      options.unknown(("%s (policy '%s')"):format(where, runner.name), name, known)
    end
  end
end

-- ====== State and options of policies ======

--- A copy of plain data.
local function copy(value)
  if type(value) ~= "table" then return value end
  local new = {}
  for k, v in pairs(value) do new[k] = copy(v) end
  return new
end

--- Takes fields of `old` over into `new` where name and type agree.
local function carry_over(old, new)
  local kept, reset = {}, {}
  for name, value in pairs(new) do
    if old[name] ~= nil and type(old[name]) == type(value) then
      new[name] = copy(old[name])
      kept[#kept + 1] = tostring(name)
    else
      reset[#reset + 1] = tostring(name)
    end
  end
  table.sort(kept)
  table.sort(reset)
  return kept, reset
end

--- The options that a policy sees: what was given, else its own default, else the scaler's.
local function options_of(given, runner, bounds)
  local opts = {}
  for _, name in ipairs(policy_options) do opts[name] = spec[name][2] end
  for name, default in pairs(runner.options or {}) do opts[name] = default end
  for name, value in pairs(given) do opts[name] = value end
  for name, value in pairs(bounds) do opts[name] = value end
  return opts
end

--- Statistics that only a scaler that waits for the device has.
local SLOW = {histogram = true, per_param = true}

--- Raises if the scaler cannot tell what the policy needs.
local function check_needs(where, runner, async)
  for _, name in ipairs(runner.needs) do
    if async and SLOW[name] then
      raise("%s: policy '%s' needs '%s', which a scaler with async = true does not have: its events carry the counts, "
        .. "amax and norm\n  hint: make the scaler without async, or take a policy that needs less", where, runner.name,
        name)
    end
  end
end

return {
  spec = spec, policy_options = policy_options, finite_above = finite_above, split = split_options,
  check_extra = check_extra, check_needs = check_needs, of = options_of, copy = copy, carry_over = carry_over,
}
