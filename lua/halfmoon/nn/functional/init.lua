--- nn/functional/init.lua -- nn.functional: layers as functions, what modules compute, without state.
--
-- Options come last, as a table; positions (dims) count from 1, ids from 0.  Requiring this file also gives tensors the
-- methods max_pool2d, cross_entropy and so on.

local core = require "halfmoon.core"
require "halfmoon.tensor" -- the parts use methods that it gives to tensors

---@class halfmoon.functional
local F = {}

for _, part in ipairs {"linear", "window", "activation", "norm", "attention", "loss", "quantize"} do
  for name, fn in pairs(require("halfmoon.nn.functional." .. part)) do F[name] = fn end
end

-- ====== Methods of tensors ======

for _, name in ipairs {
  "linear", "conv2d", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "gelu", "glu", "cross_entropy", "mse_loss",
  "l1_loss",
} do
  core.Tensor[name] = F[name]
end

return F
