--- nn/losses.lua -- losses as modules.

local class = require "halfmoon.nn.class"
local F = require "halfmoon.nn.functional"
local options = require "halfmoon.options"

local losses = {}

---@class CrossEntropyLoss: Module
local CrossEntropyLoss = class.class("CrossEntropyLoss")

--- nn.CrossEntropyLoss{reduction = "mean", ignore_index = -100, label_smoothing = 0}: logits [N, C, ...], int64 class
--- ids from 0.
function CrossEntropyLoss:init(opts) self.options = F._cross_entropy_options(opts) end

function CrossEntropyLoss:forward(logits, target) return F._cross_entropy(logits, target, self.options) end

losses.CrossEntropyLoss = CrossEntropyLoss

local reduction_spec = {reduction = {"string", "mean", options.one_of("mean", "sum", "none")}}

--- A loss of two tensors of equal shape, with the option `reduction`.
local function pointwise(name, fn)
  local new = class.class(name)
  function new:init(opts) self.options = options.check("nn." .. name, opts, reduction_spec) end
  function new:forward(x, target) return fn(x, target, self.options) end
  losses[name] = new
end

pointwise("MSELoss", F.mse_loss)
pointwise("L1Loss", F.l1_loss)

return losses
