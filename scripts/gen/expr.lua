-- expr.lua -- the small expression language of kernels/ops.def: parse, print as C, differentiate.
--
-- One grammar serves formulas (values, printed as C) and op expressions (gradients, turned into op calls).
--   ?:  ||  &&  == !=  < > <= >=  + -  * /  unary - !  calls  names  numbers
-- A node is {kind, ...}: {"num", text} {"id", name} {"call", name, args} {"bin", op, a, b} {"neg", a} {"not", a}
-- {"if", c, a, b}.

local M = {}

-- ====== Parsing ======

local function tokens(text)
  local list, at = {}, 1
  while true do
    at = text:match("^%s*()", at)
    if at > #text then return list end
    local tok = text:match("^%d+%.?%d*[eE][+-]?%d+", at) or text:match("^%d+%.?%d*", at) or text:match("^%.%d+", at)
      or text:match("^[%a_][%w_]*", at) or text:match("^[=!<>]=", at) or text:match("^&&", at) or text:match("^||", at)
      or text:match("^[%+%-%*/<>!%(%),%?:]", at)
    if not tok then error("cannot read '" .. text:sub(at) .. "' in expression: " .. text) end
    list[#list + 1] = tok
    at = at + #tok
  end
end

local LEVELS = {{"||"}, {"&&"}, {"==", "!="}, {"<", ">", "<=", ">="}, {"+", "-"}, {"*", "/"}}
for _, level in ipairs(LEVELS) do
  for _, op in ipairs(level) do level[op] = true end
end

--- Parses an expression into a tree.
function M.parse(text)
  local list, at = tokens(text), 1
  local expression

  local function fail() error("unexpected '" .. tostring(list[at]) .. "' in expression: " .. text) end
  local function accept(tok)
    if list[at] == tok then at = at + 1 return true end
    return false
  end
  local function expect(tok) if not accept(tok) then fail() end end

  local function primary()
    local tok = list[at]
    if not tok then fail() end
    if accept("(") then
      local e = expression()
      expect(")")
      return e
    end
    at = at + 1
    if tok:match("^[%d.]") then return {"num", tok} end
    if not tok:match("^[%a_]") then at = at - 1 fail() end
    if not accept("(") then return {"id", tok} end
    local args = {}
    if not accept(")") then
      repeat args[#args + 1] = expression() until not accept(",")
      expect(")")
    end
    return {"call", tok, args}
  end

  local function unary()
    if accept("-") then return {"neg", unary()} end
    if accept("!") then return {"not", unary()} end
    return primary()
  end

  local function binary(level)
    if level > #LEVELS then return unary() end
    local left = binary(level + 1)
    while list[at] and LEVELS[level][list[at]] do
      local op = list[at]
      at = at + 1
      left = {"bin", op, left, binary(level + 1)}
    end
    return left
  end

  function expression()
    local cond = binary(1)
    if not accept("?") then return cond end
    local a = expression()
    expect(":")
    return {"if", cond, a, expression()}
  end

  local e = expression()
  if at <= #list then fail() end
  return e
end

--- Calls visit(node) for every node, parents first.
function M.walk(e, visit)
  visit(e)
  if e[1] == "call" then
    for _, a in ipairs(e[3]) do M.walk(a, visit) end
  elseif e[1] == "bin" then
    M.walk(e[3], visit) M.walk(e[4], visit)
  elseif e[1] == "neg" or e[1] == "not" then
    M.walk(e[2], visit)
  elseif e[1] == "if" then
    M.walk(e[2], visit) M.walk(e[3], visit) M.walk(e[4], visit)
  end
end

--- The set of names that an expression uses (names of functions excepted).
function M.names(e)
  local set = {}
  M.walk(e, function(n) if n[1] == "id" then set[n[2]] = true end end)
  return set
end

-- ====== Printing as C ======

--- C text of a formula.  suffix: "f32", "f64" or "i64"; type: the C type computed in.
function M.c(e, suffix, type)
  local kind = e[1]
  if kind == "num" then return ("(%s)(%s)"):format(type, e[2]) end
  if kind == "id" then return e[2] == "INFINITY" and ("(%s)INFINITY"):format(type) or e[2] end
  if kind == "neg" then return "(-" .. M.c(e[2], suffix, type) .. ")" end
  if kind == "not" then return "(!" .. M.c(e[2], suffix, type) .. ")" end
  if kind == "bin" then return ("(%s %s %s)"):format(M.c(e[3], suffix, type), e[2], M.c(e[4], suffix, type)) end
  if kind == "if" then
    return ("(%s ? %s : %s)"):format(M.c(e[2], suffix, type), M.c(e[3], suffix, type), M.c(e[4], suffix, type))
  end
  local args = {}
  for i, a in ipairs(e[3]) do args[i] = M.c(a, suffix, type) end
  local name = e[2]:match("^hm_") and e[2] or ("hm_%s_%s"):format(e[2], suffix)
  return ("%s(%s)"):format(name, table.concat(args, ", "))
end

-- ====== Differentiation, for second derivatives ======

local function num(v) return {"num", tostring(v)} end
local function is(e, v) return e[1] == "num" and tonumber(e[2]) == v end

local function neg(a)
  if is(a, 0) then return a end
  if a[1] == "neg" then return a[2] end
  return {"neg", a}
end
local function add(a, b)
  if is(a, 0) then return b end
  if is(b, 0) then return a end
  return {"bin", "+", a, b}
end
local function sub(a, b)
  if is(b, 0) then return a end
  if is(a, 0) then return neg(b) end
  return {"bin", "-", a, b}
end
local function mul(a, b)
  if is(a, 0) or is(b, 0) then return num(0) end
  if is(a, 1) then return b end
  if is(b, 1) then return a end
  return {"bin", "*", a, b}
end
local function div(a, b)
  if is(a, 0) then return a end
  if is(b, 1) then return a end
  return {"bin", "/", a, b}
end
local function call(name, ...) return {"call", name, {...}} end
M.mul = mul

-- d f(u) / du, given f(u) and u.
local RULES = {
  exp = function(_, u) return call("exp", u) end,
  log = function(_, u) return div(num(1), u) end,
  log1p = function(_, u) return div(num(1), add(num(1), u)) end,
  sqrt = function(f) return div(num(0.5), f) end,
  sin = function(_, u) return call("cos", u) end,
  cos = function(_, u) return neg(call("sin", u)) end,
  tanh = function(f) return sub(num(1), mul(f, f)) end,
  erf = function(_, u) return mul(num("1.1283791670955126"), call("exp", neg(mul(u, u)))) end,
  erfc = function(_, u) return neg(mul(num("1.1283791670955126"), call("exp", neg(mul(u, u))))) end,
  abs = function(_, u) return {"if", {"bin", ">", u, num(0)}, num(1), {"if", {"bin", "<", u, num(0)}, num(-1), num(0)}} end,
  floor = function() return num(0) end,
}

--- Derivative of a formula by a name; nil where a function has no rule.
function M.diff(e, by)
  local kind = e[1]
  if not M.names(e)[by] then return num(0) end
  if kind == "id" then return num(1) end
  if kind == "neg" then
    local d = M.diff(e[2], by)
    return d and neg(d)
  end
  if kind == "if" then
    local a, b = M.diff(e[3], by), M.diff(e[4], by)
    if not (a and b) then return nil end
    if is(a, 0) and is(b, 0) then return num(0) end
    return {"if", e[2], a, b}
  end
  if kind == "bin" then
    local op, x, y = e[2], e[3], e[4]
    local dx, dy = M.diff(x, by), M.diff(y, by)
    if not (dx and dy) then return nil end
    if op == "+" then return add(dx, dy) end
    if op == "-" then return sub(dx, dy) end
    if op == "*" then return add(mul(dx, y), mul(x, dy)) end
    if op == "/" then return sub(div(dx, y), div(mul(x, dy), mul(y, y))) end
    return num(0) -- comparisons are flat
  end
  if kind == "call" then
    local name, args = e[2], e[3]
    if name == "pow" then
      local u, v = args[1], args[2]
      local du, dv = M.diff(u, by), M.diff(v, by)
      if not (du and dv) then return nil end
      return add(mul(mul(v, call("pow", u, sub(v, num(1)))), du), mul(mul(e, call("log", u)), dv))
    end
    local rule, du = RULES[name], #args == 1 and M.diff(args[1], by)
    return rule and du and mul(rule(e, args[1]), du) or nil
  end
  return nil
end

--- True if the tree is the number 0.
function M.is_zero(e) return is(e, 0) end

return M
