-- learning.lua -- a short training in float32, or under autocast with a scaler, for the specs of layers.

local hm = require "halfmoon"
local amp = hm.amp

--- Runs steps of an optimizer on loss(), in "f32", "f16" (with a loss scale) or "bf16".
---@param opt Optimizer
---@param dtype string
---@param steps integer
---@param loss fun(): Tensor
---@return number first the first loss
---@return number last the last one
---@return integer skipped how many steps were left out
return function(opt, dtype, steps, loss)
  local scaler = amp.GradScaler {enabled = dtype == "f16"}
  local first, last, skipped = nil, nil, 0
  for _ = 1, steps do
    opt:zero_grad()
    local value
    do
      local _ <close> = dtype ~= "f32" and amp.autocast(dtype) or nil
      value = loss()
    end
    scaler:scale(value):backward()
    if not scaler:step(opt) then skipped = skipped + 1 end
    scaler:update()
    last = value:item()
    first = first or last
  end
  return first, last, skipped
end
