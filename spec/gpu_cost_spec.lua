-- gpu_cost_spec.lua -- what a training step costs on cuda by count: launches, waits, bytes, FLOPs must not grow unnoticed.
--
-- scripts/gpu_cost.lua counts on the test double; it says what is counted and what the least is.  A bound here is what was reached; one
-- that is missed means that a pass, a copy or a wait came in.  Lower a bound when a step gets cheaper.

local devices = require "spec.support.devices"
local process = require "spec.support.process"

-- By workload and run: launches, waits of the host, and bytes over the least, at most.
local BOUNDS = {
  cnn = {f32 = {28, 0, 1.264}, bf16 = {33, 0, 1.24}, f16 = {37, 1, 1.235}, async = {40, 0, 1.235}},
  mlp = {f32 = {12, 0, 1.002}, bf16 = {13, 0, 1.025}, f16 = {17, 1, 1.022}, async = {20, 0, 1.022}},
}
local RUNS = {"f32", "bf16", "f16", "async"}
local MARK = "[model, not a measurement] "

describe("a training step on cuda, by count", function()
  if not devices.has_double() then
    pending("the test double is not built: make cuda-emu", function() end)
    return
  end

  local it = devices.cpu_cases("the program from outside", it)
  local workloads = dofile("scripts/bench/workloads.lua")

  --- Runs the script -> what it said, status
  local function cost(options)
    return process.shell(("HALFMOON_CUDA=emu HALFMOON_THREADS=1 %s scripts/gpu_cost.lua %s"):format(process.program, options))
  end

  for name, bounds in pairs(BOUNDS) do
    it("of the " .. name, function()
      local said, status = cost("--figures --workload " .. name)
      assert.equal(0, status, said)
      local seen = {}
      for run, launches, waits, bytes, least, flops in said:gmatch(
        name .. " (%w+) launches=(%d+) waits=(%d+) bytes=(%d+) least=(%d+) buffers=%d+ flops=(%d+)") do
        local bound, ratio = bounds[run], bytes / least
        assert(launches + 0 > 10 and launches + 0 <= bound[1], ("%s: %s launches, %d at most"):format(run, launches, bound[1]))
        assert.equal(bound[2], waits + 0, run .. ": waits of the host")
        assert(ratio >= 1 and ratio <= bound[3], ("%s: %.3f times the least bytes, %g at most"):format(run, ratio, bound[3]))
        assert.equal(workloads.models[name].flops, flops + 0, run .. ": FLOPs")
        seen[#seen + 1] = run
      end
      assert.same(RUNS, seen, said)
    end)
  end

  it("every line says that it is a model", function()
    local said, status = cost("--workload mlp --runs f16")
    assert.equal(0, status, said)
    local lines = 0
    for line in said:gmatch("[^\n]+") do
      assert.equal(MARK, line:sub(1, #MARK))
      lines = lines + 1
    end
    assert(lines > 10, said)
    assert.truthy(said:find("(AdamW)", 1, true), said)
  end)

  it("names what it does not know", function()
    local said, status = cost("--workload rnn")
    assert.not_equal(0, status)
    assert.truthy(said:find("'rnn' is not one of mlp, cnn", 1, true), said)
  end)
end)
