-- formula.lua -- what the CPU's tiles and the GPU's functors share: an elementwise row's formula, its operands and attributes, as C.

local expr = require "expr"

local M = {}

--- The types that formulas are computed in: {suffix, C type}.
M.DOMAINS = {{"f32", "float"}, {"f64", "double"}, {"i64", "int64_t"}}

--- Does the row have a formula for this domain?
---@param op table a row
---@param suffix string "f32", "f64" or "i64"
---@return boolean
function M.has(op, suffix) return suffix ~= "i64" or op.ints == "keep" end

--- The formula's tree in a domain.
---@param op table a row
---@param suffix string
---@return table
function M.tree(op, suffix) return suffix == "i64" and op.fi or op.f end

--- The row's value as a C expression of its inputs' and attributes' names.
---@param op table a row
---@param suffix string
---@param type string the C type
---@return string
function M.value(op, suffix, type)
  local fixed = {}
  for _, a in ipairs(op.attrs) do fixed[a.name] = true end
  return ("(%s)%s"):format(type, expr.c(M.tree(op, suffix), suffix, type, fixed))
end

--- Attribute number i (from 1) of a row as a C expression over `attr`, in the type computed in.
---@param a table the attribute
---@param i integer
---@param suffix string
---@param type string the C type
---@return string
function M.attribute(a, i, suffix, type)
  local value = ("attr[%d].%s"):format(i - 1, a.type == "float" and "f" or "i")
  if a.type == "float" and suffix == "i64" then value = ("hm_saturate_i64(%s)"):format(value) end
  return ("(%s)%s"):format(type, value)
end

--- The positions (from 1) of the inputs or attributes that the formula names.
---@param op table a row
---@param suffix string
---@param list table op.inputs or op.attrs
---@return integer[]
function M.used(op, suffix, list)
  local names, t = expr.names(M.tree(op, suffix)), {}
  for i, item in ipairs(list) do if names[item.name] then t[#t + 1] = i end end
  return t
end

return M
