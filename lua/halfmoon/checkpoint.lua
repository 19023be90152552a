--- checkpoint.lua -- hm.save and hm.load: state dicts and whole training states, and arrays for NumPy.
--
--     local run = {model = model, optimizer = opt, scaler = scaler, scheduler = schedule, loader = loader, rng = true, step = 0}
--     assert(hm.save("run.safetensors", run))
--     assert(hm.load("run.safetensors", {into = run}))       -- in the process that goes on: same table of live objects
--
-- A flat table name -> tensor is written as it is, readable by anything that reads safetensors.  A table that holds
-- objects, tables, numbers or strings too is written with its tensors under joined names ("model.fc.weight") and the
-- rest as JSON in the metadata entry "halfmoon".  Nothing in a file is ever executed.  Beside it, in "halfmoon.settings",
-- stands what decides bits: threads, instruction set, versions.  Taking a state over under other settings warns.
--
-- `rng = true` stands for the random state of all devices (Lua's own math.random is not part of it).  A run that saves
-- model, optimizer, scaler, scheduler, loader and rng behind a step, and is killed at any moment after that, goes on
-- from there to the bits that it would have had.
--
-- The C side writes to a temporary file, flushes and renames: a kill at any moment leaves the old file or the new one.
-- A path that ends in .npy or .npz is written and read in NumPy's format: one tensor, or a table name -> tensor.

local core = require "halfmoon.core"
local errors = require "halfmoon.errors"
local json = require "halfmoon.json"
local options = require "halfmoon.options"

local raise, describe = errors.raise, errors.describe

local checkpoint = {}

local TREE = "halfmoon" -- the metadata entry that holds everything but the tensors
local SETTINGS = "halfmoon.settings"

-- ====== Settings that decide bits ======

--- What must be the same for the same bits.
local function settings_now(device)
  local features = core.features()
  local now = {
    version = core.version, threads = features.threads, isa = features.isa, onednn = features.onednn,
    deterministic = core.is_deterministic(),
  }
  for _, d in ipairs(device and device ~= "cpu" and core.devices() or {}) do
    if d.name == device then now.device = device .. " " .. d.kind end
  end
  return now
end

--- The device of the first tensor that is not on the CPU.
local function other_device(entries)
  for _, entry in ipairs(entries) do
    if entry[2].device ~= "cpu" then return entry[2].device end
  end
end

--- Says on standard error which settings are not what they were.
local function warn_of_settings(path, text)
  local saved = text and json.decode(text)
  if type(saved) ~= "table" then return end
  local name = type(saved.device) == "string" and saved.device:match("^(%S+)")
  local now, changed = settings_now(name), {}
  for key, value in pairs(saved) do
    if now[key] ~= value then
      changed[#changed + 1] = ("%s was %s and is %s"):format(key, tostring(value), tostring(now[key] or "none"))
    end
  end
  if #changed == 0 then return end
  table.sort(changed)
  io.stderr:write(("halfmoon: %s goes on under other settings: %s; the bits may differ\n"):format(path,
    table.concat(changed, ", ")))
end

-- ====== Saving ======

--- obj:state_dict() for modules, optimizers, scalers, schedulers and loaders; anything else as it is.
local function state_of(obj)
  if type(obj) == "table" and type(obj.state_dict) == "function" then return obj:state_dict() end
  return obj
end

--- True for a table whose keys are strings and whose values are tensors.
local function is_flat(t)
  for key, value in pairs(t) do
    if type(key) ~= "string" or not core.is_tensor(value) then return false end
  end
  return true
end

local function joined(path, key) return path == "" and tostring(key) or path .. "." .. tostring(key) end

--- Replaces tensors in nested tables by {["$tensor"] = name}, and collects them.
---@param value any
---@param path string names on the way here
---@param entries table[] {name, tensor}
---@param taken table<string|table, boolean> names in use, and tables on the way here
local function strip(value, path, entries, taken)
  if path == "rng" and value == true then return core.random_states() end
  value = state_of(value)
  if core.is_tensor(value) then
    local name = path
    while taken[name] do name = name .. "_" end
    taken[name] = true
    entries[#entries + 1] = {name, value}
    return {["$tensor"] = name}
  end
  if type(value) ~= "table" then return value end
  if taken[value] then raise("hm.save: '%s' leads back to a table that it is part of", path) end
  taken[value] = true
  local plain = {}
  for key, inner in pairs(value) do
    if type(key) == "string" and key:sub(1, 1) == "$" then
      raise("hm.save: the key '%s' begins with $, which stands for tensors and other special values", joined(path, key))
    end
    plain[key] = strip(inner, joined(path, key), entries, taken)
  end
  taken[value] = nil
  return plain
end

--- The kind of file that a path asks for: "npy", "npz", or nil for safetensors.
local function array_format(path)
  local suffix = path:lower():match("%.(np[yz])$")
  return suffix
end

--- Writes one tensor, or a table of them, for NumPy.
local function save_arrays(path, format, obj, metadata)
  if metadata ~= nil then raise("hm.save: %s: the %s format has no metadata", path, format) end
  if format == "npy" then
    if not core.is_tensor(obj) then
      raise("hm.save: %s: an npy file holds one tensor, not %s\n  hint: a table of tensors goes into .npz", path,
        describe(obj))
    end
    return core.npy_save(path, obj:detach())
  end
  if type(obj) ~= "table" or not is_flat(obj) then
    raise("hm.save: %s: an npz file holds a table name -> tensor, not %s\n  hint: .safetensors takes nested tables",
      path, describe(obj))
  end
  local entries = {}
  for name, t in pairs(obj) do entries[#entries + 1] = {name, t:detach()} end
  table.sort(entries, function(a, b) return a[1] < b[1] end)
  return core.npz_save(path, entries)
end

--- Saves a state dict, an object that has one, or nested tables of objects, tensors, numbers, strings and booleans.
--- `rng = true` in the table stands for the random state of all devices.  .npy and .npz: arrays for NumPy.
---@param path string
---@param obj table|Tensor
---@param metadata table<string, string>? further text to keep in the file
---@return boolean? true
---@return string? message
---@return string? code
function checkpoint.save(path, obj, metadata)
  if type(path) ~= "string" then raise("hm.save: the path must be a string, not %s", describe(path)) end
  obj = state_of(obj)
  local format = array_format(path)
  if format then return save_arrays(path, format, obj, metadata) end
  if core.is_tensor(obj) then obj = {tensor = obj} end
  if type(obj) ~= "table" then raise("hm.save: expected a state dict or a table, not %s", describe(obj)) end
  local entries, texts = {}, {}
  for key, value in pairs(metadata or {}) do
    if type(key) ~= "string" or type(value) ~= "string" then raise("hm.save: metadata must be strings") end
    if key == TREE or key == SETTINGS then raise("hm.save: the metadata entry '%s' is taken", key) end
    texts[key] = value
  end
  if is_flat(obj) then
    for name, t in pairs(obj) do entries[#entries + 1] = {name, t} end
  else
    local tree = strip(obj, "", entries, {})
    local ok, text = pcall(json.encode, tree)
    if not ok then raise("hm.save: %s", text) end
    texts[TREE] = text
    texts[SETTINGS] = json.encode(settings_now(other_device(entries)))
  end
  table.sort(entries, function(a, b) return a[1] < b[1] end)
  return core.safetensors_save(path, entries, texts)
end

-- ====== Loading ======

--- Puts tensors back where {["$tensor"] = name} stands; missing[1]: a name that is not there.
local function fill(value, tensors, missing)
  if type(value) ~= "table" then return value end
  local name = value["$tensor"]
  if name ~= nil then
    if not tensors[name] then missing[1] = tostring(name) end
    return tensors[name]
  end
  for key, inner in pairs(value) do value[key] = fill(inner, tensors, missing) end
  return value
end

--- Reads a safetensors file: name -> tensor, or the tree that was saved.
local function load_state(path, device)
  local entries, metadata, code = core.safetensors_load(path, device)
  if not entries then return nil, metadata, code end
  local tensors = {}
  for _, entry in ipairs(entries) do tensors[entry[1]] = entry[2] end
  metadata = metadata or {}
  local text = metadata[TREE]
  if not text then return tensors, metadata end
  local tree, why = json.decode(text)
  local missing = {}
  if type(tree) == "table" then
    tree = fill(tree, tensors, missing)
    if missing[1] then why = ("the tensor '%s' is not in the file"):format(missing[1]) end
  end
  if type(tree) ~= "table" or missing[1] then
    return nil, ("%s: the metadata entry '%s' is damaged: %s"):format(path, TREE, why or "not a table"), "EFORMAT"
  end
  metadata[TREE] = nil
  return tree, metadata
end

--- Reads NumPy's arrays.
local function load_arrays(path, format, device)
  local loaded, message, code = core[format .. "_load"](path)
  if not loaded then return nil, message, code end
  local function there(t) return device and t:to(device) or t end
  if format == "npy" then return there(loaded), {} end
  local arrays = {}
  for _, entry in ipairs(loaded) do arrays[entry[1]] = there(entry[2]) end
  return arrays, {}
end

--- When an object takes its state over: optimizers before the schedulers that set their rates.
local function rank(live) return type(live) == "table" and live.param_groups and 1 or 2 end

--- What is to be done so that `live` holds what was saved: {rank, name, action}.  Raises for what the file lacks.
local function plan(path, live, saved, at, steps)
  if type(saved) ~= "table" then raise("hm.load: %s: '%s' is %s, a table was expected", path, at, describe(saved)) end
  for key, target in pairs(live) do
    local name, value = joined(at, key), saved[key]
    if value == nil then
      raise("hm.load: %s: '%s' is not in the file\n  hint: leave it out of `into` to start it afresh", path, name)
    end
    local function step(action) steps[#steps + 1] = {rank(target), name, action} end
    if name == "rng" and target == true then
      step(function() core.set_random_states(value) end)
    elseif core.is_tensor(target) then
      if not core.is_tensor(value) or table.concat(value.shape, ",") ~= table.concat(target.shape, ",") then
        raise("hm.load: %s: '%s' is %s, the table has %s", path, name, describe(value), describe(target))
      end
      step(function() core.no_grad(function() target:copy_(value:to(target.device)) end) end)
    elseif type(target) == "table" and type(target.load_state_dict) == "function" then
      step(function() target:load_state_dict(value) end)
    elseif type(target) == "table" then
      plan(path, target, value, name, steps)
    else
      step(function() live[key] = value end)
    end
  end
end

--- Gives what was saved to live objects.
local function take_over(path, live, saved)
  local steps = {}
  plan(path, live, saved, "", steps)
  table.sort(steps, function(a, b)
    if a[1] ~= b[1] then return a[1] < b[1] end
    return a[2] < b[2]
  end)
  for _, step in ipairs(steps) do
    local ok, why = pcall(step[3])
    if not ok then
      raise("%s", ("hm.load: %s: '%s': %s"):format(path, step[2], (tostring(why):gsub("^[^\n]-:%d+: ", ""))))
    end
  end
end

--- Loads what hm.save wrote, or any safetensors, npy or npz file.  into: a table of live objects as it was given to
--- hm.save: each takes its state over, other values are set in the table, `rng = true` sets the random state.
---@param path string
---@param opts {device: string?, into: table?}?
---@return table|Tensor|nil obj what was saved; name -> tensor for a file without more
---@return table<string, string>|string metadata, or a message
---@return string? code "ENOENT", "EFORMAT", ...
function checkpoint.load(path, opts)
  if type(path) ~= "string" then raise("hm.load: the path must be a string, not %s", describe(path)) end
  opts = options.check("hm.load", opts, {device = {"string"}, into = {"table"}})
  local format = array_format(path)
  if format and opts.into then raise("hm.load: %s: `into` needs a safetensors file", path) end
  if format then return load_arrays(path, format, opts.device) end
  local saved, metadata, code = load_state(path, opts.device)
  if not saved or not opts.into then return saved, metadata, code end
  take_over(path, opts.into, saved)
  warn_of_settings(path, metadata[SETTINGS])
  return saved, metadata
end

return checkpoint
