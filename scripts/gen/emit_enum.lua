-- emit_enum.lua -- ops.h: the ids.

return function(ops)
  local t = {"#ifndef HM_OPS_H\n#define HM_OPS_H\n\ntypedef enum hm_op {\n"}
  for _, op in ipairs(ops) do t[#t + 1] = ("  HM_OP_%s,\n"):format(op.name:upper()) end
  t[#t + 1] = "  HM_OP_COUNT\n} hm_op;\n\n#endif\n"
  return {["ops.h"] = table.concat(t)}
end
