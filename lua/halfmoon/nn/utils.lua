--- nn/utils.lua -- nn.utils: clipping gradients, parameters as one vector, sequences padded to one length.
--
-- With a GradScaler call scaler:unscale_(opt) first, or give scaler:step(opt, {max_norm = ...}), which clips in the
-- same pass.

local core = require "halfmoon.core"
local errors = require "halfmoon.errors"
local options = require "halfmoon.options"

local utils = {}

--- One tensor or an array of them, as an array.
local function list_of(where, params)
  if core.is_tensor(params) then return {params} end
  if type(params) ~= "table" then
    errors.raise("%s: expected an array of tensors, not %s", where, errors.describe(params))
  end
  for i, p in ipairs(params) do
    if not core.is_tensor(p) then errors.raise("%s: entry %d is %s, not a tensor", where, i, errors.describe(p)) end
  end
  return params
end

--- Scales gradients so that their norm together is at most max_norm.
---@param params Tensor[]|Tensor
---@param max_norm number
---@param opts {error_if_nonfinite: boolean}?
---@return Tensor norm before clipping, a float32 tensor of no dims; on a GPU it stays there, and nothing waits for it
--- unless error_if_nonfinite is asked for
function utils.clip_grad_norm_(params, max_norm, opts)
  params = list_of("clip_grad_norm_", params)
  opts = options.check("clip_grad_norm_", opts, {error_if_nonfinite = {"boolean", false}})
  if type(max_norm) ~= "number" or max_norm ~= max_norm or max_norm < 0 then
    errors.raise("clip_grad_norm_: max_norm must be a number of at least 0, not %s", errors.describe(max_norm))
  end
  if not opts.error_if_nonfinite then
    local late = core.grad_clip(params, max_norm)
    if late then return late end
  end
  local norm = core.grad_norm(params)
  if opts.error_if_nonfinite and (norm ~= norm or norm == math.huge) then
    errors.raise("clip_grad_norm_: the norm of the gradients is %s; nothing was clipped",
      norm ~= norm and "nan" or "inf")
  end
  local coefficient = max_norm / (norm + 1e-6)
  local within = coefficient >= 1
  if not within then core.grad_scale(params, coefficient) end -- also for NaN: it must not be hidden
  return core.tensor(norm)
end

--- Limits every element of the gradients to [-limit, limit], in one pass; NaN stays NaN.
---@param params Tensor[]|Tensor
---@param limit number
function utils.clip_grad_value_(params, limit)
  params = list_of("clip_grad_value_", params)
  if type(limit) ~= "number" or limit ~= limit or limit < 0 then
    errors.raise("clip_grad_value_: the limit must be a number of at least 0, not %s", errors.describe(limit))
  end
  core.grad_clamp(params, limit)
end

-- ====== Parameters as one vector ======

--- All parameters one behind the other in a vector; gradients flow through it.
---@param params Tensor[]|Tensor
---@return Tensor
function utils.parameters_to_vector(params)
  params = list_of("parameters_to_vector", params)
  if #params == 0 then errors.raise("parameters_to_vector: the list of parameters is empty") end
  local parts = {}
  for i, p in ipairs(params) do parts[i] = p:reshape(p:numel()) end
  return core.cat(parts, 1)
end

--- Copies a vector made by parameters_to_vector into parameters.
---@param vector Tensor
---@param params Tensor[]|Tensor
function utils.vector_to_parameters(vector, params)
  local where = "vector_to_parameters"
  params = list_of(where, params)
  local total = 0
  for _, p in ipairs(params) do total = total + p:numel() end
  if not core.is_tensor(vector) or vector:dim() ~= 1 or vector:size(1) ~= total then
    errors.raise("%s: the vector must be [%d], as many numbers as the parameters have, came %s", where, total,
      errors.describe(vector))
  end
  local _ <close> = core.no_grad()
  local at = 1
  for _, p in ipairs(params) do
    p:copy_(vector:narrow(1, at, p:numel()):reshape(p.shape))
    at = at + p:numel()
  end
end

-- ====== Sequences ======

utils.rnn = {}

local pad_spec = {
  batch_first = {"boolean", false}, padding_value = {"number", 0},
  padding_side = {"string", "right", options.one_of("right", "left")},
}

--- Sequences [T, ...] of different lengths as one tensor [longest, N, ...] (batch_first: [N, longest, ...]), filled up with
--- padding_value.
---@param sequences Tensor[]
---@param opts {batch_first: boolean, padding_value: number, padding_side: "right"|"left"}?
---@return Tensor
function utils.rnn.pad_sequence(sequences, opts)
  local where = "pad_sequence"
  sequences = list_of(where, sequences)
  opts = options.check(where, opts, pad_spec)
  if #sequences == 0 then errors.raise("%s: the list of sequences is empty", where) end
  local longest, first = 0, sequences[1]
  for i, s in ipairs(sequences) do
    local fits = s:dim() > 0 and s:dim() == first:dim()
    for d = 2, fits and s:dim() or 0 do fits = fits and s:size(d) == first:size(d) end
    if not fits then
      errors.raise("%s: sequences may differ in dim 1 only: entry 1 is %s, entry %d is %s", where,
        errors.describe(first), i, errors.describe(s))
    end
    longest = math.max(longest, s:size(1))
  end
  local padded = {}
  for i, s in ipairs(sequences) do
    local missing = longest - s:size(1)
    if missing > 0 then
      local pads = {}
      for d = 1, 2 * s:dim() do pads[d] = 0 end
      pads[#pads - (opts.padding_side == "right" and 0 or 1)] = missing
      s = core.call("pad", s, {pad = pads, mode = "constant", value = opts.padding_value})
    end
    padded[i] = s
  end
  return core.stack(padded, opts.batch_first and 1 or 2)
end

return utils
