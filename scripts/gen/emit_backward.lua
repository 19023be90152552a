-- emit_backward.lua -- backward.c: each row's gradient expressions as op calls.
--
-- A function gets the gradients of the outputs and sets those of the inputs that are wanted.  The outermost call of an
-- expression writes the dtype that the input's edge wants, so nothing is rounded twice; shapes are fitted by the
-- engine.

local rows = require "rows"
local attrs = require "attrs"

local INFIX = {["+"] = "add", ["-"] = "sub", ["*"] = "mul", ["/"] = "div"}

local function find(list, name)
  for i, item in ipairs(list) do if item.name == name then return i end end
end

local function fail(op, message) error(("kernels/ops.def: %s: gradient: %s"):format(op.signature, message), 0) end

-- What stands for a size, not for a tensor's values.
local SIZES = {shape = true, size = true, spatial = true, reduced_count = true, spread_scale = true}

--- Names of saved inputs and outputs: everything an expression uses as a value (not only inside shape(), size(), ...).
local function saved_names(e, set)
  if e[1] == "id" then set[e[2]] = true
  elseif e[1] == "bin" then saved_names(e[3], set) saved_names(e[4], set)
  elseif e[1] == "neg" then saved_names(e[2], set)
  elseif e[1] == "call" and not SIZES[e[2]] then
    for _, a in ipairs(e[3]) do saved_names(a, set) end
  end
  return set
end

local Emitter = {}
Emitter.__index = Emitter

function Emitter:line(text, ...) table.insert(self.code, "    " .. text:format(...) .. "\n") end

-- An attribute argument of a called op, as a C expression of type hm_attr.
function Emitter:attribute(e, want)
  local op = self.op
  if e[1] == "num" then
    if want.type == "float" then return ("(hm_attr){.f = %s}"):format(e[2]) end
    if attrs.is_list(want.type) then return ("(hm_attr){.n = 1, .v = {%s}}"):format(e[2]) end
    return ("(hm_attr){.i = %s}"):format(e[2])
  end
  if e[1] == "neg" and e[2][1] == "num" then return ("(hm_attr){.i = -%s}"):format(e[2][2]) end
  if e[1] == "id" then
    local i = find(op.attrs, e[2])
    if not i then fail(op, "no attribute " .. e[2]) end
    local from = op.attrs[i].type
    if attrs.is_list(want.type) and not attrs.is_list(from) then return ("(hm_attr){.n = 1, .v = {n->attr[%d].i}}"):format(i - 1) end
    return ("n->attr[%d]"):format(i - 1)
  end
  local name = ("x%d"):format(self.count)
  self.count = self.count + 1
  if e[1] == "call" and e[2] == "shape" then
    self:line("hm_attr %s = {.n = 0};", name)
    self:line("hm__edge_shape(n, %d, &%s);", find(op.inputs, e[3][1][2]) - 1, name)
  elseif e[1] == "call" and e[2] == "spatial" then
    self:line("hm_attr %s = {.n = 2};", name)
    for d = 0, 1 do self:line("%s.v[%d] = hm__edge_size(n, %d, %d);", name, d, find(op.inputs, e[3][1][2]) - 1, d + 2) end
  elseif e[1] == "call" and e[2] == "inverse" then
    self:line("hm_attr %s = {.n = 0};", name)
    self:line("hm__inverse_dims(&n->attr[%d], &%s);", find(op.attrs, e[3][1][2]) - 1, name)
  elseif e[1] == "call" and e[2] == "size" then
    local input, dim = find(op.inputs, e[3][1][2]), find(op.attrs, e[3][2][2])
    self:line("hm_attr %s = {.i = hm__edge_size(n, %d, n->attr[%d].i)};", name, input - 1, dim - 1)
  else
    fail(op, "cannot use this as attribute " .. want.name)
  end
  return name
end

--- Spells an expression out: equal ones give equal text.
local function spelled(e)
  if type(e) ~= "table" then return tostring(e) end
  local t = {}
  for i, part in ipairs(e) do t[i] = spelled(part) end
  return "(" .. table.concat(t, " ") .. ")"
end

-- An op call; target: C lvalue of type hm_tensor*, or nil for a temporary, which equal calls share.  Returns a C expression of type hm_arg.
function Emitter:call(name, args, target, dtype)
  local callee = self.ops.by_name[name]
  if not callee then fail(self.op, "no op " .. name) end
  if #callee.outputs > 1 and not self.group then fail(self.op, name .. " has several outputs") end
  local ins, ats = {}, {}
  for i, input in ipairs(callee.inputs) do
    if args[i] then ins[i] = self:value(args[i])
    elseif input.optional then ins[i] = "(hm_arg){HM_ARG_NONE, {.t = NULL}}"
    else fail(self.op, name .. " lacks input " .. input.name) end
  end
  for i, a in ipairs(callee.attrs) do
    local given = args[#callee.inputs + i]
    ats[i] = given and self:attribute(given, a) or "(hm_attr)" .. attrs.default(a)
  end
  local slot, guard = target, ""
  if not slot then
    local key = name .. spelled(args)
    slot = self.shared[key]
    if slot then
      guard = ("if (!%s) "):format(slot)
    else
      slot = ("t[%d]"):format(self.temps)
      self.temps = self.temps + 1
      self.shared[key] = slot
    end
  end
  self:line(guard .. "status = hm_call_as(HM_OP_%s, (const hm_arg[]){%s}, %s, %s, &%s);", name:upper(), table.concat(ins, ", "),
    #ats > 0 and ("(const hm_attr[]){%s}"):format(table.concat(ats, ", ")) or "NULL", dtype or "HM_NONE", slot)
  self:line("if (status) goto done;")
  return ("hm_t(%s)"):format(slot)
end

-- A value as a C expression of type hm_arg.
function Emitter:value(e, target, dtype)
  local op = self.op
  if e[1] == "num" then return ("hm_f(%s)"):format(e[2]) end
  if e[1] == "bin" then return self:call(INFIX[e[2]], {e[3], e[4]}, target, dtype) end
  if e[1] == "neg" then return self:call("neg", {e[2]}, target, dtype) end
  if e[1] == "call" then
    if e[2] == "spread_scale" then
      local i, k, c = find(op.inputs, e[3][1][2]), find(op.attrs, e[3][2][2]), find(op.attrs, e[3][3][2])
      return ("hm_f(2 / (hm__reduced_count(n, %d, &n->attr[%d]) - n->attr[%d].f))"):format(i - 1, k - 1, c - 1)
    end
    if e[2] == "reduced_count" then
      local i, k = find(op.inputs, e[3][1][2]), find(op.attrs, e[3][2][2])
      return ("hm_f(hm__reduced_count(n, %d, &n->attr[%d]))"):format(i - 1, k - 1)
    end
    return self:call(e[2], e[3], target, dtype)
  end
  local name = e[2]
  if name == "none" then return "(hm_arg){HM_ARG_NONE, {.t = NULL}}" end
  for k = 1, #op.outputs do
    if name == rows.upstream(op, k) then return ("hm_t(grad[%d])"):format(k - 1) end
  end
  local i, what = find(op.inputs, name), "in"
  if not i then i, what = find(op.outputs, name), "out" end
  if not i then fail(op, "unknown name " .. name) end
  local var = ("s_%s"):format(name)
  if not self.loaded[var] then
    self.loaded[var] = true
    local again = what == "out" and not self.group and op.again[name] -- a joint call is for gradients that are not recorded
    if again then
      local loaded = self.loaded
      self.loaded = {}
      self:line("hm_arg %s;", var)
      self:line("if (hm__recording()) {")
      self:line("%s = %s;", var, self:value(again))
      self:line("} else {")
      self:line("%s = hm__saved_out(n, %d, &status);", var, i - 1)
      self:line("}")
      self.loaded = loaded
    else
      self:line("const hm_arg %s = hm__saved_%s(n, %d, &status);", var, what, i - 1)
    end
    self:line("if (status) goto done;")
  end
  return var
end

local function condition(list, word)
  local wants = {}
  for k, i in ipairs(list) do wants[k] = ("hm__wants(n, %d)"):format(i - 1) end
  return table.concat(wants, word)
end

-- One call whose outputs are the gradients of several inputs.  joint: it is taken where all of them are wanted, in one dtype, and
-- the gradient is not itself recorded.
local function emit_group(em, e, list, joint)
  local op = em.op
  if e[1] ~= "call" or #(em.ops.by_name[e[2]] or {outputs = {}}).outputs ~= #list then
    fail(op, "a gradient by several inputs must be one call with as many outputs")
  end
  local when = condition(list, joint and " && " or " || ")
  if joint then
    when = "!hm__recording() && " .. when
    for k = 2, #list do when = when .. (" && hm__edge_dtype(n, %d) == hm__edge_dtype(n, %d)"):format(list[k] - 1, list[1] - 1) end
  end
  table.insert(em.code, ("  if (%s) { /* by %s */\n"):format(when, em.ops.by_name[e[2]].name))
  em.loaded, em.group = {}, true
  em:line("hm_tensor *o[%d] = {NULL};", #list)
  em:call(e[2], e[3], "o[0]", ("hm__wants(n, %d) ? hm__edge_dtype(n, %d) : HM_NONE"):format(list[1] - 1, list[1] - 1))
  em.group = false
  for k, i in ipairs(list) do
    em:line("if (hm__wants(n, %d)) grad_in[%d] = o[%d];", i - 1, i - 1, k - 1)
    em:line("else hm_tensor_release(o[%d]);", k - 1)
  end
  table.insert(em.code, "  }\n")
end

local function emit(ops, op)
  local order, joint = {}, {}
  for i in pairs(op.grad) do order[#order + 1] = i end
  table.sort(order)
  local em = setmetatable({ops = ops, op = op, code = {}, temps = 0, count = 0, shared = {}}, Emitter)
  if op.joint then
    emit_group(em, op.joint[1], op.joint[2], true)
    for _, i in ipairs(op.joint[2]) do joint[i] = true end
  end
  for _, i in ipairs(order) do
    local e = op.grad[i]
    local list = op.groups[e]
    if list then
      if list[1] == i then emit_group(em, e, list) end
      goto continue
    end
    local open = joint[i] and (" && !grad_in[%d]"):format(i - 1) or ""
    table.insert(em.code, ("  if (hm__wants(n, %d)%s) { /* by %s */\n"):format(i - 1, open, op.inputs[i].name))
    em.loaded = {}
    local slot = ("grad_in[%d]"):format(i - 1)
    if e[1] == "id" then
      em:line("grad_in[%d] = hm_tensor_retain(%s.t);", i - 1, em:value(e))
    else
      em:value(e, slot, ("hm__edge_dtype(n, %d)"):format(i - 1))
    end
    table.insert(em.code, "  }\n")
    ::continue::
  end
  local t = {("/* %s */\nint hm__backward_%s(hm_node *n, hm_tensor *const *grad, hm_tensor **grad_in) {\n"):format(op.signature, op.name)}
  t[#t + 1] = "  int status = HM_OK;\n"
  if em.temps > 0 then t[#t + 1] = ("  hm_tensor *t[%d] = {NULL};\n"):format(em.temps) end
  t[#t + 1] = "  if (!grad[0]) return HM_OK;\n"
  local code = table.concat(em.code)
  t[#t + 1] = code
  if code:find("goto done", 1, true) then t[#t + 1] = "done:\n" end
  if em.temps > 0 then t[#t + 1] = ("  for (int i = 0; i < %d; i++) hm_tensor_release(t[i]);\n"):format(em.temps) end
  t[#t + 1] = "  return status;\n}\n\n"
  return table.concat(t)
end

return function(ops)
  local c, h = {'#include <math.h>\n\n#include "backward.h"\n\n'}, {'#include "graph.h"\n\n'}
  for _, op in ipairs(ops) do
    if next(op.grad) then
      op.need_in, op.need_out, op.diff_in = {}, {}, 0
      for by, e in pairs(op.grad) do
        local set, mask_in, mask_out = saved_names(e, {}), 0, 0
        for name, tree in pairs(op.again) do if set[name] then saved_names(tree, set) end end
        for i, input in ipairs(op.inputs) do if set[input.name] then mask_in = mask_in | 1 << (i - 1) end end
        for i, output in ipairs(op.outputs) do
          local named = set[output.name] and not find(op.inputs, output.name)
          if named or op.keep[output.name] then mask_out = mask_out | 1 << (i - 1) end
        end
        op.need_in[by], op.need_out[by] = mask_in, mask_out
      end
      for i in pairs(op.grad) do op.diff_in = op.diff_in | 1 << (i - 1) end
      c[#c + 1] = emit(ops, op)
      h[#h + 1] = ("int hm__backward_%s(hm_node *n, hm_tensor *const *grad, hm_tensor **grad_in);\n"):format(op.name)
    end
  end
  return {["backward.c"] = table.concat(c), ["backward.h"] = table.concat(h)}
end
