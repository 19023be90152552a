-- Conversions between float16, bfloat16 and the wider types, to the bit: on the CPU with and without the processor's conversion
-- instructions, on another device by its kernels.

local hm = require "halfmoon"
local devices = require "spec.support.devices"
local process = require "spec.support.process"

local features = hm.cpu.features()
local SETS = {"baseline"}
if features.avx2 and devices.is_cpu then SETS[#SETS + 1] = "avx2" end
if features.avx512 and devices.is_cpu then SETS[#SETS + 1] = "avx512" end

describe("conversion", function()
  for _, isa in ipairs(SETS) do
    it("rounds once to nearest even, every pattern and every boundary: " .. isa, function()
      local said = process.file("spec/support/conversions.lua", {HALFMOON_ISA = isa, HALFMOON_THREADS = 1}, devices.name)
      local count, used = said:match("^checked (%d+), (%w+)\n$")
      assert(count, said)
      assert.equal(isa, used)
      assert(tonumber(count) > 2000000, said)
    end)
  end

  it("is the same in many threads", devices.cpu_only("threads of the CPU", function()
    local x = hm.randn({300001})
    local threads = hm.get_num_threads()
    for _, dtype in ipairs {"f16", "bf16"} do
      hm.set_num_threads(1)
      local one = x:to(dtype)
      hm.set_num_threads(3)
      assert.is_true(x:to(dtype):eq(one):all():item())
      assert.is_true(x:to(dtype):float():eq(one:float()):all():item())
    end
    hm.set_num_threads(threads)
  end))
end)
