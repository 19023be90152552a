--- optim/init.lua -- hm.optim: SGD, Adam, AdamW, and optim.lr_scheduler.
--
--     local opt = optim.AdamW(model:parameters(), {lr = 1e-3})
--     opt:zero_grad(); loss:backward(); opt:step()
--     local opt = optim.SGD({{params = a}, {params = b, lr = 0.1}}, {lr = 0.01, momentum = 0.9})

local optimizer = require "halfmoon.optim.optimizer"
local options = require "halfmoon.options"
local errors = require "halfmoon.errors"

local optim = {Optimizer = optimizer.Optimizer}

local not_negative = options.at_least(0)

local function betas(value)
  if #value == 2 and type(value[1]) == "number" and type(value[2]) == "number" and value[1] >= 0 and value[1] < 1
    and value[2] >= 0 and value[2] < 1 then
    return
  end
  return "must be two numbers from 0 to below 1"
end

local function sgd_check(where, o)
  if o.nesterov and (o.momentum <= 0 or o.dampening ~= 0) then
    errors.raise("%s: nesterov needs a momentum above 0 and a dampening of 0", where)
  end
end

--- Stochastic gradient descent, with momentum if wanted:
--- optim.SGD(params, {lr = 0.001, momentum = 0, dampening = 0, weight_decay = 0, nesterov = false, maximize = false})
optim.SGD = optimizer.kind("SGD", "sgd", {
  lr = {"number", 1e-3, not_negative}, momentum = {"number", 0.0, not_negative}, dampening = {"number", 0.0},
  weight_decay = {"number", 0.0, not_negative}, nesterov = {"boolean", false}, maximize = {"boolean", false},
}, {"momentum_buffer"}, sgd_check)

--- The options of Adam and AdamW, which differ in the default of weight_decay.
local function adam_spec(weight_decay)
  return {
    lr = {"number", 1e-3, not_negative}, betas = {"table", {0.9, 0.999}, betas}, eps = {"number", 1e-8, not_negative},
    weight_decay = {"number", weight_decay, not_negative}, maximize = {"boolean", false},
  }
end

--- Adam: steps scaled by running means of the gradient and its square; weight decay is added to the gradient.
--- optim.Adam(params, {lr = 0.001, betas = {0.9, 0.999}, eps = 1e-8, weight_decay = 0, maximize = false})
optim.Adam = optimizer.kind("Adam", "adam", adam_spec(0.0), {"exp_avg", "exp_avg_sq"})

--- Adam with weight decay applied to the weights themselves:
--- optim.AdamW(params, {lr = 0.001, betas = {0.9, 0.999}, eps = 1e-8, weight_decay = 0.01, maximize = false})
optim.AdamW = optimizer.kind("AdamW", "adamw", adam_spec(0.01), {"exp_avg", "exp_avg_sq"})

return setmetatable(optim, {
  __index = function(self, name)
    if name ~= "lr_scheduler" then return nil end
    local module = require "halfmoon.optim.lr_scheduler"
    rawset(self, name, module)
    return module
  end,
})
