-- rows.lua -- reads kernels/ops.def: parses signatures, makes the rows that derivative formulas stand for.
--
-- A row afterwards: name, signature, doc, family, infer, ints, lua, meta, ulp, domain, partial, generated,
--   inputs  {{name, cls, optional, mutated}}      outputs {{name, cls, same}}      attrs {{name, type, optional, default, choices}}
--   f, fi   formula trees (elementwise)           grad    {[input index] = op expression tree}
--   groups  {[tree] = input indices}: one call that gives several gradients       dim_first  the first attribute follows the first input
--   joint   {tree, input indices}: such a call, to be preferred to the expressions that each of its inputs has too
--   keep    {[output name] = true}: saved for the engine     again   {[output name] = expression that makes it}

local expr = require "expr"

local M = {}

local CLASSES = {L = true, F = true, P = true, T = true, t = true, i = true, b = true}
local ATTR_TYPES = {}
for name in ("int ints float bool dtype shape dim dims rng"):gmatch("%a+") do ATTR_TYPES[name] = true end
local FIELDS = {}
for name in ("family f fi ints d grad ulp lua meta domain doc partial infer keep again"):gmatch("%a+") do FIELDS[name] = true end

local function fail(row, message) error("kernels/ops.def: " .. row.signature .. ": " .. message, 0) end

local function split(text)
  local list = {}
  for part in text:gmatch("[^,]+") do list[#list + 1] = part:match("^%s*(.-)%s*$") end
  return list
end

local function parse_argument(row, text)
  local word, rest = text:match("^(%S+)%s+(.+)$")
  if not word then fail(row, "cannot read argument '" .. text .. "'") end
  if CLASSES[word] then
    if #row.attrs > 0 then row.dim_first = true end
    local name, marks = rest:match("^([%a_][%w_]*)([?!]*)$")
    if not name then fail(row, "cannot read input '" .. text .. "'") end
    local optional, mutated = marks:find("?", 1, true) ~= nil, marks:find("!", 1, true) ~= nil
    table.insert(row.inputs, {name = name, cls = word, optional = optional, mutated = mutated})
    return
  end
  local choices = word:match("^enum%((.*)%)$")
  if not choices and not ATTR_TYPES[word] then fail(row, "unknown class or type '" .. word .. "'") end
  local name, mark, default = rest:match("^([%a_][%w_]*)(%??)=?(.*)$")
  local attr = {name = name, type = choices and "enum" or word, optional = mark == "?"}
  attr.default = default ~= "" and default or nil
  if choices then
    attr.choices = {}
    for c in choices:gmatch("[^|]+") do table.insert(attr.choices, c) end
  end
  table.insert(row.attrs, attr)
end

local function parse_output(row, text, index)
  local cls, name = text:match("^(%S+)%s+([%a_][%w_]*)$")
  cls = cls or text
  for i, input in ipairs(row.inputs) do
    if input.name == cls and input.mutated then
      table.insert(row.outputs, {name = name or cls, cls = "=", same = i - 1})
      return
    end
  end
  if not cls:match("^[LFPTtfiub*]$") then fail(row, "unknown output '" .. text .. "'") end
  local taken
  for _, input in ipairs(row.inputs) do taken = taken or input.name == "out" end
  local default = taken and "result" or "out"
  table.insert(row.outputs, {name = name or (index == 1 and default or default .. index), cls = cls, same = -1})
end

local function parse_signature(row)
  -- enum(a|b) holds parentheses: the greedy match ends at the last ") ->"
  local name, args, outs = row.signature:match("^([%a_][%w_]*)%((.*)%)%s*%->%s*(.+)$")
  if not name then fail(row, "not a signature") end
  row.name, row.inputs, row.attrs, row.outputs = name, {}, {}, {}
  for _, text in ipairs(split(args)) do parse_argument(row, text) end
  for i, text in ipairs(split(outs)) do parse_output(row, text, i) end
  local first = row.attrs[1]
  if row.dim_first and not (first.type == "dim" and #row.inputs >= 2) then
    fail(row, "only a dim may stand between inputs, behind the first")
  end
end

--- The name of the gradient of output k in the row's own expressions.
function M.upstream(row, k)
  for _, input in ipairs(row.inputs) do
    if input.name == "g" then return k == 1 and "grad" or "grad" .. k end
  end
  return k == 1 and "g" or "g" .. k
end

local function input_index(row, name)
  for i, input in ipairs(row.inputs) do if input.name == name then return i end end
end

-- ====== Rows made from derivative formulas ======

local function elementwise_row(name, inputs, attrs, formula, doc, ulp, domain)
  local texts = {}
  for i, n in ipairs(inputs) do texts[i] = "T " .. n end
  for _, a in ipairs(attrs) do
    local shown = a.type .. " " .. a.name .. (a.default and "=" .. a.default or "")
    table.insert(texts, shown)
  end
  local row = {
    signature = ("%s(%s) -> T"):format(name, table.concat(texts, ", ")), family = "elementwise", infer = "elementwise",
    ints = "no", lua = "no", ulp = ulp, doc = doc, generated = true, f = formula, grad = {}, groups = {}, keep = {},
    again = {}, domain = domain,
  }
  parse_signature(row)
  return row
end

-- The inputs a formula uses, `first` in front, the others in the given order; and whether it uses attributes.
local function used_inputs(formula, first, candidates, attrs)
  local names, list = expr.names(formula), {first}
  for _, c in ipairs(candidates) do if names[c] and c ~= first then list[#list + 1] = c end end
  local used = {}
  for _, a in ipairs(attrs) do if names[a.name] then used = attrs end end
  return list, used
end

local function call_text(name, inputs, attrs)
  local args = {}
  for _, n in ipairs(inputs) do args[#args + 1] = n end
  for _, a in ipairs(attrs) do args[#args + 1] = a.name end
  return expr.parse(("%s(%s)"):format(name, table.concat(args, ", ")))
end

-- Second derivatives: d (backward formula) / d v, times the new gradient `gg`, for each input v of the backward row.
local function second_rows(row, add)
  local names = {}
  for i, input in ipairs(row.inputs) do names[i] = input.name end
  local flat = true -- by every input
  for i, v in ipairs(names) do
    local d = expr.diff(row.f, v)
    flat = flat and d and expr.is_zero(d)
    if d and not expr.is_zero(d) then
      local formula = expr.mul({"id", "gg"}, d)
      local inputs, attrs = used_inputs(formula, "gg", names, row.attrs)
      local name = row.name .. "_by_" .. v
      local doc = ("Second derivative: %s by %s."):format(row.name, v)
      local second = elementwise_row(name, inputs, attrs, formula, doc, row.ulp * 4, row.domain)
      second.second = true
      add(second)
      inputs[1] = "grad"
      row.grad[i] = call_text(name, inputs, attrs)
    end
  end
  -- A gradient that is constant has a derivative, nothing; one that cannot be differentiated has none.
  if flat then for i in ipairs(names) do row.grad[i] = {"id", "none"} end end
end

local function derivative_rows(row, add)
  if not row.d then return end
  local count, candidates = 0, {}
  for _ in pairs(row.d) do count = count + 1 end
  for _, input in ipairs(row.inputs) do candidates[#candidates + 1] = input.name end
  candidates[#candidates + 1] = "out"
  for i, input in ipairs(row.inputs) do
    local text = row.d[input.name]
    if text then
      local formula = expr.parse(text)
      local name = row.name .. "_backward" .. (count > 1 and "_" .. input.name or "")
      local inputs, attrs = used_inputs(formula, "g", candidates, row.attrs)
      local doc = ("Gradient of %s by %s."):format(row.name, input.name)
      local back = elementwise_row(name, inputs, attrs, formula, doc, row.ulp * 4 + 4, row.domain)
      add(back)
      row.grad[i] = call_text(name, inputs, attrs)
      second_rows(back, add)
    end
  end
end

-- ====== Loading ======

--- The row's gradient expressions: one for each input, or one call for several.
local function read_gradients(row, texts)
  local groups = {}
  for names, text in pairs(texts) do
    local tree, indices = expr.parse(text), {}
    for _, name in ipairs(split(names)) do
      local i = input_index(row, name)
      if not i then fail(row, "derivative by unknown input '" .. name .. "'") end
      indices[#indices + 1] = i
    end
    if #indices > 1 then groups[tree] = indices else row.grad[indices[1]] = tree end
  end
  for tree, indices in pairs(groups) do
    local single = 0
    for _, i in ipairs(indices) do if row.grad[i] then single = single + 1 end end
    if single == #indices and not row.joint then
      row.joint = {tree, indices}
    elseif single > 0 then
      fail(row, "beside a derivative by several inputs each of them needs one of its own, or none of them; one such call for a row")
    else
      row.groups[tree] = indices
      for _, i in ipairs(indices) do row.grad[i] = tree end
    end
  end
end

local function want_output(row, field, name)
  for _, output in ipairs(row.outputs) do if output.name == name then return end end
  fail(row, ("%s names '%s', which is no output"):format(field, name))
end

local function check(row)
  for key in pairs(row.raw) do
    if type(key) == "string" and not FIELDS[key] then fail(row, "unknown field '" .. key .. "'") end
  end
  if not row.doc then fail(row, "no doc line") end
  if row.family == "elementwise" and not row.f then fail(row, "no formula") end
  if #row.inputs > 8 or #row.outputs > 4 or #row.attrs > 8 then fail(row, "too many inputs, outputs or attributes") end
end

--- Reads the table.  Returns the rows in order; rows made from formulas follow the row they came from.
function M.load(path)
  local ops, by_name = {}, {}

  local function add(row)
    if by_name[row.name] then fail(row, "declared twice") end
    by_name[row.name] = row
    ops[#ops + 1] = row
    row.id = #ops - 1
  end

  local function declare(raw, family)
    local row = {
      raw = raw, signature = raw[1], family = raw.family or family, infer = raw.infer or raw.family or family,
      ints = raw.ints or (family == "view" and "keep" or "float"), lua = raw.lua or "both", meta = raw.meta,
      ulp = raw.ulp or 0, domain = raw.domain or "real", doc = raw.doc, partial = raw.partial, d = raw.d,
      grad = {}, groups = {}, keep = {}, again = {}, generated = false,
    }
    parse_signature(row)
    row.f = raw.f and expr.parse(raw.f)
    row.fi = raw.fi and expr.parse(raw.fi) or row.f
    check(row)
    add(row)
    read_gradients(row, raw.grad or {})
    for name, text in pairs(raw.again or {}) do
      want_output(row, "again", name)
      row.again[name] = expr.parse(text)
    end
    for _, name in ipairs(split(raw.keep or "")) do
      want_output(row, "keep", name)
      row.keep[name] = true
    end
    for name in pairs(raw.d or {}) do
      if not input_index(row, name) then fail(row, "derivative by unknown input '" .. name .. "'") end
    end
    derivative_rows(row, add)
  end

  local env = {
    op = function(raw) declare(raw, nil) end,
    elementwise = function(raw) declare(raw, "elementwise") end,
    view = function(raw) declare(raw, "view") end,
  }
  assert(loadfile(path, "t", env))()
  ops.by_name = by_name
  return ops
end

return M
