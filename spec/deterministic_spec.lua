-- deterministic_spec.lua -- the same bits for any number of threads: products and weight gradients under hm.use_deterministic.
--
-- How oneDNN adds up a product or a weight's gradient depends on how many threads share the work.  In deterministic mode the
-- pieces depend on shapes alone.  One case alone:  make test SPEC=spec/deterministic_spec.lua FILTER='conv2d'

local hm = require "halfmoon"
local core = require "halfmoon.core"
local numbers = require "spec.support.numbers"
local devices = require "spec.support.devices"

local it = devices.cpu_cases("threads of the CPU", it)

--- Runs fn() with 1, 2, 3 and 5 threads and wants the same bits each time.
local function same_for_any_threads(fn)
  local before, first = hm.get_num_threads(), nil
  for _, threads in ipairs {1, 2, 3, 5} do
    hm.set_num_threads(threads)
    local ok, result = pcall(fn)
    hm.set_num_threads(before)
    assert(ok, result)
    if not first then first = result end
    for i, t in ipairs(result) do numbers.assert_same(t, first[i], ("%d threads, tensor %d"):format(threads, i)) end
  end
  return first
end

local function conv_case(name, x_shape, w_shape, attrs)
  for _, dtype in ipairs {"f32", "f16", "bf16"} do
    it(("conv2d weight gradient, %s, %s"):format(name, dtype), function()
      hm.manual_seed(3)
      local x = hm.randn(x_shape, {dtype = dtype})
      local y = core.call("conv2d", x, hm.zeros(w_shape, {dtype = dtype}), nil, attrs)
      local g = hm.randn(y.shape, {dtype = dtype})
      local call = function()
        local more = {shape = w_shape, out_dtype = "f32"}
        for k, v in pairs(attrs) do more[k] = v end
        return core.call("conv2d_backward_weight", g, x, more)
      end
      local plain = call()
      hm.use_deterministic(true)
      local got = same_for_any_threads(function() return {call()} end)[1]
      hm.use_deterministic(false)
      local scale = plain:abs():max():item()
      assert((got - plain):abs():max():item() <= 2e-5 * scale, "differs from the other way by more than rounding")
    end)
  end
end

describe("deterministic mode", function()
  after_each(function() hm.use_deterministic(false) end)

  conv_case("many images", {37, 8, 14, 14}, {16, 8, 3, 3}, {padding = {1, 1}})
  conv_case("few images, stride and groups", {3, 8, 15, 15}, {8, 4, 3, 3}, {stride = {2, 2}, groups = 2})
  conv_case("one image", {1, 4, 28, 28}, {8, 4, 5, 5}, {})

  for _, dtype in ipairs {"f32", "f16", "bf16"} do
    it("linear weight gradient, " .. dtype, function()
      hm.manual_seed(4)
      for _, size in ipairs {{128, 512, 784}, {1000, 70, 33}, {4096, 10, 512}, {33, 31, 64}} do
        local g, x = hm.randn({size[1], size[2]}, {dtype = dtype}), hm.randn({size[1], size[3]}, {dtype = dtype})
        local call = function() return core.call("linear_backward_weight", g, x, {out_dtype = "f32"}) end
        local plain = call()
        hm.use_deterministic(true)
        local got = same_for_any_threads(function() return {call()} end)[1]
        hm.use_deterministic(false)
        assert((got - plain):abs():max():item() <= 2e-5 * plain:abs():max():item())
      end
    end)
  end

  it("products, one and many, with and without a bias", function()
    hm.manual_seed(6)
    local x, w, b = hm.randn {24, 4608}, hm.randn {10, 4608}, hm.randn {10}
    local many, other = hm.randn {6, 40, 300}, hm.randn {6, 300, 20}
    hm.use_deterministic(true)
    local got = same_for_any_threads(function()
      return {core.call("linear", x, w, b), core.call("linear_backward_input", hm.ones {24, 10}, w), x:matmul(x:t()),
        w:matmul(x:t()), many:matmul(other), x:half():matmul(w:half():t())}
    end)
    hm.use_deterministic(false)
    local plain = core.call("linear", x, w, b)
    assert((got[1] - plain):abs():max():item() <= 1e-5 * plain:abs():max():item())
    assert((got[5] - many:matmul(other)):abs():max():item() <= 1e-4)
  end)

  it("a whole training step", function()
    local nn = hm.nn
    hm.use_deterministic(true)
    assert.is_true(hm.is_deterministic())
    same_for_any_threads(function()
      hm.manual_seed(5)
      local model = nn.Sequential(nn.Conv2d(1, 16, 3, {padding = 1}), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3),
        nn.ReLU(), nn.Flatten(), nn.Linear(32 * 12 * 12, 10))
      local opt = hm.optim.AdamW(model:parameters(), {lr = 1e-3})
      for _ = 1, 2 do
        opt:zero_grad()
        local x, y = hm.randn({24, 1, 28, 28}), hm.randint(0, 10, {24})
        nn.functional.cross_entropy(model(x), y):backward()
        opt:step()
      end
      return model:parameters()
    end)
  end)

  it("switches off again", function()
    hm.use_deterministic()
    assert.is_true(hm.is_deterministic())
    hm.use_deterministic(false)
    assert.is_false(hm.is_deterministic())
  end)
end)
