-- emit_cuda.lua -- tiles.cuh: every elementwise formula as a functor for the device (kernels/cuda/elementwise.cu).
--
-- A functor has the number of inputs and constants, how many elements a thread should take at once, value(inputs, constants)
-- for float, double and, where the row has one, int64_t, and constants(attributes, ...), which runs on the host.  They come in
-- parts, which compile side by side: HM_TILES_1(X) lists those of the first, HM_TILES_PARTS(X) the parts.

local expr = require "expr"
local formula = require "formula"

-- Rough instruction counts of functions: a formula above HEAVY gets 4 elements a thread, not 8, so that it does not
-- run out of registers.
local COST = {
  exp = 20, log = 30, log1p = 45, tanh = 40, erf = 100, erfc = 90, sin = 110, cos = 110, pow = 220, remainder = 100,
  sqrt = 10, floor = 10,
}
local HEAVY = 75

local function cost(tree)
  local sum = 0
  expr.walk(tree, function(n)
    if n[1] == "call" then sum = sum + (COST[n[2]] or 10) end
    if n[1] == "bin" then sum = sum + (n[2] == "/" and 10 or 1) end
  end)
  return sum
end

local function functor(op)
  local width = cost(op.f) > HEAVY and 4 or 8
  local t = {("struct hm_tile_%s {\n  enum { inputs = %d, attrs = %d, width = %d, ints = %d, runs = %d };\n"):format(
    op.name, #op.inputs, #op.attrs, width, formula.has(op, "i64") and 1 or 0, op.second and 0 or 1)}
  for _, domain in ipairs(formula.DOMAINS) do
    local suffix, type = domain[1], domain[2]
    if formula.has(op, suffix) then
      local used = formula.used(op, suffix, op.attrs)
      t[#t + 1] = ("  static void constants(const hm_attr *attr, %s *c) {\n"):format(type)
      if #used == 0 then t[#t + 1] = "    (void)attr, (void)c;\n" end
      for _, i in ipairs(used) do t[#t + 1] = ("    c[%d] = %s;\n"):format(i - 1, formula.attribute(op.attrs[i], i, suffix, type)) end
      t[#t + 1] = ("  }\n  HM_DEV %s value(const %s *a, const %s *c) {\n    (void)a, (void)c;\n"):format(type, type, type)
      for _, i in ipairs(formula.used(op, suffix, op.inputs)) do
        t[#t + 1] = ("    const %s %s = a[%d];\n"):format(type, op.inputs[i].name, i - 1)
      end
      for _, i in ipairs(used) do t[#t + 1] = ("    const %s %s = c[%d];\n"):format(type, op.attrs[i].name, i - 1) end
      t[#t + 1] = ("    return %s;\n  }\n"):format(formula.value(op, suffix, type))
    end
  end
  t[#t + 1] = "};\n\n"
  return table.concat(t)
end

-- One for each kernels/cuda/elementwise_N.cu.
local PARTS = 6

return function(ops)
  local parts, n = {}, 0
  for k = 1, PARTS do parts[k] = {code = {}, list = {}} end
  for _, op in ipairs(ops) do
    if op.family == "elementwise" then
      local part = parts[n % PARTS + 1]
      n = n + 1
      table.insert(part.code, functor(op))
      table.insert(part.list, ("  X(%s, HM_OP_%s)"):format(op.name, op.name:upper()))
    end
  end
  local t = {}
  for k, part in ipairs(parts) do
    t[#t + 1] = ("#if HM_TILES_PART == %d\n%s#endif\n\n"):format(k, table.concat(part.code))
    t[#t + 1] = ("/* X(name, op id) */\n#define HM_TILES_%d(X) \\\n%s\n\n"):format(k, table.concat(part.list, " \\\n"))
  end
  t[#t + 1] = "/* X(part) */\n#define HM_TILES_PARTS(X)"
  for k = 1, PARTS do t[#t + 1] = (" X(%d)"):format(k) end
  t[#t + 1] = "\n"
  return {["tiles.cuh"] = table.concat(t)}
end
