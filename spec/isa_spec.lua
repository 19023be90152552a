-- The same bits: whatever the instruction set, whatever the number of threads.

local hm = require "halfmoon"
local bits = require "spec.support.bits"
local cases = require "spec.support.isa_cases"
local devices = require "spec.support.devices"
local process = require "spec.support.process"

local it = devices.cpu_cases("the instruction sets of the processor", it)
local features = hm.cpu.features()

--- All results with an instruction set: name -> tensor, and the bytes of the file that held them.
local function results(isa)
  local path = os.tmpname()
  local said = process.file("spec/support/isa_cases.lua", {HALFMOON_ISA = isa, HALFMOON_THREADS = 1}, path)
  assert.equal(isa .. "\n", said)
  local state = assert(hm.load(path))
  local f = assert(io.open(path, "rb"))
  local bytes = f:read("a")
  f:close()
  os.remove(path)
  return state, bytes
end

--- Names of entries whose bytes differ.
local function differing(a, b)
  local names = {}
  for name, t in pairs(a) do
    local u = b[name]
    if not u or u.dtype ~= t.dtype or bits.bytes(u) ~= bits.bytes(t) then names[#names + 1] = name end
  end
  table.sort(names)
  return names
end

--- Equal, or both NaN, and zeros of the same sign.
local function same(a, b)
  if table.concat(a.shape, ",") ~= table.concat(b.shape, ",") or a.dtype ~= b.dtype then return false end
  local equal = a:eq(b)
  if a:is_floating_point() then
    equal = equal:logical_or(a:isnan():logical_and(b:isnan()))
    equal = equal:logical_and(hm.where(a:eq(0), 1 / a:double(), 0):eq(hm.where(b:eq(0), 1 / b:double(), 0)))
  end
  return equal:all():item()
end

describe("the same bits", function()
  local baseline
  local function base()
    baseline = baseline or {results("baseline")}
    return table.unpack(baseline)
  end

  for _, isa in ipairs {"avx2", "avx512"} do
    if features[isa] then
      it("from baseline and " .. isa, function()
        local a, all_a = base()
        local b, all_b = results(isa)
        local count = 0
        for _ in pairs(a) do count = count + 1 end
        assert(count > 1000, count)
        if all_a ~= all_b then assert.equal("", table.concat(differing(a, b), ", ")) end
      end)
    end
  end

  it("from one thread and three", function()
    local before = hm.get_num_threads()
    local wrong = {}
    hm.no_grad(function()
      for _, case in ipairs(cases.cases(70001)) do
        hm.set_num_threads(1)
        local one = {case[2]()}
        hm.set_num_threads(3)
        local three = {case[2]()}
        for i, t in ipairs(one) do
          if not same(t, three[i]) then wrong[#wrong + 1] = case[1] .. " #" .. i end
        end
      end
    end)
    hm.set_num_threads(before)
    assert.equal("", table.concat(wrong, ", "))
  end)

  it("a sum that is not the same would be seen", function()
    local a, b = hm.tensor {1, 0 / 0, 0.0}, hm.tensor {1, 0 / 0, -0.0}
    assert.is_true(same(a, a:clone()))
    assert.is_false(same(a, b))
    assert.same({"x"}, differing({x = a}, {x = b}))
  end)
end)

describe("HALFMOON_ISA and HALFMOON_THREADS", function()
  it("with an unknown value are clear errors", function()
    local said, status = process.script("require 'halfmoon'", {HALFMOON_ISA = "sse9"})
    assert.not_equal(0, status)
    assert.truthy(said:find("HALFMOON_ISA: baseline, avx2 or avx512 is wanted, not 'sse9'", 1, true), said)
    for _, value in ipairs {"none", "0", "2x", "-1"} do
      said, status = process.script("require 'halfmoon'", {HALFMOON_THREADS = value})
      assert.not_equal(0, status)
      assert.truthy(said:find("HALFMOON_THREADS: a number from 1 to 4096 is wanted, not '" .. value .. "'", 1, true), said)
    end
    if not features.avx512 then
      said, status = process.script("require 'halfmoon'", {HALFMOON_ISA = "avx512"})
      assert.not_equal(0, status)
      assert.truthy(said:find("no avx512", 1, true), said)
    end
  end)

  it("are obeyed", function()
    assert.equal("baseline\t1\n", (process.script("local f = require 'halfmoon'.cpu.features() print(f.isa, f.threads)",
      {HALFMOON_ISA = "baseline", HALFMOON_THREADS = 1})))
    assert.equal("3\n", (process.script("print(require 'halfmoon'.get_num_threads())", {HALFMOON_THREADS = 3})))
  end)
end)
