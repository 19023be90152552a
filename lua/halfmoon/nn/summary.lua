--- nn/summary.lua -- model:summary(shape): what each module gives and holds, as a table of rows that prints nicely.
--
-- The model is run once on zeros, in evaluation mode and without gradients; modes and buffers are as before afterwards.

local core = require "halfmoon.core"
local errors = require "halfmoon.errors"
local options = require "halfmoon.options"

local raise, describe = errors.raise, errors.describe

-- ====== Inputs ======

--- Zeros for a shape, or what was given as a tensor.
local function one_input(shape, dtype, device)
  if core.is_tensor(shape) then return shape end
  for _, size in ipairs(shape) do
    if not math.tointeger(size) or size < 0 then
      raise("summary: a shape must hold whole numbers from 0, not %s", describe(size))
    end
  end
  return core.zeros(shape, {dtype = dtype, device = device})
end

--- The inputs: a shape, a tensor, or an array of these.
local function inputs_of(model, shape, opts)
  if not core.is_tensor(shape) and type(shape) ~= "table" then
    raise("summary: expected the shape of the input, e.g. model:summary({1, 3, 32, 32}), not %s", describe(shape))
  end
  local dtype, device = opts.dtype, nil
  for _, t in model:named_parameters() do
    device = device or t.device
    if t:is_floating_point() then dtype = dtype or t.dtype end
  end
  dtype = dtype or "float32"
  if core.is_tensor(shape) or type(shape[1]) == "number" or #shape == 0 then shape = {shape} end
  local inputs = {}
  for i, one in ipairs(shape) do inputs[i] = one_input(one, dtype, device) end
  return inputs
end

-- ====== What is given ======

--- The shape of the first tensor in what a module returned; nil where there is none.
local function shape_of(...)
  for i = 1, select("#", ...) do
    local value = select(i, ...)
    if core.is_tensor(value) then return value.shape end
    if type(value) == "table" and core.is_tensor(value[1]) then return value[1].shape end
  end
end

--- Runs the model with a hook on each module.  Returns module -> shape of its last result.
local function run(model, inputs)
  local shapes, handles, modes = {}, {}, {}
  for _, module in model:named_modules() do
    modes[module] = module.training
    handles[#handles + 1] = module:register_forward_hook(function(self, _, ...) shapes[self] = shape_of(...) end)
  end
  model:eval()
  local ok, message = pcall(core.no_grad, function() model(table.unpack(inputs)) end)
  for _, handle in ipairs(handles) do handle.remove() end
  for module, mode in pairs(modes) do module.training = mode end
  if not ok then error(message, 0) end
  return shapes
end

-- ====== What is held ======

local function bytes_of(t) return t:numel() * t:element_size() end

--- Bytes of state that an optimizer holds, by parameter.
local function optimizer_bytes(opt)
  local by_parameter = {}
  if not opt then return by_parameter end
  for i = 1, opt.core:count() do
    local bytes = 0
    for _, name in ipairs(opt.state_names) do
      local t = opt.core:state(i, name)
      if t then bytes = bytes + bytes_of(t) end
    end
    by_parameter[opt.core:param(i)] = bytes
  end
  return by_parameter
end

--- Adds the module's own parameters (not those of modules below it) to its row; tensors in `seen` were counted before.
local function count_own(module, row, state, seen)
  for _, value, kind in module:fields() do
    if kind ~= "module" and not seen[value] then
      seen[value] = true
      row.dtype = row.dtype or value.dtype
      row.weight_bytes = row.weight_bytes + bytes_of(value)
      if kind == "parameter" then
        row.parameters = row.parameters + value:numel()
        if value.requires_grad then
          row.trainable = row.trainable + value:numel()
          row.gradient_bytes = row.gradient_bytes + bytes_of(value)
        end
        row.optimizer_bytes = row.optimizer_bytes + (state[value] or 0)
      end
    end
  end
end

local counted = {"parameters", "trainable", "weight_bytes", "gradient_bytes", "optimizer_bytes"}

local function empty_row(name, kind)
  local row = {name = name, type = kind}
  for _, key in ipairs(counted) do row[key] = 0 end
  return row
end

-- ====== Text ======

--- 1234567 as "1,234,567".
local function grouped(n)
  local text = tostring(n)
  local head = #text % 3
  local parts = head > 0 and {text:sub(1, head)} or {}
  for i = head + 1, #text, 3 do parts[#parts + 1] = text:sub(i, i + 2) end
  return table.concat(parts, ",")
end

--- Bytes as "1.5 MB".
local function in_bytes(n)
  if n < 1024 then return ("%d B"):format(n) end
  local units, i = {"KB", "MB", "GB", "TB"}, 0
  local value = n + 0.0
  while value >= 1024 and i < #units do
    value, i = value / 1024, i + 1
  end
  return ("%.1f %s"):format(value, units[i])
end

local RIGHT = {parameters = true, weights = true, gradients = true, optimizer = true}

--- The rows in columns.
local function to_text(self)
  local heads = {"name", "type", "output", "parameters", "dtype", "weights", "gradients"}
  if self.optimizer then heads[#heads + 1] = "optimizer" end
  local lines, widths = {heads}, {}
  local function cells(row)
    return {row.name == "" and "(model)" or row.name, row.type,
      row.output_shape and "[" .. table.concat(row.output_shape, ",") .. "]" or "",
      row.parameters > 0 and grouped(row.parameters) or "", row.dtype and errors.short_dtype[row.dtype] or "",
      row.weight_bytes > 0 and in_bytes(row.weight_bytes) or "",
      row.gradient_bytes > 0 and in_bytes(row.gradient_bytes) or "",
      row.optimizer_bytes > 0 and in_bytes(row.optimizer_bytes) or ""}
  end
  for _, row in ipairs(self) do lines[#lines + 1] = cells(row) end
  local total = self.total
  lines[#lines + 1] = {"total", "", "", grouped(total.parameters), "", in_bytes(total.weight_bytes),
    in_bytes(total.gradient_bytes), in_bytes(total.optimizer_bytes)}
  for _, line in ipairs(lines) do
    for i = 1, #heads do widths[i] = math.max(widths[i] or 0, #line[i]) end
  end
  local out = {}
  for n, line in ipairs(lines) do
    local parts = {}
    for i, head in ipairs(heads) do
      local pad = (" "):rep(widths[i] - #line[i])
      parts[i] = RIGHT[head] and pad .. line[i] or line[i] .. pad
    end
    if n == 2 or n == #lines then
      local length = 2 * (#heads - 1)
      for _, width in ipairs(widths) do length = length + width end
      out[#out + 1] = ("-"):rep(length)
    end
    out[#out + 1] = (table.concat(parts, "  "):gsub("%s+$", ""))
  end
  if total.trainable < total.parameters then
    out[#out + 1] = ("%s of %s parameters are trained"):format(grouped(total.trainable), grouped(total.parameters))
  end
  return table.concat(out, "\n")
end

local Summary = {__name = "Summary", __tostring = to_text}

-- ====== All of it ======

local summary_spec = {optimizer = {"table"}, dtype = {"string"}, print = {"boolean", true}}

--- model:summary(shape [, {optimizer =, dtype =, print = true}]): see Module:summary in nn/class.lua.  Rows have name, type,
--- output_shape, parameters, trainable, dtype, weight_bytes (parameters and buffers), gradient_bytes (of a full backward),
--- optimizer_bytes (what the optimizer holds now: nothing before its first step); `total` has their sums.  A module's row
--- counts its own tensors, not those of the modules in it, and a shared one where it comes first.
---@param model Module
---@param shape integer[]|Tensor|(integer[]|Tensor)[]
---@param opts {optimizer: Optimizer, dtype: string, print: boolean}?
---@return table
return function(model, shape, opts)
  opts = options.check("summary", opts, summary_spec)
  if opts.optimizer and not opts.optimizer.state_names then
    raise("summary: option 'optimizer' must be an optimizer, not %s", describe(opts.optimizer))
  end
  if opts.dtype and not errors.long_dtype[opts.dtype] then raise("summary: unknown dtype '%s'", opts.dtype) end
  local shapes = run(model, inputs_of(model, shape, opts))
  local state, seen = optimizer_bytes(opts.optimizer), {}
  local summary = setmetatable({total = empty_row("total", ""), optimizer = opts.optimizer ~= nil}, Summary)
  for name, module in model:named_modules() do
    local row = empty_row(name, module.__class)
    row.output_shape = shapes[module]
    count_own(module, row, state, seen)
    for _, key in ipairs(counted) do summary.total[key] = summary.total[key] + row[key] end
    summary[#summary + 1] = row
  end
  if opts.print then print(to_text(summary)) end
  return summary
end
