--- print.lua -- tensors as text.
--
-- One format for all elements: integers where all values are whole, four decimals where that shows every value, a
-- common factor where the values lie close together but far from 1, scientific otherwise.  Matrices wider than the
-- terminal are cut into blocks of columns; tensors of more dims are shown matrix by matrix; above 1,000 elements only
-- the edges are shown.  The footer has dtype, shape and device:  [f16 2x3, cpu].
-- Sets core.Tensor.__tostring_impl, which a tensor's __tostring calls.

local core = require "halfmoon.core"
local errors = require "halfmoon.errors"

local printer = {}

local SUMMARY_ABOVE = 1000 -- elements
local EDGE = 3             -- entries shown at each end of a dim in a summary

-- ====== Reading ======

--- Positions shown along a dim of size n; 0 stands for the gap.
local function shown(n, summary)
  local list = {}
  if not summary or n <= 2 * EDGE then
    for i = 1, n do list[i] = i end
    return list
  end
  for i = 1, EDGE do list[i] = i end
  list[EDGE + 1] = 0
  for i = 1, EDGE do list[EDGE + 1 + i] = n - EDGE + i end
  return list
end

--- The shown elements of a tensor of one dim or more as nested arrays; `false` stands for the gap.
local function fetch(t, summary)
  if not summary then return t:totable() end
  local n = t:size(1)
  if t:dim() == 1 then
    if n <= 2 * EDGE then return t:totable() end
    local row = t:narrow(1, 1, EDGE):totable()
    row[EDGE + 1] = false
    return table.move(t:narrow(1, n - EDGE + 1, EDGE):totable(), 1, EDGE, EDGE + 2, row)
  end
  local rows = {}
  for i, position in ipairs(shown(n, true)) do
    rows[i] = position ~= 0 and fetch(t:select(1, position), true) -- false: the gap
  end
  return rows
end

-- ====== Choosing a format ======

--- Calls visit(value) for each element of nested arrays of the given depth.
local function each(values, depth, visit)
  if depth == 0 then return visit(values) end
  for _, value in ipairs(values) do
    if depth == 1 then visit(value) elseif value then each(value, depth - 1, visit) end
  end
end

local function special(x)
  if x ~= x then return "nan" end
  if x == math.huge then return "inf" end
  if x == -math.huge then return "-inf" end
end

--- A function value -> text for floating values, and the common factor taken out (1 if none).
local function float_format(values, depth)
  local largest, smallest, whole = 0, math.huge, true
  each(values, depth, function(x)
    if not x or special(x) then return end
    local a = x < 0 and -x or x
    if a > largest then largest = a end
    if a > 0 and a < smallest then smallest = a end
    if whole and a % 1 ~= 0 then whole = false end
  end)
  local pattern, factor = "%.4f", 1
  if whole and largest < 1e9 then
    pattern = "%.0f"
  elseif largest >= 1e5 or smallest < 5e-5 then
    if largest / smallest <= 1e4 then
      factor = 10.0 ^ math.floor(math.log(largest, 10))
    else
      pattern = "%.4e"
    end
  end
  return function(x) return special(x) or pattern:format(x / factor) end, factor
end

local function format_for(dtype, values, depth)
  if dtype:find("float", 1, true) then
    return float_format(values, depth)
  end
  return tostring, 1
end

-- ====== Laying out ======

local function pad(text, width) return (" "):rep(width - #text) .. text end

--- Texts of a row of values; "..." for the gap.
local function texts_of(row, format)
  local texts = {}
  for i, value in ipairs(row) do
    -- a gap is `false`, which a bool tensor also holds: the caller swaps those for strings before
    texts[i] = value == nil and "" or format(value)
  end
  return texts
end

--- A vector on as many lines as it takes.
local function add_vector(lines, texts, columns)
  local width = 0
  for _, text in ipairs(texts) do width = math.max(width, #text) end
  local per_line = math.max(1, (columns + 1) // (width + 1))
  for first = 1, #texts, per_line do
    local line = {}
    for i = first, math.min(#texts, first + per_line - 1) do line[#line + 1] = pad(texts[i], width) end
    lines[#lines + 1] = table.concat(line, " ")
  end
end

--- A matrix of texts (rows of equal length, or the text "..." for the gap) in blocks of columns that fit.
local function add_matrix(lines, rows, columns)
  local width, count = 0, 0
  for _, row in ipairs(rows) do
    if type(row) == "table" then
      count = #row
      for _, text in ipairs(row) do width = math.max(width, #text) end
    end
  end
  local per_block = math.max(1, (columns + 1) // (width + 1))
  for first = 1, count, per_block do
    local last = math.min(count, first + per_block - 1)
    if count > per_block then
      lines[#lines + 1] = first == last and ("Column %d"):format(first) or ("Columns %d to %d"):format(first, last)
    end
    for _, row in ipairs(rows) do
      if type(row) == "table" then
        local line = {}
        for i = first, last do line[#line + 1] = pad(row[i], width) end
        lines[#lines + 1] = table.concat(line, " ")
      else
        lines[#lines + 1] = pad(row, width)
      end
    end
    if last < count then lines[#lines + 1] = "" end
  end
end

--- Matrix after matrix, each under its position: (2,1,.,.)
local function add_slices(lines, values, depth, shape, prefix, summary, to_rows, columns)
  if depth == 2 then
    if #prefix > 0 then
      if #lines > 0 and lines[#lines] ~= "" then lines[#lines + 1] = "" end
      lines[#lines + 1] = ("(%s,.,.)"):format(table.concat(prefix, ","))
    end
    return add_matrix(lines, to_rows(values), columns)
  end
  for i, position in ipairs(shown(shape[#prefix + 1], summary)) do
    if position == 0 then
      lines[#lines + 1] = ""
      lines[#lines + 1] = "..."
    else
      prefix[#prefix + 1] = position
      add_slices(lines, values[i], depth - 1, shape, prefix, summary, to_rows, columns)
      prefix[#prefix] = nil
    end
  end
end

--- [f16 2x3, cpu]
---@param t Tensor
---@return string
function printer.footer(t)
  local shape = t:dim() == 0 and "scalar" or table.concat(t.shape, "x")
  return ("[%s %s, %s%s]"):format(errors.short_dtype[t.dtype] or t.dtype, shape, t.device,
    t.requires_grad and ", requires_grad" or "")
end

--- A tensor as text.
---@param t Tensor
---@param columns integer? width to fit; default: the terminal's, else 80
---@return string
function printer.format(t, columns)
  local footer = printer.footer(t)
  if t:numel() == 0 then return "(no elements)\n" .. footer end
  columns = columns or (core.isatty(1) and core.term_width()) or 80
  local depth, shape, plain = t:dim(), t.shape, t:detach()
  local summary = t:numel() > SUMMARY_ABOVE
  local values
  if depth == 0 then values = plain:item() else values = fetch(plain, summary) end

  local gaps = summary -- in a bool tensor `false` is a value; its gaps are found by position instead
  local format, factor = format_for(t.dtype, values, depth)
  local lines = {}
  if factor ~= 1 then lines[1] = ("%g *"):format(factor) end
  local function to_texts(row, n)
    local texts = texts_of(row, function(value)
      if value == false and t.dtype ~= "bool" then return "..." end
      return format(value)
    end)
    if gaps and n > 2 * EDGE then texts[EDGE + 1] = "..." end
    return texts
  end
  if depth == 0 then
    lines[#lines + 1] = format(values)
  elseif depth == 1 then
    add_vector(lines, to_texts(values, shape[1]), columns)
  else
    local function to_rows(matrix)
      local rows = {}
      for i, row in ipairs(matrix) do rows[i] = row and to_texts(row, shape[depth]) or "..." end
      return rows
    end
    add_slices(lines, values, depth, shape, {}, summary, to_rows, columns)
  end
  lines[#lines + 1] = footer
  return table.concat(lines, "\n")
end

core.Tensor.__tostring_impl = printer.format

return printer
