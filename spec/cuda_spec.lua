-- cuda_spec.lua -- the device "cuda" from a script: moving, mixing, printing, autograd, optimizers, the scaler,
-- memory, counters, kernels that a
-- script brings along, a training run against the CPU, and what a fault on the device looks like.
--
-- Runs on the device that HALFMOON_CUDA names, else on the test double (see spec/support/devices.lua).

local hm = require "halfmoon"
local core = require "halfmoon.core"
local cnn = require "spec.support.cnn"
local devices = require "spec.support.devices"
local numbers = require "spec.support.numbers"
local process = require "spec.support.process"
local raises = require "spec.support.raises"

local nn, optim, amp = hm.nn, hm.optim, hm.amp
local same, near = numbers.assert_same, numbers.assert_near
local DTYPES = {"float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool"}
local EMU = {HALFMOON_CUDA = "emu", HALFMOON_THREADS = 1, HALFMOON_EMU_QUIET = 1, HALFMOON_SPEC_REPORT = ""}

local cases, why = devices.cases("spec/cuda_spec.lua")

local function case(name, fn) it(name, function() cases:run(name, fn) end) end

local function settle()
  collectgarbage()
  collectgarbage()
end

-- ====== Tensors ======

local function tensors()
  case("to(\"cuda\") and back keeps every dtype's values", function()
    for _, dtype in ipairs(DTYPES) do
      local x = hm.tensor({{0, 1, 3}, {1, 0, 2}}, {dtype = dtype})
      local y = x:to("cuda")
      assert.equal("cuda:0", y.device)
      assert.equal(dtype, y.dtype)
      same(y:cpu(), x, dtype)
      same(y, x, dtype) -- totable of a tensor on cuda
      assert.equal(x:eq(1):sum():item(), y:eq(1):sum():item())
    end
  end)

  case("a tensor that is there already is not copied, one that is not is", function()
    local x = hm.ones({3}, {device = "cuda"})
    assert.equal(x, x:to("cuda:0"))
    local back = x:cpu()
    back:fill_(5)
    same(x, {1, 1, 1})
    same(x:to("cuda"):cuda(), {1, 1, 1})
  end)

  case("device and dtype at once, and views cross as what they show", function()
    local x = hm.arange(0, 12):view {3, 4}:float()
    local y = x:t():to("cuda", "f16")
    assert.equal("float16", y.dtype)
    same(y:cpu(), x:t(), "transposed")
    same(x:to("cuda"):select(2, 3):cpu(), {2, 6, 10})
    same(x:to("cuda"):narrow(2, 2, 2):t():cpu(), x:narrow(2, 2, 2):t(), "a view over there")
  end)

  case("factories take the device and give the CPU's numbers", function()
    for _, name in ipairs {"zeros", "ones", "empty", "rand", "randn"} do
      hm.manual_seed(3)
      local y = hm[name]({5, 3}, {device = "cuda"})
      assert.equal("cuda:0", y.device)
      hm.manual_seed(3)
      if name ~= "empty" then same(y, hm[name] {5, 3}, name) end
    end
    same(hm.full({2}, 7, {device = "cuda"}), {7, 7})
    same(hm.tensor({1, 2, 3}, {device = "cuda"}), {1, 2, 3})
    same(hm.arange(0, 5, 1, {device = "cuda"}), {0, 1, 2, 3, 4})
    same(hm.eye(2, {device = "cuda"}), {1, 0, 0, 1})
    hm.manual_seed(3)
    local y = hm.randint(0, 100, {50}, {device = "cuda"})
    hm.manual_seed(3)
    same(y, hm.randint(0, 100, {50}), "randint")
  end)

  case("the default device: factories, modules and random numbers go there, data and files do not", function()
    local function on_cuda()
      assert.equal("cuda:0", hm.get_default_device())
      local model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
      for name, p in model:named_parameters() do assert.equal("cuda:0", p.device, name) end
      hm.manual_seed(4)
      local x = hm.randn {2, 1, 4, 4}
      local state = hm.rng_state()
      assert.same({seed = 4, offset = 8}, state)
      assert.same({seed = 4, offset = 0}, hm.rng_state("cpu"))
      local y = hm.rand {3}
      hm.set_rng_state(state)
      same(hm.rand {3}, y)
      local opt = optim.AdamW(model:parameters(), {lr = 0.01})
      nn.functional.cross_entropy(model(x), hm.tensor({0, 2}, {dtype = "i64"})):backward()
      nn.utils.clip_grad_norm_(model:parameters(), 1)
      opt:step()
      local path = os.tmpname()
      assert(hm.save(path, model:state_dict()))
      for name, t in pairs(assert(hm.load(path))) do assert.equal("cpu", t.device, name) end
      os.remove(path)
      local rows = hm.data.DataLoader {{hm.zeros({4, 2}, {device = "cpu"})}, batch_size = 2}
      for batch in rows:batches() do assert.equal("cpu", batch.device) end
      raises({"set_default_device", "cuda:15", "no such device"}, hm.set_default_device, "cuda:15")
      assert.equal("cuda:0", hm.ones({1}).device)
    end
    hm.set_default_device("cuda")
    local ok, message = xpcall(on_cuda, debug.traceback)
    hm.set_default_device("cpu")
    assert(ok, message)
    assert.equal("cpu", hm.ones({1}).device)
  end)

  case("item, totable, indexing and assignment", function()
    local x = hm.tensor({{1, 2}, {3, 4}}, {device = "cuda"})
    assert.equal(4, x[{2, 2}]:item())
    assert.same({{1, 2}, {3, 4}}, x:totable())
    x[1] = 9
    same(x, {9, 9, 3, 4})
    x[{{}, 2}] = hm.tensor({5, 6}, {device = "cuda"})
    same(x, {9, 5, 3, 6})
    raises("item", function() return x:item() end)
  end)

  case("printing shows the values and the device", function()
    local text = tostring(hm.tensor({1.5, -2}, {device = "cuda"}))
    assert.truthy(text:find("1.5", 1, true), text)
    assert.truthy(text:find("cuda:0", 1, true), text)
    assert.truthy(text:find("f32 2", 1, true), text)
  end)

  case("views, cat, stack, where and copy_ stay on the device", function()
    local x = hm.arange(0, 6):float():view {2, 3}
    local y = x:to("cuda")
    for name, fn in pairs {
      reshape = function(t) return t:reshape {3, 2} end,
        expand = function(t) return t:unsqueeze(1):expand {2, 2, 3}:contiguous() end,
      cat = function(t) return hm.cat({t, t * 2}, 1) end, stack = function(t) return hm.stack({t, -t}, 2) end,
      where = function(t) return hm.where(t:gt(2), t, -1) end, sorted = function(t) return (t:max(2)) end,
    } do
      assert.equal("cuda:0", fn(y).device, name)
      same(fn(y), fn(x), name)
    end
    local z = hm.zeros({2, 3}, {device = "cuda"})
    same(z:copy_(y), x)
    same(z:copy_(x * 2), x * 2) -- the one op that crosses devices
  end)
end

local function mistakes()
  case("mixed devices in one op: an error that names both", function()
    local x, y = hm.ones {2}, hm.ones({2}, {device = "cuda"})
    raises({"add: ", "different devices", "cpu", "cuda:0", "hint"}, function() return x + y end)
    raises({"cpu", "cuda:0"}, function() return hm.ones({2, 2}, {device = "cuda"}):matmul(hm.ones {2, 2}) end)
    raises({"cpu", "cuda:0"}, function() return hm.cat({x, y}, 1) end)
    raises({"cpu", "cuda:0"}, function() return y:add_(x) end)
    raises({"cpu", "cuda:0"}, function() return hm.where(x:gt(0), y, y) end)
    local labels = hm.zeros({2}, {dtype = "i64"})
    raises({"cpu", "cuda:0"},
      function() return nn.functional.cross_entropy(hm.ones({2, 2}, {device = "cuda"}), labels) end)
    raises({"cpu", "cuda:0"}, function() return nn.Linear(2, 2)(y) end)
    same(y, {1, 1}) -- and nothing was done
    same(y + 1, {2, 2}) -- numbers are of no device
  end)

  case("no such index, no such device", function()
    local last = "cuda:" .. hm.cuda.device_count() - 1
    raises({"cuda:15", "no such device", last}, hm.ones, {2}, {device = "cuda:15"})
    raises({"cuda:15", "no such device"}, function() return hm.ones({2}):to("cuda:15") end)
    raises("gpu", hm.ones, {2}, {device = "gpu"})
    raises("cuda:x", hm.ones, {2}, {device = "cuda:x"})
    raises("cuda:15", hm.cuda.properties, "cuda:15")
    raises("cpu", hm.cuda.properties, "cpu")
    raises("cuda:15", hm.cuda.memory_stats, "cuda:15")
  end)

  case("bad values in a kernel are told at the next place that waits, once", function()
    local x = hm.tensor({1, 2}, {dtype = "i64", device = "cuda"})
    for _, y in ipairs {x, x:cpu()} do
      raises("floor_divide: integer division by zero", function() return y:floor_divide(0):totable() end)
      raises("remainder: integer division by zero", function() return (y % 0):totable() end)
    end
    same(x + 1, {2, 3})
    local logits = hm.zeros({2, 3}, {device = "cuda"})
    raises({"cross_entropy", "target 7", "C = 3"}, function()
      return nn.functional.cross_entropy(logits, hm.tensor({0, 7}, {dtype = "i64", device = "cuda"})):item()
    end)
    near(nn.functional.cross_entropy(logits, hm.tensor({0, 1}, {dtype = "i64", device = "cuda"})), {math.log(3)}, 1e-6)
  end)

  case("out of memory is an ordinary error, after which work goes on", function()
    raises({"memory", "cuda:0"}, hm.empty, {1 << 20, 1 << 20}, {device = "cuda"})
    same(hm.ones({2}, {device = "cuda"}) * 2, {2, 2})
  end)
end

-- ====== Devices, memory, counters ======

local function system()
  case("what hm.cuda says of the device", function()
    assert.is_true((hm.cuda.is_available()))
    assert(hm.cuda.device_count() >= 1)
    local major, minor = hm.cuda.get_device_capability()
    local p = hm.cuda.properties("cuda:0")
    assert.equal(major, p.major)
    assert.equal(minor, p.minor)
    assert(major >= 7, major)
    assert(#p.name > 0 and p.total_memory > 1 << 28 and p.multi_processor_count >= 1 and p.max_threads_per_block >= 256)
    local found
    for _, d in ipairs(core.devices()) do found = found or d.name == "cuda:0" end
    assert.is_true(found)
    if os.getenv("HALFMOON_CUDA") == "emu" then assert.truthy(p.name:find("test double", 1, true)) end
    hm.cuda.synchronize()
  end)

  case("memory: live bytes rise by a tensor and return; peak, trim", function()
    settle()
    local before = hm.cuda.memory_stats()
    hm.cuda.reset_peak()
    local x = hm.zeros({1000}, {device = "cuda"})
    local at = hm.cuda.memory_stats()
    assert(at.live - before.live >= 4000, at.live - before.live)
    assert.equal(core.memory_stats().live, core.memory_stats("cpu").live)
    x:copy_(x * 2)
    assert(hm.cuda.memory_stats().peak - before.live >= 8000)
    x = nil -- luacheck: ignore 311
    settle()
    assert.equal(before.live, hm.cuda.memory_stats().live)
    hm.cuda.trim()
    assert.equal(0, hm.cuda.memory_stats().cached)
  end)

  for _, dtype in ipairs {"f32", "f16"} do
    case("a training loop on cuda gives every byte back, and asks for none in its steady state: " .. dtype, function()
      settle()
      hm.cuda.trim() -- so that what earlier cases left in the cache decides nothing
      local before = hm.cuda.memory_stats().live
      local function whole()
        local run = cnn.run(dtype, 2, "cuda")
        local function step()
          run.step():item()
          settle() -- what the step left is free again when the next one asks
        end
        collectgarbage("stop") -- when it runs inside a step decides how much is live there
        for _ = 1, 3 do step() end
        local at = hm.cuda.memory_stats().system_allocs
        for _ = 1, 3 do step() end
        collectgarbage("restart")
        assert.equal(at, hm.cuda.memory_stats().system_allocs)
      end
      whole()
      settle()
      assert.equal(before, hm.cuda.memory_stats().live)
      assert.equal(0, hm.cuda.memory_stats().shadow_bytes)
    end)
  end

  case("stats() counts launches, copies with their bytes, and waits", function()
    local x = hm.ones({256}, {device = "cuda"})
    hm.cuda.synchronize()
    hm.cuda.reset_stats()
    local none = hm.cuda.stats()
    assert.same({launches = 0, synchronisations = 0, copies = 0, bytes = 0, cudnn_convolutions = 0, im2col_convolutions = 0,
      cudnn_refusals = 0, fused_linears = 0, stepped_linears = 0}, none)
    local y = x + x
    assert.equal(1, hm.cuda.stats().launches)
    assert.equal(0, hm.cuda.stats().copies)
    assert.equal(0, hm.cuda.stats().synchronisations) -- nobody looked
    y:cpu()
    local after = hm.cuda.stats()
    assert.equal(1, after.copies)
    assert.equal(1024, after.bytes)
    assert(after.synchronisations >= 1)
  end)

  for _, dtype in ipairs {"f32", "bf16", "f16"} do
    case("a training step waits for the device at most once, and each is like the one before: " .. dtype, function()
      local run = cnn.run(dtype, 2, "cuda")
      for _ = 1, 3 do run.step() end
      hm.cuda.reset_stats()
      run.step()
      local one = hm.cuda.stats()
      assert(one.launches > 20, one.launches)
      assert(one.synchronisations <= (dtype == "f16" and 1 or 0), one.synchronisations .. " synchronisations in a step")
      hm.cuda.reset_stats()
      run.step()
      assert.same(one, hm.cuda.stats())
    end)
  end
end

-- ====== Autograd and training ======

local function training()
  case("gradients cross to() in both directions", function()
    local x = hm.tensor({1, 2, 3}, {requires_grad = true})
    local y = (x:to("cuda") * 2):cpu() * 3
    y:sum():backward()
    assert.equal("cpu", x.grad.device)
    same(x.grad, {6, 6, 6})
    local z = hm.tensor({1, 2}, {requires_grad = true, device = "cuda"})
    local loss = (z:to("cpu", "f64") ^ 2):sum()
    loss:backward()
    assert.equal("cuda:0", z.grad.device)
    assert.equal("float32", z.grad.dtype)
    same(z.grad, {2, 4})
  end)

  case("second derivatives, hooks and a gradient given by hand", function()
    local x = hm.tensor({0.5, 1.5}, {requires_grad = true, device = "cuda"})
    local g = hm.autograd.grad({(x ^ 3):sum()}, {x}, {create_graph = true})[1]
    local gg = hm.autograd.grad({g:sum()}, {x})[1]
    near(gg, {3, 9}, 1e-6)
    local seen
    x:register_hook(function(grad) seen = grad.device end)
    local y = x * 2
    y:backward(hm.ones({2}, {device = "cuda"}))
    assert.equal("cuda:0", seen)
    same(x.grad, {2, 2})
    raises({"cpu", "cuda"}, function() (x * 2):backward(hm.ones {2}) end)
  end)

  case("shadows: weights are cast once in a region, on their device", function()
    local model = nn.Linear(4, 3):to("cuda")
    local x = hm.ones({2, 4}, {device = "cuda"})
    settle()
    local before = hm.cuda.memory_stats().shadow_bytes
    local h
    amp.autocast("f16", function() h = model(x) + model(x) end)
    assert.equal("float16", h.dtype)
    assert.equal("cuda:0", h.device)
    assert.equal(core.memory_stats("cpu").shadow_bytes, 0)
    h:float():sum():backward()
    assert.equal("cuda:0", model.weight.grad.device)
    assert.equal("float32", model.weight.grad.dtype)
    same(model.weight.grad, hm.full({3, 4}, 4))
    model, h = nil, nil -- luacheck: ignore 311
    settle()
    assert(hm.cuda.memory_stats().shadow_bytes <= before)
  end)

  local OPTIMIZERS = {
    {"SGD", {lr = 0.1}}, {"SGD", {lr = 0.1, momentum = 0.9, weight_decay = 0.01, nesterov = true}},
    {"Adam", {lr = 0.01, weight_decay = 0.1}},
    {"AdamW", {lr = 0.01, weight_decay = 0.1}},
  }
  for i, row in ipairs(OPTIMIZERS) do
    for _, clip in ipairs {false, 0.5} do
      case(("%s, settings %d%s: five steps as on the CPU, one of them skipped"):format(row[1], i,
        clip and ", clipped" or ""), function()
        local function run(device)
          local params = {}
          for k, size in ipairs {1, 37, 1000} do
            hm.manual_seed(k)
            params[k] = nn.Parameter(hm.randn({size}):to(device))
          end
          local opt = optim[row[1]](params, row[2])
          local scaler = amp.GradScaler {init_scale = 1024.0}
          for step = 1, 5 do
            for k, p in ipairs(params) do
              hm.manual_seed(10 * step + k)
              p.grad = (hm.randn(p.shape) * scaler:get_scale()):to(device)
            end
            if step == 3 then params[2].grad:narrow(1, 5, 2):fill_(1 / 0) end
            local stepped, record = scaler:step(opt, clip and {max_norm = clip} or nil)
            assert.equal(step ~= 3, stepped)
            if step == 3 then
              assert.equal(2, record.inf_count)
              assert.equal(params[2], record.culprits[1].param)
            end
            scaler:update()
            assert.equal(step < 3 and 1024 or 512, scaler:get_scale())
          end
          return params, opt
        end
        local want, here = run("cpu")
        local got, there = run("cuda")
        for k, p in ipairs(got) do
          assert.equal("cuda:0", p.device)
          near(p, want[k], clip and 1e-5 or 1e-6, clip and 1e-6 or 1e-7, "parameter " .. k)
          for _, state in ipairs {"momentum_buffer", "exp_avg", "exp_avg_sq"} do
            local a, b = there.core:state(k, state), here.core:state(k, state)
            assert.equal(a == nil, b == nil)
            if a then
              assert.equal("cuda:0", a.device)
              near(a, b, 1e-5, 1e-7, state)
            end
          end
        end
      end)
    end
  end

  -- Thirty steps from the same seed, from a loss of 2.3; in float16 the gradients of one step are made to overflow.
  local TOLERANCE = {f32 = 1e-4, bf16 = 3e-2, f16 = 5e-3}
  for _, dtype in ipairs {"f32", "bf16", "f16"} do
    case("the demo network trains as on the CPU: " .. dtype, function()
      local function losses(device)
        local run, list = cnn.run(dtype, 4, device), {}
        for step = 1, 30 do
          local scale = run.scaler:get_scale()
          if dtype == "f16" and step == 4 then run.scaler:set_scale(2.0 ^ 24) end
          list[step] = run.step():item()
          if dtype == "f16" and step == 4 then
            assert.equal(2.0 ^ 23, run.scaler:get_scale(), "the overflow was seen and the scale halved")
            run.scaler:set_scale(scale)
          end
        end
        if dtype == "f16" then assert.equal(list[4], list[5], "the step that overflowed changed nothing") end
        return list
      end
      local want, got = losses("cpu"), losses("cuda")
      assert(want[30] < 0.1 * want[1], "the network learns")
      near(got, want, TOLERANCE[dtype], TOLERANCE[dtype] / 2, "loss by step")
    end)
  end

  case("a module moves with its buffers, saves from cuda and loads into it", function()
    local model = nn.Linear(3, 2):cuda()
    for _, p in ipairs(model:parameters()) do assert.equal("cuda:0", p.device) end
    local path = os.tmpname()
    assert(hm.save(path, model:state_dict()))
    local other = nn.Linear(3, 2):cuda()
    other:load_state_dict(assert(hm.load(path)))
    os.remove(path)
    same(other.weight, model.weight)
    assert.equal("cuda:0", other.weight.device)
    same(model:cpu()(hm.ones {1, 3}), other(hm.ones({1, 3}, {device = "cuda"})):cpu(), "forward")
  end)
end

-- ====== Kernels of a script ======

local AXPY = [[
__global__ void axpy(int n, float a, const float *x, float *y) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] += a * x[i];
}
]]

local function kernels()
  case("a kernel of a script: compiled, launched, ordered behind what was asked before", function()
    local k = hm.cuda.kernel(AXPY, "axpy")
    assert.truthy(tostring(k):find("axpy", 1, true))
    local x, y = hm.arange(0, 1000, 1, {device = "cuda"}):float(), hm.ones({1000}, {device = "cuda"})
    k {grid = 4, block = 256}(1000, 2.5, x + 0, y)
    same(y, (hm.arange(0, 1000):float() * 2.5 + 1), "axpy")
    k {grid = {4, 1, 1}, block = {256}}(10, 1, x, y) -- only the first ten
    assert.equal(9 * 3.5 + 1, y[10]:item())
    assert.equal(10 * 2.5 + 1, y[11]:item())
  end)

  case("dynamic shared memory and barriers", function()
    local k = hm.cuda.kernel([[
      __global__ void reverse(int n, float *x) {
        extern __shared__ float s[];
        s[threadIdx.x] = x[threadIdx.x];
        __syncthreads();
        x[threadIdx.x] = s[n - 1 - threadIdx.x];
      }]], "reverse")
    local x = hm.arange(0, 64, 1, {device = "cuda"}):float()
    k {grid = 1, block = 64, shared = 256}(64, x)
    same(x, hm.arange(63, -1, -1):float(), "reversed")
  end)

  case("a source that does not compile: the compiler's words with the line", function()
    local source = "__global__ void bad(float *x) {\n  x[0] = nothing;\n}\n"
    local message = raises({"kernel bad", "does not compile"}, hm.cuda.kernel, source, "bad")
    assert.truthy(message:find("nothing", 1, true), message)
    assert.truthy(message:find("[:(]2[:)]"), message)
    raises("axpz", hm.cuda.kernel, AXPY, "axpz") -- there is no such kernel in it
    same(hm.ones({2}, {device = "cuda"}) + 1, {2, 2})
  end)

  case("a launch that cannot be: what was asked, and that the device goes on", function()
    local k = hm.cuda.kernel(AXPY, "axpy")
    local x, y = hm.ones({4}, {device = "cuda"}), hm.ones({4}, {device = "cuda"})
    raises({"kernel axpy", "block", "4096"}, k {grid = 1, block = 4096}, 4, 1, x, y)
    raises({"kernel axpy", "grid"}, k {grid = {1, 1 << 20, 1}, block = 32}, 4, 1, x, y)
    raises({"kernel axpy", "shared"}, k {grid = 1, block = 32, shared = 1 << 30}, 4, 1, x, y)
    raises({"kernel axpy", "0"}, k {grid = 0, block = 32}, 4, 1, x, y)
    raises({"kernel axpy", "'block' is missing"}, function() return k {grid = 1} end)
    raises({"unknown option", "grid"}, function() return k {grit = 1, block = 1} end)
    k {grid = 1, block = 32}(4, 1, x, y)
    same(y, {2, 2, 2, 2})
  end)

  case("arguments that do not fit the declaration", function()
    local k = hm.cuda.kernel(AXPY, "axpy") {grid = 1, block = 32}
    local x, y = hm.ones({4}, {device = "cuda"}), hm.ones({4}, {device = "cuda"})
    raises({"axpy", "4 arguments", "3"}, k, 4, 1, x)
    raises({"axpy", "float"}, k, 4, 1, x:half(), y)
    raises({"axpy", "tensor"}, k, 4, 1, 5, y)
    raises({"axpy", "number"}, k, x, 1, x, y)
    raises({"axpy", "int"}, k, 1 << 40, 1, x, y)
    raises({"kernel axpy", "cpu", "cuda:0", "hint"}, k, 4, 1, x:cpu(), y)
    raises({"argument 1", "must be a tensor, a number or a boolean"}, k, "4", 1, x, y)
    same(y, {1, 1, 1, 1})
  end)
end

-- ====== Faults: each in a process of its own, always on the test double ======

local PRELUDE = [[
local hm = require "halfmoon"
local x = hm.ones({64}, {device = "cuda"})
local k = hm.cuda.kernel("__global__ void wild(float *x, int i) { x[i] = 1; }", "wild")
]]

local function faults()
  case("a kernel that writes where it must not is an ordinary error, at the next call and at every one after",
    function()
    local said, status = process.script(PRELUDE .. [[
      local ok, message = pcall(function()
        k{grid = 1, block = 1}(x, 1 << 28)
        return x:totable()
      end)
      print(ok, message)
      print(pcall(function() return (x + 1):totable() end))
      print((hm.ones({2}) + 1):sum():item()) -- the CPU goes on
    ]], EMU)
    assert.equal(0, status, said)
    assert.truthy(said:find("^false\t"), said)
    assert.truthy(said:find("wild", 1, true) or said:find("kernel", 1, true), said)
    assert.truthy(said:find("illegal", 1, true), said)
    assert.truthy(said:find("\nfalse\t", 1, true), said)
    assert.equal(2, select(2, said:gsub("cannot be used again", "")), said)
    assert.truthy(said:find("\n4.0?\n"), said)
  end)

  case("a lost device: the op that finds it, what was queued, and with HALFMOON_CUDA_SYNC=1 the op that did it", function()
    local source = PRELUDE .. [[
      local function attempt(fn) return select(2, pcall(fn)) end
      print(attempt(function()
        k{grid = 1, block = 1}(x, 1 << 28)
        return (x * 2):totable()
      end))
      print("again", attempt(function() return hm.zeros({3}, {device = "cuda"}) + 1 end))
      print("moved", attempt(function() return x:cpu() end))
      x:release()
    ]]
    local said, status = process.script(source, EMU)
    assert.equal(0, status, said)
    assert.truthy(said:find("queued since the last wait: [^\n]*a user's kernel"), said)
    assert.truthy(said:find("HALFMOON_CUDA_SYNC=1", 1, true), said)
    assert.truthy(said:find("\nagain\t[^\n]*zeros: cuda:0: "), said)
    assert.truthy(said:find("\nmoved\t[^\n]*copy to the host: cuda:0: "), said)
    local env = {HALFMOON_CUDA_SYNC = 1}
    for name, value in pairs(EMU) do env[name] = value end
    said, status = process.script(source, env)
    assert.equal(0, status, said)
    assert.truthy(said:find("^[^\n]*kernel wild: cuda:0: "), said)
  end)

  case("a call of the driver that fails is an ordinary error with the op in it", function()
    local said, status = process.script([[
      local hm = require "halfmoon"
      local x = hm.ones({64}, {device = "cuda"})
      print(pcall(function() for _ = 1, 50 do x = x + 1 end return x:totable() end))
      print((hm.ones({64}, {device = "cuda"}) + 1):sum():item())
    ]], {HALFMOON_CUDA = "emu", HALFMOON_THREADS = 1, HALFMOON_EMU_QUIET = 1, HALFMOON_EMU_FAIL = "launch:20"})
    assert.equal(0, status, said)
    assert.truthy(said:find("^false\t[^\n]*add"), said)
    assert.truthy(said:find("\n128.0?\n"), said)
  end)

  case("device memory that runs out once is collected, trimmed and asked for again", function()
    local said, status = process.script([[
      local hm = require "halfmoon"
      local x = hm.ones({64}, {device = "cuda"})
      for n = 1, 40 do x = hm.cat({x, x:narrow(1, 1, 1)}, 1) end
      print(x:sum():item())
    ]], {HALFMOON_CUDA = "emu", HALFMOON_THREADS = 1, HALFMOON_EMU_QUIET = 1, HALFMOON_EMU_FAIL = "cudaMallocAsync:2"})
    assert.equal(0, status, said)
    assert.equal("104.0\n", (said:gsub("^104\n", "104.0\n")))
  end)

  case("without a plug-in, cuda is refused with the reason and the CPU works", function()
    local said, status = process.script([[
      local hm = require "halfmoon"
      print(hm.cuda.is_available())
      print(pcall(hm.ones, {2}, {device = "cuda"}))
      print(hm.ones({2}):sum():item())
    ]], {HALFMOON_CUDA = "off"})
    assert.equal(0, status, said)
    assert.truthy(said:find("^false\t[^\n]*HALFMOON_CUDA=off"), said)
    assert.truthy(said:find("\nfalse\t[^\n]*cuda"), said)
    assert.truthy(said:find("\n2.0?\n"), said)
    said, status = process.script("print(require 'halfmoon'.cuda.is_available())", {HALFMOON_CUDA = "/nowhere.so"})
    assert.equal(0, status, said)
    assert.truthy(said:find("/nowhere.so", 1, true), said)
  end)

  case("without a driver, or with one that is too old, cuda is refused with the reason and the CPU works", function()
    local function with_driver(version)
      local said, status = process.script([[
        local hm = require "halfmoon"
        print(hm.cuda.is_available())
        print(hm.cuda.device_count())
        print(pcall(hm.ones, {2}, {device = "cuda"}))
        print(pcall(hm.set_default_device, "cuda"))
        print(hm.ones({2}):sum():item(), hm.get_default_device())
      ]], {HALFMOON_CUDA = "emu", HALFMOON_THREADS = 1, HALFMOON_EMU_QUIET = 1, HALFMOON_EMU_DRIVER = version})
      assert.equal(0, status, said)
      assert.truthy(said:find("\n0\n", 1, true), said)
      assert.truthy(said:find("\nfalse\t[^\n]*ones: device cuda:0: CUDA is not available here: "), said)
      assert.truthy(said:find("\nfalse\t[^\n]*set_default_device: device cuda:0: CUDA is not available here: "), said)
      assert.truthy(said:find("hint: use device = \"cpu\"", 1, true), said)
      assert.truthy(said:find("\n2.0\tcpu\n$"), said)
      return said
    end
    local said = with_driver("11.4")
    assert.truthy(said:find("^false\tthe NVIDIA driver knows CUDA 11%.4 and the plug%-in needs %d+%.%d+: a newer driver"), said)
    said = with_driver("0")
    assert.truthy(said:find("^false\tno NVIDIA driver is installed\n"), said)
  end)

  case("an older driver of the same major version serves", function()
    local said, status = process.script("print(require('halfmoon').ones({2}, {device = 'cuda'}):sum():item())",
      {HALFMOON_CUDA = "emu", HALFMOON_THREADS = 1, HALFMOON_EMU_DRIVER = hm.cuda.properties().runtime:match("%d+") .. ".0"})
    assert.equal(0, status, said)
    assert.equal("2.0\n", said)
  end)

  case("bfloat16 is refused below compute capability 8.0 with the reason, and float16 warned of below 7.0", function()
    local said, status = process.script([[
      local hm = require "halfmoon"
      local x = hm.ones({4, 4}, {device = "cuda"})
      print(pcall(hm.amp.autocast, "bf16", function() return x:matmul(x):sum():item() end))
      print(hm.amp.autocast("f16", function() return x:matmul(x) end):float():sum():item())
    ]], {HALFMOON_CUDA = "emu", HALFMOON_THREADS = 1, HALFMOON_EMU_QUIET = 1, HALFMOON_EMU_CC = "7.5"})
    assert.equal(0, status, said)
    assert.truthy(said:find("^false\t[^\n]*8.0"), said)
    assert.truthy(said:find("\n64.0?\n"), said)
    said, status = process.script([[
      local hm = require "halfmoon"
      local x = hm.ones({4, 4}, {device = "cuda"})
      for _ = 1, 2 do print(hm.amp.autocast("f16", function() return x:matmul(x) end).dtype) end
    ]], {HALFMOON_CUDA = "emu", HALFMOON_THREADS = 1, HALFMOON_EMU_QUIET = 1, HALFMOON_EMU_CC = "6.1"})
    assert.equal(0, status, said)
    assert.truthy(said:find("6.1", 1, true) and said:find("7.0", 1, true), said)
    assert.equal(1, select(2, said:gsub("compute capability", "")), "the warning comes once")
    assert.truthy(said:find("float16\nfloat16\n"), said)
  end)
end

describe("cuda", function()
  if not cases then return pending(why) end
  case("a device is there", function() assert(hm.cuda.is_available()) end)
  tensors()
  mistakes()
  system()
  training()
  kernels()
  if devices.has_double() then faults() else pending("faults: " .. devices.plugin .. " is not built") end
end)
