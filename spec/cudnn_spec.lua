-- cudnn_spec.lua -- convolution on cuda by cuDNN and without it: both ways give the same numbers, what cuDNN refuses is
-- done and counted, and which way is taken can be read.
--
-- The values are those of spec/support/cudnn_cases.lua, each setting in a process of its own, on the test double unless
-- HALFMOON_CUDA names another device.  On the double cuDNN is the double's own (kernels/emu/cudnn.cpp), which can be
-- told to refuse.

local devices = require "spec.support.devices"
local process = require "spec.support.process"
local processes = require "spec.support.processes"

local it = devices.cpu_cases("runs its cases in processes of their own", it)
local cuda = processes.with {HALFMOON_CUDNN = ""}
local contains = processes.contains
local CASES = "spec/support/cudnn_cases.lua"
local NONE = {cudnn = 0, im2col = 0, refused = 0}

local function run(extra) return cuda:run(CASES, extra) end
local function script(...) return cuda:script(...) end

-- How often a convolution was run by each case of a dtype: 5 times, and twice more under autocast.
local function all_by(way, refused)
  return function(dtype, n)
    local want = {cudnn = 0, im2col = 0, refused = refused and dtype ~= "f64" and n or 0}
    want[dtype == "f64" and "im2col" or way] = n
    return want
  end
end

local function check_counts(got, want)
  assert.same(want("f32", 50), got.f32)
  assert.same(want("f16", 70), got.f16)
  assert.same(want("bf16", 70), got.bf16)
  assert.same(want("f64", 50), got.f64)
  assert.same(want("others", 8), got.others)
  assert.same(NONE, got.empty)
  assert.same(NONE, got.pixels)
end

local CONVOLVE = [[
local x, w = hm.ones({1, 2, 5, 5}, {device = "cuda"}), hm.ones({3, 2, 3, 3}, {device = "cuda"})
local function conv() return core.call("conv2d", x, w) end
]]

local function double_cases()
  it("is right with cudnn, which does all of it but float64", function()
    local got = run()
    check_counts(got, all_by("cudnn"))
    assert.matches("^cudnn %d+%.%d+%.%d+ %(the test double's%)$", got.convolution)
  end)

  it("is right where cudnn refuses: products do it, and it is counted", function()
    check_counts(run({HALFMOON_EMU_CUDNN = "refuse"}), all_by("im2col", true))
  end)

  it("is right where cudnn refuses what it had agreed to", function()
    check_counts(run({HALFMOON_EMU_CUDNN = "late"}), all_by("im2col", true))
  end)

  it("is right where cudnn adds no bias by itself", function()
    check_counts(run({HALFMOON_EMU_CUDNN = "bias"}), all_by("cudnn"))
  end)

  it("is right when nothing runs before somebody waits", function()
    check_counts(run({HALFMOON_EMU_DEFER = 1}), all_by("cudnn"))
    check_counts(run({HALFMOON_EMU_DEFER = 1, HALFMOON_EMU_CUDNN = "late"}), all_by("im2col", true))
  end)

  it("leaves bfloat16, and float32 gradients of halves, to products on an old device", function()
    local got = run({HALFMOON_EMU_CC = "7.5", HALFMOON_CUDNN_SPEC = "f16"})
    assert.same({cudnn = 60, im2col = 10, refused = 0}, got.f16)
  end)

  it("tells of an error inside cudnn by the op's name, and goes on", function()
    local said = script(CONVOLVE .. [[
      print(pcall(conv))
      print(conv():sum():item())
    ]], {HALFMOON_EMU_FAIL = "cudnnConvolutionForward:1"})
    contains(said, "conv2d: cuda:0: unknown error")
    contains(said, "486.0")
  end)

  it("does without a cudnn that does not start, and says why", function()
    local said = script(CONVOLVE .. [[
      print(conv():sum():item())
      print(hm.cuda.properties().convolution, hm.cuda.stats().im2col_convolutions)
    ]], {HALFMOON_EMU_FAIL = "cudnnCreate:1"})
    contains(said, "486.0")
    contains(said, "im2col + cublas (cudnn 9.0.0 (the test double's) does not start on cuda:0: CUDNN_STATUS_EXECUTION")
    contains(said, ")\t1\n")
  end)
end

describe("convolution on cuda", function()
  if not processes.can_run(it) then return end
  if processes.is_double then double_cases() end

  it("is right without cudnn, and says so", function()
    local got = run({HALFMOON_CUDNN = "0"})
    check_counts(got, all_by("im2col"))
    assert.equal("im2col + cublas (HALFMOON_CUDNN=0 leaves cudnn out)", got.convolution)
  end)

  it("obeys each row's bound either way (the parity cases)", function()
    for _, which in ipairs {"", "0"} do
      local command = "unset HALFMOON_SPEC_REPORT; HALFMOON_CUDA=%s HALFMOON_THREADS=1 HALFMOON_CUDNN=%s "
        .. "%s spec/run.lua %s"
      local words = "--filter=conv spec/cuda_parity_spec.lua"
      local said, status = process.shell(command:format(process.quote(processes.cuda), which, process.program, words))
      assert(status == 0, said)
      assert(tonumber(said:match("(%d+) passed")) >= 20, said)
    end
  end)

  it("rounds float32 to TF32 only where HALFMOON_TF32=1 allows it", function()
    local source = [[
      hm.manual_seed(1)
      local x, w = hm.randn({2, 16, 9, 9}), hm.randn({8, 16, 3, 3})
      local want, got = core.call("conv2d", x, w), core.call("conv2d", x:to("cuda"), w:to("cuda"))
      print(("%.3e"):format((got:cpu() - want):abs():max():item() / want:abs():max():item()))
    ]]
    for _, which in ipairs {"", "0"} do
      local exact = tonumber((script(source, {HALFMOON_CUDNN = which})))
      local rounded = tonumber((script(source, {HALFMOON_CUDNN = which, HALFMOON_TF32 = 1})))
      assert(exact < 1e-6, exact)
      assert(rounded > 1e-5 and rounded < 2e-3, rounded)
    end
  end)

  -- Small integers, whose sums are exact, in as many images as make two chunks either way.
  it("adds up a large weight gradient of halves in chunks", function()
    local source = [[
      hm.manual_seed(1)
      local n, c = tonumber(arg[1]), 14
      local x, g = hm.randint(-1, 2, {n, c, 128, 128}):float(), hm.randint(-1, 2, {n, c, 127, 128}):float()
      local attrs = {shape = {c, 1, 2, 1}, groups = c, out_dtype = "float32"}
      local want = core.call("conv2d_backward_weight", g, x, attrs)
      x, g = x:to("cuda", "f16"), g:to("cuda", "f16")
      hm.cuda.reset_stats()
      local got = core.call("conv2d_backward_weight", g, x, attrs):cpu()
      local stats = hm.cuda.stats()
      print((got - want):abs():max():item(), want:abs():max():item(), stats.launches)
    ]]
    for which, images in pairs {[""] = 41, ["0"] = 24} do
      local said = script(source, {HALFMOON_CUDNN = which}, images)
      local off, most, launches = said:match("(%S+)\t(%S+)\t(%d+)")
      assert(off and tonumber(off) == 0 and tonumber(most) > 100, said)
      assert(tonumber(launches) >= (which == "" and 6 or 4), said) -- two chunks of as many launches as one has
    end
  end)

  it("raises where HALFMOON_CUDNN names what is no cudnn", function()
    for _, path in ipairs {"/nowhere/libcudnn.so.9", "libm.so.6"} do
      local source = CONVOLVE .. "print(pcall(conv))\nprint(hm.cuda.properties().convolution)"
      local said = script(source, {HALFMOON_CUDNN = path})
      contains(said, "false\t")
      local _, count = said:gsub("HALFMOON_CUDNN: ", "")
      assert.equal(2, count) -- in the error, and in properties()
      contains(said, path == "libm.so.6" and "cudnn has no cudnn" or path)
    end
  end)
end)
