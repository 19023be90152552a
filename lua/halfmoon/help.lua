--- help.lua -- `? name` at the prompt: what an op, function, class or module is and how it is called.
--
-- Ops explain themselves from the op table.  Lua functions are documented by the comment above their definition, which is read from
-- the source when asked for.  Functions written in C have theirs in meta.lua, a file that editors read and nothing loads.

local core = require "halfmoon.core"
local errors = require "halfmoon.errors"

local help = {}

local WELCOME = [[
Type an expression to see its value, a statement to run it.  `_` is the last value; a `;` at the end hides it.

  hm       tensors: hm.randn({2, 3}), hm.tensor{{1, 2}, {3, 4}}, x:matmul(y), x[{1, {}}]
  nn       modules and layers: nn.Linear(784, 10)
  optim    optimizers: optim.AdamW(model:parameters(), {lr = 1e-3})
  amp      mixed precision: amp.autocast("f16", fn), amp.GradScaler()
  hm.data  data sets and loaders

  ? name   help on an op, function, class or table: ? matmul   ? amp.autocast   ? nn.Linear   ? hm
  Tab      completes names, methods after `:`, and file names inside strings
  Ctrl-C   interrupts what is running; variables stay
  Ctrl-D   leaves]]

-- ====== Reading sources ======

local sources = {} -- path -> array of lines, or false

local function lines_of(path)
  if sources[path] == nil then
    local f = io.open(path, "r")
    local lines = f and {}
    if f then
      for line in f:lines() do lines[#lines + 1] = line end
      f:close()
    end
    sources[path] = lines or false
  end
  return sources[path] or nil
end

-- The doc comment that ends above a line: prose without its dashes, and the tags of the annotations.
local function comment_above(lines, at)
  local first = at
  while first > 1 and lines[first - 1]:find("^%s*%-%-%-") do first = first - 1 end
  local prose, tags = {}, {}
  for i = first, at - 1 do
    local text = lines[i]:gsub("^%s*%-%-%- ?", "")
    if text:find("^%s*@") then tags[#tags + 1] = text else prose[#prose + 1] = text end
  end
  return prose, tags
end

-- "(x, opts)" of the function defined on a line.
local function parameters_on(line)
  return line:match("function[^%(]*(%b())") or ""
end

local function meta_path() return package.searchpath("halfmoon.meta", package.path) end

-- Where meta.lua describes `name` ("Tensor:backward" is found as Tensor and backward): its lines and the line number.
local function in_meta(owner, name)
  local path = meta_path()
  local lines = path and lines_of(path)
  for i, line in ipairs(lines or {}) do
    local where, what = line:match("^function%s+([%w_]+)[%.:]([%w_]+)%(")
    if what == name and (owner == nil or where == owner) then return lines, i, where end
  end
end

-- All files of the library.
local function library_files(folder, list)
  local ok, program = pcall(require, "halfmoon.program") -- in the program only
  for _, name in ipairs(ok and program.files(folder) or {}) do
    if name:sub(-1) == "/" then library_files(folder .. "/" .. name:sub(1, -2), list) end
    if name:find("%.lua$") then list[#list + 1] = folder .. "/" .. name end
  end
  return list
end

-- Where a comment begins with the call it describes, "--- amp.autocast(...): ...": the comment.
local function in_comments(path)
  local init = package.searchpath("halfmoon", package.path)
  local start = "^%s*%-%-%-%s*" .. path:gsub("^hm%.", ""):gsub("%.", "[.:]") .. "[%(%s{]"
  for _, file in ipairs(init and library_files(init:match("^(.*)/init%.lua$") or "", {}) or {}) do
    local lines = lines_of(file) or {}
    for i, line in ipairs(lines) do
      if line:gsub("^(%s*%-%-%-%s*)hm%.", "%1"):find(start) then
        local out = {}
        while lines[i] and lines[i]:find("^%s*%-%-%-") do
          out[#out + 1] = (#out == 0 and "" or "  ") .. lines[i]:gsub("^%s*%-%-%- ?", "")
          i = i + 1
        end
        return table.concat(out, "\n")
      end
    end
  end
end

-- ====== Pieces of text ======

local TAG_WORDS = {param = "  %s", ["return"] = "  returns %s"}

-- Splits "{a: string, b: integer}? words" into the type and the words.
local function split_type(text)
  for _, form in ipairs {"^(%b{}%S*)%s*(.*)", "^(fun%b()%S*)%s*(.*)", "^([%w_%.]+%b<>%S*)%s*(.*)", "^(%S+)%s*(.*)"} do
    local kind, words = text:match(form)
    if kind then return kind, words end
  end
  return text, ""
end

local function add_tags(out, tags)
  for _, tag in ipairs(tags) do
    local kind, rest = tag:match("^@(%a+)%s+(.*)")
    if kind == "param" then
      local name, more = rest:match("^(%S+)%s+(.*)")
      if name then
        local type_text, words = split_type(more)
        rest = ("%-12s %s%s"):format(name, type_text:gsub("%?$", ", optional"), words ~= "" and "  " .. words or "")
      end
    end
    if TAG_WORDS[kind] then out[#out + 1] = TAG_WORDS[kind]:format(rest) end
  end
end

local function documented(head, lines, at)
  local prose, tags = comment_above(lines, at)
  -- Where the prose begins with the call itself, it is the heading.
  local own = prose[1] and prose[1]:find("^[%w_.:]*" .. head:match("[%w_]+$") .. "[%({]")
  local out = {own and table.remove(prose, 1) or head .. parameters_on(lines[at])}
  for _, text in ipairs(prose) do out[#out + 1] = text == "" and "" or "  " .. text end
  if #tags > 0 then
    out[#out + 1] = ""
    add_tags(out, tags)
  end
  return table.concat(out, "\n")
end

-- Names in columns.
local function columns(names)
  local width, out, line = 0, {}, {}
  for _, name in ipairs(names) do width = math.max(width, #name + 2) end
  local per_line = math.max(1, (math.min(core.term_width(), 100) - 2) // width)
  for i, name in ipairs(names) do
    line[#line + 1] = name .. (" "):rep(width - #name)
    if #line == per_line or i == #names then
      out[#out + 1] = "  " .. table.concat(line):gsub("%s+$", "")
      line = {}
    end
  end
  return table.concat(out, "\n")
end

-- ====== Ops ======

local AUTOCAST = {
  L = "computes in the low dtype", F = "computes in float32", P = "computes in the widest dtype of its inputs",
  T = "follows its input",
}

local rows -- name -> row

local function row_of(name)
  if not rows then
    rows = {}
    for _, row in ipairs(core.ops()) do rows[row.name] = row end
  end
  return rows[name]
end

-- An attribute as an argument: "dim", "[keepdim = false]".
local function attribute_text(attr)
  if attr.default ~= nil then return ("[%s = %s]"):format(attr.name, tostring(attr.default)) end
  return attr.optional and "[" .. attr.name .. "]" or attr.name
end

local function argument_list(row, from)
  local list = {}
  for i = from, #row.inputs do
    local input = row.inputs[i]
    list[#list + 1] = input.optional and "[" .. input.name .. "]" or input.name
  end
  for _, attr in ipairs(row.attrs) do
    if attr.type ~= "rng" then list[#list + 1] = attribute_text(attr) end
  end
  return "(" .. table.concat(list, ", ") .. ")"
end

local OPERATORS = {
  __add = "x + y", __sub = "x - y", __mul = "x * y", __div = "x / y", __mod = "x % y", __pow = "x ^ y", __unm = "-x",
  __idiv = "x // y", __band = "x & y", __bor = "x | y", __bxor = "x ~ y", __bnot = "~x",
}

local function call_forms(row)
  local forms = {}
  if row.lua == "both" or row.lua == "function" then forms[#forms + 1] = "hm." .. row.name .. argument_list(row, 1) end
  if (row.lua == "both" or row.lua == "method") and row.inputs[1] then
    forms[#forms + 1] = row.inputs[1].name .. ":" .. row.name .. argument_list(row, 2)
  end
  if OPERATORS[row.meta] then forms[#forms + 1] = OPERATORS[row.meta] end
  return forms
end

local function op_text(row)
  local out = {table.concat(call_forms(row), "     "), "  " .. row.doc, ""}
  if out[1] == "" then out[1] = row.signature .. "     (hm's own: not called from Lua by name)" end
  for _, attr in ipairs(row.attrs) do
    if attr.choices then out[#out + 1] = ("  %-12s one of: %s"):format(attr.name, table.concat(attr.choices, ", ")) end
  end
  local class = row.inputs[1] and AUTOCAST[row.inputs[1].cls]
  out[#out + 1] = ("  autocast     %s"):format(class or "not touched")
  out[#out + 1] = ("  gradient     %s"):format(row.differentiable and "yes" or "no")
  if #row.outputs > 1 then
    local names = {}
    for i, output in ipairs(row.outputs) do names[i] = output.name or "result" end
    out[#out + 1] = "  returns      " .. table.concat(names, ", ")
  end
  return table.concat(out, "\n")
end

-- ====== Values ======

local function is_class(value) return type(value) == "table" and rawget(value, "__class") ~= nil end

-- Help on a Lua function: the comment above it, or one that begins with its name; at least how it is called.  nil where it has no source.
local function function_text(name, fn)
  local info = debug.getinfo(fn, "S")
  local lines = info.what ~= "C" and info.source:sub(1, 1) == "@" and lines_of(info.source:sub(2))
  if not lines or not lines[info.linedefined] then return nil end
  if #comment_above(lines, info.linedefined) == 0 then
    local text = in_comments(name)
    if text then return text end
  end
  return documented(name, lines, info.linedefined)
end

-- nn.ReLU does what the op relu does, nn.MSELoss what nn.functional.mse_loss does: the line that says so.
local function namesake(class_name)
  local name = class_name:gsub("Loss$", "_loss"):lower()
  local row = row_of(name)
  if row then return "  " .. row.doc .. "  As a function: ? " .. name end
  if require("halfmoon").nn.functional[name] then return "  As a function: ? nn.functional." .. name end
end

-- The public names of a table, functions marked by brackets.
local function public_names(t)
  local names = {}
  for key, value in pairs(t) do
    if type(key) == "string" and not key:find("^_") then
      names[#names + 1] = key .. ((type(value) == "function" and "()") or "")
    end
  end
  table.sort(names)
  return names
end

local function class_text(name, class)
  local init = rawget(class, "init")
  -- The comment above "function Linear:init(...)" describes the class.
  local text = init and function_text(name, init) or name .. "()"
  if not text:find("[\n:]") then text = text .. "\n" .. (namesake(class.__class) or "") end
  local methods = public_names(class)
  local own = {}
  for _, method in ipairs(methods) do
    if method ~= "init()" then own[#own + 1] = method end
  end
  if #own > 0 then text = text .. "\n\n  methods\n" .. columns(own) end
  local meta = getmetatable(class)
  local base = meta and rawget(meta, "__index")
  if is_class(base) then text = text .. ("\n\n  a kind of %s: ? nn.%s"):format(base.__class, base.__class) end
  return text
end

-- Names of hm that are loaded on first use.
local function table_text(name, t)
  local names = public_names(t)
  local meta = getmetatable(t)
  local later = meta and rawget(meta, "__lazy")
  for key in pairs(type(later) == "table" and later or {}) do
    if rawget(t, key) == nil then names[#names + 1] = key end
  end
  table.sort(names)
  if #names == 0 then return name .. ": an empty table" end
  return name .. "\n" .. columns(names)
end

local function c_function_text(name, last)
  local text = in_comments(name)
  if text then return text end
  local plain = last:match("^(.*[^_])_$")
  if plain and not row_of(last) and row_of(plain) then
    return ("%s is %s in place: the result replaces the tensor.\n\n%s"):format(last, plain, op_text(row_of(plain)))
  end
  local row = row_of(last)
  if row and row.lua ~= "no" then return op_text(row) end
  local lines, at = in_meta(nil, last)
  return lines and documented(name, lines, at) or nil
end

local function value_text(name, last, value)
  if type(value) == "function" then
    return function_text(name, value) or c_function_text(name, last)
  elseif core.is_tensor(value) then
    return name .. " is a tensor, " .. errors.describe(value) .. ".  Its methods:\n" .. columns(public_names(core.Tensor))
  elseif is_class(value) then
    return class_text(name, value)
  elseif type(value) == "table" then
    local class = getmetatable(value) and rawget(getmetatable(value), "__index")
    if is_class(class) then return name .. " is a " .. class.__class .. "\n\n" .. class_text(class.__class, class) end
    return table_text(name, value)
  elseif value ~= nil then
    return ("%s is a %s: %s"):format(name, math.type(value) or type(value), tostring(value))
  end
end

-- ====== Looking names up ======

-- Where a bare name may live, in this order.
local function namespaces()
  local hm = require "halfmoon"
  local list = {{"hm", hm}, {"tensor", core.Tensor}}
  for _, path in ipairs {"nn", "nn.functional", "nn.utils", "nn.init", "optim", "optim.lr_scheduler", "amp", "data", "autograd"} do
    local ok, value = pcall(function()
      local at = hm
      for key in path:gmatch("[%w_]+") do at = at[key] end
      return at
    end)
    if ok and type(value) == "table" then list[#list + 1] = {path, value} end
  end
  return list
end

-- Follows "nn.Linear" or "model.fc" from the environment, tensors' methods from "tensor".
local function resolve(path, env)
  local keys = {}
  for key in path:gmatch("[%w_]+") do keys[#keys + 1] = math.tointeger(tonumber(key)) or key end
  if #keys == 0 then return nil end
  local at = env
  for i, key in ipairs(keys) do
    if i == 1 and at[key] == nil then
      at = (key == "tensor" or key == "Tensor" or key == "t") and core.Tensor or require("halfmoon")[key]
      if at == nil then return nil end
    else
      local ok, value = pcall(function() return at[key] end)
      if not ok or value == nil then return nil end
      at = value
    end
  end
  return at, keys[#keys]
end

-- Every name that help knows, for suggestions.
local function known_names()
  local seen = {}
  for _, row in ipairs(core.ops()) do
    if row.lua ~= "no" then seen[row.name] = row.name end
  end
  for _, space in ipairs(namespaces()) do
    for key in pairs(space[2]) do
      if type(key) == "string" and not key:find("^_") then seen[key] = seen[key] or space[1] .. "." .. key end
    end
  end
  return seen
end

local function suggestions(name)
  local close = {}
  for key, full in pairs(known_names()) do
    local distance = errors.distance(name:lower(), key:lower())
    if key:lower():find(name:lower(), 1, true) and #name > 2 then distance = math.min(distance, 1) end
    if distance <= math.max(1, #name // 3) then close[#close + 1] = {distance, full} end
  end
  table.sort(close, function(a, b) return a[1] < b[1] or (a[1] == b[1] and a[2] < b[2]) end)
  local names = {}
  for i = 1, math.min(#close, 6) do names[i] = close[i][2] end
  return names
end

-- Breaks lines that are wider than the terminal at a space; what follows stands as far in as the line did, headings' rest by two.
local function wrap(text)
  local width, out = math.max(40, core.term_width() - 1), {}
  for line in (text .. "\n"):gmatch("(.-)\n") do
    local indent = line:match("^%s+") or "  "
    while #line > width do
      local cut = line:sub(#indent + 1, width):match("^.*()%s")
      if not cut then break end
      cut = cut + #indent
      out[#out + 1] = line:sub(1, cut - 1)
      line = indent .. line:sub(cut + 1):gsub("^%s+", "")
    end
    out[#out + 1] = line
  end
  return table.concat(out, "\n")
end

-- Help on a name, or what comes close to it.
local function explain(topic, env)
  if topic == "" then return WELCOME end
  local path = topic:gsub("%s+", ""):gsub("%(.*%)$", ""):gsub(":", ".")
  local last = path:match("([%w_]+)$")
  if not last then return ("no help on '%s': type ? and a name, e.g. ? matmul"):format(topic) end
  local value, key = resolve(path, env)
  local text = value ~= nil and value_text(path, tostring(key), value)
  if text then return text end
  if not path:find(".", 1, true) then
    local row = row_of(path)
    if row and row.lua ~= "no" then return op_text(row) end
    for _, space in ipairs(namespaces()) do
      local found = space[2][path]
      text = found ~= nil and value_text(space[1] .. "." .. path, path, found)
      if text then return text end
    end
  end
  local lines, at, owner = in_meta(nil, last)
  if lines then return documented(owner .. "." .. last, lines, at) end
  text = in_comments(path)
  if text then return text end
  if value ~= nil then return ("%s is a %s without a description"):format(path, type(value)) end
  local close = suggestions(last)
  return ("no help on '%s'%s"):format(topic, #close > 0 and "; close to it: " .. table.concat(close, ", ") or ": ? lists what there is")
end

--- What `? topic` prints.
---@param topic string a name, with or without what it belongs to; "" for the overview
---@param env table the environment in which the prompt runs
---@return string
function help.text(topic, env) return wrap(explain(topic, env)) end

return help
