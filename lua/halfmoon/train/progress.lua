--- train/progress.lua -- how far a loop is: a bar on a terminal, plain lines elsewhere.
--
--     local bar = progress.new{total = #loader, title = "epoch 1/3"}
--     for x, y in loader:batches() do ...; bar:step{loss = loss, ["images/s"] = rate} end
--     bar:finish{accuracy = 0.91}
--
-- A terminal is redrawn at most ten times a second; where the output is no terminal, `lines` lines are written per
-- loop.  Fields are shown in the order of `fields`.  Numbers only: reading a tensor's value is the caller's business.

local core = require "halfmoon.core"
local options = require "halfmoon.options"

local REDRAW = 0.1 -- seconds between two drawings

---@class Progress
local Progress = {}
Progress.__index = Progress

local spec = {
  total = {"integer", nil, options.at_least(0)}, title = {"string", ""}, fields = {"table", {}},
  lines = {"integer", 4, options.at_least(1)},
  file = {"userdata"}, terminal = {"boolean"}, width = {"integer"},
}

--- "1:05", "42 s"
local function clock(seconds)
  if seconds < 60 then return ("%.0f s"):format(seconds) end
  return ("%d:%02d"):format(seconds // 60, math.floor(seconds % 60))
end

--- A number in few characters.
local function short(value)
  if type(value) ~= "number" then return tostring(value) end
  if math.type(value) == "integer" then return tostring(value) end
  if value % 1 == 0 and math.abs(value) < 1e9 then return ("%.0f"):format(value) end
  return ("%.4g"):format(value)
end

--- A progress display.  total: steps; title: text before the bar; fields: names in the order to show; lines: plain
--- lines per loop; file, terminal, width: for output elsewhere than on stderr.
---@param opts {total: integer, title: string, fields: string[], lines: integer}
---@return Progress
local function new(opts)
  opts = options.check("progress.new", opts, spec)
  local terminal = opts.terminal
  if terminal == nil then terminal = opts.file == nil and core.isatty(2) end
  local now = core.now()
  return setmetatable({
    total = opts.total or 0, title = opts.title, fields = opts.fields, file = opts.file or io.stderr,
    terminal = terminal,
    width = opts.width or (terminal and core.term_width()) or 80, start = now, drawn = now, count = 0,
    lines = opts.lines, said = 0,
    values = {},
  }, Progress)
end

--- "loss 0.41  accuracy 0.86": the fields that have values.
local function field_text(self)
  local parts, seen = {}, {}
  for _, name in ipairs(self.fields) do
    if self.values[name] ~= nil then parts[#parts + 1] = ("%s %s"):format(name, short(self.values[name])) end
    seen[name] = true
  end
  local others = {}
  for name in pairs(self.values) do
    if not seen[name] then others[#others + 1] = name end
  end
  table.sort(others)
  for _, name in ipairs(others) do parts[#parts + 1] = ("%s %s"):format(name, short(self.values[name])) end
  return table.concat(parts, "  ")
end

--- Draws the bar over the line it stands on.
local function draw(self, now)
  local share = self.total > 0 and math.min(1, self.count / self.total) or 0
  local spent = now - self.start
  local left = share > 0 and share < 1 and clock(spent / share - spent) .. " left" or clock(spent)
  local text = field_text(self)
  local room = self.width - 1 - #self.title - 2 - 6 - #left - 2 - #text - 2
  local bar = ""
  if room >= 4 then
    local size = math.min(24, room)
    local full = math.floor(share * size + 0.5)
    bar = " " .. ("━"):rep(full) .. ("─"):rep(size - full)
  end
  local line = ("%s%s %3.0f %%  %s  %s"):format(self.title, bar, share * 100, left, text)
  self.file:write("\r\27[K", line)
  self.file:flush()
  self.drawn = now
end

--- Writes a plain line.
local function say(self, now)
  self.file:write(("%s  %d/%d  %s  %s\n"):format(self.title, self.count, self.total, clock(now - self.start),
    field_text(self)))
  self.file:flush()
end

--- True if step() would show something now: compute costly values only then.
---@return boolean
function Progress:due()
  if self.terminal then return core.now() - self.drawn >= REDRAW or self.count + 1 >= self.total end
  return (self.count + 1) * self.lines // math.max(1, self.total) > self.said
end

--- Seconds since the display was made.
---@return number
function Progress:seconds() return core.now() - self.start end

--- One more step is done.
---@param values table<string, number|string>? fields to show from now on
function Progress:step(values)
  local due = self:due()
  self.count = self.count + 1
  for name, value in pairs(values or {}) do self.values[name] = value end
  if not due then return end
  if self.terminal then
    draw(self, core.now())
  else
    self.said = self.count * self.lines // math.max(1, self.total)
    if self.count < self.total then say(self, core.now()) end -- finish() writes the last one
  end
end

--- The loop is over: the last state stays on the screen.
---@param values table<string, number|string>? last fields
---@return number seconds since new()
function Progress:finish(values)
  for name, value in pairs(values or {}) do self.values[name] = value end
  local now = core.now()
  if self.terminal then
    draw(self, now)
    self.file:write("\n")
    self.file:flush()
  else
    say(self, now)
  end
  return now - self.start
end

return {new = new, clock = clock}
