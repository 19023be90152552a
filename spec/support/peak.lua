-- peak.lua -- run by memory_spec.lua in a process of its own: trains the demo's network and prints the peak of tensor memory in bytes.
--
--     build/halfmoon spec/support/peak.lua DTYPE MODE HEAP [DEVICE [BATCH [STEPS [WHAT]]]]
--
-- MODE: "incremental" or "generational" for Lua's collector; "counted" collects after every op, so that a tensor goes
-- when the last reference to
-- it does, as if references were counted.  HEAP: megabytes of Lua tables that are held meanwhile.  DEVICE, BATCH, STEPS: where, on
-- how many images, how long; "cpu", 64 and 40 if left out.  WHAT: "train", or "infer" for the network
-- alone, without gradients.

local hm = require "halfmoon"
local core = require "halfmoon.core"
local cnn = require "spec.support.cnn"

local dtype, mode, megabytes = arg[1], arg[2], tonumber(arg[3])
hm.set_default_device(arg[4] or "cpu")
local batch, steps = math.tointeger(arg[5] or 64), math.tointeger(arg[6] or 40)
collectgarbage(mode == "generational" and "generational" or "incremental")

local heap = {}
local before = collectgarbage("count")
while collectgarbage("count") - before < megabytes * 1000 do
  for _ = 1, 1000 do heap[#heap + 1] = {#heap, tostring(#heap)} end
end

local run = cnn.run(dtype, batch)
if arg[7] == "infer" then
  local x = hm.randn {batch, 1, 28, 28}
  function run.step() return hm.no_grad(run.model, x):sum() end
end
if mode == "counted" then
  core.op_log(function() collectgarbage() end)
  for _ = 1, 3 do run.step() end
  core.reset_peak()
  run.step()
else
  for _ = 1, steps do run.step():item() end
end
core.op_log(nil)
print(core.memory_stats().peak, #heap)
