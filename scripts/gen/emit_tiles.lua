-- emit_tiles.lua -- tiles.h: every elementwise formula as a loop over contiguous elements, in float, double and int64_t.

local formula = require "formula"

local function tile(op, suffix, type)
  local t = {("static void tile_%s_%s(int64_t n, %s *o, const %s *const *a, const hm_attr *attr) {\n"):format(suffix, op.name, type, type)}
  local loads = {}
  for _, i in ipairs(formula.used(op, suffix, op.inputs)) do
    t[#t + 1] = ("  const %s *const p%d = a[%d];\n"):format(type, i, i - 1)
    loads[#loads + 1] = ("    const %s %s = p%d[k];\n"):format(type, op.inputs[i].name, i)
  end
  local attrs = formula.used(op, suffix, op.attrs)
  for _, i in ipairs(attrs) do
    t[#t + 1] = ("  const %s %s = %s;\n"):format(type, op.attrs[i].name, formula.attribute(op.attrs[i], i, suffix, type))
  end
  if #attrs == 0 then t[#t + 1] = "  (void)attr;\n" end
  t[#t + 1] = "#pragma GCC ivdep\n  for (int64_t k = 0; k < n; k++) {\n" .. table.concat(loads)
  t[#t + 1] = ("    o[k] = %s;\n  }\n}\n\n"):format(formula.value(op, suffix, type))
  return table.concat(t)
end

return function(ops)
  local t, rows = {}, {}
  for _, op in ipairs(ops) do
    if op.family == "elementwise" then
      local cells = {}
      for i, domain in ipairs(formula.DOMAINS) do
        if formula.has(op, domain[1]) then
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
