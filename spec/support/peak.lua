-- peak.lua -- run by memory_spec.lua in a process of its own: trains the demo's network and prints the peak of tensor memory in bytes.
--
--     build/halfmoon spec/support/peak.lua DTYPE MODE HEAP
--
-- MODE: "incremental" or "generational" for Lua's collector; "counted" collects after every op, so that a tensor goes
-- when the last reference to
-- it does, as if references were counted.  HEAP: megabytes of Lua tables that are held meanwhile.

local hm = require "halfmoon"
local core = require "halfmoon.core"
local cnn = require "spec.support.cnn"

local dtype, mode, megabytes = arg[1], arg[2], tonumber(arg[3])
collectgarbage(mode == "generational" and "generational" or "incremental")

local heap = {}
local before = collectgarbage("count")
while collectgarbage("count") - before < megabytes * 1000 do
  for _ = 1, 1000 do heap[#heap + 1] = {#heap, tostring(#heap)} end
end

local run = cnn.run(dtype, 64)
if mode == "counted" then
  core.op_log(function() collectgarbage() end)
  for _ = 1, 3 do run.step() end
  hm.cpu.reset_peak()
  run.step()
else
  for _ = 1, 40 do run.step():item() end
end
core.op_log(nil)
print(core.memory_stats().peak, #heap)
