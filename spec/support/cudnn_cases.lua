-- cudnn_cases.lua -- convolutions and their gradients on cuda against the plain loops of spec/reference/naive.lua and
-- against the CPU, in every dtype; run by cudnn_spec.lua in a process of its own for each setting of HALFMOON_CUDNN.
--
-- Raises at the first case that is wrong.  Prints one line, a Lua table: what properties().convolution said, and the
-- counters by dtype.

local hm = require "halfmoon"
local core = require "halfmoon.core"
local naive = require "spec.reference.naive"
local numbers = require "spec.support.numbers"

local TOLERANCE = {f64 = 1e-12, f32 = 2e-6, f16 = 6e-4, bf16 = 4.5e-3}
local nan, inf = 0 / 0, math.huge

local CASES = {
  {x = {2, 3, 7, 5}, w = {4, 3, 3, 3}, o = {}},
  {x = {1, 4, 8, 8}, w = {6, 4, 3, 3}, o = {stride = 2, padding = 1}},
  {x = {2, 4, 6, 6}, w = {4, 2, 3, 3}, o = {groups = 2, padding = 1}},
  {x = {1, 4, 5, 5}, w = {4, 1, 3, 3}, o = {groups = 4, padding = 1}},
  {x = {1, 2, 9, 9}, w = {3, 2, 3, 3}, o = {dilation = 2}},
  {x = {1, 2, 6, 8}, w = {3, 2, 2, 3}, o = {stride = {1, 2}, padding = {1, 0}}},
  {x = {2, 2, 11, 4}, w = {3, 2, 5, 1}, o = {stride = {3, 1}, padding = {2, 3}, dilation = {1, 2}}},
  {x = {3, 5, 4, 3}, w = {7, 5, 1, 1}, o = {stride = 2}},
  {x = {1, 6, 7, 7}, w = {9, 2, 3, 2}, o = {groups = 3, stride = {2, 1}, dilation = {2, 1}, padding = {1, 0}}},
  {x = {1, 1, 1, 1}, w = {1, 1, 3, 3}, o = {padding = 1}},
}

local function filled(shape, dtype, seed)
  local n, list = 1, {}
  for _, s in ipairs(shape) do n = n * s end
  for i = 1, n do list[i] = math.sin(i * 12.9898 + seed * 78.233) * 2 end
  return hm.tensor(list, {dtype = "f16"}):to(dtype):view(shape) -- values that every dtype but bf16 holds
end

local function options(o)
  local copy = {}
  for k, v in pairs(o or {}) do copy[k] = v end
  return copy
end

local function conv(x, w, b, o) return core.call("conv2d", x, w, b, options(o)) end

local function pair(v) if type(v) == "table" then return v[1], v[2] end return v, v end

--- Gradients of conv2d by x and by w, for the gradient g of its result, by plain loops: flat arrays.
local function naive_gradients(x, w, g, o)
  local sy, sx = pair(o.stride or 1)
  local py, px = pair(o.padding or 0)
  local dy, dx = pair(o.dilation or 1)
  local N, C, H, W = table.unpack(x.shape)
  local O, Cg, kH, kW = table.unpack(w.shape)
  local oh, ow, per = g.shape[3], g.shape[4], O // (o.groups or 1)
  local gx, gw = naive.new(x.shape, 0.0), naive.new(w.shape, 0.0)
  for n = 0, N - 1 do for k = 0, O - 1 do for y = 0, oh - 1 do for z = 0, ow - 1 do
    local up = g[((n * O + k) * oh + y) * ow + z + 1]
    for c = 0, Cg - 1 do for ky = 0, kH - 1 do for kx = 0, kW - 1 do
      local iy, ix = y * sy - py + ky * dy, z * sx - px + kx * dx
      if iy >= 0 and iy < H and ix >= 0 and ix < W then
        local at_x = ((n * C + k // per * Cg + c) * H + iy) * W + ix + 1
        local at_w = ((k * Cg + c) * kH + ky) * kW + kx + 1
        gx[at_x] = gx[at_x] + up * w[at_w]
        gw[at_w] = gw[at_w] + up * x[at_x]
      end
    end end end
  end end end end
  return gx, gw
end

local function largest(list)
  local most = 0
  for _, v in ipairs(numbers.flat(list)) do most = math.max(most, math.abs(v)) end
  return most
end

-- Within the dtype's tolerance of the exact result, relative to the largest value.
local function near(got, want, dtype, what)
  local t = TOLERANCE[dtype]
  numbers.assert_near(got, want, t, t * math.max(largest(want), 1) * 2, what)
end

-- ====== Cases ======

local function check_values(case, dtype, what)
  local x, w, b = filled(case.x, dtype, 1), filled(case.w, dtype, 2), filled({case.w[1]}, dtype, 3)
  local far = {x:to("cuda"), w:to("cuda"), b:to("cuda")}
  local with_bias, without = conv(far[1], far[2], far[3], case.o), conv(far[1], far[2], nil, case.o)
  near(with_bias, naive.conv2d(naive.of(x), naive.of(w), numbers.flat(b), case.o), dtype, what .. " with bias")
  near(without, naive.conv2d(naive.of(x), naive.of(w), nil, case.o), dtype, what)
  near(with_bias, conv(x, w, b, case.o), dtype, what .. " against the CPU")
  local s = with_bias:stride()
  assert(case.w[1] == 1 or s[2] == 1, what .. ": the result is channels-last")
end

local function check_gradients(case, dtype, what)
  local x, w, b = filled(case.x, dtype, 1), filled(case.w, dtype, 2), filled({case.w[1]}, dtype, 3)
  local near_by, far = {}, {}
  for k, t in ipairs {x, w, b} do
    near_by[k] = t:clone():requires_grad_()
    far[k] = t:to("cuda"):requires_grad_()
  end
  local y, there = conv(near_by[1], near_by[2], near_by[3], case.o), conv(far[1], far[2], far[3], case.o)
  local g = filled(y.shape, dtype, 4)
  y:backward(g)
  there:backward(g:to("cuda"))
  local gx, gw = naive_gradients(naive.of(x), naive.of(w), naive.of(g), case.o)
  near(far[1].grad, gx, dtype, what .. " by x")
  near(far[2].grad, gw, dtype, what .. " by weight")
  for k = 1, 3 do near(far[k].grad, near_by[k].grad, dtype, what .. " against the CPU") end
end

--- Half operands, float32 gradients of the masters: nothing is rounded to half, and sums are float32's.
local function check_autocast(case, dtype, what)
  local x, w = filled(case.x, "f32", 1), filled(case.w, "f32", 2):to(dtype):float()
  local near_by, far = w:clone():requires_grad_(), w:to("cuda"):requires_grad_()
  local y = hm.amp.autocast(dtype, function() return conv(x:to("cuda"), far, nil, case.o) end)
  local g = filled(y.shape, dtype, 4)
  y:backward(g:to("cuda"))
  local here = hm.amp.autocast(dtype, function() return conv(x, near_by, nil, case.o) end)
  here:backward(g)
  local _, gw = naive_gradients(naive.of(x:to(dtype)), naive.of(w), naive.of(g), case.o)
  assert(far.grad.dtype == "float32", what .. ": the master's gradient is float32")
  near(far.grad, gw, "f32", what .. ": a float32 gradient of half operands")
  near(far.grad, near_by.grad, "f32", what .. ": that against the CPU")
end

--- A float32 gradient of half operands, asked for by the caller.
local function check_mixed()
  local x, w = filled({1, 3, 5, 5}, "f32", 1), filled({4, 3, 3, 3}, "f32", 2)
  local g = filled({1, 4, 3, 3}, "f16", 3)
  local got = core.call("conv2d_backward_weight", g:to("cuda"), x:to("f16"):to("cuda"),
    {shape = {4, 3, 3, 3}, out_dtype = "float32"})
  local _, gw = naive_gradients(naive.of(x:to("f16")), naive.of(w), naive.of(g), {})
  assert(got.dtype == "float32")
  near(got, gw, "f32", "conv2d_backward_weight into float32")
end

local function check_special()
  local x = hm.zeros({1, 1, 5, 5})
  x[{1, 1, 1, 1}] = nan
  x[{1, 1, 5, 5}] = inf
  local y = conv(x:to("cuda"), hm.ones({1, 1, 3, 3}, {device = "cuda"})):totable()[1][1]
  assert(y[1][1] ~= y[1][1] and y[3][3] == inf, "NaN and infinity propagate")
  for i = 1, 3 do for j = 1, 3 do
    if not (i == 1 and j == 1 or i == 3 and j == 3) then assert(y[i][j] == 0, "and stay where they are") end
  end end
  local w = hm.ones({1, 1, 2, 2}, {device = "cuda"})
  local g = core.call("conv2d_backward_input", hm.tensor({{{{nan, 0}, {0, 1}}}}):to("cuda"), w,
    {shape = {1, 1, 4, 4}, stride = {2}}):totable()[1][1]
  assert(g[1][1] ~= g[1][1] and g[2][2] ~= g[2][2] and g[3][3] == 1 and g[1][3] == 0, "in the gradient by x as well")
end

--- No images: an empty result, gradients of zeros.
local function check_empty()
  local x = hm.zeros({0, 3, 4, 4}, {device = "cuda"}):requires_grad_()
  local w = hm.ones({4, 3, 3, 3}, {device = "cuda"}):requires_grad_()
  local y = conv(x, w, nil, {padding = 1})
  assert(table.concat(y.shape, ",") == "0,4,4,4")
  y:sum():backward()
  numbers.assert_same(w.grad, hm.zeros({4, 3, 3, 3}))
end

--- The same call twice, and after other shapes: the same bits.
local function check_repeats()
  local x, w = filled({4, 8, 9, 9}, "f16", 5):to("cuda"), filled({16, 8, 3, 3}, "f16", 6):to("cuda")
  local first = conv(x, w, nil, {padding = 1})
  for i = 1, 3 do conv(x:narrow(1, 1, i), w) end
  numbers.assert_same(conv(x, w, nil, {padding = 1}), first, "again")
end

-- ====== All of them, counted by dtype ======

local function counted(fn)
  hm.cuda.reset_stats()
  fn()
  local s = hm.cuda.stats()
  local line = "{cudnn = %d, im2col = %d, refused = %d}"
  return line:format(s.cudnn_convolutions, s.im2col_convolutions, s.cudnn_refusals)
end

local words = {}
local only = os.getenv("HALFMOON_CUDNN_SPEC") -- one dtype alone
for _, dtype in ipairs(only and {only} or {"f32", "f16", "bf16", "f64"}) do
  words[#words + 1] = dtype .. " = " .. counted(function()
    for i, case in ipairs(CASES) do
      local what = ("case %d %s"):format(i, dtype)
      check_values(case, dtype, what)
      check_gradients(case, dtype, what)
      if dtype == "f16" or dtype == "bf16" then check_autocast(case, dtype, what) end
    end
  end)
end
words[#words + 1] = "others = " .. counted(function()
  check_mixed()
  check_special()
  check_repeats()
end)
words[#words + 1] = "empty = " .. counted(check_empty)
words[#words + 1] = "pixels = " .. counted(function()
  near(conv(filled({2, 8, 4, 4}, "f32", 1):to("cuda"), filled({16, 8, 1, 1}, "f32", 2):to("cuda")),
    conv(filled({2, 8, 4, 4}, "f32", 1), filled({16, 8, 1, 1}, "f32", 2)), "f32", "windows of one pixel")
end)
print(("return {convolution = %q, %s}"):format(hm.cuda.properties().convolution, table.concat(words, ", ")))
