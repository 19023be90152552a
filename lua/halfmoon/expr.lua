--- expr.lua -- the small expression language of kernels/ops.def and hm.elementwise: parse, print as C, differentiate.
--
-- Used by scripts/genops.lua, which runs before anything is built, and by elementwise.lua: it requires nothing.
-- One grammar serves formulas (values, printed as C) and op expressions (gradients, turned into op calls).
--   ?:  ||  &&  == !=  < > <= >=  + -  * /  unary - !  calls  names  numbers
-- A node is {kind, ...}: {"num", text} {"id", name} {"call", name, args} {"bin", op, a, b} {"neg", a} {"not", a}
-- {"if", c, a, b}.

local M = {}

-- ====== Parsing ======

--- Raises what is wrong, with the text and a mark below the place.
local function fail_at(text, at, message)
  local line = text:gsub("%s", " ")
  error(("%s\n  %s\n  %s^"):format(message, line, (" "):rep(at - 1)), 0)
end
M.fail_at = fail_at

-- The words of a text, and where each begins.
local function tokens(text, at)
  local list, places = {}, {}
  while true do
    at = text:match("^%s*()", at)
    if at > #text then
      places[#list + 1] = at
      return list, places
    end
    local tok = text:match("^%d+%.?%d*[eE][+-]?%d+", at) or text:match("^%d+%.?%d*", at)
      or text:match("^%.%d+[eE][+-]?%d+", at) or text:match("^%.%d+", at)
      or text:match("^[%a_][%w_]*", at) or text:match("^[=!<>]=", at) or text:match("^&&", at) or text:match("^||", at)
      or text:match("^[%+%-%*/<>!%(%),%?:]", at)
    if not tok then fail_at(text, at, ("cannot read '%s'"):format(text:match("^.[\128-\191]*", at))) end
    list[#list + 1], places[#list + 1] = tok, at
    at = at + #tok
    if tok:match("^[%d.]") then at = text:match("^[fF]()%f[^%w_]", at) or at end -- C's 0.5f
  end
end

local LEVELS = {{"||"}, {"&&"}, {"==", "!="}, {"<", ">", "<=", ">="}, {"+", "-"}, {"*", "/"}}
for _, level in ipairs(LEVELS) do
  for _, op in ipairs(level) do level[op] = true end
end

--- Parses an expression into a tree.  Raises what is wrong with the text marked.  Names and calls know their place.
---@param text string
---@param from integer? where it begins in the text; 1
---@return table
function M.parse(text, from)
  local list, places = tokens(text, from or 1)
  local at, expression = 1, nil

  local function fail(wanted)
    local came = list[at] and ("'%s'"):format(list[at]) or "end"
    fail_at(text, places[at], ("unexpected %s%s"):format(came, wanted and (", '%s' is wanted"):format(wanted) or ""))
  end
  local function accept(tok)
    if list[at] == tok then at = at + 1 return true end
    return false
  end
  local function expect(tok) if not accept(tok) then fail(tok) end end

  local function primary()
    local tok = list[at]
    if not tok then fail() end
    if accept("(") then
      local e = expression()
      expect(")")
      return e
    end
    local place = places[at]
    at = at + 1
    if tok:match("^[%d.]") then return {"num", tok} end
    if not tok:match("^[%a_]") then at = at - 1 fail() end
    if not accept("(") then return {"id", tok, at = place} end
    local args = {}
    if not accept(")") then
      repeat args[#args + 1] = expression() until not accept(",")
      expect(")")
    end
    return {"call", tok, args, at = place}
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

--- Does computing the expression call a function that is more than a few instructions?
local function calls(e)
  local found = false
  M.walk(e, function(n) found = found or (n[1] == "call" and n[2] ~= "abs") end)
  return found
end

--- Is a value the same for all elements?
local function is_fixed(e, fixed)
  for name in pairs(M.names(e)) do
    if not fixed[name] then return false end
  end
  return true
end

--- C text of a formula.  Where an arm of a choice calls a function, both are computed and one is picked by a mask: from ?: a compiler makes
--- a branch around the call, and then a loop does not vectorise.  A choice that is the same for all elements stays: it is made once.
---@param e table
---@param suffix string "f32", "f64" or "i64"
---@param type string the C type computed in
---@param fixed table<string, boolean>? names whose values are the same for all elements
---@return string
function M.c(e, suffix, type, fixed)
  fixed = fixed or {}
  local function c(part) return M.c(part, suffix, type, fixed) end
  local kind = e[1]
  if kind == "num" then return ("(%s)(%s)"):format(type, e[2]) end
  if kind == "id" then return e[2] == "INFINITY" and ("(%s)INFINITY"):format(type) or e[2] end
  if kind == "neg" then return "(-" .. c(e[2]) .. ")" end
  if kind == "not" then return "(!" .. c(e[2]) .. ")" end
  if kind == "bin" then return ("(%s %s %s)"):format(c(e[3]), e[2], c(e[4])) end
  if kind == "if" then
    local masks = suffix ~= "i64" and (calls(e[3]) or calls(e[4])) and not is_fixed(e[2], fixed)
    local form = masks and "hm__pick_" .. suffix .. "(%s, %s, %s)" or "(%s ? %s : %s)"
    return form:format(c(e[2]), c(e[3]), c(e[4]))
  end
  local args = {}
  for i, a in ipairs(e[3]) do args[i] = c(a) end
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
  expm1 = function(f) return add(f, num(1)) end,
  log2 = function(_, u) return div(num("1.4426950408889634"), u) end,
  log10 = function(_, u) return div(num("0.4342944819032518"), u) end,
  tan = function(f) return add(num(1), mul(f, f)) end,
  sinh = function(_, u) return call("cosh", u) end,
  cosh = function(_, u) return call("sinh", u) end,
  asin = function(_, u) return div(num(1), call("sqrt", sub(num(1), mul(u, u)))) end,
  acos = function(_, u) return div(num(-1), call("sqrt", sub(num(1), mul(u, u)))) end,
  atan = function(_, u) return div(num(1), add(num(1), mul(u, u))) end,
  floor = function() return num(0) end,
  ceil = function() return num(0) end,
  round = function() return num(0) end,
  trunc = function() return num(0) end,
}

-- d x^y without the NaN of 0 * log(0) and 0 * 0^-1, as the row of pow has it.
local function diff_pow(e, du, dv)
  local u, v = e[3][1], e[3][2]
  local by_u = mul(v, call("pow", u, sub(v, num(1))))
  local by_v = mul(e, call("log", u))
  if v[1] ~= "num" then by_u = {"if", {"bin", "==", v, num(0)}, num(0), by_u} end
  local at_zero = {"bin", "&&", {"bin", "==", u, num(0)}, {"bin", ">=", v, num(0)}}
  return add(mul(by_u, du), is(dv, 0) and dv or mul({"if", at_zero, num(0), by_v}, dv))
end

-- Derivatives of calls of two arguments, given the call and the arguments' derivatives.
local RULES2 = {
  pow = diff_pow,
  remainder = function(e, du, dv) return sub(du, mul(call("floor", div(e[3][1], e[3][2])), dv)) end,
}

local function is_exp(e) return e[1] == "call" and e[2] == "exp" end

-- w of 1 + exp(w): such a divisor's derivative over itself is (1 - 1 / y) dw, without the infinity that e^w may be.
local function exponent_above_one(y)
  return y[1] == "bin" and y[2] == "+" and is(y[3], 1) and is_exp(y[4]) and y[4][3][1] or nil
end

-- known: what was found for each subtree; trees that derivatives are made of share them.
local function diff(e, by, known)
  if known[e] ~= nil then return known[e] end
  local kind, d = e[1], nil
  if kind == "num" then
    d = num(0)
  elseif kind == "id" then
    d = num(e[2] == by and 1 or 0)
  elseif kind == "neg" then
    local da = diff(e[2], by, known)
    d = da and neg(da)
  elseif kind == "if" then
    local da, db = diff(e[3], by, known), diff(e[4], by, known)
    if da and db then d = is(da, 0) and is(db, 0) and da or {"if", e[2], da, db} end
  elseif kind == "not" then
    d = num(0)
  elseif kind == "bin" then
    local op, x, y = e[2], e[3], e[4]
    local dx, dy = diff(x, by, known), diff(y, by, known)
    if not (dx and dy) then d = nil
    elseif op == "+" then d = add(dx, dy)
    elseif op == "-" then d = sub(dx, dy)
    elseif op == "*" then d = add(mul(dx, y), mul(x, dy))
    elseif op == "/" and exponent_above_one(y) then
      local dw = diff(exponent_above_one(y), by, known)
      d = dw and sub(div(dx, y), mul(div(x, y), mul(sub(num(1), div(num(1), y)), dw)))
    elseif op == "/" then d = sub(div(dx, y), div(mul(x, dy), mul(y, y)))
    else d = num(0) end -- comparisons are flat
  elseif kind == "call" then
    local name, args, flat, inner = e[2], e[3], true, {}
    for i, arg in ipairs(args) do
      inner[i] = diff(arg, by, known)
      flat = flat and inner[i] and is(inner[i], 0)
    end
    if flat then d = num(0)
    elseif name == "log1p" and is_exp(args[1]) then -- log(1 + e^w): e^w / (1 + e^w) would be NaN where e^w is infinite
      local w = args[1][3][1]
      local dw = diff(w, by, known)
      d = dw and mul(div(num(1), add(num(1), call("exp", neg(w)))), dw)
    elseif #args == 1 and RULES[name] then d = inner[1] and mul(RULES[name](e, args[1]), inner[1])
    elseif #args == 2 and RULES2[name] then d = inner[1] and inner[2] and RULES2[name](e, inner[1], inner[2]) end
  end
  known[e] = d or false
  return d
end

--- Derivative of a formula by a name; nil where a function has no rule.
---@param e table a tree
---@param by string
---@return table?
function M.diff(e, by) return diff(e, by, {}) or nil end

--- True if the tree is the number 0.
function M.is_zero(e) return is(e, 0) end

return M
