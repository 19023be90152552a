--- checkpoint.lua -- hm.save and hm.load: state dicts and whole checkpoints as safetensors files.
--
-- A flat table name -> tensor is written as it is, readable by anything that reads safetensors.  A table that holds
-- tables, numbers or strings too ({model = ..., optimizer = ..., scaler = ..., epoch = 3}) is written with its tensors
-- under joined names ("model.fc.weight") and the rest as JSON in the metadata entry "halfmoon".  Nothing in a file is
-- ever executed.
--
-- The C side writes to a temporary file, flushes and renames: a kill at any moment leaves the old file or the new one.

local core = require "halfmoon.core"
local errors = require "halfmoon.errors"
local json = require "halfmoon.json"
local options = require "halfmoon.options"

local raise, describe = errors.raise, errors.describe

local checkpoint = {}

local TREE = "halfmoon" -- the metadata entry that holds everything but the tensors

--- obj:state_dict() for modules, optimizers, scalers and schedulers; anything else as it is.
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

--- Replaces tensors in nested tables by {["$tensor"] = name}, and collects them.
local function strip(value, path, entries, taken)
  value = state_of(value)
  if core.is_tensor(value) then
    local name = path
    while taken[name] do name = name .. "_" end
    taken[name] = true
    entries[#entries + 1] = {name, value}
    return {["$tensor"] = name}
  end
  if type(value) ~= "table" then return value end
  local plain = {}
  for key, inner in pairs(value) do
    plain[key] = strip(inner, path == "" and tostring(key) or path .. "." .. tostring(key), entries, taken)
  end
  return plain
end

--- Saves a state dict, an object that has one, or nested tables of tensors, numbers, strings and booleans.
---@param path string
---@param obj table
---@param metadata table<string, string>? further text to keep in the file
---@return boolean? true
---@return string? message
---@return string? code
function checkpoint.save(path, obj, metadata)
  if type(path) ~= "string" then raise("hm.save: the path must be a string, not %s", describe(path)) end
  obj = state_of(obj)
  if core.is_tensor(obj) then obj = {tensor = obj} end
  if type(obj) ~= "table" then raise("hm.save: expected a state dict or a table, not %s", describe(obj)) end
  local entries, texts = {}, {}
  for key, value in pairs(metadata or {}) do
    if type(key) ~= "string" or type(value) ~= "string" then raise("hm.save: metadata must be strings") end
    texts[key] = value
  end
  if is_flat(obj) then
    for name, t in pairs(obj) do entries[#entries + 1] = {name, t} end
  else
    local tree = strip(obj, "", entries, {})
    local ok, text = pcall(json.encode, tree)
    if not ok then raise("hm.save: %s", text) end
    texts[TREE] = text
  end
  table.sort(entries, function(a, b) return a[1] < b[1] end)
  return core.safetensors_save(path, entries, texts)
end

--- Puts tensors back where {["$tensor"] = name} stands.
local function fill(value, tensors)
  if type(value) ~= "table" then return value end
  if value["$tensor"] then return tensors[value["$tensor"]] end
  for key, inner in pairs(value) do value[key] = fill(inner, tensors) end
  return value
end

--- Loads what hm.save wrote, or any safetensors file as name -> tensor.
---@param path string
---@param opts {device: string}?
---@return table? obj
---@return table<string, string>|string metadata, or a message
---@return string? code "ENOENT", "EFORMAT", ...
function checkpoint.load(path, opts)
  if type(path) ~= "string" then raise("hm.load: the path must be a string, not %s", describe(path)) end
  opts = options.check("hm.load", opts, {device = {"string"}})
  local entries, metadata, code = core.safetensors_load(path, opts.device)
  if not entries then return nil, metadata, code end
  local tensors = {}
  for _, entry in ipairs(entries) do tensors[entry[1]] = entry[2] end
  metadata = metadata or {}
  local text = metadata[TREE]
  if not text then return tensors, metadata end
  local tree, why = json.decode(text)
  if type(tree) ~= "table" then
    return nil, ("%s: the metadata entry '%s' is damaged: %s"):format(path, TREE, why or "not a table"), "EFORMAT"
  end
  metadata[TREE] = nil
  return fill(tree, tensors), metadata
end

return checkpoint
