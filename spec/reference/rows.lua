-- rows.lua -- what each row of the op table that is no formula should give: plain loops over flat row-major arrays of
-- doubles.
--
-- One function per row: rows[name](inputs..., attributes) -> outputs.  An array is {shape = {...}, [1] = ..., ...};
-- absent inputs are nil, numbers stay numbers; attributes are those of core.call (dims from 0).  Rows that only make
-- derivatives (NAME_backward) may be left out: they are proved where the derivative of their row is held against
-- differences.

local elementwise = require "spec.reference.elementwise"
local naive = require "spec.reference.naive"
local philox = require "spec.reference.philox"

local R = {}
local inf, nan = math.huge, 0 / 0
local at, index_of = naive.at, naive.index_of

-- ====== Shapes and places ======

local function count(shape, from, to)
  local n = 1
  for d = from or 1, to or #shape do n = n * shape[d] end
  return n
end

local function copy(list) return table.move(list, 1, #list, 1, {}) end

--- An array of a shape whose elements are fn(index).
local function build(shape, fn)
  local out = {shape = shape}
  for p = 1, count(shape) do out[p] = fn(index_of(shape, p), p) end
  return out
end

local function get(a, index) return a[at(a.shape, index)] end

--- A dim from 0, perhaps negative, as one from 1.
local function from_one(d, n) return d < 0 and d + n + 1 or d + 1 end

--- The set of dims (from 1) that an attribute names; all where it names none.
local function dims_of(attr, n)
  local set = {}
  if attr == nil then
    for d = 1, n do set[d] = true end
  else
    for _, d in ipairs(type(attr) == "table" and attr or {attr}) do set[from_one(d, n)] = true end
  end
  return set
end

--- Reduces groups: fn(list of values) -> value...; arrays of each value, by shape.
local function reduce(fn, results)
  return function(a, attrs)
    local set, kept, shape, lists = dims_of(attrs.dim, #a.shape), {}, {}, {}
    for d, s in ipairs(a.shape) do
      kept[d] = set[d] and 1 or s
      if attrs.keepdim or not set[d] then shape[#shape + 1] = set[d] and 1 or s end
    end
    for g = 1, count(kept) do lists[g] = {} end
    for p = 1, #a do
      local index = index_of(a.shape, p)
      for d in pairs(set) do index[d] = 1 end
      table.insert(lists[at(kept, index)], a[p])
    end
    local outs = {}
    for k = 1, results or 1 do outs[k] = {shape = shape} end
    for g, list in ipairs(lists) do
      local values = {fn(list, attrs)}
      for k = 1, results or 1 do outs[k][g] = values[k] end
    end
    return table.unpack(outs)
  end
end

--- Runs fn(list of values, attrs) -> list over every line along attrs.dim.
local function along(fn, results)
  return function(a, attrs)
    local n = #a.shape
    local d, outs = n > 0 and from_one(attrs.dim or -1, n) or 1, {}
    local shape = n > 0 and a.shape or {1}
    local length = shape[d]
    local new = copy(shape)
    new[d] = attrs.k or length
    for p = 1, count(shape) do
      local index = index_of(shape, p)
      if index[d] == 1 then
        local line = {}
        for i = 1, length do
          index[d] = i
          line[i] = a[at(shape, index)]
        end
        local lines = {fn(line, attrs)}
        new[d] = #lines[1]
        for k = 1, results or 1 do
          outs[k] = outs[k] or {}
          for i, v in ipairs(lines[k]) do
            index[d] = i
            outs[k][at(new, index)] = v
          end
        end
      end
    end
    for k = 1, results or 1 do
      outs[k] = outs[k] or {}
      outs[k].shape = n > 0 and new or {}
    end
    return table.unpack(outs)
  end
end

-- ====== Reductions ======

local function sum(list)
  local s = 0.0
  for _, v in ipairs(list) do s = s + (v == true and 1 or v == false and 0 or v) end
  return s
end

local function first_of(better)
  return function(list)
    local best, where = list[1], 1
    for i = 2, #list do
      local v = list[i]
      if best == best and (v ~= v or better(v, best)) then best, where = v, i end
    end
    return best, where - 1
  end
end

local function number(v) return v == true and 1 or v == false and 0 or v end
local largest = first_of(function(a, b) return number(a) > number(b) end)
local smallest = first_of(function(a, b) return number(a) < number(b) end)

local function variance(list, attrs)
  local mean, s = sum(list) / #list, 0
  for _, v in ipairs(list) do s = s + (v - mean) ^ 2 end
  return s / math.max(0, #list - (attrs.correction or 1))
end

R.sum = reduce(sum)
R.mean = reduce(function(list) return sum(list) / #list end)
R.amax = reduce(function(list) return (largest(list)) end)
R.amin = reduce(function(list) return (smallest(list)) end)
R.max_dim, R.min_dim = reduce(largest, 2), reduce(smallest, 2)
R.argmax = reduce(function(list) return select(2, largest(list)) end)
R.argmin = reduce(function(list) return select(2, smallest(list)) end)
R.any = reduce(function(list) for _, v in ipairs(list) do if number(v) ~= 0 then return true end end return false end)
R.all = reduce(function(list) for _, v in ipairs(list) do if number(v) == 0 then return false end end return true end)
R.prod = reduce(function(list)
  local p = 1.0
  for _, v in ipairs(list) do p = p * number(v) end
  return p
end)
R.var = reduce(variance)
R.std = reduce(function(list, attrs) return math.sqrt(variance(list, attrs)) end)
R.norm = reduce(function(list, attrs)
  local p, s = attrs.p or 2, 0
  for _, v in ipairs(list) do s = s + (p == 0 and (v ~= 0 and 1 or 0) or math.abs(v) ^ p) end
  return p == 0 and s or s ^ (1 / p)
end)
R.logsumexp = reduce(function(list)
  local top, s = largest(list) or -inf, 0
  if top ~= top or math.abs(top) == inf then return top end
  for _, v in ipairs(list) do s = s + math.exp(v - top) end
  return top + math.log(s)
end)

local function last_of_leading(a) -- sums over all dims but one
  return function(kept)
    local out = {shape = {a.shape[kept]}}
    for i = 1, a.shape[kept] do out[i] = 0.0 end
    for p = 1, #a do
      local i = index_of(a.shape, p)[kept]
      out[i] = out[i] + a[p]
    end
    return out
  end
end
R.linear_backward_bias = function(g) return last_of_leading(g)(#g.shape) end
R.conv2d_backward_bias = function(g) return last_of_leading(g)(2) end

-- ====== Scans, softmax, losses ======

local function running(start, step, backwards)
  return along(function(line)
    local out, acc = {}, start
    for k = 1, #line do
      local i = backwards and #line + 1 - k or k
      acc = step(acc, number(line[i]))
      out[i] = acc
    end
    return out
  end)
end
R.cumsum = running(0.0, function(a, v) return a + v end)
R.cumsum_reverse = running(0.0, function(a, v) return a + v end, true)
R.cumprod = running(1.0, function(a, v) return a * v end)

R.softmax = function(x, attrs) return naive.softmax(x, from_one(attrs.dim, #x.shape)) end
R.log_softmax = function(x, attrs) return naive.softmax(x, from_one(attrs.dim, #x.shape), true) end

--- Positions of a target as [N, d...] in x as [N, C, d...].
local function with_class(index, c)
  local full = copy(index)
  table.insert(full, 2, c)
  return full
end

R.cross_entropy = function(x, target, attrs)
  local lse = build(target.shape, function(index)
    local s = 0
    for c = 1, x.shape[2] do s = s + math.exp(get(x, with_class(index, c))) end
    return math.log(s)
  end)
  local loss = naive.cross_entropy(x, target, attrs.reduction or "mean", attrs.ignore_index or -100,
    attrs.label_smoothing or 0)
  return loss, lse
end

R.nll_loss = function(x, target, weight, attrs)
  local total = 0
  local losses = build(target.shape, function(index, p)
    local c = target[p]
    if c == (attrs.ignore_index or -100) then return 0 end
    local w = weight and weight[c + 1] or 1
    total = total + w
    return -w * get(x, with_class(index, c + 1))
  end)
  total = {shape = {}, total}
  if attrs.reduction == "none" then return losses, total end
  return {shape = {}, attrs.reduction == "sum" and sum(losses) or sum(losses) / total[1]}, total
end

-- ====== Products ======

R.matmul = function(a, b)
  local one_a, one_b = #a.shape == 1, #b.shape == 1
  local sa, sb = one_a and {1, a.shape[1]} or a.shape, one_b and {b.shape[1], 1} or b.shape
  local batch, na, nb = {}, #sa - 2, #sb - 2
  for d = 1, math.max(na, nb) do
    local x, y = sa[na - math.max(na, nb) + d] or 1, sb[nb - math.max(na, nb) + d] or 1
    if na - math.max(na, nb) + d < 1 then x = 1 end
    if nb - math.max(na, nb) + d < 1 then y = 1 end
    batch[d] = x == 1 and y or x
  end
  local full = copy(batch)
  full[#full + 1], full[#full + 2] = sa[#sa - 1], sb[#sb]
  local function place(shape, n, index, i, j)
    local own = {}
    for d = 1, n do own[d] = shape[d] == 1 and 1 or index[#batch - n + d] end
    own[n + 1], own[n + 2] = i, j
    return at(shape, own)
  end
  local out = build(full, function(index)
    local s, i, j = 0.0, index[#full - 1], index[#full]
    for k = 1, sa[#sa] do s = s + a[place(sa, na, index, i, k)] * b[place(sb, nb, index, k, j)] end
    return s
  end)
  local shape = copy(batch)
  if not one_a then shape[#shape + 1] = sa[#sa - 1] end
  if not one_b then shape[#shape + 1] = sb[#sb] end
  out.shape = shape
  return out
end

--- fn(value, place) of each.
local function mapped(a, fn)
  local out = {shape = a.shape}
  for p, v in ipairs(a) do out[p] = fn(v, p) end
  return out
end

--- The derivative of gelu_tanh: 0.5 (1 + tanh u) + 0.5 x (1 - tanh^2 u) u'.
local function gelu_tanh_slope(x)
  local c = math.sqrt(2 / math.pi)
  local s = 1 / (1 + math.exp(-2 * c * (x + 0.044715 * x ^ 3))) -- (1 + tanh u) / 2
  return s + x * 2 * s * (1 - s) * c * (1 + 3 * 0.044715 * x ^ 2)
end

R.linear = function(x, w, bias)
  local inner, outer = w.shape[2], w.shape[1]
  local shape = copy(x.shape)
  shape[#shape] = outer
  return build(shape, function(_, p)
    local row, o = (p - 1) // outer, (p - 1) % outer
    local s = bias and bias[o + 1] or 0.0
    for k = 1, inner do s = s + x[row * inner + k] * w[o * inner + k] end
    return s
  end)
end

R.linear_relu = function(x, w, bias) return mapped(R.linear(x, w, bias), elementwise.relu) end
R.linear_gelu_tanh = function(x, w, bias)
  local pre = R.linear(x, w, bias)
  return mapped(pre, elementwise.gelu_tanh), pre
end

R.linear_backward_input = function(g, w)
  local inner, outer = w.shape[2], w.shape[1]
  local shape = copy(g.shape)
  shape[#shape] = inner
  return build(shape, function(_, p)
    local row, k, s = (p - 1) // inner, (p - 1) % inner + 1, 0.0
    for o = 1, outer do s = s + g[row * outer + o] * w[(o - 1) * inner + k] end
    return s
  end)
end
R.linear_backward_input_relu = function(g, w, out)
  return mapped(R.linear_backward_input(g, w), function(v, p) return out[p] <= 0 and 0.0 or v end)
end
R.linear_backward_input_gelu_tanh = function(g, w, pre)
  return mapped(R.linear_backward_input(g, w), function(v, p) return v * gelu_tanh_slope(pre[p]) end)
end

R.linear_backward_weight = function(g, x)
  local outer, inner = g.shape[#g.shape], x.shape[#x.shape]
  local out = {shape = {outer, inner}}
  for i = 1, outer * inner do
    local s = 0.0
    for row = 0, count(g.shape, 1, #g.shape - 1) - 1 do
      s = s + g[row * outer + (i - 1) // inner + 1] * x[row * inner + (i - 1) % inner + 1]
    end
    out[i] = s
  end
  return out
end
R.linear_backward_params = function(g, x) return R.linear_backward_weight(g, x), R.linear_backward_bias(g) end

R.conv2d = function(x, w, bias, attrs) return naive.conv2d(x, w, bias, attrs) end

-- ====== Windows ======

local function pair(v, default)
  v = v or default
  if type(v) ~= "table" then return v, v end
  return v[1], v[2] or v[1]
end

--- How many windows: with ceil_mode also one that reaches over the end, if it begins inside or on the left padding.
local function windows(size, k, stride, pad, dilation, ceil)
  local span = size + 2 * pad - dilation * (k - 1) - 1
  local n = (ceil and -(-span // stride) or span // stride) + 1
  if ceil and (n - 1) * stride >= size + pad then n = n - 1 end
  return n
end

--- Runs fn(visit, index) over the windows of x [N, C, H, W]; visit(f) calls f(value or nil outside, place in window,
--- h, w from 0).
local function pooled(x, attrs, results, fn)
  local kh, kw = pair(attrs.kernel_size)
  local sy, sx = pair(attrs.stride and #attrs.stride > 0 and attrs.stride or nil, attrs.kernel_size)
  local py, px = pair(attrs.padding, 0)
  local dy, dx = pair(attrs.dilation, 1)
  local N, C, H, W = table.unpack(x.shape)
  local shape = {N, C, windows(H, kh, sy, py, dy, attrs.ceil_mode), windows(W, kw, sx, px, dx, attrs.ceil_mode)}
  local outs = {}
  for k = 1, results do outs[k] = {shape = shape} end
  for p = 1, count(shape) do
    local index = index_of(shape, p)
    local top, left = (index[3] - 1) * sy - py, (index[4] - 1) * sx - px
    local values = {fn(function(visit)
      for i = 0, kh - 1 do
        for j = 0, kw - 1 do
          local h, w = top + i * dy, left + j * dx
          local inside = h >= 0 and h < H and w >= 0 and w < W
          visit(inside and get(x, {index[1], index[2], h + 1, w + 1}) or nil, i * kw + j, h, w)
        end
      end
    end, {H, W, py, px})}
    for k = 1, results do outs[k][p] = values[k] end
  end
  return table.unpack(outs)
end

local function best_in(each)
  local best, where
  each(function(v, place)
    if v and (best == nil or (best == best and (v ~= v or v > best))) then best, where = v, place end
  end)
  return best, where
end

R.max_pool2d = function(x, attrs) return pooled(x, attrs, 2, best_in) end

R.max_pool2d_pick = function(x, places, attrs)
  local p = 0
  return pooled(x, attrs, 1, function(each)
    local picked
    p = p + 1
    each(function(v, place) if place == places[p] then picked = v end end)
    return picked
  end)
end

R.avg_pool2d = function(x, attrs)
  return pooled(x, attrs, 1, function(each, size)
    local H, W, py, px = table.unpack(size)
    local s, n = 0, 0
    each(function(v, _, h, w)
      s = s + (v or 0)
      local counted = v or (attrs.count_include_pad ~= false and h < H + py and w < W + px)
      if counted then n = n + 1 end
    end)
    local by = attrs.divisor_override or 0
    return s / (by ~= 0 and by or n)
  end)
end

local function adaptive(x, attrs, results, fn)
  local oh, ow = pair(attrs.output_size)
  local N, C, H, W = table.unpack(x.shape)
  local shape, outs = {N, C, oh, ow}, {}
  for k = 1, results do outs[k] = {shape = shape} end
  for p = 1, count(shape) do
    local index = index_of(shape, p)
    local list, places = {}, {}
    for h = (index[3] - 1) * H // oh, -(-index[3] * H // oh) - 1 do
      for w = (index[4] - 1) * W // ow, -(-index[4] * W // ow) - 1 do
        list[#list + 1], places[#places + 1] = get(x, {index[1], index[2], h + 1, w + 1}), h * W + w
      end
    end
    local values = {fn(list, places)}
    for k = 1, results do outs[k][p] = values[k] end
  end
  return table.unpack(outs)
end
R.adaptive_avg_pool2d = function(x, attrs) return adaptive(x, attrs, 1, function(list) return sum(list) / #list end) end
R.adaptive_max_pool2d = function(x, attrs)
  return adaptive(x, attrs, 2, function(list, places)
    local best, i = largest(list)
    return best, places[i + 1]
  end)
end

R.interpolate2d = function(x, attrs)
  local N, C, H, W = table.unpack(x.shape)
  local oh, ow = pair(attrs.size)
  --- Neighbours and weight of output place o (from 0).
  local function source(o, size, new, scale)
    local ratio = scale and scale ~= 0 and 1 / scale or size / new
    if (attrs.mode or "nearest") == "nearest" then
      local i = math.min(math.floor(o * ratio), size - 1)
      return i, i, 0
    end
    local c
    if attrs.align_corners then c = new > 1 and o * (size - 1) / (new - 1) or 0
    else c = math.max(0, (o + 0.5) * ratio - 0.5) end
    local low = math.min(math.floor(c), size - 1)
    return low, math.min(low + 1, size - 1), c - low
  end
  return build({N, C, oh, ow}, function(index)
    local h0, h1, fh = source(index[3] - 1, H, oh, attrs.scale_h)
    local w0, w1, fw = source(index[4] - 1, W, ow, attrs.scale_w)
    local function v(h, w) return get(x, {index[1], index[2], h + 1, w + 1}) end
    if (attrs.mode or "nearest") == "nearest" then return v(h0, w0) end
    -- at the edge both neighbours are one
    local function between(a, b, same, f) return same and a or a * (1 - f) + b * f end
    local top, bottom = between(v(h0, w0), v(h0, w1), w0 == w1, fw), between(v(h1, w0), v(h1, w1), w0 == w1, fw)
    return between(top, bottom, h0 == h1, fh)
  end)
end

-- ====== Normalization ======

--- Normalizes sets of places: key(index) names the set, number(index) the weight's place.
local function normalized(x, key, place, w, b, eps, stat_shape, o)
  local lists, order = {}, count(stat_shape)
  for g = 1, order do lists[g] = {} end
  for p = 1, #x do table.insert(lists[key(index_of(x.shape, p), p)], x[p]) end
  local mean, rstd, var = {shape = stat_shape}, {shape = stat_shape}, {}
  for g = 1, order do
    local list = lists[g]
    mean[g] = o.rms and 0 or sum(list) / #list
    local s = 0
    for _, v in ipairs(list) do s = s + (v - mean[g]) ^ 2 end
    var[g] = s / #list
    if o.mean then mean[g], var[g] = o.mean[g], o.var[g] end
    rstd[g] = 1 / math.sqrt(var[g] + eps)
  end
  local y = build(x.shape, function(index, p)
    local g, i = key(index, p), place(index, p)
    local v = (x[p] - mean[g]) * rstd[g] * (w and w[i] or 1) + (b and b[i] or 0)
    return o.relu and v < 0 and 0 or v
  end)
  return y, mean, rstd
end

R.batch_norm = function(x, w, b, rm, rv, attrs)
  local function channel(index) return index[2] end
  local o = {relu = attrs.relu}
  if attrs.training == false then o.mean, o.var = rm, rv end
  return normalized(x, channel, channel, w, b, attrs.eps or 1e-5, {x.shape[2]}, o)
end

local function row_norm(rms)
  return function(x, w, b, attrs)
    if rms then attrs, b = b, nil end
    local lead = #x.shape - (attrs.dims or 1)
    local length, shape = count(x.shape, lead + 1), table.move(x.shape, 1, lead, 1, {})
    local function row(_, p) return (p - 1) // length + 1 end
    local function place(_, p) return (p - 1) % length + 1 end
    local y, mean, rstd = normalized(x, row, place, w, b, attrs.eps or (rms and 1.1920928955078125e-7 or 1e-5), shape,
      {rms = rms})
    if rms then return y, rstd end
    return y, mean, rstd
  end
end
R.layer_norm, R.rms_norm = row_norm(false), row_norm(true)

R.group_norm = function(x, w, b, attrs)
  local wide = x.shape[2] // attrs.groups
  return normalized(x, function(index) return (index[1] - 1) * attrs.groups + (index[2] - 1) // wide + 1 end,
    function(index) return index[2] end, w, b, attrs.eps or 1e-5, {x.shape[1], attrs.groups}, {})
end

-- ====== Attention ======

R.attention = function(q, k, v, mask, attrs)
  local B, H, T, D = table.unpack(q.shape)
  local G, S, E = k.shape[2], k.shape[3], v.shape[4]
  local scale = attrs.scale and attrs.scale ~= 0 and attrs.scale or 1 / math.sqrt(D)
  local keep = attrs.dropout and attrs.dropout > 0 and philox.keeps(attrs.rng, B * H * T * S, attrs.dropout)
  local function mask_at(b, h, t, s)
    if not mask then return 0 end
    local full, own, n = {b, h, t, s}, {}, #mask.shape
    for d = 1, n do own[d] = mask.shape[d] == 1 and 1 or full[4 - n + d] end
    local m = mask[at(mask.shape, own)]
    return m == true and 0 or m == false and -inf or m
  end
  local lse = {shape = {B, H, T}}
  local out = {shape = {B, H, T, E}}
  for p = 1, B * H * T do
    local b, h, t = table.unpack(index_of(lse.shape, p))
    local g, scores, total = (h - 1) * G // H + 1, {}, 0
    local top = -inf
    for s = 1, S do
      local dot = 0
      for d = 1, D do dot = dot + get(q, {b, h, t, d}) * get(k, {b, g, s, d}) end
      local m = mask_at(b, h, t, s)
      scores[s] = (attrs.causal and s > t or m == -inf) and -inf or dot * scale + m -- what is masked is not looked at
      if scores[s] ~= scores[s] then top = nan elseif top == top then top = math.max(top, scores[s]) end
    end
    for s = 1, S do total = total + math.exp(scores[s] - (top == -inf and 0 or top)) end
    lse[p] = top + math.log(total)
    for e = 1, E do
      local acc = 0
      for s = 1, S do
        local weight = top == -inf and 0 or math.exp(scores[s] - top) / total
        if keep then weight = keep[(p - 1) * S + s] and weight / (1 - attrs.dropout) or 0 end
        acc = acc + weight * get(v, {b, g, s, e})
      end
      out[(p - 1) * E + e] = acc
    end
  end
  return out, lse
end

-- ====== Indexing ======

local function placed(index, d, to)
  local out = copy(index)
  out[d] = to
  return out
end

R.gather = function(x, ids, attrs)
  local n = #x.shape
  if n == 0 then return {shape = {}, x[1]} end
  local d = from_one(attrs.dim, n)
  return build(ids.shape, function(index, p) return get(x, placed(index, d, ids[p] + 1)) end)
end
R.index_select = function(x, ids, attrs)
  local d, shape = from_one(attrs.dim, #x.shape), copy(x.shape)
  shape[d] = #ids
  return build(shape, function(index) return get(x, placed(index, d, ids[index[d]] + 1)) end)
end

local function writing(step, whole)
  return function(x, ids, src, attrs)
    local d, out = from_one(attrs.dim, #x.shape), copy(x)
    out.shape = x.shape
    local shape = ids.shape
    if whole then
      shape = copy(x.shape)
      shape[d] = #ids
    end
    for p = 1, count(shape) do
      local index = index_of(shape, p)
      local id = whole and ids[index[d]] or ids[p]
      local to = at(x.shape, placed(index, d, id + 1))
      local v = src
      if type(src) == "table" then v = get(src, index) end
      out[to] = step(out[to], v)
    end
    return out
  end
end
R.scatter = writing(function(_, v) return v end)
R.scatter_add = writing(function(a, v) return number(a) + number(v) end)
R.index_add = writing(function(a, v) return number(a) + number(v) end, true)

R.embedding = function(w, ids, attrs)
  local shape, wide = copy(ids.shape), w.shape[2]
  shape[#shape + 1] = wide
  return build(shape, function(_, p)
    local id = ids[(p - 1) // wide + 1]
    if attrs.zero_padding and id == attrs.padding_idx then return 0.0 end
    return w[id * wide + (p - 1) % wide + 1]
  end)
end
R.one_hot = function(ids, attrs)
  local shape, n = copy(ids.shape), attrs.num_classes
  shape[#shape + 1] = n
  return build(shape, function(_, p) return ids[(p - 1) // n + 1] == (p - 1) % n and 1 or 0 end)
end

local function ordered(line, descending)
  local order = {}
  for i = 1, #line do order[i] = i end
  local function above(a, b) -- a stands over b; NaN over all
    if a ~= a or b ~= b then return a ~= a and b == b end
    return number(a) > number(b)
  end
  table.sort(order, function(i, j)
    local a, b = line[i], line[j]
    if above(a, b) then return descending or false end
    if above(b, a) then return not descending end
    return i < j
  end)
  local values, index = {}, {}
  for i, from in ipairs(order) do values[i], index[i] = line[from], from - 1 end
  return values, index
end
R.sort = along(function(line, attrs) return ordered(line, attrs.descending or false) end, 2)
R.topk = along(function(line, attrs)
  local values, index = ordered(line, attrs.largest ~= false)
  return table.move(values, 1, attrs.k, 1, {}), table.move(index, 1, attrs.k, 1, {})
end, 2)

R.flip = function(x, attrs)
  local set = dims_of(attrs.dims, #x.shape)
  return build(x.shape, function(index)
    for d in pairs(set) do index[d] = x.shape[d] + 1 - index[d] end
    return get(x, index)
  end)
end
local function triangle(keeps)
  return function(x, attrs)
    local n, k = #x.shape, attrs.diagonal or 0
    return build(x.shape, function(index, p)
      if keeps(index[n] - index[n - 1], k) then return x[p] end
      return type(x[p]) == "boolean" and false or 0.0
    end)
  end
end
R.tril = triangle(function(off, k) return off <= k end)
R.triu = triangle(function(off, k) return off >= k end)

R.pad = function(x, attrs)
  local n, shape, mode = #x.shape, copy(x.shape), attrs.mode or "constant"
  local before = {}
  for d = 1, n do before[d] = 0 end
  for i = 1, #attrs.pad, 2 do
    local d = n - (i - 1) // 2
    before[d] = attrs.pad[i]
    shape[d] = shape[d] + attrs.pad[i] + attrs.pad[i + 1]
  end
  local value = attrs.value or 0
  if type(x[1]) == "boolean" then value = value ~= 0 end
  return build(shape, function(index)
    for d = 1, n do
      local i, size = index[d] - before[d], x.shape[d]
      if i < 1 or i > size then
        if mode == "constant" then return value end
        if mode == "replicate" then i = math.max(1, math.min(i, size))
        elseif mode == "circular" then i = (i - 1) % size + 1
        else i = i < 1 and 2 - i or 2 * size - i end
      end
      index[d] = i
    end
    return get(x, index)
  end)
end

-- ====== Copies, fills, random numbers ======

local function same(x) return x end
R.cast = same
R.detach = same

--- Element of src at an index of a larger shape.
local function broadcast(src, index)
  local n, own = #src.shape, {}
  for d = 1, n do own[d] = src.shape[d] == 1 and 1 or index[#index - n + d] end
  return src[at(src.shape, own)]
end
R.copy_ = function(x, src) return build(x.shape, function(index) return broadcast(src, index) end) end
R.fill_ = function(x, value) return build(x.shape, function() return value end) end
R.arange_ = function(x, start, step) return build(x.shape, function(_, p) return start + (p - 1) * step end) end
R.eye_ = function(x) return build(x.shape, function(index) return index[1] == index[2] and 1 or 0 end) end

R.uniform_, R.normal_, R.random_ = philox.uniform, philox.normal, philox.random
R.bernoulli_ = function(x, attrs)
  local kept = philox.keeps(attrs.rng, #x, attrs.p or 0.5)
  return build(x.shape, function(_, p) return kept[p] and 0 or 1 end)
end
R.dropout = function(x, attrs)
  local p = attrs.p or 0.5
  local kept = philox.keeps(attrs.rng, #x, p)
  return build(x.shape, function(_, i) return kept[i] and x[i] * (1 / (1 - p)) or 0.0 end)
end

-- ====== Views ======

local function shaped(x, shape)
  local out, known, open = copy(x), 1, nil
  shape = copy(shape)
  for d, s in ipairs(shape) do if s == -1 then open = d else known = known * s end end
  if open then shape[open] = #x // known end
  out.shape = shape
  return out
end
R.view = function(x, attrs) return shaped(x, attrs.shape) end
R.reshape = R.view
R.flatten = function(x, attrs)
  local n, shape = #x.shape, {}
  local first, last = from_one(attrs.start_dim or 0, n), from_one(attrs.end_dim or -1, n)
  for d = 1, first - 1 do shape[#shape + 1] = x.shape[d] end
  shape[#shape + 1] = count(x.shape, first, last)
  for d = last + 1, n do shape[#shape + 1] = x.shape[d] end
  return shaped(x, shape)
end
R.permute = function(x, attrs)
  local shape = {}
  for k, d in ipairs(attrs.dims) do shape[k] = x.shape[from_one(d, #x.shape)] end
  return build(shape, function(index)
    local from = {}
    for k, d in ipairs(attrs.dims) do from[from_one(d, #x.shape)] = index[k] end
    return get(x, from)
  end)
end
R.transpose = function(x, attrs)
  local dims = {}
  for d = 1, #x.shape do dims[d] = d - 1 end
  local a, b = from_one(attrs.dim0, #x.shape), from_one(attrs.dim1, #x.shape)
  dims[a], dims[b] = dims[b], dims[a]
  return R.permute(x, {dims = dims})
end
R.t = function(x) return #x.shape < 2 and x or R.permute(x, {dims = {1, 0}}) end
R.squeeze = function(x, attrs)
  local set, shape = dims_of(attrs.dim, #x.shape), {}
  for d, s in ipairs(x.shape) do if not (set[d] and s == 1) then shape[#shape + 1] = s end end
  return shaped(x, shape)
end
R.unsqueeze = function(x, attrs)
  local shape = copy(x.shape)
  table.insert(shape, from_one(attrs.dim, #shape + 1), 1)
  return shaped(x, shape)
end
R.expand = function(x, attrs)
  local shape = copy(attrs.shape)
  for d, s in ipairs(shape) do if s == -1 then shape[d] = x.shape[#x.shape - #shape + d] end end
  return build(shape, function(index) return broadcast(x, index) end)
end
R.narrow = function(x, attrs)
  local d, shape = from_one(attrs.dim, #x.shape), copy(x.shape)
  shape[d] = attrs.length
  return build(shape, function(index) return get(x, placed(index, d, index[d] + attrs.start)) end)
end
R.select = function(x, attrs)
  local d = from_one(attrs.dim, #x.shape)
  local out = R.narrow(x, {dim = d - 1, start = attrs.index, length = 1})
  local shape = copy(x.shape)
  table.remove(shape, d)
  return shaped(out, shape)
end
R.expand_reduced = function(x, attrs)
  local set, shape = dims_of(attrs.dim, #attrs.shape), {}
  for d, s in ipairs(attrs.shape) do shape[d] = set[d] and 1 or s end
  return R.expand(shaped(x, shape), {shape = attrs.shape})
end
R.grad_channels = function(x, attrs) return build(attrs.shape, function(index) return x[index[2]] end) end
R.select_pick = function(x, ids, attrs)
  if #x.shape == 0 then return {shape = {}, x[1]} end
  local d = from_one(attrs.dim, #x.shape)
  local shape = copy(x.shape)
  shape[d] = 1
  local wide = R.gather(x, shaped(ids, shape), attrs)
  if not attrs.keepdim then table.remove(shape, d) end
  return shaped(wide, shape)
end
R.narrow_backward = function(x, attrs)
  local d = from_one(attrs.dim, #attrs.shape)
  return build(attrs.shape, function(index)
    local i = index[d] - attrs.start
    if i < 1 or i > x.shape[d] then return 0 end
    return get(x, placed(index, d, i))
  end)
end

return R
