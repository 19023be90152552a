-- windows.lua -- pooling over windows and interpolation, as plain loops over flat row-major arrays of doubles
-- [N, C, H, W].
--
-- Arrays are those of naive.lua.  Attributes bear the names of the op table; every one that is a list has two numbers.
-- Written from the definitions, window by window: gradients are scattered, where the kernels gather.

local naive = require "spec.reference.naive"

local M = {}

--- How many windows one dim has.
function M.count(size, kernel, stride, padding, dilation, ceil_mode)
  local room = size + 2 * padding - dilation * (kernel - 1) - 1
  local n = (ceil_mode and -(-room // stride) or room // stride) + 1
  if ceil_mode and (n - 1) * stride >= size + padding then n = n - 1 end
  return n
end

local function both(v, default)
  if v == nil then v = default end
  if type(v) == "number" then return {v, v} end
  return {v[1], v[2] or v[1]}
end

--- A function that gives the flat place of (n, c, y, x), all from 0.
local function placer(shape)
  local _, C, H, W = table.unpack(shape)
  return function(n, c, y, x) return ((n * C + c) * H + y) * W + x + 1 end
end

local function each_window(N, C, h, w, visit)
  for n = 0, N - 1 do
    for c = 0, C - 1 do
      for y = 0, h - 1 do for x = 0, w - 1 do visit(n, c, y, x) end end
    end
  end
end

--- Largest values and the places in their windows (from 0): the first of equals, the last of several NaNs.
function M.max_pool2d(x, a)
  local k = both(a.kernel_size)
  local s, p, d = both(a.stride, k), both(a.padding, 0), both(a.dilation, 1)
  local N, C, H, W = table.unpack(x.shape)
  local h = M.count(H, k[1], s[1], p[1], d[1], a.ceil_mode)
  local w = M.count(W, k[2], s[2], p[2], d[2], a.ceil_mode)
  local out, index = naive.new({N, C, h, w}), naive.new({N, C, h, w}, 0)
  local from, to = placer(x.shape), placer(out.shape)
  each_window(N, C, h, w, function(n, c, oy, ox)
    local best, place = -math.huge, nil
    for ky = 0, k[1] - 1 do
      for kx = 0, k[2] - 1 do
        local iy, ix = oy * s[1] - p[1] + ky * d[1], ox * s[2] - p[2] + kx * d[2]
        if iy >= 0 and iy < H and ix >= 0 and ix < W then
          local v = x[from(n, c, iy, ix)]
          if not place or v > best or v ~= v then best, place = v, ky * k[2] + kx end
        end
      end
    end
    out[to(n, c, oy, ox)], index[to(n, c, oy, ox)] = best, place or 0
  end)
  return out, index
end

--- avg_pool2d as lists: for each window the divisor and the pixels {flat place, ...} of x.
local function average_windows(shape, a, visit)
  local k = both(a.kernel_size)
  local s, p = both(a.stride, k), both(a.padding, 0)
  local N, C, H, W = table.unpack(shape)
  local h = M.count(H, k[1], s[1], p[1], 1, a.ceil_mode)
  local w = M.count(W, k[2], s[2], p[2], 1, a.ceil_mode)
  local from, to = placer(shape), placer({N, C, h, w})
  each_window(N, C, h, w, function(n, c, oy, ox)
    local pixels, counted = {}, 0
    for iy = oy * s[1] - p[1], oy * s[1] - p[1] + k[1] - 1 do
      for ix = ox * s[2] - p[2], ox * s[2] - p[2] + k[2] - 1 do
        local inside = iy >= 0 and iy < H and ix >= 0 and ix < W
        -- padding counts, what lies past it on the right does not
        if inside or (a.count_include_pad ~= false and iy < H + p[1] and ix < W + p[2]) then counted = counted + 1 end
        if inside then pixels[#pixels + 1] = from(n, c, iy, ix) end
      end
    end
    local divisor = a.divisor_override
    visit(to(n, c, oy, ox), pixels, divisor and divisor ~= 0 and divisor or counted)
  end)
  return {N, C, h, w}
end

local function adaptive_windows(shape, a, visit)
  local size = both(a.output_size)
  local N, C, H, W = table.unpack(shape)
  local from, to = placer(shape), placer({N, C, size[1], size[2]})
  each_window(N, C, size[1], size[2], function(n, c, oy, ox)
    local pixels = {}
    for iy = oy * H // size[1], -(-(oy + 1) * H // size[1]) - 1 do
      for ix = ox * W // size[2], -(-(ox + 1) * W // size[2]) - 1 do pixels[#pixels + 1] = from(n, c, iy, ix) end
    end
    visit(to(n, c, oy, ox), pixels, #pixels)
  end)
  return {N, C, size[1], size[2]}
end

local function averages(windows)
  return function(x, a)
    local out = {}
    out.shape = windows(x.shape, a, function(at, pixels, divisor)
      local sum = 0.0
      for _, i in ipairs(pixels) do sum = sum + x[i] end
      out[at] = sum / divisor
    end)
    return out
  end
end

--- The gradient for an image of that shape from g over the windows.
local function spread(windows)
  return function(g, shape, a)
    local out = naive.new(shape)
    windows(shape, a, function(at, pixels, divisor)
      for _, i in ipairs(pixels) do out[i] = out[i] + g[at] / divisor end
    end)
    return out
  end
end

M.avg_pool2d, M.avg_pool2d_backward = averages(average_windows), spread(average_windows)
M.adaptive_avg_pool2d, M.adaptive_avg_pool2d_backward = averages(adaptive_windows), spread(adaptive_windows)

--- Largest values and their places y * W + x.
function M.adaptive_max_pool2d(x, a)
  local out, index = {}, {}
  local plane = x.shape[3] * x.shape[4]
  out.shape = adaptive_windows(x.shape, a, function(at, pixels)
    local best
    for _, i in ipairs(pixels) do
      if not best or x[i] > x[best] or x[i] ~= x[i] then best = i end
    end
    out[at], index[at] = x[best], (best - 1) % plane
  end)
  index.shape = out.shape
  return out, index
end

local function f32(v) return (string.unpack("<f", string.pack("<f", v))) end

--- The pixels of one dim that place `o` is made of: {place, weight, place, weight}.
local function taps(o, size, out, a, scale)
  local given = scale and scale ~= 0
  if a.mode ~= "bilinear" then
    local ratio = given and f32(1 / scale) or f32(size / out)
    return {math.min(math.floor(f32(o * ratio)), size - 1), 1.0}
  end
  local ratio = given and 1 / scale or size / out
  local at = math.max(ratio * (o + 0.5) - 0.5, 0)
  if a.align_corners then at = out > 1 and o * ((size - 1) / (out - 1)) or 0.0 end
  local first = math.min(math.floor(at), size - 1)
  if first == size - 1 then return {first, 1.0} end
  return {first, 1 - (at - first), first + 1, at - first}
end

local function samples(shape, a, visit)
  local size = both(a.size)
  local N, C, H, W = table.unpack(shape)
  local from, to = placer(shape), placer({N, C, size[1], size[2]})
  each_window(N, C, size[1], size[2], function(n, c, oy, ox)
    local ys, xs = taps(oy, H, size[1], a, a.scale_h), taps(ox, W, size[2], a, a.scale_w)
    for i = 1, #ys, 2 do
      for j = 1, #xs, 2 do visit(to(n, c, oy, ox), from(n, c, ys[i], xs[j]), ys[i + 1] * xs[j + 1]) end
    end
  end)
  return {N, C, size[1], size[2]}
end

function M.interpolate2d(x, a)
  local out = {}
  out.shape = samples(x.shape, a, function(at, pixel, weight) out[at] = (out[at] or 0.0) + weight * x[pixel] end)
  return out
end

function M.interpolate2d_backward(g, shape, a)
  local out = naive.new(shape)
  samples(shape, a, function(at, pixel, weight) out[pixel] = out[pixel] + weight * g[at] end)
  return out
end

return M
