--- einsum.lua -- sums of products in Einstein's notation: hm.einsum("bij,bjk->bik", x, y).
--
-- The equation names the dims of each operand by letters; a letter that the result does not name is summed over.  A
-- letter written twice in one operand takes its diagonal.  "..." stands for the dims not named, which broadcast.
-- Operands are taken from left to right, two at a time: each pair is a batched matmul of permuted, reshaped operands.

local core = require "halfmoon.core"
local linalg = require "halfmoon.linalg"
local errors = require "halfmoon.errors"

local raise, describe = errors.raise, errors.describe

-- ====== Reading the equation ======
-- A label is a letter, or "...k" for the k-th dim of an ellipsis, counted from its end.

--- Labels of one term for a tensor of `ndim` dims (nil: the result, whose ellipsis has `ellipsis` dims).
local function labels_of(equation, term, ndim, ellipsis)
  local before, after = term, ""
  local at = term:find("...", 1, true)
  if at then before, after = term:sub(1, at - 1), term:sub(at + 3) end
  if (before .. after):find("[^%a]") then
    raise("einsum: \"%s\" in \"%s\" may hold letters and one \"...\"", term, equation)
  end
  local list = {}
  for letter in before:gmatch(".") do list[#list + 1] = letter end
  if at then
    local dims = ndim and ndim - #before - #after or ellipsis
    for k = dims, 1, -1 do list[#list + 1] = "..." .. k end
  end
  for letter in after:gmatch(".") do list[#list + 1] = letter end
  return list, at ~= nil
end

--- Labels of each operand, and of the result.
local function read(equation, operands)
  local compact = equation:gsub("%s+", "")
  local left, right = compact:match("^(.-)%->(.*)$")
  left = left or compact
  local inputs, ellipsis, count = {}, 0, {}
  for term in (left .. ","):gmatch("([^,]*),") do inputs[#inputs + 1] = term end
  if #inputs ~= #operands then
    raise("einsum: \"%s\" names %d operand%s, came %d tensor%s", equation, #inputs, #inputs == 1 and "" or "s",
      #operands, #operands == 1 and "" or "s")
  end
  for i, term in ipairs(inputs) do
    local x = operands[i]
    local labels, open = labels_of(equation, term, x:dim())
    if #labels ~= x:dim() then
      raise("einsum: \"%s\" names %d dim%s, operand %d is %s", term, #term - (open and 3 or 0),
        #term == (open and 4 or 1) and "" or "s", i, describe(x))
    end
    for _, label in ipairs(labels) do
      count[label] = (count[label] or 0) + 1
      if #label > 1 then ellipsis = math.max(ellipsis, math.tointeger(label:sub(4))) end
    end
    inputs[i] = labels
  end
  local output
  if right then
    output = labels_of(equation, right, nil, ellipsis)
  else -- the ellipsis, then what is named once, in the order of the alphabet
    output = {}
    for label, times in pairs(count) do
      if times == 1 and #label == 1 then output[#output + 1] = label end
    end
    table.sort(output)
    for k = 1, ellipsis do table.insert(output, 1, "..." .. k) end
  end
  local seen = {}
  for _, label in ipairs(output) do
    if seen[label] then raise("einsum: the result of \"%s\" names \"%s\" twice", equation, label) end
    if not count[label] then
      raise("einsum: the result of \"%s\" names \"%s\", which no operand has", equation, label)
    end
    seen[label] = true
  end
  return inputs, output, seen
end

-- ====== One operand ======

--- Takes diagonals until each label stands once.
local function without_repeats(equation, x, labels)
  local i = 1
  while i <= #labels do
    local j = i + 1
    while j <= #labels and labels[j] ~= labels[i] do j = j + 1 end
    if j <= #labels then
      if x:size(i) ~= x:size(j) then
        raise("einsum: \"%s\" of \"%s\" stands for sizes %d and %d of %s", labels[i], equation, x:size(i), x:size(j),
          describe(x))
      end
      x = linalg.diagonal(x, 0, i, j)
      local kept = {}
      for k, label in ipairs(labels) do
        if k ~= i and k ~= j then kept[#kept + 1] = label end
      end
      kept[#kept + 1] = labels[i]
      labels, i = kept, 1
    else
      i = i + 1
    end
  end
  return x, labels
end

--- Sum over dims, counted from 1.
local function sum_over(x, dims) return x:sum{dim = dims} end

--- Sums over the labels that are not wanted.
local function summed(x, labels, wanted)
  local dims, kept = {}, {}
  for d, label in ipairs(labels) do
    if wanted[label] then kept[#kept + 1] = label else dims[#dims + 1] = d end
  end
  if #dims == 0 then return x, labels end
  return sum_over(x, dims), kept
end

--- The dims of x in the order of `order`, then joined to the given shape.
local function arranged(x, labels, order, shape)
  local place = {}
  for d, label in ipairs(labels) do place[label] = d end
  local dims = {}
  for i, label in ipairs(order) do dims[i] = place[label] end
  if #dims > 1 then x = x:permute(dims) end
  return shape and x:reshape(shape) or x
end

-- ====== Two operands ======

local function product_of(labels, sizes)
  local n = 1
  for _, label in ipairs(labels) do n = n * sizes[label] end
  return n
end

--- Drops the dims of size 1 that broadcast against a larger dim of the other operand.
local function without_ones(x, labels, others)
  local dims, kept = {}, {}
  for d, label in ipairs(labels) do
    if x:size(d) == 1 and others[label] and others[label] ~= 1 then dims[#dims + 1] = d else kept[#kept + 1] = label end
  end
  return #dims > 0 and x:squeeze(dims) or x, kept
end

local function sizes_of(x, labels)
  local sizes = {}
  for d, label in ipairs(labels) do sizes[label] = x:size(d) end
  return sizes
end

local function append(list, more) return table.move(more, 1, #more, #list + 1, table.move(list, 1, #list, 1, {})) end

--- x times y, summed over the labels that are in both and not wanted.
local function multiply(x, x_labels, y, y_labels, wanted)
  local x_sizes, y_sizes = sizes_of(x, x_labels), sizes_of(y, y_labels)
  x, x_labels = without_ones(x, x_labels, y_sizes)
  y, y_labels = without_ones(y, y_labels, x_sizes)
  x_sizes, y_sizes = sizes_of(x, x_labels), sizes_of(y, y_labels)
  local needed = setmetatable({}, {__index = function(_, label) return wanted[label] or y_sizes[label] end})
  x, x_labels = summed(x, x_labels, needed)
  needed = setmetatable({}, {__index = function(_, label) return wanted[label] or x_sizes[label] end})
  y, y_labels = summed(y, y_labels, needed)
  local batch, rows, inner, columns = {}, {}, {}, {}
  for _, label in ipairs(x_labels) do
    local into = not y_sizes[label] and rows or (wanted[label] and batch or inner)
    into[#into + 1] = label
  end
  for _, label in ipairs(y_labels) do
    if not x_sizes[label] then columns[#columns + 1] = label end
  end
  local b, r, k, c = product_of(batch, x_sizes), product_of(rows, x_sizes), product_of(inner, x_sizes),
    product_of(columns, y_sizes)
  local left = arranged(x, x_labels, append(append(batch, rows), inner), {b, r, k})
  local right = arranged(y, y_labels, append(append(batch, inner), columns), {b, k, c})
  local out
  if #inner == 0 then
    out = left * right
  elseif x:is_floating_point() or y:is_floating_point() then
    out = core.matmul(left, right)
  else
    out = core.sum(left:unsqueeze(4) * right:unsqueeze(2), 3)
  end
  local labels, shape = append(append(batch, rows), columns), {}
  for i, label in ipairs(labels) do shape[i] = x_sizes[label] or y_sizes[label] end
  return out:reshape(shape), labels
end

-- ====== All of them ======

--- Raises unless each label stands for one size (or 1).
local function check_sizes(equation, operands, inputs)
  local sizes, from = {}, {}
  for i, labels in ipairs(inputs) do
    for d, label in ipairs(labels) do
      local size = operands[i]:size(d)
      if sizes[label] and sizes[label] ~= size and sizes[label] ~= 1 and size ~= 1 then
        raise("einsum: \"%s\" of \"%s\" stands for sizes %d and %d: operand %d is %s, operand %d is %s",
          #label > 1 and "..." or label, equation, sizes[label], size, from[label], describe(operands[from[label]]), i,
          describe(operands[i]))
      end
      if not sizes[label] or sizes[label] == 1 then sizes[label], from[label] = size, i end
    end
  end
end

local function compute(equation, operands)
  local inputs, output, named = read(equation, operands)
  check_sizes(equation, operands, inputs)
  local x, labels = without_repeats(equation, operands[1], inputs[1])
  for i = 2, #operands do
    local y, y_labels = without_repeats(equation, operands[i], inputs[i])
    local wanted = setmetatable({}, {__index = named})
    for later = i + 1, #operands do
      for _, label in ipairs(inputs[later]) do wanted[label] = true end
    end
    x, labels = multiply(x, labels, y, y_labels, wanted)
  end
  x, labels = summed(x, labels, named)
  return arranged(x, labels, output)
end

--- Sum of products by the letters of an equation: einsum("ij,jk->ik", x, y) is matmul, einsum("ii", x) the trace.
--- Letters the result does not name are summed over; without "->" it names those written once, in alphabetical order;
--- "..." stands for dims that broadcast.  Inside autocast it computes in the low dtype.
---@param equation string
---@param ... Tensor the operands, or one array of them
---@return Tensor
local function einsum(equation, ...)
  local operands = {...}
  if #operands == 1 and type(operands[1]) == "table" then operands = operands[1] end
  if type(equation) ~= "string" then
    raise("einsum: the equation comes first, as a string, not %s", describe(equation))
  end
  if #operands == 0 then raise("einsum: \"%s\" needs tensors, came none", equation) end
  for i, x in ipairs(operands) do
    if not core.is_tensor(x) then raise("einsum: operand %d must be a tensor, not %s", i, describe(x)) end
  end
  local state = core.autocast_state()
  if not state.enabled then return compute(equation, operands) end
  local low, fp8 = {}, state.dtype == "fp8"
  for i, x in ipairs(operands) do
    low[i] = x:is_floating_point() and x.dtype ~= "float64" and x:to(fp8 and "float32" or state.dtype) or x
  end
  if fp8 then return compute(equation, low) end -- its products round what they multiply
  return core.autocast({enabled = false}, compute, equation, low)
end

return {einsum = einsum}
