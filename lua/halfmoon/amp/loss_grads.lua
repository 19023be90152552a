--- amp/loss_grads.lua -- private to amp: gradients of one loss apart from those that are there already.
--
-- Losses with scales of their own must be unscaled apart, also where they share parameters: the gradients at hand are
-- laid aside, backward runs, the new ones are unscaled and checked alone, and the two are added.

local core = require "halfmoon.core"

local loss_grads = {}

--- The optimizers as an array: one, or an array of them.
---@param optimizers Optimizer|Optimizer[]
---@return Optimizer[]
function loss_grads.list(optimizers)
  if type(optimizers) == "table" and optimizers.core == nil and optimizers[1] ~= nil then return optimizers end
  return {optimizers}
end

--- Calls visit(parameter) for each parameter of an optimizer.
---@param optimizer Optimizer
---@param visit fun(p: Tensor)
function loss_grads.each(optimizer, visit)
  for _, group in ipairs(optimizer.param_groups) do
    for _, p in ipairs(group.params) do visit(p) end
  end
end

--- Takes the gradients of all parameters away; the result is what put() wants.
---@param optimizers Optimizer[]
---@return table<Tensor, Tensor> aside
function loss_grads.take(optimizers)
  local aside = {}
  for _, optimizer in ipairs(optimizers) do
    loss_grads.each(optimizer, function(p)
      if p.grad then
        aside[p] = p.grad
        p.grad = nil
      end
    end)
  end
  return aside
end

--- Adds the gradients that were taken away to those that have come since.
---@param aside table<Tensor, Tensor>
function loss_grads.put(aside)
  core.no_grad(function()
    for p, before in pairs(aside) do
      local new = p.grad
      p.grad = new and before + new or before
    end
  end)
end

--- Puts the gradients that were taken away in the place of those that have come since.
---@param optimizers Optimizer[]
---@param aside table<Tensor, Tensor>
function loss_grads.restore(optimizers, aside)
  for _, optimizer in ipairs(optimizers) do
    loss_grads.each(optimizer, function(p) p.grad = aside[p] end)
  end
end

return loss_grads
