-- simulate_policies.lua -- what loss-scale policies would have done with a recorded run.
--
--     build/halfmoon examples/fashion_cnn.lua --dtype f16 --epochs 1 --record demo.jsonl
--     build/halfmoon scripts/simulate_policies.lua demo.jsonl
--     build/halfmoon scripts/simulate_policies.lua demo.jsonl --svg scales.svg \
--       --policies dynamic:growth_interval=50,auto,static:init_scale=2^12,examples/policies/cautious.lua
--
-- The first line records the demo's float16 run; amp.record_gradients records any other.  A policy is a name or a file,
-- with options behind colons; numbers may be powers of 2.  Without --policies: all that come with the library.  It
-- prints, for each, the steps it would have skipped, the overflow rate, the mean scale, the share of gradient values
-- lost to underflow, and the mean steps until the scale was back after an overflow; --svg draws all scales over time.
-- amp/simulate.lua says what a replay cannot know.

local hm = require "halfmoon"
local cli = require "halfmoon.train.cli"

local function refuse(text)
  io.stderr:write("simulate_policies.lua: ", text, "\n")
  os.exit(1, true)
end

--- "2^12", "0.5", "50", "true" or text as a value.
local function value_of(text)
  local power = text:match("^2%^(%-?%d+)$")
  if power then return 2.0 ^ math.tointeger(power) end
  if text == "true" or text == "false" then return text == "true" end
  return tonumber(text) or text
end

--- "dynamic:growth_interval=50" -> {"dynamic", growth_interval = 50}
local function policy_of(text)
  local entry = {text:match("^[^:]+")}
  if not entry[1] then return nil, ("'%s' names no policy"):format(text) end
  for option in text:sub(#entry[1] + 1):gmatch(":([^:]*)") do
    local name, value = option:match("^([%w_]+)=(.+)$")
    if not name then return nil, ("'%s' in '%s' must be NAME=VALUE"):format(option, text) end
    entry[name] = value_of(value)
  end
  return entry
end

--- "dynamic,auto" -> {{"dynamic"}, {"auto"}}; nil for "".
local function policies_of(text)
  if text == "" then return end
  local list = {}
  for one in text:gmatch("[^,%s]+") do
    local entry, wrong = policy_of(one)
    if not entry then return nil, wrong end
    list[#list + 1] = entry
  end
  if #list == 0 then return nil, ("'%s' names no policy"):format(text) end
  return list
end

local OPTIONS = {
  {"policies", "", "names or files, with commas between: dynamic:growth_interval=50,auto,mine.lua; default: all",
    function(text) return select(2, policies_of(text)) end},
  {"svg", "", "where to draw the scales over time"},
  {"first", 1, "first step to replay", function(n) if n < 1 then return "must be at least 1" end end},
  {"last", 0, "last step to replay (0: the trace's)", function(n) if n < 0 then return "must not be negative" end end},
}

local given = table.move(arg, 1, #arg, 1, {})
local path = given[1] and given[1]:sub(1, 1) ~= "-" and table.remove(given, 1) or nil
local opt = cli.parse("simulate_policies.lua TRACE: replays a recorded run through loss-scale policies", OPTIONS, given)
if not path then
  refuse("the first argument must be a trace, made by amp.record_gradients or examples/fashion_cnn.lua --record\n"
    .. "  --help lists the options")
end

local ok, result = pcall(hm.amp.simulate, path, (policies_of(opt.policies)),
  {first = opt.first, last = opt.last > 0 and opt.last or nil})
if not ok then refuse((tostring(result):gsub("^[^\n]-%.lua:%d+: ", ""))) end -- without the place in this file
print(result)
if opt.svg ~= "" then
  local written, why = result:svg(opt.svg, {title = "loss scales: " .. path})
  if not written then refuse(why) end
  print("drawn to " .. opt.svg)
end
