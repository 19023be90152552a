-- cuda_linear_spec.lua -- linear with an activation on cuda: in one product where cublasLt's epilogue is right, in steps
-- where there is none or where it was seen to be wrong, and the same numbers either way.
--
-- The values are those of spec/support/linear_cases.lua, each setting in a process of its own, on the test double unless
-- HALFMOON_CUDA names another device.  On the double the epilogues are the double's own (kernels/emu/gemm.cpp), which can
-- be told to be missing or wrong.

local devices = require "spec.support.devices"
local process = require "spec.support.process"
local processes = require "spec.support.processes"

local it = devices.cpu_cases("runs its cases in processes of their own", it)
local cuda = processes.with {}
local contains = processes.contains
local CASES = "spec/support/linear_cases.lua"
local ALL = 20 -- counted calls of one activation and dtype: 5 chains of 2 forward, 2 through the activation below
local PAIR_OF_CALLS = 5 -- of one kind of call: one for each chain

local function run(extra) return cuda:run(CASES, extra) end
local function script(source, extra) return (cuda:script(source, extra)) end

--- Checks one line of the counts: `fused` calls of all in one product, the others in steps.
local function check(got, name, fused)
  assert.same({fused = fused, stepped = ALL - fused}, got[name], name)
end

local LAYER = [[
  local x = hm.randn({16, 8}):to("cuda")
  local w, b = hm.randn({8, 8}):to("cuda"):requires_grad_(true), hm.zeros({8}):to("cuda")
  local function layer(name) return core.call(name or "linear_relu", x, w, b) end
  local function right(y)
    return (y:detach():cpu() - core.call("linear", x:cpu(), w:detach():cpu(), b:cpu()):relu()):abs():max():item() < 1e-5
  end
]]

describe("linear with an activation on cuda", function()
  if not processes.can_run(it) then return end

  it("is right, with values that are not finite, and on the double in one product but for float64", function()
    local got = run()
    if not processes.is_double then return end
    for _, activation in ipairs {"relu", "gelu_tanh"} do
      for _, dtype in ipairs {"f32", "f16", "bf16", "autocast f16", "autocast bf16"} do
        check(got, activation .. " " .. dtype, ALL)
      end
      check(got, activation .. " f64", 0)
    end
  end)
  if not processes.is_double then return end

  it("is right in steps, where cublasLt has no such epilogue", function()
    local got = run({HALFMOON_EMU_EPILOGUE = "none"})
    for name in pairs(got) do check(got, name, 0) end
  end)

  it("does relu in steps where cublasLt's makes NaN 0, and keeps what is right", function()
    local got = run({HALFMOON_EMU_EPILOGUE = "nan"})
    -- Without relu's bits its gradient goes in steps, too; what is left are the gradients of weight and bias.
    for _, dtype in ipairs {"f32", "f16", "bf16", "autocast f16", "autocast bf16"} do
      check(got, "relu " .. dtype, ALL / 2)
      check(got, "gelu_tanh " .. dtype, ALL)
    end
  end)

  it("does gelu in steps where cublasLt's is rougher than rounding what goes in", function()
    local got = run({HALFMOON_EMU_EPILOGUE = "rough"})
    check(got, "relu f32", ALL)
    check(got, "gelu_tanh f32", ALL / 2) -- neither gelu nor its gradient
    check(got, "gelu_tanh f16", ALL / 2 + PAIR_OF_CALLS) -- a thousandth is within its bound for the gradient
    check(got, "gelu_tanh bf16", ALL)
  end)

  it("is right when nothing runs before somebody waits, in any order", function()
    for _, order in ipairs {"descending", "random:7"} do
      check(run({HALFMOON_EMU_DEFER = 1, HALFMOON_EMU_ORDER = order}), "relu f32", ALL)
    end
  end)

  it("is right on a device without bfloat16", function()
    check(run({HALFMOON_EMU_CC = "7.5", HALFMOON_LINEAR_SPEC = "f32 f16", HALFMOON_LINEAR_REGIONS = "f16"}), "relu f16", ALL)
  end)

  it("keeps relu's bits for the gradient alone, and only where it will read them", function()
    local source = LAYER .. [[
      local _, aux = layer()
      local _, without = hm.no_grad(layer)
      local _, host = core.call("linear_relu", x:cpu(), w:detach():cpu():requires_grad_(true), b:cpu())
      print(aux:numel(), without:numel(), host:numel())
    ]]
    contains(script(source), "256\t0\t0") -- 16 lines of 128 bits
    contains(script(source, {HALFMOON_EMU_EPILOGUE = "none"}), "0\t0\t0")
  end)

  it("waits for the device once, when an algorithm is first seen, and never again", function()
    local said = script(LAYER .. [[
      local function waits()
        hm.cuda.synchronize()
        hm.cuda.reset_stats()
        local y = layer()
        local n = hm.cuda.stats().synchronisations
        assert(right(y))
        return n
      end
      print(waits() > 0, waits(), waits())
    ]])
    contains(said, "true\t0\t0")
  end)

  it("decides nothing without room for the check: in steps now, in one product later", function()
    local source = LAYER .. [[
      local y = layer("linear_gelu_tanh")
      print(hm.cuda.stats().stepped_linears, hm.cuda.stats().fused_linears)
      local z = layer("linear_gelu_tanh")
      print(hm.cuda.stats().stepped_linears, hm.cuda.stats().fused_linears, (y - z):abs():max():item() < 1e-5)
      local _, bits = layer()
      print(bits:numel())
    ]]
    contains(script(source), "0\t1\n0\t2\ttrue\n256")
    -- After x, w, b and the two results comes the check's; it is tried again behind a trim.
    contains(script(source, {HALFMOON_EMU_FAIL = "cudaMallocAsync:6,cudaMallocAsync:7"}), "1\t0\n1\t1\ttrue\n256")
    -- Behind x, w and b comes that of relu's bits: there are none then.
    local without = [[
      local y, bits = layer()
      local z, more = layer()
      print(right(y), right(z), bits:numel(), more:numel())
    ]]
    contains(script(LAYER .. without, {HALFMOON_EMU_FAIL = "cudaMallocAsync:4,cudaMallocAsync:5"}), "true\ttrue\t0\t256")
  end)

  it("tells of an error inside cublasLt by the op's name, and goes on", function()
    for _, where in ipairs {"cublasLtMatmul:1", "cublasLtMatmulAlgoGetHeuristic:1", "cublasLtMatmul:2"} do
      local said = script(LAYER .. [[
        local ok, message = pcall(layer)
        print(ok, message)
        local y = layer()
        print(right(y), hm.cuda.stats().fused_linears)
      ]], {HALFMOON_EMU_FAIL = where})
      contains(said, where:find("Heuristic") and "true" or "false\t")
      if not where:find("Heuristic") then contains(said, "linear_relu: cu") end
      contains(said, "\ntrue\t")
    end
  end)

  it("obeys each row's bound in steps as well (the parity cases)", function()
    for _, epilogue in ipairs {"none", "nan"} do
      local command = "unset HALFMOON_SPEC_REPORT; HALFMOON_CUDA=%s HALFMOON_THREADS=1 HALFMOON_EMU_EPILOGUE=%s "
        .. "%s spec/run.lua --filter=linear spec/cuda_parity_spec.lua"
      local said, status = process.shell(command:format(process.quote(processes.cuda), epilogue, process.program))
      assert(status == 0, said)
      assert(tonumber(said:match("(%d+) passed")) >= 20, said)
    end
  end)
end)
