-- emit_api.lua -- ops_api.h and ops_api.c: hm_op_NAME(), one typed function per row.

local attrs = require "attrs"

local function prototype(op)
  local params = {}
  for _, input in ipairs(op.inputs) do params[#params + 1] = "hm_arg " .. input.name end
  for _, a in ipairs(op.attrs) do
    local p = attrs.parameter(a)
    if p ~= "" then params[#params + 1] = p end
  end
  params[#params + 1] = "hm_tensor **hm_out"
  return ("int hm_op_%s(%s)"):format(op.name, table.concat(params, ", "))
end

local function body(op)
  local names, t = {}, {}
  for i, input in ipairs(op.inputs) do names[i] = input.name end
  t[#t + 1] = prototype(op) .. " {\n"
  t[#t + 1] = ("  const hm_arg in[] = {%s};\n"):format(table.concat(names, ", "))
  if #op.attrs > 0 then
    t[#t + 1] = ("  hm_attr at[%d];\n"):format(#op.attrs)
    for i, a in ipairs(op.attrs) do t[#t + 1] = attrs.fill(a, i - 1) end
  end
  t[#t + 1] = ("  return hm_call(HM_OP_%s, in, %s, hm_out);\n}\n\n"):format(op.name:upper(), #op.attrs > 0 and "at" or "NULL")
  return table.concat(t)
end

return function(ops)
  local h, c = {"#ifndef HM_OPS_API_H\n#define HM_OPS_API_H\n\n"}, {'#include "halfmoon.h"\n\n'}
  h[2] = "/* Operands are borrowed; hm_out receives as many new references as the row has outputs.  dims count from 0. */\n\n"
  for _, op in ipairs(ops) do
    if not op.generated then
      h[#h + 1] = ("/* %s\n * %s */\n%s;\n\n"):format(op.signature, op.doc, prototype(op))
      c[#c + 1] = body(op)
    end
  end
  h[#h + 1] = "#endif\n"
  return {["ops_api.h"] = table.concat(h), ["ops_api.c"] = table.concat(c)}
end
