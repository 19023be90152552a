-- demo.lua -- what `make demo` runs: one network, trained in float32, bfloat16 and float16, and compared.
--
--     build/halfmoon examples/demo.lua
--
-- The training itself is in fashion_cnn.lua.  Here: its settings, and what its results have to show.

local cli = require "halfmoon.train.cli"

local folder = arg[0]:match("^(.*[/\\])") or ""
local cnn = assert(loadfile(folder .. "fashion_cnn.lua"))()

-- The options of the script, with other defaults.
local defaults = {dtype = "all", epochs = 3, save = "build/fashion_cnn.safetensors"}
for _, row in ipairs(cnn.options) do row[2] = defaults[row[1]] or row[2] end
local opt = cli.parse("demo.lua: the same network in three dtypes", cnn.options, arg)
local results = cnn.main(opt)

-- ====== What the three runs have to show ======

local lowest, highest, least, most = math.huge, -math.huge, math.huge, -math.huge
for _, r in ipairs(results) do
  lowest, highest = math.min(lowest, r.accuracy), math.max(highest, r.accuracy)
  least, most = math.min(least, r.loss), math.max(most, r.loss)
end
local good = true
local function check(holds, text)
  good = good and holds
  print((holds and "  ok      " or "  MISSED  ") .. text)
end
check(lowest >= 0.90, ("every test accuracy is at least 0.90 (lowest: %.4f)"):format(lowest))
check(highest - lowest <= 0.012, ("they differ by at most 0.012 (%.4f)"):format(highest - lowest))
check(most / least <= 1.03, ("the training losses differ by at most 3 %% (%.1f %%)"):format((most / least - 1) * 100))

print([[

Next:
  examples/fashion_cnn.lua             the script that ran: one page, from the network to the table
  examples/policies/cautious.lua       a loss-scale policy to copy and change: --policy examples/policies/cautious.lua
  build/halfmoon                       a prompt; try: require("halfmoon").load("]] .. (results[1].path or "") .. [[")]])
if not good and opt.limit == 0 then os.exit(1, true) end
