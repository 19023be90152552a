-- policy_run.lua -- a training loop of one parameter with two elements, for the specs of loss-scale policies.

local hm = require "halfmoon"

---@class PolicyRun
---@field p Tensor
---@field opt Optimizer
---@field scaler GradScaler
local Run = {}
Run.__index = Run

--- One iteration whose unscaled gradients are all `gradient`: a number, "G" for clean ones, "X" for an overflow.
--- Returns what update() returned, and whether the optimizer stepped.
function Run:go(gradient)
  if gradient == "G" then gradient = 1 elseif gradient == "X" then gradient = math.huge end
  self.opt:zero_grad()
  self.scaler:scale((self.p * gradient):sum()):backward()
  local stepped = self.scaler:step(self.opt)
  return self.scaler:update(), stepped
end

--- The scales after each letter; "stop" where the policy stopped the training.
function Run:trace(letters)
  local scales = {}
  for letter in letters:gmatch("[GX]") do
    local ok, message = pcall(self.go, self, letter)
    if not ok and not tostring(message):find("stopped the training", 1, true) then error(message, 0) end
    scales[#scales + 1] = ok and ("%.14g"):format(self.scaler:get_scale()) or "stop"
  end
  return table.concat(scales, " ")
end

--- A new run, with the options of its scaler.
---@param options table?
---@return PolicyRun
return function(options)
  local p = hm.tensor({1, 2}, {requires_grad = true})
  return setmetatable({p = p, opt = hm.optim.SGD({p}, {lr = 0}), scaler = hm.amp.GradScaler(options)}, Run)
end
