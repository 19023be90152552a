-- audit_tables.lua -- what is there against what is bound, documented, annotated and proved:
--
--   build/halfmoon scripts/audit_tables.lua LEDGER
--
-- Looks at every row of the op table, every public Lua function, every module and optimizer, and every function of
-- core/halfmoon.h. LEDGER is what a run of the specs with HALFMOON_LEDGER set has written (spec/support/proofs.lua).
-- What is left out stands in a list below, with the reason.  Run by scripts/audit from the repository's root; ends
-- with `N passed, N failed`.

local program = arg[0]:match("^(.*)/[^/]*$") or "."
-- for rows.lua, and expr.lua that it needs
package.path = program .. "/gen/?.lua;" .. program .. "/../lua/halfmoon/?.lua;" .. package.path

local hm = require "halfmoon"
local core = require "halfmoon.core"
local table_rows = require "rows"

-- ====== Lists, each entry with its reason ======

-- Rows that Lua sees by other means than a function or method of their name.
local OTHER_FACE = {}

-- Respects in which a row need not be proved.
local UNPROVED = {
  ["gradient remainder"] = "jumps where x is a multiple of y",
  ["gradient cross_entropy_backward"] =
    "lse counts as a function of x: the second derivative of cross_entropy proves it",
  ["special one_hot"] = "takes ids",
  ["special fill_"] = "takes a number", ["special arange_"] = "takes numbers", ["special eye_"] = "reads nothing",
  ["special copy_"] = "overwrites", ["special uniform_"] = "overwrites", ["special normal_"] = "overwrites",
  ["special random_"] = "overwrites", ["special bernoulli_"] = "overwrites",
  ["special norm"] = "p = 0 counts what is not zero; ops_reduce_spec has NaN for the others",
}

-- Public functions of C that the binding does not call.
local C_ONLY = {
  hm_calloc = "memory of C programs", hm_realloc = "memory of C programs",
  hm_kernel_device = "a field of the kernel's own object in Lua",
  hm_alias = "detach() is a row of the table", hm_as_strided = "for C programs: Lua has views with checked bounds",
  hm_sum_to = "gradients of broadcasting use it",
  hm_broadcast = "shape rules use it", hm_promote = "dtype rules use it",
  hm_record_custom = "hm_record_custom_with is the same and more",
  hm_random_take = "ops that draw numbers use it",
}

-- Modules that compute nothing.
local LISTS = {ModuleList = "holds modules", ModuleDict = "holds modules", ParameterList = "holds parameters",
  ParameterDict = "holds parameters"}

-- Public Lua names without a comment or annotations of their own.
local PLAIN = {}

-- ====== Reporting ======

local passed, failed = 0, 0

--- Reports a list of complaints under a title.
local function report(title, complaints)
  if #complaints == 0 then
    passed = passed + 1
    return print("  ✓ " .. title)
  end
  failed = failed + 1
  print("  ✗ " .. title)
  for _, text in ipairs(complaints) do print("      " .. text) end
end

local function contents(path)
  local f = assert(io.open(path))
  local text = f:read("a")
  f:close()
  return text
end

local function files(pattern)
  local list = {}
  local pipe = assert(io.popen("ls " .. pattern .. " 2>/dev/null"))
  for name in pipe:lines() do list[#list + 1] = name end
  pipe:close()
  return list
end

local function all_text(...)
  local parts = {}
  for _, pattern in ipairs {...} do
    for _, name in ipairs(files(pattern)) do parts[#parts + 1] = contents(name) end
  end
  return table.concat(parts, "\n")
end

--- The words of a text, as a set.
local function words(text)
  local set = {}
  for word in text:gmatch("[%w_]+") do set[word] = true end
  return set
end

-- ====== The ledger ======

--- aspect .. " " .. name -> true
local function read_ledger(text)
  local set = {}
  for aspect, name in text:gmatch("([^\t\n]+)\t([^\t\n]*)[^\n]*") do set[aspect .. " " .. name] = true end
  return set
end

-- ====== Rows ======

local function is_method(row) return row.lua == "both" or row.lua == "method" end
local function is_function(row) return row.lua == "both" or row.lua == "function" end
local function has_in_place(row)
  return row.family == "elementwise" and not row.generated and row.lua ~= "no" and row.outputs[1].cls ~= "b"
    and row.inputs[1].cls ~= "b"
end

local function bound(rows, functions, methods)
  local out = {}
  for _, row in ipairs(rows) do
    if not OTHER_FACE[row.name] then
      if is_function(row) and type(functions[row.name]) ~= "function" then
        out[#out + 1] = "hm." .. row.name .. " is not there" end
      if is_method(row) and type(methods[row.name]) ~= "function" then
        out[#out + 1] = "tensor:" .. row.name .. " is not there" end
      if has_in_place(row) and type(methods[row.name .. "_"]) ~= "function" then
        out[#out + 1] = "tensor:" .. row.name .. "_ is not there" end
    end
  end
  return out
end

--- Names that gradient expressions of rows call.
local function called_by_gradients(rows)
  local set = {}
  local function walk(tree)
    if type(tree) ~= "table" then return end
    if tree[1] == "call" then set[tree[2]] = true end
    for _, part in pairs(tree) do walk(part) end
  end
  for _, row in ipairs(rows) do
    for _, tree in pairs(row.grad) do walk(tree) end
    for _, tree in pairs(row.again) do walk(tree) end
    walk(row.joint)
  end
  return set
end

--- Rows that Lua does not see must be reached from somewhere: the library, the binding, core's composites, or a
--- gradient.
local function reached(rows, sources, gradients)
  local out = {}
  for _, row in ipairs(rows) do
    local name = row.name
    if row.lua == "no" and not row.generated then
      local used = sources[name] or sources["hm_op_" .. name] or sources["HM_OP_" .. name:upper()] or gradients[name]
      if not used then out[#out + 1] = name .. " is reached from no Lua file, no binding and no gradient" end
    end
  end
  return out
end

local function documented_rows(rows)
  local out = {}
  for _, row in ipairs(rows) do
    if not row.doc or #row.doc < 8 or not row.doc:find("[%.%)]$") then
      out[#out + 1] = row.name .. ": no doc line, or no sentence" end
  end
  return out
end

local function annotated_rows(rows, text)
  local out, known = {}, {}
  for name in text:gmatch("%-%-%-@field ([%w_]+) fun") do known[name] = true end
  for name in text:gmatch("\nfunction [%w_]+[.:]([%w_]+)%(") do known[name] = true end
  for _, row in ipairs(rows) do
    if row.lua ~= "no" and not known[row.name] then out[#out + 1] = row.name .. " is not in meta_ops.lua" end
    if has_in_place(row) and not known[row.name .. "_"] then out[#out + 1] = row.name .. "_ is not in meta_ops.lua" end
  end
  return out
end

--- The respects in which a row must have been proved.
local function aspects(row)
  local list = {"float32", "float16", "bfloat16", "strides", "empty", "refusals"}
  local function want(aspect, on) if on then list[#list + 1] = aspect end end
  local gradient_row = row.generated or row.name:find("_backward", 1, true)
  want("value", not gradient_row)
  want("derivative", gradient_row)
  want("special", not row.generated)
  want("class", not row.generated)
  want("gradient", next(row.grad) ~= nil and not row.generated)
  want("second derivative", next(row.grad) ~= nil and not row.generated)
  want("integers", row.ints == "keep" and not gradient_row)
  want("broadcast", row.family == "elementwise" and not row.generated and #row.inputs > 1)
  want("in-place", has_in_place(row))
  return list
end

--- A gradient is also proved where the log does not show it (views, composites): by the derivative of the row that
--- calls it.
local function proved(rows, ledger)
  local out, by_caller = {}, {}
  for _, row in ipairs(rows) do
    if ledger["gradient " .. row.name] or ledger["second derivative " .. row.name]
      or ledger["derivative " .. row.name] then
      for name in pairs(called_by_gradients {row}) do by_caller[name] = true end
    end
  end
  for _, row in ipairs(rows) do
    for _, aspect in ipairs(aspects(row)) do
      local key = aspect .. " " .. row.name
      local unseen = aspect == "derivative" and by_caller[row.name] and (row.family == "composite"
        or row.family == "view")
      local excused = UNPROVED[key] or (aspect == "second derivative" and UNPROVED["gradient " .. row.name])
      if not (ledger[key] or unseen or excused) then out[#out + 1] = row.name .. ": not proved: " .. aspect end
    end
  end
  return out
end

-- ====== Lua functions ======

local sources = {}

local function lines_of(path)
  if not sources[path] then
    local list = {}
    for line in (contents(path) .. "\n"):gmatch("(.-)\n") do list[#list + 1] = line end
    sources[path] = list
  end
  return sources[path]
end

--- The comment above a line: its prose, and its tags by name ("param" -> {names}).
local function comment_above(lines, at)
  local prose, params, tags = 0, {}, {}
  local i = at - 1
  while i >= 1 and lines[i]:find("^%s*%-%-") do
    local text = lines[i]:match("^%s*%-%-%-?%s?(.*)$")
    local tag, rest = text:match("^@(%a+)%s*(.*)")
    if tag then tags[tag] = true else prose = prose + #text end
    if tag == "param" then params[rest:match("^([%w_.]+)") or ""] = true end
    i = i - 1
  end
  return prose, params, tags
end

--- Complaints about a Lua function that has a source: no prose, a parameter without annotation.
local function check_lua_function(name, fn, out)
  local info = debug.getinfo(fn, "Su")
  local lines = lines_of(info.source:sub(2))
  local prose, params, tags = comment_above(lines, info.linedefined)
  if prose < 5 then out[#out + 1] = ("%s (%s:%d): no comment"):format(name, info.short_src, info.linedefined) end
  if tags.type or tags.overload then return end
  for i = 1, info.nparams do
    local param = debug.getlocal(fn, i)
    if param ~= "self" and param ~= "_" and not params[param] then
      out[#out + 1] = ("%s (%s:%d): parameter %s is not annotated"):format(name, info.short_src, info.linedefined,
        param)
    end
  end
end

local PARTS = {"hm", "hm.nn", "hm.nn.functional", "hm.nn.init", "hm.nn.utils", "hm.nn.quantize",
  "hm.optim", "hm.optim.lr_scheduler", "hm.amp",
  "hm.amp.policies", "hm.amp.debug", "hm.data", "hm.autograd", "hm.cuda", "hm.cpu", "tensor"}

local function part(path)
  if path == "tensor" then return core.Tensor end
  local at = hm
  for key in path:gmatch("[%w_]+") do if key ~= "hm" then at = at and at[key] end end
  return type(at) == "table" and at or {}
end

--- Each public function: visit(path, key, function).
local function each_function(visit)
  for _, path in ipairs(PARTS) do
    for key, value in pairs(part(path)) do
      if type(key) == "string" and not key:find("^_") and type(value) == "function" then visit(path, key, value) end
    end
  end
end

local function functions_described(rows, meta)
  local row, out, described = {}, {}, {}
  for _, r in ipairs(rows) do row[r.name] = r end
  for name in meta:gmatch("\nfunction ([%w_.:]+)%(") do described[name:match("[%w_]+$")] = true end
  for name in meta:gmatch("@field ([%w_]+) fun") do described[name] = true end
  each_function(function(path, key, fn)
    local name = path .. "." .. key
    if PLAIN[name] or name:find("^hm%.optim%.%u") then return end -- optimizers have a check of their own
    if debug.getinfo(fn, "S").what ~= "C" then return check_lua_function(name, fn, out) end
    if not (described[key] or row[key]) then out[#out + 1] = name .. " (C): not described in lua/halfmoon/meta.lua" end
  end)
  table.sort(out)
  return out
end

-- ====== Modules, optimizers ======

local function is_class(value) return type(value) == "table" and type(rawget(value, "__class")) == "string" end

--- Modules of hm.nn (lists of modules compute nothing and are left out): a comment where the class is made or above
--- its init, and a forward that ran in a spec.
local function modules_described(nn, ledger, text)
  local Module = nn.Module or {}
  local undocumented, unproved = {}, {}
  for name, class in pairs(nn) do
    if is_class(class) and class ~= Module and (name == "Planted" or class.forward ~= Module.forward) then
      local init, comment = rawget(class, "init"), false
      if init then
        local info = debug.getinfo(init, "S")
        comment = comment_above(lines_of(info.source:sub(2)), info.linedefined) >= 10
      end
      comment = comment or text:find("%-%-%-? ?[^\n]*nn%." .. name .. "%f[^%w]") ~= nil
      if not comment then undocumented[#undocumented + 1] = "nn." .. name .. ": no comment" end
      if not ledger["module " .. name] and not LISTS[name] then
        unproved[#unproved + 1] = "nn." .. name .. ": its forward ran in no spec" end
    end
  end
  table.sort(undocumented)
  table.sort(unproved)
  return undocumented, unproved
end

local function optimizers_described(optim, ledger, text)
  local undocumented, unproved = {}, {}
  for name, value in pairs(optim) do
    if name:find("^%u") and name ~= "Optimizer" and (type(value) == "table" or type(value) == "function") then
      if not text:find("%-%-%- [^\n]*optim%." .. name .. "%(") then
        undocumented[#undocumented + 1] = "optim." .. name .. ": no comment" end
      if not ledger["optimizer " .. name] then
        unproved[#unproved + 1] = "optim." .. name .. ": made no step in a spec" end
    end
  end
  return undocumented, unproved
end

-- ====== Functions of C ======

--- The functions that a header declares: {name, documented}.  A comment above, at the end of the declaration, or above the
--- lines just before.
local function declared(header)
  local list, covered, inside, open = {}, false, false, nil
  for line in (header .. "\n"):gmatch("(.-)\n") do
    local name = not inside and line:match("^[%a][%w_ ]-[ %*]%*?(hm_[%w_]+)%(")
    if name and not line:find("^typedef") then
      list[#list + 1] = {name = name, documented = covered or line:find("/%*") ~= nil}
      open = not line:find("[;}]") and list[#list] or nil -- goes on in the next line
    elseif open then
      open.documented = open.documented or line:find("/%*") ~= nil
      if line:find(";", 1, true) then open = nil end
    elseif line:find("^%s*/%*") and not line:find("^/%* =") and not line:find("^/%* %-") then
      covered, inside = true, not line:find("%*/")
    elseif inside then
      inside = not line:find("%*/")
    elseif line:match("^%s*$") then
      covered = false
    end
  end
  return list
end

--- A block of functions that one comment heads is documented; so is what a heading describes whole.
local function c_documented(header)
  local out = {}
  for _, f in ipairs(declared(header)) do
    if not f.documented and not f.name:find("_free$") and not f.name:find("_count$") then
      out[#out + 1] = f.name .. ": no comment in core/halfmoon.h" end
  end
  return out
end

local function c_bound(header, binding)
  local out = {}
  for _, f in ipairs(declared(header)) do
    if not binding[f.name] and not C_ONLY[f.name] then
      out[#out + 1] = f.name .. ": not called in lua/bind, and on no list" end
  end
  for name in pairs(C_ONLY) do
    if binding[name] then out[#out + 1] = name .. " is on the list of functions that are not bound, but it is" end
  end
  return out
end

-- ====== Main ======

local rows = table_rows.load("kernels/ops.def")
local header = contents("core/halfmoon.h")
local ledger = read_ledger(contents(assert(arg[1], "usage: build/halfmoon scripts/audit_tables.lua LEDGER")))
local meta = all_text("lua/halfmoon/meta.lua", "lua/halfmoon/meta_ops.lua")
local library = all_text("lua/halfmoon/*.lua", "lua/halfmoon/*/*.lua", "lua/halfmoon/*/*/*.lua")
local users = words(library .. all_text("lua/bind/*.c", "core/*.c"))
local binding = words(all_text("lua/bind/*.c", "lua/bind/*.h"))
local gradients = called_by_gradients(rows)

report("every row is bound in Lua", bound(rows, hm, core.Tensor))
report("rows that Lua does not see are reached", reached(rows, users, gradients))
report("every row has a doc line", documented_rows(rows))
report("every row is annotated", annotated_rows(rows, meta))
report("every row is proved", proved(rows, ledger))
report("every public function of Lua is documented and annotated", functions_described(rows, meta))
local undocumented, unproved = modules_described(hm.nn, ledger, library)
report("every module is documented", undocumented)
report("every module is proved", unproved)
undocumented, unproved = optimizers_described(hm.optim, ledger, library)
report("every optimizer is documented", undocumented)
report("every optimizer is proved", unproved)
report("every function of core/halfmoon.h is documented", c_documented(header))
report("every function of core/halfmoon.h is bound", c_bound(header, binding))

-- What the checks would not see would be of no use: each is given a fault.
local function sees(title, complaints, word)
  local found = false
  for _, text in ipairs(complaints) do found = found or text:find(word, 1, true) ~= nil end
  report("a fault is seen: " .. title, found and {} or {"no complaint about " .. word})
end
local planted = {name = "planted", lua = "both", family = "elementwise", grad = {}, again = {}, inputs = {{cls = "T"}},
  outputs = {{cls = "T"}}, ints = "no"}
local hidden = {name = "planted", lua = "no", family = "index", grad = {}, again = {}, inputs = {{cls = "T"}},
  outputs = {{cls = "T"}}, ints = "no"}
sees("a row without a function", bound({planted}, hm, core.Tensor), "hm.planted")
sees("a row without an in-place form", bound({planted}, hm, core.Tensor), "planted_")
sees("a row that nobody calls", reached({hidden}, users, gradients), "planted")
sees("a row without a doc line", documented_rows({planted}), "planted")
sees("a row without annotation", annotated_rows({planted}, meta), "planted")
sees("a row without proof", proved({planted}, ledger), "planted: not proved: value")
local complaints = {}
check_lua_function("planted", load("return function(x) return x end", "@scripts/audit_tables.lua")(), complaints)
sees("a parameter without annotation", complaints, "parameter x")
sees("a module that never ran", select(2, modules_described({Planted = {__class = "Planted"}}, ledger, library)),
  "Planted")
sees("an optimizer without a comment", (optimizers_described({Planted = {}}, ledger, library)), "Planted")
sees("a C function without a comment", c_documented(header .. "\n\nint hm_planted(int x);\n"), "hm_planted")
sees("a C function that is not bound", c_bound(header .. "\nint hm_planted(int x);\n", binding), "hm_planted")

print(("%d passed, %d failed"):format(passed, failed))
os.exit(failed == 0 and 0 or 1, true)
