-- naive.lua -- ops that are no formula, as plain loops over flat row-major arrays of doubles.
--
-- An array is {shape = {...}, [1] = ..., [2] = ...}; dims count from 1 here, padding and strides are the same for both
-- sides unless two are given.

local M = {}

--- Array of a tensor's values.
function M.of(t)
  local flat = require("spec.support.numbers").flat(t)
  flat.shape = t.shape
  return flat
end

local count = require("spec.support.inputs").count

--- New array of a shape, filled with v.
function M.new(shape, v)
  local out = {shape = shape}
  for i = 1, count(shape) do out[i] = v or 0.0 end
  return out
end

--- Flat position of an index table.
local function at(shape, index)
  local p = 0
  for d = 1, #shape do p = p * shape[d] + index[d] - 1 end
  return p + 1
end

--- Index table of a flat position.
local function index_of(shape, p)
  local index = {}
  p = p - 1
  for d = #shape, 1, -1 do
    index[d] = p % shape[d] + 1
    p = p // shape[d]
  end
  return index
end

M.at, M.index_of = at, index_of

-- ====== Reductions ======

--- Groups the elements of a by what is left after reducing dims (a set; nil: all).  Calls visit(group position, value,
-- position in group).
local function grouped(a, dims, visit)
  local kept = {}
  for d, s in ipairs(a.shape) do if dims and not dims[d] then kept[#kept + 1] = s end end
  local seen = {}
  for p = 1, #a do
    local index, out = index_of(a.shape, p), {}
    for d = 1, #a.shape do if dims and not dims[d] then out[#out + 1] = index[d] end end
    local g = at(kept, out)
    seen[g] = (seen[g] or -1) + 1
    visit(g, a[p], seen[g])
  end
  return kept
end

local function reduce(start, step)
  return function(a, dims)
    local acc = {}
    local kept = grouped(a, dims, function(g, v, i) acc[g] = step(acc[g] == nil and start or acc[g], v, i) end)
    acc.shape = kept
    for g = 1, count(kept) do if acc[g] == nil then acc[g] = start end end
    return acc
  end
end

M.sum = reduce(0.0, function(s, v) return s + v end)
M.any = reduce(false, function(s, v) return s or (v ~= 0 and v ~= false) end)
M.all = reduce(true, function(s, v) return s and (v ~= 0 and v ~= false) end)
M.amax = reduce(-math.huge, function(s, v) return (v ~= v or s ~= s) and 0 / 0 or math.max(s, v) end)
M.amin = reduce(math.huge, function(s, v) return (v ~= v or s ~= s) and 0 / 0 or math.min(s, v) end)

function M.mean(a, dims)
  local out, n = M.sum(a, dims), {}
  grouped(a, dims, function(g) n[g] = (n[g] or 0) + 1 end)
  for g = 1, #out do out[g] = out[g] / (n[g] or 0) end
  return out
end

local function arg(better)
  return function(a, dims)
    local best, where = {}, {}
    where.shape = grouped(a, dims, function(g, v, i)
      local b = best[g]
      if b == nil or (b == b and (v ~= v or better(v, b))) then best[g], where[g] = v, i end
    end)
    return where, best
  end
end

M.argmax = arg(function(v, b) return v > b end)
M.argmin = arg(function(v, b) return v < b end)

-- ====== Softmax, cross entropy ======

--- Softmax along dim d; log = true for its logarithm.
function M.softmax(a, d, log)
  local out = M.new(a.shape)
  local groups = {}
  for p = 1, #a do
    local index = index_of(a.shape, p)
    index[d] = 1
    local g = at(a.shape, index)
    groups[g] = groups[g] or {}
    table.insert(groups[g], p)
  end
  for _, list in pairs(groups) do
    local top, sum = -math.huge, 0
    for _, p in ipairs(list) do top = math.max(top, a[p]) end
    for _, p in ipairs(list) do sum = sum + math.exp(a[p] - top) end
    for _, p in ipairs(list) do out[p] = log and a[p] - top - math.log(sum) or math.exp(a[p] - top) / sum end
  end
  return out
end

--- Cross entropy of logits [N, C, d...] and targets [N, d...] (class ids from 0).
function M.cross_entropy(x, target, reduction, ignore, smoothing)
  local logp, classes = M.softmax(x, 2, true), x.shape[2]
  local losses, n = {shape = target.shape}, 0
  for p = 1, #target do
    local index = index_of(target.shape, p)
    table.insert(index, 2, 1)
    if target[p] == ignore then losses[p] = 0.0
    else
      n = n + 1
      local total, mine = 0, 0
      for c = 1, classes do
        index[2] = c
        local v = logp[at(x.shape, index)]
        total = total + v
        if c - 1 == target[p] then mine = v end
      end
      losses[p] = -(1 - smoothing) * mine - smoothing / classes * total
    end
  end
  if reduction == "none" then return losses end
  local sum = 0
  for p = 1, #target do sum = sum + losses[p] end
  return {shape = {}, reduction == "sum" and sum or sum / n}
end

-- ====== Matrix products ======

--- [M, K] x [K, N].
function M.matmul(a, b)
  local m, k, n = a.shape[1], a.shape[2], b.shape[2]
  local out = M.new({m, n})
  for i = 1, m do
    for j = 1, n do
      local s = 0.0
      for l = 1, k do s = s + a[(i - 1) * k + l] * b[(l - 1) * n + j] end
      out[(i - 1) * n + j] = s
    end
  end
  return out
end

-- ====== Convolution and pooling ======

local function pair(v) if type(v) == "table" then return v[1], v[2] or v[1] end return v, v end

--- x [N, C, H, W], weight [O, C/groups, kH, kW], bias or nil; o = {stride, padding, dilation, groups}.
function M.conv2d(x, w, bias, o)
  local sy, sx = pair(o.stride or 1)
  local py, px = pair(o.padding or 0)
  local dy, dx = pair(o.dilation or 1)
  local groups = o.groups or 1
  local N, _, H, W = table.unpack(x.shape)
  local O, Cg, kH, kW = table.unpack(w.shape)
  local oh, ow = (H + 2 * py - dy * (kH - 1) - 1) // sy + 1, (W + 2 * px - dx * (kW - 1) - 1) // sx + 1
  local out = M.new({N, O, oh, ow})
  for n = 1, N do for co = 1, O do for y = 1, oh do for z = 1, ow do
    local s = bias and bias[co] or 0.0
    local first = (co - 1) // (O // groups) * Cg
    for c = 1, Cg do for ky = 1, kH do for kx = 1, kW do
      local iy, ix = (y - 1) * sy - py + (ky - 1) * dy + 1, (z - 1) * sx - px + (kx - 1) * dx + 1
      if iy >= 1 and iy <= H and ix >= 1 and ix <= W then
        s = s + x[at(x.shape, {n, first + c, iy, ix})] * w[at(w.shape, {co, c, ky, kx})]
      end
    end end end
    out[at(out.shape, {n, co, y, z})] = s
  end end end end
  return out
end

--- Largest value in each window; NaN wins.
function M.max_pool2d(x, kernel, stride, padding)
  local kH, kW = pair(kernel)
  local sy, sx = pair(stride or kernel)
  local py, px = pair(padding or 0)
  local N, C, H, W = table.unpack(x.shape)
  local oh, ow = (H + 2 * py - kH) // sy + 1, (W + 2 * px - kW) // sx + 1
  local out = M.new({N, C, oh, ow})
  for n = 1, N do for c = 1, C do for y = 1, oh do for z = 1, ow do
    local best = -math.huge
    for ky = 1, kH do for kx = 1, kW do
      local iy, ix = (y - 1) * sy - py + ky, (z - 1) * sx - px + kx
      if iy >= 1 and iy <= H and ix >= 1 and ix <= W then
        local v = x[at(x.shape, {n, c, iy, ix})]
        if v ~= v or best ~= best then best = 0 / 0 elseif v > best then best = v end
      end
    end end
    out[at(out.shape, {n, c, y, z})] = best
  end end end end
  return out
end

return M
