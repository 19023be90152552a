-- golden.lua -- values that PyTorch gave, and the tensors they were made of.

local assert = require "luassert"
local hm = require "halfmoon"
local inputs = require "spec.support.inputs"
local numbers = require "spec.support.numbers"

local M = {}

--- A tensor of sines (see inputs.lua), float64 unless a dtype is given.
---@param shape integer[]
---@param seed number
---@param dtype string?
---@return Tensor
function M.filled(shape, seed, dtype) return inputs.filled(shape, seed, {dtype = dtype or "f64"}) end

--- Ids as int64.
---@param list table
---@return Tensor
function M.ids(list) return hm.tensor(list, {dtype = "i64"}) end

--- A function that declares cases, golden(name, fn, shape, values): what fn() returns has the shape and, to nine
-- digits, the values.
---@param it function the spec's own
---@return fun(name: string, fn: fun(): Tensor, shape: integer[], values: number[])
function M.declarer(it)
  return function(name, fn, shape, values)
    it(name, function()
      local y = fn()
      assert.same(shape, y.shape)
      numbers.assert_near(y, values, 1e-9, 1e-9)
    end)
  end
end

return M
