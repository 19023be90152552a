-- emit_meta.lua -- writes lua/halfmoon/meta_ops.lua, which describes the rows of the op table for editors:
--
--   lua5.4 scripts/gen/emit_meta.lua            writes it
--   lua5.4 scripts/gen/emit_meta.lua --check    says whether it is in step, and ends with 1 if it is not
--
-- Rows that lua/halfmoon/meta.lua describes by hand (max, narrow: what Lua sees there is not the row's signature) are
-- left out.

local dir = arg[0]:match("^(.*)/[^/]*$") or "."
package.path = dir .. "/?.lua;" .. dir .. "/../../lua/halfmoon/?.lua;" .. package.path

local rows = require "rows"

local HAND = dir .. "/../../lua/halfmoon/meta.lua"
local META = dir .. "/../../lua/halfmoon/meta_ops.lua"
local HEAD = [[
---@meta

-- meta_ops.lua -- the rows of the op table, described for editors.  Written by scripts/gen/emit_meta.lua from
-- kernels/ops.def: do not edit.  Nothing loads this file.
]]

local ATTRIBUTE = {
  int = "integer", ints = "integer|integer[]", float = "number", bool = "boolean", dtype = "string",
    shape = "integer[]",
  dim = "integer", dims = "integer|integer[]",
}

local function attribute_type(a)
  if not a.choices then return ATTRIBUTE[a.type] end
  local words = {}
  for i, c in ipairs(a.choices) do words[i] = ('"%s"'):format(c) end
  return table.concat(words, "|")
end

local RESULT = {i = "Tensor", b = "Tensor"}

local function operand(input)
  local t = input.cls == "i" and "Tensor" or "Tensor|number"
  return ("%s%s: %s"):format(input.name, input.optional and "?" or "", t)
end

--- "fun(self: Tensor, dim: integer): Tensor" of a row; from: the first input that is an argument.
local function signature(row, method)
  local args = {}
  local first = row.inputs[1]
  if first then args[1] = method and "self: Tensor" or operand(first) end
  local list = {}
  for i = 2, #row.inputs do list[#list + 1] = operand(row.inputs[i]) end
  for i, a in ipairs(row.attrs) do
    if a.type ~= "rng" then
      local optional = a.optional or a.default ~= nil
      local text = ("%s%s: %s"):format(a.name, optional and "?" or "", attribute_type(a))
      if row.dim_first and i == 1 then table.insert(list, 1, text) else list[#list + 1] = text end
    end
  end
  for _, text in ipairs(list) do args[#args + 1] = text end
  local results = {}
  for i, out in ipairs(row.outputs) do results[i] = RESULT[out.cls] or "Tensor" end
  return ("fun(%s): %s"):format(table.concat(args, ", "), table.concat(results, ", "))
end

--- Comment lines of at most 120 columns.
local function comment(out, text)
  local line = "---"
  for word in text:gmatch("%S+") do
    if #line + 1 + #word > 120 then
      out[#out + 1] = line
      line = "---"
    end
    line = line .. (line == "---" and "" or " ") .. word
  end
  out[#out + 1] = line
end

local function field(out, name, text, doc)
  comment(out, doc)
  out[#out + 1] = ("---@field %s %s"):format(name, text)
end

--- What meta.lua describes: "Tensor:max", "hm.where".
local function by_hand(text)
  local set = {}
  for name in text:gmatch("\nfunction ([%w_.:]+)%(") do set[name] = true end
  return set
end

local function describe(ops, hand)
  local methods, functions = {"---@class Tensor"}, {"---@class halfmoon"}
  for _, row in ipairs(ops) do
    local name = row.name
    if row.lua == "both" or row.lua == "method" then
      if not hand["Tensor:" .. name] then field(methods, name, signature(row, true), row.doc) end
      local in_place = row.family == "elementwise" and not row.generated and row.outputs[1].cls ~= "b"
        and row.inputs[1].cls ~= "b"
      if in_place then field(methods, name .. "_", signature(row, true), ("As %s, in place."):format(name)) end
    end
    if (row.lua == "both" or row.lua == "function") and not hand["hm." .. name] then
      field(functions, name, signature(row, false), row.doc)
    end
  end
  return table.concat({HEAD, table.concat(methods, "\n"), "", table.concat(functions, "\n"), ""}, "\n")
end

local function contents(path)
  local f = io.open(path)
  local text = f and f:read("a")
  if f then f:close() end
  return text
end

local new = describe(rows.load(dir .. "/../../kernels/ops.def"), by_hand(assert(contents(HAND))))
if new == contents(META) then
  print("lua/halfmoon/meta_ops.lua is in step with kernels/ops.def")
elseif arg[1] == "--check" then
  print("lua/halfmoon/meta_ops.lua is out of step with kernels/ops.def: run lua5.4 scripts/gen/emit_meta.lua")
  os.exit(1)
else
  local out = assert(io.open(META, "w"))
  out:write(new)
  out:close()
  print("wrote lua/halfmoon/meta_ops.lua")
end
