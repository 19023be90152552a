--- nn/utils.lua -- nn.utils: clipping gradients.
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
---@return Tensor norm before clipping, a float32 tensor of no dims
function utils.clip_grad_norm_(params, max_norm, opts)
  params = list_of("clip_grad_norm_", params)
  opts = options.check("clip_grad_norm_", opts, {error_if_nonfinite = {"boolean", false}})
  if type(max_norm) ~= "number" or max_norm ~= max_norm or max_norm < 0 then
    errors.raise("clip_grad_norm_: max_norm must be a number of at least 0, not %s", errors.describe(max_norm))
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

--- Limits every element of the gradients to [-limit, limit].
---@param params Tensor[]|Tensor
---@param limit number
function utils.clip_grad_value_(params, limit)
  params = list_of("clip_grad_value_", params)
  if type(limit) ~= "number" or limit ~= limit or limit < 0 then
    errors.raise("clip_grad_value_: the limit must be a number of at least 0, not %s", errors.describe(limit))
  end
  local _ <close> = core.no_grad()
  for _, p in ipairs(params) do
    local grad = p.grad
    if grad then grad:copy_(grad:clamp(-limit, limit)) end
  end
end

return utils
