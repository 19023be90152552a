-- attrs.lua -- attribute types as C sees them: parameters, fields, defaults.

local M = {}

--- True for types whose value is a list (fields n and v of hm_attr).
function M.is_list(type) return type == "ints" or type == "dims" or type == "shape" end

--- C initialiser of an attribute's default.
function M.default(a)
  local d = a.default
  if a.type == "float" then
    if d == "inf" then return "{.f = INFINITY}" elseif d == "-inf" then return "{.f = -INFINITY}" end
    return ("{.f = %s}"):format(d or "0")
  end
  if M.is_list(a.type) then return d and ("{.n = 1, .v = {%s}}"):format(d) or "{.n = 0}" end
  if a.type == "bool" then return ("{.i = %d}"):format(d == "true" and 1 or 0) end
  if a.type == "enum" then
    for i, c in ipairs(a.choices) do if c == d then return ("{.i = %d}"):format(i - 1) end end
    return "{.i = 0}"
  end
  if a.type == "rng" then return "{.n = 0}" end
  return ("{.i = %s}"):format(d or (a.optional and "HM_NONE" or "0"))
end

--- C parameters of an attribute; "" for hidden ones.
function M.parameter(a)
  if a.type == "rng" then return "" end
  if a.type == "float" then return "double " .. a.name end
  if M.is_list(a.type) then return ("int n_%s, const int64_t *%s"):format(a.name, a.name) end
  return "int64_t " .. a.name
end

--- C statement that fills at[i] from the parameters.
function M.fill(a, i)
  if a.type == "rng" then return ("  at[%d] = (hm_attr){.n = 0};\n"):format(i) end
  if a.type == "float" then return ("  at[%d].f = %s;\n"):format(i, a.name) end
  if M.is_list(a.type) then
    return ("  at[%d].n = n_%s;\n  for (int k = 0; k < n_%s && k < HM_MAX_NDIM; k++) at[%d].v[k] = %s[k];\n"):format(
      i, a.name, a.name, i, a.name)
  end
  return ("  at[%d].i = %s;\n"):format(i, a.name)
end

return M
