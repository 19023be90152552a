-- emit_tiles.lua -- tiles.h: every elementwise formula as a loop over contiguous elements, in float, double and int64_t.

local expr = require "expr"

local DOMAINS = {{"f32", "float"}, {"f64", "double"}, {"i64", "int64_t"}}

local function attribute(a, i, suffix, type)
  local field = a.type == "float" and "f" or "i"
  local value = ("attr[%d].%s"):format(i - 1, field)
  if a.type == "float" and suffix == "i64" then value = ("hm_saturate_i64(%s)"):format(value) end
  return ("  const %s %s = (%s)%s;\n"):format(type, a.name, type, value)
end

local function tile(op, suffix, type)
  local formula = suffix == "i64" and op.fi or op.f
  local names = expr.names(formula)
  local t = {("static void tile_%s_%s(int64_t n, %s *o, const %s *const *a, const hm_attr *attr) {\n"):format(suffix, op.name, type, type)}
  local loads, uses_attr = {}, false
  for i, input in ipairs(op.inputs) do
    if names[input.name] then
      t[#t + 1] = ("  const %s *const p%d = a[%d];\n"):format(type, i, i - 1)
      loads[#loads + 1] = ("    const %s %s = p%d[k];\n"):format(type, input.name, i)
    end
  end
  for i, a in ipairs(op.attrs) do
    if names[a.name] then
      uses_attr = true
      t[#t + 1] = attribute(a, i, suffix, type)
    end
  end
  if not uses_attr then t[#t + 1] = "  (void)attr;\n" end
  t[#t + 1] = "#pragma GCC ivdep\n  for (int64_t k = 0; k < n; k++) {\n" .. table.concat(loads)
  t[#t + 1] = ("    o[k] = (%s)%s;\n  }\n}\n\n"):format(type, expr.c(formula, suffix, type))
  return table.concat(t)
end

return function(ops)
  local t, rows = {}, {}
  for _, op in ipairs(ops) do
    if op.family == "elementwise" then
      local cells = {}
      for i, domain in ipairs(DOMAINS) do
        if domain[1] ~= "i64" or op.ints == "keep" then
          t[#t + 1] = tile(op, domain[1], domain[2])
          cells[i] = ("tile_%s_%s"):format(domain[1], op.name)
        else
          cells[i] = "NULL"
        end
      end
      rows[#rows + 1] = ("  [HM_OP_%s] = {%s},\n"):format(op.name:upper(), table.concat(cells, ", "))
    end
  end
  t[#t + 1] = "static const hm_tile hm_tiles[HM_OP_COUNT] = {\n" .. table.concat(rows) .. "};\n"
  return {["tiles.h"] = table.concat(t)}
end
