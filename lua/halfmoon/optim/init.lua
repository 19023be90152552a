--- optim/init.lua -- hm.optim: SGD, Adam, AdamW, RMSprop, Adagrad, Lion, and optim.lr_scheduler.
--
--     local opt = optim.AdamW(model:parameters(), {lr = 1e-3})
--     opt:zero_grad(); loss:backward(); opt:step()
--     local opt = optim.SGD({{params = a}, {params = b, lr = 0.1}}, {lr = 0.01, momentum = 0.9})
--
-- State is float32 (float64 for float64 parameters), also for float16 and bfloat16 ones, which are rounded once a step.
-- A small update of a bfloat16 weight is lost in that rounding: train from float32 masters under amp.autocast, or, where
-- there is no room for masters, say `kahan = true` (what rounding takes is kept, in the weight's dtype, and made up for)
-- or `rounding = "stochastic"` (rounded up or down by chance, right on average; uses the device's random numbers, so
-- that hm.manual_seed gives the same run again).  Neither is better for every network: stochastic rounding adds noise in
-- each step, and a run may do worse with it than with updates that are lost (examples/study_precision.lua compares).
-- Both act on the half-precision parameters of a group.  A step that an asynchronous scaler skips takes its random
-- numbers all the same: the host does not know of it.

local optimizer = require "halfmoon.optim.optimizer"

local optim = {Optimizer = optimizer.Optimizer}

--- Stochastic gradient descent, with momentum if wanted:
--- optim.SGD(params, {lr = 0.001, momentum = 0, dampening = 0, weight_decay = 0, nesterov = false, maximize = false,
--- kahan = false, rounding = "nearest"})
optim.SGD = optimizer.kind("SGD", "sgd")

--- Adam: steps scaled by running means of the gradient and its square; weight decay is added to the gradient.
--- optim.Adam(params, {lr = 0.001, betas = {0.9, 0.999}, eps = 1e-8, weight_decay = 0, amsgrad = false,
--- maximize = false, kahan = false, rounding = "nearest"})
optim.Adam = optimizer.kind("Adam", "adam")

--- Adam with weight decay applied to the weights themselves:
--- optim.AdamW(params, {lr = 0.001, betas = {0.9, 0.999}, eps = 1e-8, weight_decay = 0.01, amsgrad = false,
--- maximize = false, kahan = false, rounding = "nearest"})
optim.AdamW = optimizer.kind("AdamW", "adamw")

--- Steps divided by the root of a running mean of the gradient's square; centered: of its variance.
--- optim.RMSprop(params, {lr = 0.01, alpha = 0.99, eps = 1e-8, weight_decay = 0, momentum = 0, centered = false,
--- maximize = false})
optim.RMSprop = optimizer.kind("RMSprop", "rmsprop")

--- Steps divided by the root of the sum of all squares so far:
--- optim.Adagrad(params, {lr = 0.01, lr_decay = 0, weight_decay = 0, initial_accumulator_value = 0, eps = 1e-10,
--- maximize = false})
optim.Adagrad = optimizer.kind("Adagrad", "adagrad")

--- Steps of one size, by the sign of a running mean of the gradient (arXiv 2302.06675); weight decay as AdamW's:
--- optim.Lion(params, {lr = 0.0001, betas = {0.9, 0.99}, weight_decay = 0, maximize = false})
optim.Lion = optimizer.kind("Lion", "lion")

return setmetatable(optim, {
  __index = function(self, name)
    if name ~= "lr_scheduler" then return nil end
    local module = require "halfmoon.optim.lr_scheduler"
    rawset(self, name, module)
    return module
  end,
})
