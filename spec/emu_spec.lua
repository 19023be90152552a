-- The CUDA test double (kernels/emu): small programs of spec/emu are built with it and run; what they print is compared.
--
-- Correct kernels must give the same numbers in every wake order and in deferred mode.  Every planted fault must be caught, by a message
-- that names the kernel, the thread and the place; where only a comparison of wake orders shows it, the orders must differ.

local devices = require "spec.support.devices"
local it = devices.cpu_cases("the test double itself", it)

local out = (os.getenv("HALFMOON_EMU_SPEC") or "build") .. "/emu-spec"
local nvcc = "/usr/local/cuda/bin/nvcc"
local sanitized = (os.getenv("SANITIZE") or ""):find("address", 1, true) -- the programs are built with it (test-emu full)
local ORDERS = {"ascending", "descending", "random:1", "random:7"}

--- Runs a shell command; returns everything it printed, and its exit status (128 + n for signal n).
---@param command string
---@return string said, integer status
local function shell(command)
  local pipe = assert(io.popen("{ " .. command .. "; } 2>&1; echo \"status=$?\""))
  local text = pipe:read("a")
  pipe:close()
  local said, status = text:match("^(.*)status=(%d+)\n$")
  return said, tonumber(status)
end

--- Runs one program of spec/emu with settings (HALFMOON_EMU_...) before it.
---@param program string
---@param case? string
---@param settings? string
---@return string said, integer status
local function run(program, case, settings)
  return shell(("env -u HALFMOON_EMU_ORDER -u HALFMOON_EMU_DEFER %s %s/%s %s"):format(settings or "", out, program, case or ""))
end

--- Asserts that a text contains each of the others.
local function contains(text, ...)
  for _, part in ipairs {...} do assert(text:find(part, 1, true), ("%q is not in:\n%s"):format(part, text)) end
end

local function line_of(file, pattern)
  local number = 0
  for line in io.lines(file) do
    number = number + 1
    if line:find(pattern, 1, true) then return number end
  end
end

local function readable(path)
  local f = io.open(path)
  if f then f:close() end
  return f ~= nil
end

describe("the CUDA test double", function()
  lazy_setup(function()
    if not devices.is_cpu then return end
    local said, status = shell(("make -s -f kernels/emu/emu.mk OUT=%s Q=@ emu-spec"):format(out:match("^(.*)/emu%-spec$")))
    assert(status == 0, said)
  end)

  describe("runs correct kernels", function()
    local expected = "casts ok\nblock_sum ok\nsoftmax ok\ntranspose ok\natomics ok\nwarp_operations ok\nvectors ok\nmuch_shared ok\n"
    for _, order in ipairs(ORDERS) do
      it("in order " .. order, function()
        local said, status = run("samples", "", "HALFMOON_EMU_ORDER=" .. order)
        assert.equal(expected, said)
        assert.equal(0, status)
      end)
    end

    it("in deferred mode, in every order", function()
      for _, order in ipairs(ORDERS) do
        assert.equal(expected, (run("samples", "", "HALFMOON_EMU_DEFER=1 HALFMOON_EMU_ORDER=" .. order)))
      end
    end)

    it("without the fence around device memory", function()
      assert.equal(expected, (run("samples", "", "HALFMOON_EMU_FENCE=0")))
    end)

    it("which nvcc compiles unchanged", function()
      if not readable(nvcc) then pending("no nvcc here") return end
      for _, name in ipairs {"samples", "faults"} do
        local said, status = shell(("%s -std=c++17 -fmad=false -ptx -arch=compute_75 -Werror all-warnings "
          .. "-Xcompiler -iquote,kernels,-iquote,kernels/cuda spec/emu/%s.cu -o %s/%s.ptx"):format(nvcc, name, out, name))
        assert.equal("", said)
        assert.equal(0, status)
      end
    end)
  end)

  describe("catches in a kernel", function()
    --- A violation: the launch succeeds, the next call knows, it stays known, and after a reset kernels run again.
    local function violation(case, code, ...)
      local said, status = run("faults", case)
      contains(said, "launch cudaSuccess", "then " .. code .. ":", ("sticky %s %s %s"):format(code, code, code),
        "after reset cudaSuccess cudaSuccess", ...)
      assert.equal(0, status)
    end
    local function at(pattern) return "faults.cu:" .. line_of("spec/emu/faults.cu", pattern) end
    --- The same of an access that a sanitizer, where the program is built with some, sees first: it ends the program and names the line.
    local function bad_access(case, sanitizer, place, code, ...)
      if not sanitized then return violation(case, code, ...) end
      local said, status = run("faults", case)
      contains(said, sanitizer, place)
      assert.not_equal(0, status)
    end

    it("nothing, where nothing is wrong", function()
      assert.equal("launch cudaSuccess\nthen cudaSuccess: no error\nhash 87400000 nan no\n", (run("faults", "good")))
    end)

    it("a missing barrier: what was not written is NaN", function()
      for _, order in ipairs(ORDERS) do contains(run("faults", "missing_barrier", "HALFMOON_EMU_ORDER=" .. order), "nan yes") end
    end)

    it("a missing barrier before a rewrite: wake orders differ", function()
      local first = run("faults", "missing_barrier_before_rewrite", "HALFMOON_EMU_ORDER=ascending")
      local second = run("faults", "missing_barrier_before_rewrite", "HALFMOON_EMU_ORDER=descending")
      contains(first, "then cudaSuccess")
      assert.not_equal(first, second)
      assert.equal(run("faults", "good", "HALFMOON_EMU_ORDER=ascending"), (run("faults", "good", "HALFMOON_EMU_ORDER=descending")))
    end)

    it("a divergent barrier, with both places", function()
      violation("divergent_barrier", "cudaErrorLaunchFailure",
        "kernel divergent_barrier: block (0,0,0) thread (20,0,0): divergent barrier: this thread waits at spec/emu/faults.cu:",
          "thread (0,0,0) at")
    end)

    it("a return before a barrier", function()
      violation("return_before_barrier", "cudaErrorLaunchFailure", "kernel return_before_barrier: block (0,0,0) thread (20,0,0)",
        "return before barrier", "20 threads wait at the barrier")
      contains(run("faults", "return_before_barrier",
        "HALFMOON_EMU_ORDER=descending"), "return before barrier: 44 threads of the block ended")
    end)

    it("a lane that does not come to a warp operation", function()
      violation("missing_lane", "cudaErrorLaunchFailure", "missing lane: __shfl_xor_sync at spec/emu/faults.cu:",
        "waits for lane 7 of mask ffffffff",
        at("if (threadIdx.x != 7)"))
      violation("ended_lane", "cudaErrorLaunchFailure", "thread (9,0,0): missing lane",
        at("__shfl_down_sync(0xffffffffu, x[threadIdx.x], 1)"))
    end)

    it("a lane that a mask leaves out", function()
      violation("lane_out_of_mask", "cudaErrorLaunchFailure", "a shuffle reads a lane that its mask leaves out")
    end)

    it("global memory out of bounds: write, read, a few bytes, after free", function()
      violation("global_out_of_bounds", "cudaErrorIllegalAddress", "thread (63,0,0): out-of-bounds global access",
        "0 bytes past the end of an allocation of 256 bytes")
      violation("global_read_out_of_bounds", "cudaErrorIllegalAddress", "thread (0,0,0): out-of-bounds global access")
      bad_access("small_overrun", "AddressSanitizer: use-after-poison", "in global_out_of_bounds(",
        "cudaErrorIllegalAddress", "wrote 0 bytes past the end of an allocation of 100 bytes")
      violation("use_after_free", "cudaErrorIllegalAddress", "in memory that was freed (256 bytes)")
    end)

    it("shared memory out of bounds, static and dynamic", function()
      bad_access("shared_out_of_bounds", "AddressSanitizer: use-after-poison", "in shared_out_of_bounds(", "cudaErrorIllegalAddress",
        "thread (63,0,0): out-of-bounds shared access: wrote 0 bytes past the end of 's' (256 bytes)")
      bad_access("dynamic_out_of_bounds", "AddressSanitizer: use-after-poison", "in dynamic_out_of_bounds(",
        "cudaErrorIllegalAddress", "past the end of 'dynamic shared memory' (256 bytes)")
    end)

    it("a misaligned 16-byte load, a null pointer, a host pointer, a stack overflow", function()
      violation("misaligned", "cudaErrorMisalignedAddress", "hm_load16: the address is not 16-byte aligned")
      bad_access("null_pointer", "runtime error: store to null pointer", "spec/emu/faults.cu:",
        "cudaErrorIllegalAddress", "is no address of the device")
      violation("host_pointer", "cudaErrorIllegalAddress", "argument 1 is a host pointer")
      violation("deep", "cudaErrorLaunchFailure", "stack overflowed")
    end)

    it("more shared memory than there is", function()
      violation("too_much_static", "cudaErrorLaunchFailure", "64000 bytes of static shared memory with 'b': 48 KiB is the limit")
      contains(run("faults", "much_dynamic"), "launch cudaErrorInvalidValue", "more than 48 KiB needs cudaFuncSetAttribute",
        "then cudaSuccess")
    end)

    it("too many threads, no blocks, too many blocks: the launch fails, the context lives", function()
      for _, case in ipairs {"too_many_threads", "empty_grid", "large_grid"} do
        contains(run("faults", case), "launch cudaErrorInvalidConfiguration", "then cudaSuccess", "hash 00000000")
      end
      contains(run("faults", "too_many_threads"), "a block of 64x17x1 threads: at most 1024")
    end)

    it("quietly, when asked to", function()
      local said = run("faults", "divergent_barrier", "HALFMOON_EMU_QUIET=1")
      assert.is_nil(said:find("CUDA test double", 1, true))
    end)
  end)

  describe("under ThreadSanitizer", function()
    lazy_setup(function()
      local said, status = shell(("make -s -f kernels/emu/emu.mk OUT=%s Q=@ emu-tsan"):format(out:match("^(.*)/emu%-spec$")))
      assert(status == 0, said)
    end)

    it("has nothing to say of a correct kernel, and names the line of a race", function()
      assert.equal("cudaSuccess\n", (run("races", "good")))
      local race = "races.cu:" .. line_of("spec/emu/races.cu", "s[t] = -first;")
      contains(run("races", "missing_barrier"), "WARNING: ThreadSanitizer: data race", race)
      contains(run("races", "blocks_without_atomics"), "WARNING: ThreadSanitizer: data race", "blocks_without_atomics(")
    end)
  end)

  describe("on the host's side", function()
    it("runs streams in order, with and without deferring, and counts what is left", function()
      for _, settings in ipairs {"", "HALFMOON_EMU_DEFER=1", "HALFMOON_EMU_DEFER=1 HALFMOON_EMU_ORDER=descending"} do
        assert.equal("wrong 0\nleft 0 0 0\n", (run("host", "pipeline", settings)))
      end
    end)

    it("shows a missing wait between streams when work is deferred", function()
      assert.equal("wrong 0\nleft 0 0 0\n", (run("host", "no_wait")))
      assert.equal("wrong 1024\nleft 0 0 0\n", (run("host", "no_wait", "HALFMOON_EMU_DEFER=1")))
    end)

    it("shows a missing synchronisation when work is deferred", function()
      assert.equal("wrong 1024\nleft 0 0 0\n", (run("host", "no_sync", "HALFMOON_EMU_DEFER=1")))
    end)

    it("orders the default stream with blocking ones", function()
      assert.equal("before cudaErrorNotReady -1\nafter cudaSuccess 2\n", (run("host", "default_stream", "HALFMOON_EMU_DEFER=1")))
      assert.equal("before cudaSuccess 2\nafter cudaSuccess 2\n", (run("host", "default_stream")))
    end)

    it("ends a program that touches device memory from the host, with a report", function()
      for _, case in ipairs {"host_read", "host_write"} do
        local said, status = run("host", case)
        contains(said, "host access to device memory", "byte 12 of an allocation of 4096 bytes; copy it with cudaMemcpy")
        assert.is_nil(said:find("survived", 1, true))
        assert.not_equal(0, status)
      end
      contains(run("host", "host_read", "HALFMOON_EMU_FENCE=0"), "read 0", "survived")
    end)

    it("refuses copies outside live allocations", function()
      local said = run("host", "copies")
      for _, case in ipairs {"past the end", "offset", "direction", "host for device", "memset", "freed", "free twice"} do
        contains(said, case .. " cudaErrorInvalidValue\n")
      end
      contains(said, "last cudaErrorInvalidValue cudaSuccess", "outside every live allocation: 4100 bytes")
    end)

    it("fails the n-th call, once", function()
      assert.equal(table.concat({"malloc 1 cudaSuccess", "malloc 2 cudaSuccess", "malloc 3 cudaErrorMemoryAllocation",
        "malloc 4 cudaSuccess",
        "launch 1 cudaSuccess", "launch 2 cudaErrorLaunchOutOfResources", "launch 3 cudaSuccess", "any cudaErrorUnknown",
        "next cudaSuccess", ""}, "\n"), (run("host", "failing", "HALFMOON_EMU_FAIL=cudaMalloc:3")))
      contains(run("host", "failing", "HALFMOON_EMU_FAIL=call:2"), "malloc 2 cudaErrorMemoryAllocation", "malloc 3 cudaSuccess")
    end)

    it("counts launches, synchronisations, copies and bytes", function()
      assert.equal("launches 3 3\nh2d 1 4096 d2h 1 8 d2d 1 4096\nmemsets 1 16\nsynchronisations 3\nlive 2 8192\n", (run("host",
        "counting")))
    end)

    it("keeps a pool's figures", function()
      for _, settings in ipairs {"", "HALFMOON_EMU_DEFER=1"} do
        contains(run("host", "pools", settings), "freed twice cudaErrorInvalidValue",
          "used 5 high 8\nreserved 8\ntrimmed 6\ntoo much cudaErrorMemoryAllocation")
      end
    end)

    it("presents itself as what it is", function()
      assert.equal("1 emulated (test double) 9.0 32 1\ncudaErrorInvalidDevice\n", (run("host", "device")))
      contains(run("host", "device", "HALFMOON_EMU_CC=7.5 HALFMOON_EMU_SMS=9"), "7.5 32 1")
    end)

    it("records events in stream order", function()
      assert.equal("query cudaErrorNotReady flag 0\nsynchronize cudaSuccess flag 1\nelapsed cudaSuccess 1\n"
        .. "gone cudaErrorInvalidResourceHandle\n",
        (run("host", "events", "HALFMOON_EMU_DEFER=1")))
      contains(run("host", "events"), "query cudaSuccess flag 1")
    end)
  end)

  describe("multiplies", function()
    it("in every type, transposed, batched, with epilogues and their gradients", function()
      assert.equal("f32 ok\nf32 transposed ok\nf32 both transposed, batched ok\nf16 ok\nf16 into f32 ok\n"
        .. "bf16 ok\nf64 ok\ntf32 ok\nbias ok\nrelu ok\ngelu ok\nleft 0 0\n", (run("blas")))
      contains(run("blas", "", "HALFMOON_EMU_DEFER=1"), "gelu ok\nleft 0 0\n")
    end)

    it("nothing that cuBLAS would refuse", function()
      local said = run("blas", "refusals")
      contains(said, "good CUBLAS_STATUS_SUCCESS", "types CUBLAS_STATUS_NOT_SUPPORTED", "compute CUBLAS_STATUS_NOT_SUPPORTED",
        "planned CUBLAS_STATUS_EXECUTION_FAILED", "destroyed CUBLAS_STATUS_NOT_INITIALIZED",
          "leading dimension of A is 7, at least 8 is needed")
      for _, case in ipairs {"small lda", "large lda", "host pointer", "device alpha", "shapes", "no bias"} do
        contains(said, case .. " CUBLAS_STATUS_INVALID_VALUE\n")
      end
      contains(run("blas", "", "HALFMOON_EMU_CC=7.5"), "bf16: CUBLAS_STATUS_ARCH_MISMATCH", "f16 ok")
    end)
  end)

  describe("compiles at run time", function()
    it("and launches kernels with arguments, shared memory and template arguments", function()
      local said = run("runtime_compile", "launch")
      contains(said, "compile NVRTC_SUCCESS\nload 0\nfunctions 0 0 0 500\nlaunch 0\nwrong 0\ntoo large 1\nearly 719\n", "left 0 0\n",
        "report: kernel early: block (0,0,0) thread (3,0,0): return before barrier", "user.cu:18")
      contains(run("runtime_compile", "launch", "HALFMOON_EMU_DEFER=1 HALFMOON_EMU_ORDER=descending"), "wrong 0\n")
    end)

    it("and gives a log with line numbers, and refuses what it does not know", function()
      contains(run("runtime_compile", "bad"), "compile NVRTC_ERROR_COMPILATION", "user.cu(3): error: ", "nonsense",
        "option NVRTC_ERROR_INVALID_OPTION")
      contains(run("runtime_compile", "bad", "HALFMOON_EMU_CXX=/nonexistent/g++"), "there is no compiler named /nonexistent/g++")
    end)

    it("and refuses images that are none, and gives the driver's entry points", function()
      assert.equal("image 200\nentry 0 1\n", (run("runtime_compile", "image")))
    end)
  end)
end)
