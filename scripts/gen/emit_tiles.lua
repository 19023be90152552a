-- emit_tiles.lua -- every elementwise formula as a loop over contiguous elements.
--
--   tiles_hot.h    float loops of the rows that training runs; elementwise.c compiles them once per instruction set
--   tiles_cold.h   all the rest: double and int64_t loops, and the float loops of second derivatives; tiles.c compiles them once

local formula = require "formula"

local function tile(op, suffix, type)
  local t = {("static void tile_%s_%s(int64_t n, %s *o, const %s *const *a, const hm_attr *attr) {\n"):format(suffix, op.name, type, type)}
  local loads = {}
  for _, i in ipairs(formula.used(op, suffix, op.inputs)) do
    t[#t + 1] = ("  const %s *const p%d = a[%d];\n"):format(type, i, i - 1)
    loads[#loads + 1] = ("    const %s %s = p%d[k];\n"):format(type, op.inputs[i].name, i)
  end
  if #loads == 0 then t[#t + 1] = "  (void)a;\n" end
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
  local hot, cold, hot_rows, cold_rows = {}, {}, {}, {}
  for _, op in ipairs(ops) do
    if op.family == "elementwise" then
      local cells = {}
      for i, domain in ipairs(formula.DOMAINS) do
        local suffix = domain[1]
        local is_hot = suffix == "f32" and not op.second
        cells[i] = "NULL"
        if is_hot then
          hot[#hot + 1] = tile(op, suffix, domain[2])
          hot_rows[#hot_rows + 1] = ("  [HM_OP_%s] = tile_f32_%s,\n"):format(op.name:upper(), op.name)
        elseif formula.has(op, suffix) then
          cold[#cold + 1] = tile(op, suffix, domain[2])
          cells[i] = ("tile_%s_%s"):format(suffix, op.name)
        end
      end
      cold_rows[#cold_rows + 1] = ("  [HM_OP_%s] = {%s},\n"):format(op.name:upper(), table.concat(cells, ", "))
    end
  end
  hot[#hot + 1] = "static const hm_tile_f32 hm_hot_tiles[HM_OP_COUNT] = {\n" .. table.concat(hot_rows) .. "};\n"
  cold[#cold + 1] = "const hm_tile hm_cold_tiles[HM_OP_COUNT] = {\n" .. table.concat(cold_rows) .. "};\n"
  return {["tiles_hot.h"] = table.concat(hot), ["tiles_cold.h"] = table.concat(cold)}
end
