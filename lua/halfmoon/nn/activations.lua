--- nn/activations.lua -- activations as modules, for Sequential.

local class = require "halfmoon.nn.class"
local F = require "halfmoon.nn.functional"
local options = require "halfmoon.options"

local activations = {}

--- A module that calls a function of one tensor.
local function simple(name, fn)
  local new = class.class(name)
  function new:forward(x) return fn(x) end -- luacheck: ignore 212
  activations[name] = new
end

simple("ReLU", F.relu)
simple("Tanh", F.tanh)
simple("Sigmoid", F.sigmoid)
simple("SiLU", F.silu)

---@class GELU: Module
local GELU = class.class("GELU")

--- nn.GELU{approximate = "none"|"tanh"}
function GELU:init(opts)
  opts = options.check("nn.GELU", opts, {approximate = {"string", "none", options.one_of("none", "tanh")}})
  self.approximate = opts.approximate
end

function GELU:forward(x) return F.gelu(x, self.approximate == "tanh" and {approximate = "tanh"} or nil) end

function GELU:extra() return self.approximate == "tanh" and "tanh" or "" end

activations.GELU = GELU

return activations
