-- layers.lua -- models for the specs of amp.layer_scale, and their gradients.

local assert = require "luassert"
local hm = require "halfmoon"
local numbers = require "spec.support.numbers"

local nn = hm.nn

local M = {}

--- A model of one function: model(x) calls fn(self, x).  layers: {{name, module or parameter}, ...}.
function M.model_of(layers, fn)
  local Net = nn.class("Net")
  function Net:init()
    for _, entry in ipairs(layers) do self[entry[1]] = entry[2] end
  end
  Net.forward = fn
  return Net()
end

--- n square linear layers, one behind the other.
function M.chain(n, width)
  local layers = {}
  for i = 1, n do layers[i] = nn.Linear(width, width) end
  return nn.Sequential(table.unpack(layers))
end

--- Gradients of all parameters, by name, after a backward of fn(); .grad is cleared before.
function M.gradients(model, fn)
  model:zero_grad()
  fn():backward()
  local grads = {}
  for name, p in model:named_parameters() do grads[name] = p.grad and p.grad:clone() end
  return grads
end

--- The same names, the same bits.
function M.assert_equal_grads(got, want)
  for name, g in pairs(want) do numbers.assert_same(got[name], g, name) end
  for name in pairs(got) do assert.is_truthy(want[name], name) end
end

return M
