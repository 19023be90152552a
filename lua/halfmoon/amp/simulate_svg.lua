--- amp/simulate_svg.lua -- the picture of a simulation: all scales over time, as SVG.  Private to amp.
--
-- The vertical axis is log2 of the scale.  A light line shows where the largest recorded gradient just fits into
-- float16 (65504 / amax): a scale above it overflows there.  Each overflow is a circle of class "overflow" on the line
-- of its policy, with a title that tells step, scale and whose gradient it was.  The file needs nothing beside it.

local errors = require "halfmoon.errors"
local options = require "halfmoon.options"
local gradient_trace = require "halfmoon.amp.gradient_trace"

local raise = errors.raise

local svg = {}

local COLORS = {"#3b6fb6", "#c8553d", "#3f8f5b", "#8e5ea2", "#b8860b", "#2a9d9d", "#c2589a", "#6b7280"}
local DASHES = {"", "7 3", "2 2", "9 3 2 3"} -- a line style for each round of colors

local MARGIN = {left = 64, right = 20, top = 44, bottom = 44}
local LEGEND_ROW, LEGEND_CHARS = 18, 7.2 -- height of a row, width of a letter

local spec = {
  title = {"string", "loss scales"}, width = {"integer", 960, options.at_least(320)},
  height = {"integer", 420, options.at_least(200)},
}

local ESCAPES = {["&"] = "&amp;", ["<"] = "&lt;", [">"] = "&gt;", ['"'] = "&quot;"}

--- Text as XML has it; bytes that XML forbids become "?".
local function escape(text)
  return (text:gsub("[%z\1-\8\11\12\14-\31]", "?"):gsub('[&<>"]', ESCAPES))
end

local function log2(x) return math.log(x, 2) end

local function number(x) return (("%.2f"):format(x):gsub("%.?0+$", "")) end

-- ====== The frame ======

--- The range of log2 that is shown: all scales, and of the ceilings what lies near them.
local function range_of(result)
  local low, high = math.huge, -math.huge
  for _, run in ipairs(result) do
    for _, scale in ipairs(run.scales) do low, high = math.min(low, log2(scale)), math.max(high, log2(scale)) end
  end
  local top = high + 6
  for _, step in ipairs(result.trace) do
    local ceiling = gradient_trace.ceiling(step)
    if ceiling and log2(ceiling) < top then high = math.max(high, log2(ceiling)) end
  end
  low, high = low // 1 - 1, -(-high // 1) + 1
  return low, math.max(high, low + 4)
end

--- Places on the page: x of a step, y of log2 of a scale.
local function frame_of(result, opts, legend_height)
  local low, high = range_of(result)
  local frame = {
    low = low, high = high, left = MARGIN.left, right = opts.width - MARGIN.right, top = MARGIN.top + legend_height,
    width = opts.width, height = opts.height + legend_height,
  }
  frame.bottom = frame.height - MARGIN.bottom
  local across, up = (frame.right - frame.left) / result.steps, (frame.bottom - frame.top) / (high - low)
  function frame.x(step) return frame.left + (step - 1) * across end
  function frame.y(log)
    return math.max(frame.top, math.min(frame.bottom, frame.bottom - (log - low) * up))
  end
  return frame
end

--- 1, 2 or 5 times a power of ten, so that about `wanted` fit.
local function nice(span, wanted)
  local raw = math.max(1, span / wanted)
  local power = 10 ^ (math.log(raw, 10) // 1)
  for _, m in ipairs {1, 2, 5, 10} do
    if m * power >= raw then return math.tointeger(m * power) or 1 end
  end
  return 1
end

--- Lines and numbers of both axes.
local function axes(out, frame, result)
  local by = nice(frame.high - frame.low, 9)
  for log = math.tointeger(-(-frame.low // by) * by), math.tointeger(frame.high // 1), by do
    local y = number(frame.y(log))
    out('<line class="grid" x1="%d" y1="%s" x2="%d" y2="%s"/>', frame.left, y, frame.right, y)
    out('<text class="axis" x="%d" y="%s" text-anchor="end" dy="0.35em">2<tspan class="power" dy="-0.45em">%d</tspan>'
      .. "</text>", frame.left - 8, y, log)
  end
  by = nice(result.steps, 10)
  for step = by, result.steps, by do
    local x = number(frame.x(step))
    out('<line class="tick" x1="%s" y1="%d" x2="%s" y2="%d"/>', x, frame.bottom, x, frame.bottom + 4)
    out('<text class="axis" x="%s" y="%d" text-anchor="middle">%d</text>', x, frame.bottom + 17,
      result.trace[step].step)
  end
  out('<path class="frame" d="M%d %dV%dH%d"/>', frame.left, frame.top, frame.bottom, frame.right)
  out('<text class="axis" x="%s" y="%d" text-anchor="middle">step</text>', number((frame.left + frame.right) / 2),
    frame.bottom + 35)
end

-- ====== Lines ======

--- The line of ceilings, in pieces where there is one.
local function ceilings(out, frame, result)
  local parts, drawing = {}, false
  for i, step in ipairs(result.trace) do
    local ceiling = gradient_trace.ceiling(step)
    if ceiling then
      parts[#parts + 1] = ("%s%s %s"):format(drawing and "L" or "M", number(frame.x(i + 0.5)),
        number(frame.y(log2(ceiling))))
    end
    drawing = ceiling ~= nil
  end
  if #parts > 0 then out('<path class="ceiling" d="%s"/>', table.concat(parts)) end
end

--- The scale of each step as a staircase.
local function staircase(frame, scales)
  local parts = {("M%s %s"):format(number(frame.x(1)), number(frame.y(log2(scales[1]))))}
  for i = 2, #scales do
    if scales[i] ~= scales[i - 1] then
      parts[#parts + 1] = ("H%sV%s"):format(number(frame.x(i)), number(frame.y(log2(scales[i]))))
    end
  end
  parts[#parts + 1] = "H" .. number(frame.x(#scales + 1))
  return table.concat(parts)
end

local WHY = {
  gradient = "the gradient of %s", forward = "the forward: %s", parameter = "a parameter's gradient, in float32",
  recording = "the recording itself overflowed",
}

--- What a mark tells: "step 12, scale 2^17: the gradient of Net.conv1 conv2d".
local function title_of(run, step, i)
  local cause = run.causes[i]
  local name = cause == "forward" and step.forward_top or step.top or "the network"
  return ("%s: step %d, scale 2^%s: %s"):format(run.label, step.step, number(log2(run.scales[i])),
    WHY[cause]:format(name))
end

--- The line of a policy and its marks.
local function policy(out, frame, result, k)
  local run, color = result[k], COLORS[(k - 1) % #COLORS + 1]
  local dash = DASHES[(k - 1) // #COLORS % #DASHES + 1]
  out('<g class="policy" stroke="%s" fill="none">', color)
  out('<path class="scale"%s d="%s"/>', dash ~= "" and (' stroke-dasharray="%s"'):format(dash) or "",
    staircase(frame, run.scales))
  for i = 1, #run.scales do
    if run.causes[i] then
      out('<circle class="overflow" cx="%s" cy="%s" r="3.2" fill="%s"><title>%s</title></circle>',
        number(frame.x(i + 0.5)), number(frame.y(log2(run.scales[i]))), color,
        escape(title_of(run, result.trace[i], i)))
    end
  end
  out "</g>"
end

-- ====== The legend ======

--- Entries with their places, row by row, and the height of all.
local function legend_of(result, width)
  local entries, x, row = {}, MARGIN.left, 0
  local function add(entry)
    local size = 34 + LEGEND_CHARS * #entry.text
    if x > MARGIN.left and x + size > width - MARGIN.right then x, row = MARGIN.left, row + 1 end
    entry.x, entry.row = x, row
    x = x + size + 10
    entries[#entries + 1] = entry
  end
  for k, run in ipairs(result) do add {text = ("%s: %d skipped"):format(run.label, run.skipped), k = k} end
  add {text = "largest scale that fits"}
  return entries, (row + 1) * LEGEND_ROW
end

local function legend(out, entries)
  for _, entry in ipairs(entries) do
    local y = MARGIN.top - 8 + entry.row * LEGEND_ROW
    local k = entry.k
    if k then
      local dash = DASHES[(k - 1) // #COLORS % #DASHES + 1]
      out('<path class="scale" stroke="%s" fill="none"%s d="M%s %dh22"/>', COLORS[(k - 1) % #COLORS + 1],
        dash ~= "" and (' stroke-dasharray="%s"'):format(dash) or "", number(entry.x), y)
    else
      out('<path class="ceiling" d="M%s %dh22"/>', number(entry.x), y)
    end
    out('<text class="label" x="%s" y="%d" dy="0.35em">%s</text>', number(entry.x + 28), y, escape(entry.text))
  end
end

-- ====== The whole ======

local STYLE = [[
text { font-family: system-ui, sans-serif; fill: #374151; }
.title { font-size: 15px; font-weight: 600; }
.axis, .label { font-size: 12px; }
.power { font-size: 9px; }
.grid { stroke: #e5e7eb; }
.tick, .frame { stroke: #9ca3af; fill: none; }
.ceiling { stroke: #c9cdd4; stroke-width: 1.2; fill: none; }
.scale { stroke-width: 1.8; stroke-linejoin: round; }
.overflow { stroke: #ffffff; stroke-width: 0.8; }]]

--- The picture as text.
---@param result Simulation
---@param given {title: string?, width: integer?, height: integer?}?
---@return string
function svg.text(result, given)
  local opts = options.check("svg", given, spec)
  local lines = {}
  local function out(form, ...) lines[#lines + 1] = select("#", ...) > 0 and form:format(...) or form end
  local entries, legend_height = legend_of(result, opts.width)
  local frame = frame_of(result, opts, legend_height)
  out('<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" role="img">', frame.width,
    frame.height, frame.width, frame.height)
  out("<title>%s</title>", escape(opts.title))
  out("<style>%s</style>", STYLE)
  out('<rect width="%d" height="%d" fill="#ffffff"/>', frame.width, frame.height)
  out('<text class="title" x="%d" y="22">%s</text>', frame.left, escape(opts.title))
  legend(out, entries)
  axes(out, frame, result)
  ceilings(out, frame, result)
  for k = 1, #result do policy(out, frame, result, k) end
  out "</svg>\n"
  return table.concat(lines, "\n")
end

--- Writes the picture.
---@param result Simulation
---@param path string
---@param given table?
---@return boolean? ok
---@return string? message
function svg.write(result, path, given)
  if type(path) ~= "string" then raise("svg: the path must be a string, not %s", errors.describe(path)) end
  local text = svg.text(result, given)
  local file, message = io.open(path, "w")
  if not file then return nil, message end
  local ok, why = file:write(text)
  local closed, late = file:close()
  if not (ok and closed) then return nil, why or late end
  return true
end

return svg
