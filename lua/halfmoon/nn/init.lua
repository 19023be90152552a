--- nn/init.lua -- hm.nn: modules, layers, losses, and nn.functional, nn.init, nn.utils.

local class = require "halfmoon.nn.class"

local nn = {
  class = class.class,
  Module = class.Module,
  Parameter = class.Parameter,
  is_module = class.is_module,
  is_parameter = class.is_parameter,
  functional = require "halfmoon.nn.functional",
  init = require "halfmoon.nn.initialize",
  utils = require "halfmoon.nn.utils",
}

for _, file in ipairs {
  "linear", "conv", "pooling", "norm", "activations", "recurrent", "transformer", "containers", "losses", "observers",
  "quantize",
} do
  for name, value in pairs(require("halfmoon.nn." .. file)) do nn[name] = value end
end

return nn
