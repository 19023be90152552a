-- gradients.lua -- derivatives by finite differences, for any function of float64 tensors.

local hm = require "halfmoon"
local core = require "halfmoon.core"
local numbers = require "spec.support.numbers"

local M = {}

-- Fixed weights make a scalar of any output.
local function weights(t)
  local w, n = {}, t:numel()
  for i = 1, n do w[i] = math.cos(1.7 * i) + 0.3 end
  return hm.tensor(w, {dtype = "f64"}):view(t.shape)
end

local function scalar(fn, inputs)
  local y = fn(table.unpack(inputs))
  return (y * weights(y)):sum()
end

local function leaves_of(inputs)
  local out = {}
  for i, x in ipairs(inputs) do out[i] = x:detach():clone():requires_grad_() end
  return out
end

--- Central differences of f(lists) by element e of tensor k.
local function difference(f, inputs, k, e, h)
  local flat = numbers.flat(inputs[k])
  local function value(v)
    local list = table.move(flat, 1, #flat, 1, {})
    list[e] = v
    local changed = table.move(inputs, 1, #inputs, 1, {})
    changed[k] = hm.tensor(list, {dtype = "f64"}):view(inputs[k].shape)
    return f(changed)
  end
  return (value(flat[e] + h) - value(flat[e] - h)) / (2 * h)
end

local function compare(what, got, f, inputs, tolerance)
  for k = 1, #inputs do
    local g = got[k] and numbers.flat(got[k])
    for e = 1, inputs[k]:numel() do
      local want = difference(f, inputs, k, e, 1e-5)
      local have = g and g[e] or 0
      if not numbers.near(have, want, tolerance, tolerance) then
        error(("%s by input %d, element %d is %.9g, differences say %.9g"):format(what, k, e, have, want), 3)
      end
    end
  end
end

--- Checks the gradient of fn(inputs...) (a float64 tensor) by every element of every input.
function M.check(fn, inputs, tolerance)
  local leaves = leaves_of(inputs)
  local got = core.grad({scalar(fn, leaves)}, leaves, {allow_unused = true})
  compare("derivative", got, function(xs) return scalar(fn, xs):item() end, inputs, tolerance or 1e-6)
end

-- Not linear in the output: the gradient that comes into backward then hangs on the inputs too.
local function curved(fn, inputs)
  local y = fn(table.unpack(inputs))
  return ((y + y * y * 0.25) * weights(y)):sum()
end

--- Checks the second derivative: the gradient of a weighted sum of first gradients.
function M.check_second(fn, inputs, tolerance)
  local function first(xs, create)
    local grads = core.grad({curved(fn, xs)}, xs, {create_graph = create, allow_unused = true})
    local total
    for k = 1, #xs do
      if grads[k] then
        local part = (grads[k] * weights(grads[k])):sum()
        total = total and total + part or part
      end
    end
    return total
  end
  local leaves = leaves_of(inputs)
  local total = first(leaves, true)
  local got = total.requires_grad and core.grad({total}, leaves, {allow_unused = true}) or {}
  compare("second derivative", got, function(xs) return first(leaves_of(xs), false):item() end, inputs, tolerance or 1e-5)
end

return M
