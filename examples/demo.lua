-- demo.lua -- what `make demo` runs: one network, trained in float32, bfloat16 and float16, and compared.
--
--     build/halfmoon examples/demo.lua
--
-- The training itself is in fashion_cnn.lua.  Here: its settings, and what its results have to show.

local cli = require "halfmoon.train.cli"

local folder = arg[0]:match("^(.*[/\\])") or ""
local cnn = assert(loadfile(folder .. "fashion_cnn.lua"))()

local opt = cli.parse("demo.lua: the same network in three dtypes", {
  {"dtype", "all", "what to compute in: f32, bf16, f16, or all"},
  {"epochs", 2, "passes over the training images"},
  {"batch", 128, "images per step"},
  {"lr", 2e-3, "highest learning rate of AdamW"},
  {"policy", "dynamic", "loss-scale policy for f16"},
  {"growth-interval", 200, "clean steps before the dynamic policy doubles the scale"},
  {"seed", 1, "seed of weights and order"},
  {"save", "build/fashion_cnn.safetensors", "where to save the trained weights"},
  {"data", "", "folder of the Fashion-MNIST files"},
  {"limit", 0, "use the first N images only (0: all)"},
}, arg)
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
  examples/policies/cautious.lua       a loss-scale policy to copy and change; --policy takes it, also while it runs
  build/halfmoon                       a prompt; try: require("halfmoon").load("]] .. (results[1].path or "") .. [[")]])
if not good and opt.limit == 0 then os.exit(1, true) end
