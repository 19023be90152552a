-- proofs.lua -- a ledger of what the specs proved about each row of the op table, so that scripts/audit can tell what
-- nobody proved.
--
-- An entry is made only after a check has passed, and only for rows that really ran in it: the engine's own log says
-- which.  With HALFMOON_LEDGER set, entries are appended to that file, one a line: aspect, name, detail, separated by
-- tabs.

local core = require "halfmoon.core"
local samples = require "spec.support.samples"

local M = {}

local path = os.getenv("HALFMOON_LEDGER")
if path == "" then path = nil end
local noted, worst = {}, {}

local function write(...)
  if not path then return end
  local f = assert(io.open(path, "a"))
  f:write(table.concat({...}, "\t"), "\n")
  f:close()
end

--- Notes that a name has been proved in one respect.
---@param aspect string
---@param name string
---@param detail string?
function M.note(aspect, name, detail)
  local key = aspect .. "\t" .. name .. "\t" .. (detail or "")
  if noted[key] then return end
  noted[key] = true
  write(aspect, name, detail or "")
end

--- Runs fn and returns the names of all rows that ran meanwhile: forward, and in the engine's backward walk.
---@param fn function
---@return table<string, boolean> forward
---@return table<string, boolean> backward
function M.rows_in(fn)
  local forward, backward = {}, {}
  core.op_log(function(r)
    if r.backward then backward[r.op] = true else forward[r.op] = true end
  end)
  local ok, message = pcall(fn)
  core.op_log(nil)
  if not ok then error(message, 0) end
  return forward, backward
end

--- Runs a check of a row; where it passes, notes the aspect, and "derivative" for each row that the backward walk ran.
---@param aspect string
---@param name string the row: it must have run
---@param fn function
function M.check(aspect, name, fn)
  samples.called = {}
  local forward, backward = M.rows_in(fn)
  if not forward[name] and not backward[name] and not samples.called[name] then
    error(("the check of %s never ran it"):format(name), 0) end
  M.note(aspect, name)
  for row in pairs(backward) do M.note("derivative", row) end
end

--- Keeps the largest error of a dtype, in units in the last place.
---@param dtype string
---@param name string
---@param ulps number
function M.measured(dtype, name, ulps)
  if ulps > 0 and ulps > (worst[dtype] and worst[dtype][1] or -1) and ulps < math.huge then
    worst[dtype] = {ulps, name}
    write("ulp", name, dtype .. " " .. ulps)
  end
end

--- "float32 3.02 (rsqrt), ...": the largest errors kept so far.
---@return string
function M.errors()
  local words = {}
  for _, dtype in ipairs {"float64", "float32", "float16", "bfloat16"} do
    local w = worst[dtype]
    if w then words[#words + 1] = ("%s %.5g (%s)"):format(dtype, w[1], w[2]) end
  end
  return table.concat(words, ", ")
end

return M
