-- loader_cuda_spec.lua -- batches delivered to the device "cuda", and copy_ between devices.
--
-- Batches must be the CPU loader's to the bit, without a wait, an allocation or a copy too many.  The order between the
-- two streams and the host is looked at where the test double runs nothing before it must (HALFMOON_EMU_DEFER=1):
-- there a forgotten wait shows as wrong values, as three planted faults prove.
--
-- Runs on the device that HALFMOON_CUDA names, else on the test double (see spec/support/devices.lua).

local hm = require "halfmoon"
local core = require "halfmoon.core"
local devices = require "spec.support.devices"
local numbers = require "spec.support.numbers"
local process = require "spec.support.process"
local raises = require "spec.support.raises"

local data = hm.data
local same = numbers.assert_same
-- Where streams never lag behind, nobody may wait for them.
local AT_ONCE = os.getenv("HALFMOON_CUDA") == "emu" and (os.getenv("HALFMOON_EMU_DEFER") or "0") == "0"
local N = 103

local cases, why = devices.cases("spec/loader_cuda_spec.lua")

local function case(name, fn) it(name, function() cases:run(name, fn) end) end

local function settle()
  collectgarbage()
  collectgarbage()
end

--- Rows of a data set on the CPU, in any dtype, and labels.
local function rows(dtype)
  local xs = hm.arange(0, N * 6, 1, {device = "cpu"}):view {N, 2, 3}
  if dtype == "bool" then xs = xs % 3 end
  return xs:to(dtype), hm.arange(N, {device = "cpu"})
end

local function loader(device, opts, dtype)
  local all = {device = device, batch_size = 10, shuffle = true, seed = 5}
  for name, value in pairs(opts or {}) do all[name] = value end
  return data.DataLoader({rows(dtype or "uint8")}, all)
end

--- All batches of the next epoch.
local function epoch(l)
  local list = {}
  for x, y in l:batches() do list[#list + 1] = {x, y} end
  return list
end

local function same_batches(got, want)
  assert.equal(#want, #got)
  for i, batch in ipairs(want) do
    for k, t in ipairs(batch) do
      assert.equal("cuda:0", got[i][k].device)
      assert.equal(t.dtype, got[i][k].dtype)
      same(got[i][k]:cpu(), t, ("batch %d, tensor %d"):format(i, k))
    end
  end
end

-- ====== Batches ======

local function batches()
  for _, prefetch in ipairs {0, 1, 2, 7} do
    case("the CPU loader's batches, epoch by epoch, with prefetch = " .. prefetch, function()
      local here, there = loader("cpu"), loader("cuda", {prefetch = prefetch})
      assert.equal("cuda:0", there.device)
      assert.equal(11, #there)
      local first = epoch(here)
      same_batches(epoch(there), first)
      same_batches(epoch(there), epoch(here))
      assert.not_same(first[1][2]:totable(), epoch(here)[1][2]:totable())
    end)
  end

  for _, dtype in ipairs {"uint8", "bool", "int32", "int64", "float16", "bfloat16", "float32", "float64"} do
    case("every conversion as on the CPU: from " .. dtype, function()
      for _, opts in ipairs {
        {}, {dtype = "f32"}, {dtype = "f16"}, {dtype = "bf16"}, {normalize = {mean = 0.3, std = 0.7}},
        {normalize = {mean = 0.3, std = 0.7}, dtype = "bf16"}, {drop_last = true, batch_size = 25},
        {batch_size = 1000, dtype = "f16"},
      } do
        same_batches(epoch(loader("cuda:0", opts, dtype)), epoch(loader("cpu", opts, dtype)))
      end
    end)
  end

  case("transforms get the batch on the device", function()
    local l = loader("cuda", {transforms = function(x, y) return x:float() * 2, y + 1 end})
    for x, y in l:batches() do
      assert.equal("cuda:0", x.device)
      same(x:select(2, 1):select(2, 1) / 2, (((y - 1) * 6) % 256):float(), "first column")
    end
  end)

  case("an epoch may be left in the middle, and the next is whole", function()
    local here, there = loader("cpu", {prefetch = 3}), loader("cuda", {prefetch = 3})
    for round = 1, 4 do
      local kept, n = {}, 0
      for x, y in there:batches() do
        n = n + 1
        kept[n] = {x, y}
        if n == round then break end
      end
      local want = epoch(here)
      for i = n + 1, #want do want[i] = nil end
      same_batches(kept, want)
    end
    same_batches(epoch(there), epoch(here))
    there:batches() -- begun, and not one batch taken
    epoch(here)
    same_batches(epoch(there), epoch(here))
  end)

  case("earlier batches stay as they were, and two loaders work side by side", function()
    local a, b = loader("cuda", {seed = 1}), loader("cuda", {seed = 2, prefetch = 1, batch_size = 7})
    local other, list, others = b:batches(), {}, {}
    for x, y in a:batches() do
      list[#list + 1] = {x, y}
      others[#others + 1] = {other()}
    end
    same_batches(list, epoch(loader("cpu", {seed = 1})))
    local want = epoch(loader("cpu", {seed = 2, batch_size = 7}))
    for i = #others + 1, #want do want[i] = nil end
    same_batches(others, want)
  end)

  case("rows without elements, and data sets without rows", function()
    local nothing = hm.zeros({4, 0}, {device = "cpu"})
    local sizes = {}
    for x in data.DataLoader({{nothing}, batch_size = 3, device = "cuda"}):batches() do
      assert.equal("cuda:0", x.device)
      sizes[#sizes + 1] = x.shape
    end
    assert.same({{3, 0}, {1, 0}}, sizes)
    for _ in data.DataLoader({{hm.zeros({0, 4}, {device = "cpu"})}, device = "cuda"}):batches() do error("a batch") end
  end)
end

-- ====== What it costs ======

local function costs()
  case("a copy for each tensor of a batch, its bytes, and no wait", function()
    local l = loader("cuda")
    epoch(l)
    hm.cuda.synchronize()
    hm.cuda.reset_stats()
    for _ = 1, 3 do
      local n = 0
      for x, y in l:batches() do
        n = n + 1
        local _ = x:float():sum() + y:sum()
        x:release()
        y:release()
      end
      assert.equal(11, n)
    end
    local s = hm.cuda.stats()
    assert.equal(3 * 11 * 2, s.copies)
    assert.equal(3 * N * (6 + 8), s.bytes)
    if AT_ONCE then assert.equal(0, s.synchronisations) end
  end)

  case("the upload of a batch begins when the one before it is handed out", function()
    local l, ahead = loader("cuda", {batch_size = 1}), false
    for _ = 1, 20 do -- the thread decides when it has gathered: seldom too late, never always
      hm.cuda.reset_stats()
      local n = 0
      for _ in l:batches() do
        n = n + 1
        local begun = hm.cuda.stats().copies / 2
        assert(begun == n or begun == n + 1, begun .. " uploads when batch " .. n .. " was handed out")
        ahead = ahead or begun == n + 1
        for i = 1, 1000 do local _ = {i} end
      end
      if ahead then break end
    end
    assert.is_true(ahead)
  end)

  case("the steady state asks no one for memory, here or there", function()
    local l = loader("cuda", {dtype = "f32"})
    local function whole()
      for x, y in l:batches() do
        x:release()
        y:release()
      end
    end
    for _ = 1, 3 do whole() end
    settle()
    collectgarbage("stop")
    local here, there = core.memory_stats("cpu"), hm.cuda.memory_stats()
    for _ = 1, 3 do whole() end
    local here_now, there_now = core.memory_stats("cpu"), hm.cuda.memory_stats()
    collectgarbage("restart")
    assert.equal(there.system_allocs, there_now.system_allocs)
    assert.equal(there.pinned, there_now.pinned)
    assert.equal(here.allocs, here_now.allocs) -- batches were gathered into pinned memory, not into tensors
  end)

  case("pinned memory: prefetch + 1 buffers while a loader lives, none when it was closed or collected", function()
    settle()
    local function held() return hm.cuda.memory_stats().pinned end
    local before = held()
    local l = loader("cuda", {prefetch = 3})
    assert.equal(before, held()) -- before the first epoch it needs none
    l:batches()()
    assert.equal(before + 4 * 512, held()) -- 60 and 80 bytes, each rounded up to 256
    epoch(l)
    assert.equal(before + 4 * 512, held())
    l:close()
    assert.equal(before, held())
    l:close()
    raises("closed", l.batches, l)
    for i = 1, 10 do
      l = loader("cuda", {prefetch = i})
      l:batches()()
    end
    l = nil -- luacheck: ignore 311
    settle()
    assert.equal(before, held())
    assert.equal(0, core.memory_stats("cpu").pinned)
  end)

  case("a failed allocation, whichever, is an error after which the same loader gives all batches", function()
    local want = epoch(loader("cpu"))
    local failed, l = 0, nil
    for n = 1, 60 do
      local ok, message
      core.alloc_fail_at(n)
      if not l then
        ok, message = pcall(loader, "cuda")
        if ok then l = message end
      else
        ok, message = pcall(function()
          local begun = l.core
          begun:start(1)
          for _ = 1, 3 do begun:next() end
        end)
      end
      core.alloc_fail_at(0)
      if not ok then
        failed = failed + 1
        assert.truthy(message:find("memory", 1, true), message)
      end
    end
    assert(failed > 3, failed .. " failures")
    l.epoch = 0
    same_batches(epoch(l), want)
  end)
end

-- ====== Mistakes ======

local function mistakes()
  case("no such device", function()
    raises({"gpu", "\"cuda\""}, loader, "gpu")
    raises({"cuda:15", "no such device"}, loader, "cuda:15")
    raises({"device", "string"}, loader, 1)
  end)

  case("a data set that lies on the device: what to do instead", function()
    local xs, ys = rows("uint8")
    raises({"entry 1", "u8[103,2,3] on cuda:0", "cpu", "hint", "device ="}, data.DataLoader,
      {{xs:to("cuda"), ys:to("cuda")}, batch_size = 10})
    raises({"entry 2", "cuda:0"}, data.DataLoader, {{xs, ys:to("cuda")}, batch_size = 10, device = "cuda"})
    raises({"tensor 1", "on the cpu", "cuda:0", "hint"}, core.loader_new, {xs:to("cuda")}, {device = "cuda"})
  end)
end

-- ====== Order, where nothing runs before it must ======

-- Doubles every batch and lets go of it; nothing is looked at before the end of an epoch.  Prints how many values are
-- wrong.
local LOOP = [[
local hm = require "halfmoon"
local xs, ys = hm.arange(0, 1030):to("i32"):view {103, 10}, hm.arange(103)
local function run(device)
  local l = hm.data.DataLoader({{xs, ys}, batch_size = 10, shuffle = true, seed = 9, device = device, dtype = "f32"})
  local list = {}
  for epoch = 1, 3 do
    local n = 0
    for x, y in l:batches() do
      list[#list + 1] = x * 2
      list[#list + 1] = y + 1
      x:release()
      y:release()
      n = n + 1
      if epoch == 2 and n == 5 then break end
    end
    if device == "cuda" then hm.cuda.synchronize() end
  end
  return list
end
local wrong = 0
local got = run("cuda")
for i, t in ipairs(run("cpu")) do
  if not got[i]:cpu():eq(t):all():item() then wrong = wrong + 1 end
end
print(#got == 54 and wrong)
]]

local function settings(more)
  local env = {
    HALFMOON_CUDA = "emu", HALFMOON_THREADS = 1, HALFMOON_EMU_QUIET = 1, HALFMOON_EMU_DEFER = 1,
    HALFMOON_SPEC_REPORT = "",
  }
  for name, value in pairs(more or {}) do env[name] = value end
  return env
end

-- What is done wrong in kernels/cuda/memory.cu: a line, and what stands there instead.
local FAULTS = {
  ["the device's work does not wait for the upload"] = {
    "cudaStreamWaitEvent(d->compute, t->done, 0)", "cudaSuccess",
  },
  ["a host buffer is used again while it is being read"] = {
    "cudaError_t e = cudaEventQuery(t->done);", "cudaError_t e = cudaSuccess;",
  },
  ["an upload does not wait for the device's earlier work"] = {
    "cudaError_t e = order(d->compute, d->copy, d->fork);\n  for (int i = 0; i < n",
    "cudaError_t e = cudaSuccess;\n  for (int i = 0; i < n",
  },
}

--- Builds the test double's plug-in with a fault in memory.cu.  Returns its path.
local function planted(fault)
  local f = assert(io.open("kernels/cuda/memory.cu"))
  local source = f:read("a")
  f:close()
  local at, to = source:find(fault[1], 1, true)
  assert(at and not source:find(fault[1], to, true), "the line to change is there once")
  local folder = devices.plugin:match("^(.*/)") or ""
  local base = os.tmpname()
  f = assert(io.open(base .. ".cu", "w"))
  f:write(source:sub(1, at - 1), fault[2], source:sub(to + 1))
  f:close()
  local build = [[
set -e
objects=$(ls %scuda-emu/*.o | grep -v /memory.o)
g++ -x c++ -std=c++17 -fPIC -O1 -w -ffp-contract=off -fvisibility=hidden -DHALFMOON_EMU -Ikernels/emu/include \
  -iquote kernels -iquote kernels/cuda -iquote build/gen -c %s.cu -o %s.o
g++ -shared -o %s.so $objects %s.o -Wl,--whole-archive %semu/libemu.a -Wl,--no-whole-archive -ldl -lpthread
]]
  local said, status = process.shell(build:format(folder, base, base, base, base, folder))
  assert.equal(0, status, said)
  return base
end

local function order()
  it("gives the right values when streams run as late as they may, in each order", function()
    for _, way in ipairs {"ascending", "descending", "random:3"} do
      local said, status = process.script(LOOP, settings {HALFMOON_EMU_ORDER = way})
      assert.equal("0\n", said)
      assert.equal(0, status)
    end
  end)

  for name, fault in pairs(FAULTS) do
    it("finds a planted fault: " .. name, function()
      if devices.plugin:find("san/", 1, true) then return pending("not built with sanitizers") end
      local base = planted(fault)
      local said, status = process.script(LOOP, settings {HALFMOON_CUDA = base .. ".so"})
      for _, suffix in ipairs {"", ".cu", ".o", ".so"} do os.remove(base .. suffix) end
      assert.equal(0, status, said)
      assert((tonumber(said) or 0) > 0, "values are wrong: " .. said)
    end)
  end
end

-- ====== Faults of the driver, each in a process of its own ======

local CHECKED = [[
local hm = require "halfmoon"
local xs = hm.arange(0, 500):to("u8"):view {50, 10}
local l = hm.data.DataLoader {xs, batch_size = 10, device = "cuda"}
local iterate, errors, n = nil, 0, 0
repeat
  local ok, message = pcall(function() iterate = l:batches() end)
  if not ok then print(message) end
until ok
while true do
  local ok, x = pcall(iterate)
  if not ok then
    errors = errors + 1
    print(x)
  elseif not x then break
  else
    n = n + 1
    -- the call that fails may be of this copy: which is the n-th depends on how far the loader has got
    local came, values = pcall(x.cpu, x)
    if not came then
      errors = errors + 1
      print(values)
      values = x:cpu()
    end
    assert(values:eq(xs:narrow(1, 10 * n - 9, 10)):all():item(), "batch " .. n)
  end
end
print("batches", n, "errors", errors)
]]

local function faults()
  it("pinned memory that runs out once is collected for and asked again; when it is out, the error says so", function()
    local env = settings {HALFMOON_EMU_DEFER = 0, HALFMOON_EMU_FAIL = "cudaHostAlloc:2"}
    local said = process.script(CHECKED, env)
    assert.equal("batches\t5\terrors\t0\n", said)
    env.HALFMOON_EMU_FAIL = "cudaHostAlloc:2,cudaHostAlloc:3"
    said = process.script(CHECKED, env)
    for _, part in ipairs {
      "loader: out of pinned host memory for cuda:0", "wanted", "hint", "prefetch", "batches\t5\terrors\t0",
    } do
      assert.truthy(said:find(part, 1, true), said)
    end
  end)

  for call, n in pairs {
    cudaMemcpyAsync = 2, cudaEventRecord = 3, cudaStreamWaitEvent = 3, cudaEventCreateWithFlags = 4,
  } do
    it("a driver that fails in " .. call .. " costs an error at most, and no batch", function()
      local said, status = process.script(CHECKED, settings {HALFMOON_EMU_DEFER = 0,
        HALFMOON_EMU_FAIL = call .. ":" .. n})
      assert.equal(0, status, said)
      assert.truthy(said:find("batches\t5\terrors\t[01]\n"), said)
    end)
  end

  it("a lost device: the loader says so, and lets go of its memory", function()
    local said, status = process.script([[
      local hm = require "halfmoon"
      local xs = hm.arange(0, 500):to("u8"):view {50, 10}
      local l = hm.data.DataLoader {xs, batch_size = 10, device = "cuda"}
      local iterate = l:batches()
      local k = hm.cuda.kernel("__global__ void wild(unsigned char *x) { x[1 << 28] = 1; }", "wild")
      k{grid = 1, block = 1}(iterate())
      pcall(hm.cuda.synchronize)
      print(pcall(iterate))
      print(pcall(l.batches, l))
      l:close()
      print(hm.cuda.memory_stats().pinned, hm.ones({2}):sum():item())
    ]], settings {HALFMOON_EMU_DEFER = 0})
    assert.equal(0, status, said)
    assert.truthy(said:find("^false\t[^\n]*cuda:0"), said)
    assert.truthy(said:find("cannot be used again", 1, true), said)
    assert.truthy(said:find("\n0\t2.0?\n$"), said)
  end)
end

-- ====== copy_ between devices ======

local function copies()
  case("copy_ crosses devices, with conversion, broadcasting and views at both ends", function()
    local x = hm.arange(0, 12, 1, {device = "cpu"}):view {3, 4}
    for _, way in ipairs {{"cpu", "cuda"}, {"cuda", "cpu"}} do
      for _, from in ipairs {"float32", "float16", "int64", "uint8", "float64"} do
        for _, to in ipairs {"float32", "bfloat16", "int32", "uint8", "bool", "float64"} do
          local src, label = (x / 1):to(from):to(way[1]), from .. " to " .. to .. " on " .. way[2]
          local dst = hm.zeros({3, 4}, {dtype = to, device = way[2]})
          assert.equal(dst, dst:copy_(src))
          same(dst:cpu(), hm.zeros({3, 4}, {dtype = to, device = "cpu"}):copy_(src:cpu()), label)
        end
      end
      local src = x:float():to(way[1])
      local dst = hm.zeros({4, 3}, {device = way[2]})
      dst:t():copy_(src)
      same(dst:cpu(), x:float():t(), "into a transposed view")
      dst:copy_(src:t())
      same(dst:cpu(), x:float():t(), "from a transposed view")
      dst = hm.zeros({2, 3, 2}, {device = way[2]})
      dst:select(1, 2):copy_(src:narrow(2, 2, 2))
      same(dst:cpu():select(1, 2), x:float():narrow(2, 2, 2), "part to part")
      same(dst:cpu():select(1, 1), {0, 0, 0, 0, 0, 0})
      dst:copy_(src:select(2, 1):unsqueeze(2))
      same(dst:cpu():select(1, 1), {0, 0, 4, 4, 8, 8}, "broadcast")
      dst[1] = src:narrow(2, 1, 2)
      same(dst:cpu():select(1, 1), x:float():narrow(2, 1, 2), "by assignment")
      dst = hm.zeros({0}, {device = way[2]})
      dst:copy_(hm.zeros({0}, {device = way[1]}))
      local pictures = hm.rand({2, 3, 4, 5}, {device = "cpu"})
      dst = hm.zeros({2, 3, 4, 5}, {device = way[2]})
      same(dst:copy_(pictures:permute(1, 3, 4, 2):contiguous():permute(1, 4, 2, 3):to(way[1])):cpu(), pictures)
    end
  end)

  case("values round once on the way", function()
    local x = hm.tensor({1 + 2.0 ^ -11 + 2.0 ^ -40, 65519.999999}, {dtype = "f64", device = "cpu"})
    same(hm.zeros({2}, {dtype = "f16", device = "cuda"}):copy_(x):cpu(), x:to("f16"))
    same(hm.zeros({2}, {dtype = "f16", device = "cpu"}):copy_(x:to("cuda")), x:to("f16"))
  end)

  case("its gradient goes back to the source's device", function()
    for _, way in ipairs {{"cpu", "cuda:0"}, {"cuda:0", "cpu"}} do
      local src = hm.tensor({1, 2, 3}, {requires_grad = true, device = way[1]})
      local dst = hm.ones({2, 3}, {device = way[2], dtype = "f64"})
      dst:copy_(src)
      assert.is_true(dst.requires_grad)
      local weight = hm.tensor({{1, 2, 3}, {10, 20, 30}}, {device = way[2], dtype = "f64"})
      dst:mul(weight):sum():backward()
      assert.equal(way[1], src.grad.device)
      assert.equal("float32", src.grad.dtype)
      same(src.grad, {11, 22, 33})
      local leaf = hm.ones({3}, {requires_grad = true, device = way[2]})
      local mixed = leaf * 2
      mixed:copy_(src)
      mixed:sum():backward()
      assert.is_nil(leaf.grad) -- all of it was overwritten
      same(src.grad, {12, 23, 34})
      do
        local _ <close> = hm.no_grad()
        leaf:copy_(src)
      end
      same(leaf, {1, 2, 3})
    end
  end)

  case("what cannot be copied is refused and nothing is changed", function()
    local x, y = hm.zeros({2, 3}, {device = "cuda"}), hm.ones({4}, {device = "cpu"})
    raises({"copy_", "broadcast", "f32[2,3] on cuda:0", "f32[4] on cpu"}, function() x:copy_(y) end)
    local wide = x:narrow(1, 1, 1):expand {4, 3}
    raises({"copy_", "share memory"}, function() wide:copy_(hm.ones({3}, {device = "cpu"})) end)
    local leaf = hm.zeros({4}, {device = "cuda", requires_grad = true})
    raises({"copy_", "leaf"}, function() leaf:copy_(y) end)
    y:release()
    raises({"copy_", "released"}, function() x:copy_(y) end)
    same(x:cpu(), {0, 0, 0, 0, 0, 0})
  end)
end

describe("loader to cuda", function()
  if not cases then return pending(why) end
  batches()
  costs()
  mistakes()
  if devices.has_double() then
    order()
    faults()
  else
    pending("order and faults: " .. devices.plugin .. " is not built")
  end
end)

describe("copies between devices", function()
  if not cases then return pending(why) end
  copies()
end)
