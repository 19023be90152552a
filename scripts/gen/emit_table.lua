-- emit_table.lua -- optable.c: hm__ops[], one hm_op_info per row.  Runs after emit_backward, which works out what is
-- saved.

local attrs = require "attrs"

local function quote(s) return s and ('"' .. s:gsub('[\\"]', "\\%0") .. '"') or "NULL" end
local function bool(b) return b and "true" or "false" end

local function attr_rows(op, t)
  for _, a in ipairs(op.attrs) do
    if a.choices then
      local c = {}
      for i, choice in ipairs(a.choices) do c[i] = quote(choice) end
      t[#t + 1] = ("static const char *const choices_%s_%s[] = {%s, NULL};\n"):format(op.name, a.name, table.concat(c, ", "))
    end
  end
  if #op.attrs == 0 then return end
  t[#t + 1] = ("static const hm_attr_info attrs_%s[] = {\n"):format(op.name)
  for _, a in ipairs(op.attrs) do
    local optional = a.optional or a.default or a.type == "rng"
    t[#t + 1] = ("  {%s, HM_ATTR_%s, %s, %s, %s},\n"):format(quote(a.name), a.type:upper(), bool(optional),
      attrs.default(a), a.choices and ("choices_%s_%s"):format(op.name, a.name) or "NULL")
  end
  t[#t + 1] = "};\n"
end

local function masks(op, list)
  local t = {}
  for i = 1, #op.inputs do t[i] = tostring(list and list[i] or 0) end
  return table.concat(t, ", ")
end

local function row(op)
  local ins, outs = {}, {}
  for i, x in ipairs(op.inputs) do ins[i] = ("{%s, '%s', %s, %s}"):format(quote(x.name), x.cls, bool(x.optional), bool(x.mutated)) end
  for i, x in ipairs(op.outputs) do outs[i] = ("{%s, '%s', %d}"):format(quote(x.name), x.cls, x.same) end
  local f = {
    (".name = %s, .signature = %s,\n    .doc = %s, .meta = %s"):format(quote(op.name), quote(op.signature), quote(op.doc), quote(op.meta)),
    (".family = HM_FAMILY_%s, .n_in = %d, .n_out = %d, .n_attr = %d"):format(op.family:upper(), #op.inputs, #op.outputs, #op.attrs),
    (".dim_first = %s"):format(bool(op.dim_first)),
    (".ints = HM_INTS_%s, .lua = HM_LUA_%s, .differentiable = %s, .partial = %s, .generated = %s"):format(op.ints:upper(), op.lua:upper(),
      bool(next(op.grad)), bool(op.partial), bool(op.generated)),
    (".ulp = %g, .domain = %s"):format(op.ulp, quote(op.domain or "real")),
    (".in = {%s}"):format(table.concat(ins, ", ")),
    (".out = {%s}"):format(table.concat(outs, ", ")),
    (".attr = %s"):format(#op.attrs > 0 and "attrs_" .. op.name or "NULL"),
    (".diff_in = %d, .need_in = {%s}, .need_out = {%s}"):format(op.diff_in or 0, masks(op, op.need_in), masks(op, op.need_out)),
    (".infer = hm__infer_%s, .backward = %s"):format(op.infer, next(op.grad) and "hm__backward_" .. op.name or "NULL"),
  }
  return ("  [HM_OP_%s] = {\n    %s},\n"):format(op.name:upper(), table.concat(f, ",\n    "))
end

return function(ops)
  local t = {'#include <math.h>\n\n#include "backward.h"\n\nextern const hm_op_info hm__ops[HM_OP_COUNT];\n\n'}
  for _, op in ipairs(ops) do attr_rows(op, t) end
  t[#t + 1] = "\nconst hm_op_info hm__ops[HM_OP_COUNT] = {\n"
  for _, op in ipairs(ops) do t[#t + 1] = row(op) end
  t[#t + 1] = "};\n"
  return {["optable.c"] = table.concat(t)}
end
