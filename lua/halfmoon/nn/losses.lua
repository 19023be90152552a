--- nn/losses.lua -- losses as modules.  Options are checked when the module is made; tensors among them (weight,
--- pos_weight) are buffers, which move with the module and stand in its state dict, as in PyTorch.

local class = require "halfmoon.nn.class"
local options = require "halfmoon.options"
local F = require "halfmoon.nn.functional"

local losses = {}

local reductions = options.one_of("mean", "sum", "none")
local share = require("halfmoon.arguments").share

-- A loss that calls a function of (input, target, options).  `tensors` names the options that are buffers.
local function loss(name, fn, spec, tensors)
  local new = class.class(name)
  local where = "nn." .. name
  spec.reduction = spec.reduction or {"string", "mean", reductions}
  for _, key in ipairs(tensors or {}) do spec[key] = {"tensor"} end
  function new:init(opts)
    opts = options.check(where, opts, spec)
    for _, key in ipairs(tensors or {}) do
      if opts[key] then self:register_buffer(key, opts[key]) end
      opts[key] = nil
    end
    self.options = opts
  end
  function new:forward(x, target)
    local opts = self.options
    for _, key in ipairs(tensors or {}) do opts[key] = self[key] end
    return fn(x, target, opts)
  end
  function new:extra()
    local parts = {}
    for _, key in ipairs(options.names(spec)) do
      local value = self.options[key]
      if value ~= spec[key][2] and type(value) ~= "userdata" then
        parts[#parts + 1] = ("%s %s"):format(key, type(value) == "number" and ("%g"):format(value) or tostring(value))
      end
    end
    return table.concat(parts, ", ")
  end
  losses[name] = new
end

--- nn.CrossEntropyLoss{weight =, reduction = "mean", ignore_index = -100, label_smoothing = 0}: logits [N, C, ...], int64
--- class ids from 0.  weight has one number for each class.
loss("CrossEntropyLoss", F._cross_entropy, {ignore_index = {"integer", -100}, label_smoothing = {"number", 0.0, share}},
  {"weight"})
--- nn.NLLLoss{weight =, reduction = "mean", ignore_index = -100}: log probabilities [N, C, ...], int64 class ids from 0.
loss("NLLLoss", F.nll_loss, {ignore_index = {"integer", -100}}, {"weight"})
--- nn.MSELoss{reduction = "mean"|"sum"|"none"}: squared differences.
loss("MSELoss", F.mse_loss, {})
--- nn.L1Loss{reduction = "mean"|"sum"|"none"}: absolute differences.
loss("L1Loss", F.l1_loss, {})
--- nn.SmoothL1Loss{reduction = "mean", beta = 1}: square (by 2 beta) below beta, absolute less beta / 2 above.
loss("SmoothL1Loss", F.smooth_l1_loss, {beta = {"number", 1.0, options.at_least(0)}})
--- nn.HuberLoss{reduction = "mean", delta = 1}: half the square below delta, a straight line above.
loss("HuberLoss", F.huber_loss, {delta = {"number", 1.0, options.above(0)}})
--- nn.BCELoss{weight =, reduction = "mean"}: binary cross entropy of probabilities; refused inside autocast.
loss("BCELoss", F.binary_cross_entropy, {}, {"weight"})
--- nn.BCEWithLogitsLoss{weight =, pos_weight =, reduction = "mean"}: binary cross entropy of sigmoid(x), without overflow.
loss("BCEWithLogitsLoss", F.binary_cross_entropy_with_logits, {}, {"weight", "pos_weight"})
--- nn.KLDivLoss{reduction = "mean"|"batchmean"|"sum"|"none", log_target = false}: x and, with log_target, target are log
--- probabilities.
loss("KLDivLoss", F.kl_div, {
  reduction = {"string", "mean", options.one_of("mean", "batchmean", "sum", "none")}, log_target = {"boolean", false},
})

return losses
