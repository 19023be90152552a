-- ops_index_spec.lua -- the ops that read and write at places: gather, scatter, index_select, index_add, embedding and
-- their gradients, one_hot, sort, topk, flip, tril, triu, pad.  Values against loops in Lua, in every dtype and memory
-- order; gradients by differences; errors; and cuda against the CPU to the bit.
-- One case alone:  build/halfmoon spec/run.lua --filter='sort: float16' spec/ops_index_spec.lua

local hm = require "halfmoon"
local core = require "halfmoon.core"
local fixed = require "spec.support.inputs"
local numbers = require "spec.support.numbers"
local gradients = require "spec.support.gradients"
local devices = require "spec.support.devices"
local raises = require "spec.support.raises"

local nan, inf = 0 / 0, math.huge
local FLOATS = {"float32", "float16", "bfloat16", "float64"}
local DTYPES = {"float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool"}
local IDS = {"int64", "int32", "uint8"}

-- ====== Plain tensors: {shape, flat values}, coordinates from 0 ======

local count = fixed.count

local function position(shape, at)
  local p = 0
  for d = 1, #shape do p = p * shape[d] + at[d] end
  return p + 1
end

--- Calls fn(coordinates, place in the flat list) for each element, in row-major order.
local function each(shape, fn)
  local at = {}
  for i = 1, count(shape) do
    local rest = i - 1
    for d = #shape, 1, -1 do at[d], rest = rest % shape[d], rest // shape[d] end
    fn(at, i)
  end
end

local function changed(at, dim, value)
  local out = table.move(at, 1, #at, 1, {})
  out[dim] = value
  return out
end

local function plain(t) return {shape = t.shape, flat = numbers.flat(t)} end

local function zeros(shape)
  local flat = {}
  for i = 1, count(shape) do flat[i] = 0 end
  return {shape = shape, flat = flat}
end

local function copy(t) return {shape = t.shape, flat = table.move(t.flat, 1, #t.flat, 1, {})} end

local naive = {}

function naive.gather(x, dim, index)
  local out = zeros(index.shape)
  each(index.shape, function(at, i) out.flat[i] = x.flat[position(x.shape, changed(at, dim, index.flat[i]))] end)
  return out
end

--- src added (or written) at index along dim of a copy of x.
function naive.scatter(x, dim, index, src, put)
  local out = copy(x)
  each(index.shape, function(at, i)
    local p = position(x.shape, changed(at, dim, index.flat[i]))
    local v = type(src) == "number" and src or src.flat[position(src.shape, at)]
    if put then out.flat[p] = v else out.flat[p] = out.flat[p] + v end
  end)
  return out
end

--- A list of ids as an index for every element of `shape`, whose dim `dim` has the list's length.
function naive.spread(ids, dim, shape)
  local out = zeros(shape)
  each(shape, function(at, i) out.flat[i] = ids.flat[at[dim] + 1] end)
  return out
end

function naive.index_select(x, dim, ids)
  local shape = changed(x.shape, dim, #ids.flat)
  return naive.gather(x, dim, naive.spread(ids, dim, shape))
end

local function before(a, b)
  if a ~= a then return false end
  return b ~= b or a < b
end

--- The first k in order along dim: values and places.
function naive.sort(x, dim, descending, k)
  local n = x.shape[dim]
  local shape = changed(x.shape, dim, k or n)
  local values, places = zeros(shape), zeros(shape)
  each(changed(x.shape, dim, 1), function(at)
    local row = {}
    for i = 0, n - 1 do row[i + 1] = {x.flat[position(x.shape, changed(at, dim, i))], i} end
    table.sort(row, function(a, b)
      local p, q = a[1], b[1]
      if descending then p, q = q, p end
      if before(p, q) then return true end
      if before(q, p) then return false end
      return a[2] < b[2]
    end)
    for i = 0, (k or n) - 1 do
      local p = position(shape, changed(at, dim, i))
      values.flat[p], places.flat[p] = row[i + 1][1], row[i + 1][2]
    end
  end)
  return values, places
end

function naive.flip(x, dims)
  local out = zeros(x.shape)
  each(x.shape, function(at, i)
    local from = table.move(at, 1, #at, 1, {})
    for _, d in ipairs(dims) do from[d] = x.shape[d] - 1 - at[d] end
    out.flat[i] = x.flat[position(x.shape, from)]
  end)
  return out
end

function naive.triangle(x, lower, diagonal)
  local out, n = zeros(x.shape), #x.shape
  each(x.shape, function(at, i)
    local above = at[n] - at[n - 1]
    local keep = above >= diagonal
    if lower then keep = above <= diagonal end
    if keep then out.flat[i] = x.flat[i] end
  end)
  return out
end

local SOURCE = {
  constant = function() end,
  reflect = function(j, n) return j < 0 and -j or 2 * (n - 1) - j end,
  replicate = function(j, n) return j < 0 and 0 or n - 1 end,
  circular = function(j, n) return j % n end,
}

--- Calls fn(place in the padded tensor, place in x or nil).
local function each_padded(x_shape, pad, mode, fn)
  local n, shape = #x_shape, {}
  for d = 1, n do
    local k = 2 * (n - d)
    shape[d] = x_shape[d] + (pad[k + 1] or 0) + (pad[k + 2] or 0)
  end
  each(shape, function(at, i)
    local from = {}
    for d = 1, n do
      local j = at[d] - (pad[2 * (n - d) + 1] or 0)
      if j < 0 or j >= x_shape[d] then j = SOURCE[mode](j, x_shape[d]) end
      from[d] = j
      if not j then return fn(i, nil) end
    end
    fn(i, position(x_shape, from))
  end)
  return shape
end

function naive.pad(x, pad, mode, value)
  local flat = {}
  local shape = each_padded(x.shape, pad, mode, function(i, p)
    flat[i] = value
    if p then flat[i] = x.flat[p] end
  end)
  return {shape = shape, flat = flat}
end

-- ====== Inputs ======

--- Values that every dtype holds exactly, and whose sums do too.
local function filled(shape, dtype, seed)
  local list = {}
  for i = 1, count(shape) do
    local v = (i * 7 + (seed or 0) * 5) % 23
    if dtype == "bool" then v = v % 3 == 0 elseif dtype ~= "uint8" then v = v - 11 end
    list[i] = v
  end
  return hm.tensor(list, {dtype = dtype}):view(shape)
end

--- Values that no half type holds.
local function real(shape, dtype, seed)
  local list = {}
  for i = 1, count(shape) do list[i] = math.sin(i * 12.9898 + (seed or 0) * 78.233) * 2 end
  return hm.tensor(list, {dtype = dtype}):view(shape)
end

local function ids(shape, limit, dtype, seed)
  local list = {}
  for i = 1, count(shape) do list[i] = (i * i + i * 5 + (seed or 1)) % limit end
  return hm.tensor(list, {dtype = dtype or "int64"}):view(shape)
end

-- The same values in other memory orders.
local function orders(t)
  if t:dim() < 2 then return {t, hm.stack({t, t}, -1):select(-1, 2)} end
  return {t, t:transpose(1, -1):contiguous():transpose(1, -1), hm.stack({t, t}, -1):select(-1, 2)}
end

local function number_of(v) return v == true and 1 or v == false and 0 or v end

local function assert_equal(got, want, what)
  assert.same(want.shape, got.shape, what)
  local g, w = numbers.flat(got), want.flat
  for i = 1, #w do
    if not numbers.same(number_of(g[i]), number_of(w[i])) then
      error(("%s: value %d is %s, expected %s"):format(what, i, tostring(g[i]), tostring(w[i])), 2)
    end
  end
end

--- Sums of booleans: whether any was true.
local function either(t)
  for i, v in ipairs(t.flat) do t.flat[i] = v ~= 0 end
  return t
end

-- ====== gather, scatter, scatter_add ======

describe("gather", function()
  for _, dtype in ipairs(DTYPES) do
    it("gather: " .. dtype .. " along each dim, any memory order, any dtype of ids", function()
      local x = filled({3, 4, 5}, dtype)
      for _, case in ipairs {{1, {6, 4, 5}}, {2, {2, 7, 5}}, {3, {3, 4, 2}}, {-1, {3, 1, 9}}, {1, {1, 2, 3}}} do
        local dim = case[1] < 0 and 4 + case[1] or case[1]
        for k, y in ipairs(orders(x)) do
          local index = orders(ids(case[2], x:size(dim), IDS[k]))[k]
          local got = y:gather(case[1], index)
          assert.equal(dtype, got.dtype)
          assert_equal(got, naive.gather(plain(x), dim, plain(index)), "gather")
        end
      end
    end)
  end

  it("gather: of 0-dim tensors, and of nothing", function()
    assert.equal(7, hm.tensor(7):gather(1, hm.tensor(0, {dtype = "i64"})):item())
    assert.same({0, 4}, hm.ones({3, 4}):gather(1, hm.zeros({0, 4}, {dtype = "i64"})).shape)
    assert.same({3, 0}, hm.ones({3, 4}):gather(2, hm.zeros({3, 0}, {dtype = "i64"})).shape)
    assert.same({0, 2}, hm.ones({0, 4}):gather(2, hm.zeros({0, 2}, {dtype = "i64"})).shape)
  end)

  it("gather: NaN and infinities pass, and half gradients are summed in float32", function()
    numbers.assert_same(hm.tensor({nan, inf, -inf}):gather(1, hm.tensor({2, 0, 1, 0}, {dtype = "i64"})),
      {-inf, nan, inf, nan})
    for _, dtype in ipairs {"float16", "bfloat16"} do
      local x = hm.zeros({3}, {dtype = dtype, requires_grad = true})
      -- 600 ones: a sum rounded at each step would stop at 256 in bfloat16
      x:gather(1, hm.zeros({600}, {dtype = "i64"})):sum():backward()
      numbers.assert_same(x.grad, {600, 0, 0})
    end
  end)

  it("gather: gradients, and the gradient of the gradient", function()
    local index = ids({3, 6}, 4)
    gradients.check(function(x) return x:gather(2, index) end, {real({3, 4}, "f64")})
    gradients.check(function(x) return x:gather(1, ids({7, 2}, 3)) end, {real({3, 4}, "f64")})
    gradients.check_second(function(x) return x:gather(2, index):pow(3) end, {real({3, 4}, "f64")})
  end)

  it("gather: says what is wrong", function()
    local x = hm.ones({2, 3})
    raises({"gather: index 3 is outside of [0, 3)", "ids count from 0"}, x.gather, x, 2, hm.tensor({{0, 3}}, {dtype = "i64"}))
    raises("gather: index -1 is outside of [0, 3)", x.gather, x, 2, hm.tensor({{-1}}, {dtype = "i64"}))
    raises({"index must have as many dims as x", "i64[2]"}, x.gather, x, 2, hm.tensor({0, 1}, {dtype = "i64"}))
    raises("no larger except along dim 2", x.gather, x, 2, hm.zeros({3, 1}, {dtype = "i64"}))
    raises("must hold integers", x.gather, x, 2, hm.zeros({2, 1}))
    raises("dim", x.gather, x, 3, hm.zeros({2, 1}, {dtype = "i64"}))
  end)
end)

describe("scatter", function()
  local CASES = {{1, {7, 4, 5}}, {2, {2, 9, 5}}, {3, {3, 4, 2}}, {3, {3, 4, 40}}, {1, {50, 2, 3}}}

  for _, dtype in ipairs(DTYPES) do
    it("scatter: " .. dtype .. ": of several ids the last stays, along each dim, any memory order", function()
      local x = filled({3, 4, 5}, dtype)
      for _, case in ipairs(CASES) do
        for k, y in ipairs(orders(x)) do
          local index = orders(ids(case[2], x:size(case[1]), IDS[k]))[k]
          local src = filled(case[2], dtype, 3)
          assert_equal(y:scatter(case[1], index, orders(src)[k]),
            naive.scatter(plain(x), case[1], plain(index), plain(src), true), "scatter")
        end
      end
    end)

    it("scatter_add: " .. dtype .. " along each dim, any memory order", function()
      local x = filled({3, 4, 5}, dtype)
      for _, case in ipairs(CASES) do
        for k, y in ipairs(orders(x)) do
          local index = orders(ids(case[2], x:size(case[1]), IDS[k]))[k]
          local src = filled(case[2], dtype, 3)
          local got = y:scatter_add(case[1], index, orders(src)[k])
          assert.equal(dtype, got.dtype)
          if dtype ~= "bool" then
            local want = naive.scatter(plain(x), case[1], plain(index), plain(src))
            if dtype == "uint8" then for i, v in ipairs(want.flat) do want.flat[i] = v % 256 end end
            assert_equal(got, want, "scatter_add")
          else
            assert_equal(got, either(naive.scatter(plain(x:to("i64")), case[1], plain(index), plain(src:to("i64")))), "or")
          end
        end
      end
    end)
  end

  it("scatter: a number as src", function()
    local x, index = filled({3, 4}, "float32"), ids({2, 3}, 4)
    assert_equal(x:scatter(2, index, 2.5), naive.scatter(plain(x), 2, plain(index), 2.5, true), "scatter")
    assert.equal("float16", x:half():scatter(2, index, 0.1).dtype)
    numbers.assert_same(hm.zeros({2}, {dtype = "f16"}):scatter(1, hm.tensor({1}, {dtype = "i64"}), 0.1),
      {0, hm.tensor({0.1}, {dtype = "f16"}):select(1, 1):item()})
    assert.equal("int64", hm.zeros({2}, {dtype = "i64"}):scatter(1, hm.tensor({1}, {dtype = "i64"}), 3).dtype)
  end)

  it("scatter and scatter_add: half types are summed in float32 and rounded once", function()
    for _, dtype in ipairs {"float16", "bfloat16"} do
      for _, n in ipairs {20, 900} do
        local x, src, index = real({2, 5}, dtype), real({2, n}, dtype, 4), ids({2, n}, 5)
        local exact = x:double():scatter_add(2, index, src:double()):float()
        local got, want = numbers.flat(x:scatter_add(2, index, src)), numbers.flat(exact)
        for i = 1, #want do assert.is_true(numbers.ulps(got[i], want[i], dtype) <= 0.51) end
      end
    end
  end)

  it("scatter and scatter_add: gradients", function()
    for _, n in ipairs {6, 40} do
      local index = ids({3, n}, 4)
      gradients.check(function(x, src) return x:scatter_add(2, index, src) end,
        {real({3, 4}, "f64"), real({3, n}, "f64", 2)})
    end
    local index = hm.tensor({{2, 0}, {1, 3}}, {dtype = "i64"})
    gradients.check(function(x, src) return x:scatter(2, index, src) end, {real({3, 4}, "f64"), real({2, 2}, "f64", 2)})
    gradients.check(function(x) return x:scatter(2, index, 1.5) end, {real({3, 4}, "f64")})
    gradients.check_second(function(x, src) return x:scatter_add(2, index, src):pow(2) end,
      {real({3, 4}, "f64"), real({2, 2}, "f64", 2)})
  end)

  it("scatter: a larger src, empty ids, 0-dim tensors, refusals", function()
    local x, src, index = filled({3, 4}, "float32"), filled({5, 6}, "float32", 1), ids({2, 3}, 4)
    assert_equal(x:scatter_add(2, index, src), naive.scatter(plain(x), 2, plain(index), plain(src)), "larger")
    raises("must have index's shape", x.scatter, x, 2, index, src:requires_grad_())
    raises("at least as large", x.scatter, x, 2, index, hm.ones({2, 2}))
    numbers.assert_same(x:scatter(1, hm.zeros({0, 4}, {dtype = "i64"}), hm.ones({0, 4})), x)
    assert.equal(5, hm.tensor(2):scatter_add(1, hm.tensor(0, {dtype = "i64"}), hm.tensor(3)):item())
    raises("scatter: index 4 is outside of [0, 4)", x.scatter, x, 2, hm.tensor({{4}}, {dtype = "i64"}), 1)
    raises("scatter_add: index 9 is outside of [0, 4)", x.scatter_add, x, 2, hm.full({2, 40}, 9, {dtype = "i64"}), hm.ones({2, 40}))
  end)
end)

-- ====== index_select, index_add, embedding ======

describe("index_select", function()
  for _, dtype in ipairs(DTYPES) do
    it("index_select and index_add: " .. dtype .. " along each dim, any memory order", function()
      local x = filled({3, 4, 16}, dtype)
      for dim = 1, 3 do
        for k, y in ipairs(orders(x)) do
          local index = orders(ids({40}, x:size(dim), IDS[k]))[k % 2 + 1]
          local want = naive.index_select(plain(x), dim, plain(index))
          assert_equal(y:index_select(dim, index), want, "index_select")
          if dtype ~= "bool" then
            local src = filled(want.shape, dtype, 2)
            local sums = naive.scatter(plain(x), dim, naive.spread(plain(index), dim, want.shape), plain(src))
            if dtype == "uint8" then for i, v in ipairs(sums.flat) do sums.flat[i] = v % 256 end end
            assert_equal(y:index_add(dim, index, orders(src)[k]), sums, "index_add")
          end
        end
      end
    end)
  end

  it("index_select and index_add: gradients", function()
    for dim = 1, 2 do
      local index = ids({5}, 3)
      local shape = dim == 1 and {5, 9} or {3, 5}
      gradients.check(function(x) return x:index_select(dim, index) end, {real({3, 9}, "f64")})
      gradients.check(function(x, src) return x:index_add(dim, index, src) end,
        {real({3, 9}, "f64"), real(shape, "f64", 3)})
      gradients.check_second(function(x) return x:index_select(dim, index):pow(3) end, {real({3, 4}, "f64")})
    end
  end)

  it("index_select and index_add: 0-dim, empty, refusals", function()
    local one = hm.tensor({0}, {dtype = "i64"})
    assert.equal(3, hm.tensor(3):index_select(1, one):item())
    assert.equal(5, hm.tensor(3):index_add(1, one, hm.tensor(2)):item())
    local x, none = hm.ones({2, 3}), hm.zeros({0}, {dtype = "i64"})
    assert.same({2, 0}, x:index_select(2, none).shape)
    numbers.assert_same(x:index_add(2, none, hm.ones({2, 0})), x)
    raises("index_select: index 3 is outside of [0, 3)", x.index_select, x, 2, hm.tensor({3}, {dtype = "i64"}))
    raises("index must be a list of ids", x.index_select, x, 2, hm.zeros({1, 1}, {dtype = "i64"}))
    raises({"src must be [2,1]", "[2,2]"}, x.index_add, x, 2, one, hm.ones({2, 2}))
    raises("index_add: index -2 is outside of [0, 3)", x.index_add, x, 2, hm.tensor({-2}, {dtype = "i64"}), hm.ones({2, 1}))
  end)
end)

describe("embedding", function()
  local function embedding(w, index, attrs) return core.call("embedding", w, index, attrs or {}) end

  for _, dtype in ipairs(FLOATS) do
    it("embedding: " .. dtype .. ": rows by id, and sums of gradients rounded once", function()
      for _, width in ipairs {1, 5, 16, 300} do
        local w = real({7, width}, dtype)
        for _, shape in ipairs {{}, {9}, {2, 3}, {3, 50}} do
          local index = ids(shape, 6)
          local got = embedding(w, index)
          local rows = naive.index_select(plain(w), 1, plain(index))
          rows.shape = table.move(shape, 1, #shape, 1, {})
          rows.shape[#shape + 1] = width
          assert_equal(got, rows, "embedding")
          local g = real(rows.shape, dtype, 5)
          local back = core.call("embedding_backward", g, index, {shape = {7, width}, padding_idx = 2})
          local n = count(shape)
          local want = naive.scatter(zeros({7, width}), 1, naive.spread(plain(index), 1, {n, width}),
            {shape = {n, width}, flat = numbers.flat(g)})
          for i = 1, width do want.flat[2 * width + i] = 0 end
          local flat = numbers.flat(back)
          for i = 1, #flat do
            local near = math.abs(flat[i] - want.flat[i]) <= 2e-6 * n
            assert.is_true(near or numbers.ulps(flat[i], want.flat[i], dtype) <= 0.51)
          end
        end
      end
    end)
  end

  it("embedding: gradients; padding_idx gets none; second derivatives", function()
    local index = ids({2, 3}, 4)
    gradients.check(function(w) return embedding(w, index) end, {real({4, 3}, "f64")})
    gradients.check_second(function(w) return embedding(w, index):pow(3) end, {real({4, 3}, "f64")})
    local w = real({4, 3}, "f32"):requires_grad_()
    embedding(w, hm.tensor({1, 3, 1}, {dtype = "i64"}), {padding_idx = 1}):sum():backward()
    numbers.assert_same(w.grad, {{0, 0, 0}, {0, 0, 0}, {0, 0, 0}, {1, 1, 1}})
    -- by its own gradient, embedding_backward passes nothing where padding_idx stands
    local g = hm.ones({3, 2}):requires_grad_()
    core.call("embedding_backward", g, hm.tensor({1, 0, 1}, {dtype = "i64"}), {shape = {2, 2}, padding_idx = 1}):sum():backward()
    numbers.assert_same(g.grad, {{0, 0}, {1, 1}, {0, 0}})
  end)

  it("embedding: keeps float32 weights inside autocast; many ids, many rows", function()
    hm.amp.autocast("f16", function()
      assert.equal("float32", embedding(hm.ones({3, 2}), hm.tensor({0}, {dtype = "i64"})).dtype)
    end)
    local w = hm.zeros({5000, 8}, {requires_grad = true})
    local index = ids({3000}, 4999)
    embedding(w, index):sum():backward()
    assert.equal(24000, w.grad:sum():item())
    local counts = zeros({5000})
    for _, id in ipairs(numbers.flat(index)) do counts.flat[id + 1] = counts.flat[id + 1] + 1 end
    assert_equal(w.grad:select(2, 1), counts, "counts")
  end)

  it("embedding: refusals", function()
    local w = hm.ones({3, 2})
    raises("embedding: index 3 is outside of [0, 3)", embedding, w, hm.tensor({3}, {dtype = "i64"}))
    raises("weight must have 2 dims", embedding, hm.ones({3}), hm.tensor({0}, {dtype = "i64"}))
    raises("padding_idx must be an id from 0 to 2", embedding, w, hm.tensor({0}, {dtype = "i64"}), {padding_idx = 3})
    raises("embedding_backward: index 7 is outside of [0, 3)", core.call, "embedding_backward", hm.ones({1, 2}),
      hm.tensor({7}, {dtype = "i64"}), {shape = {3, 2}})
  end)

  it("one_hot", function()
    for _, dtype in ipairs(IDS) do
      for _, index in ipairs(orders(ids({3, 4}, 5, dtype))) do
        local want = zeros({3, 4, 5})
        for i, id in ipairs(numbers.flat(index)) do want.flat[(i - 1) * 5 + id + 1] = 1 end
        local got = core.call("one_hot", index, {num_classes = 5})
        assert.equal("int64", got.dtype)
        assert_equal(got, want, "one_hot")
      end
    end
    numbers.assert_same(core.call("one_hot", hm.tensor(1, {dtype = "i64"}), {num_classes = 3}), {0, 1, 0})
    raises("one_hot: index 5 is outside of [0, 5)", core.call, "one_hot", hm.tensor({5}, {dtype = "i64"}), {num_classes = 5})
    raises("num_classes must be at least 1", core.call, "one_hot", hm.tensor({0}, {dtype = "i64"}), {num_classes = 0})
  end)
end)

-- ====== sort, topk ======

describe("sort", function()
  local function check_sorted(x, dim, descending, k)
    local values, places, what
    if k then values, places, what = x:topk(k, dim, descending)
    else values, places = x:sort(dim, descending) end
    local v, p = naive.sort(plain(x), dim < 0 and x:dim() + 1 + dim or dim, descending, k)
    assert.equal(x.dtype, values.dtype)
    assert.equal("int64", places.dtype)
    assert_equal(places, p, "places")
    assert_equal(values, v, what or "values")
  end

  for _, dtype in ipairs(DTYPES) do
    it("sort: " .. dtype .. ": stable, along each dim, any memory order", function()
      for _, x in ipairs(orders(dtype == "bool" and filled({3, 7, 20}, "int64"):gt(0) or filled({3, 7, 20}, dtype))) do
        if dtype == "bool" then x = x:contiguous() end
        for _, dim in ipairs {1, 2, -1} do
          for _, descending in ipairs {false, true} do
            if dtype == "bool" then
              local v, p = x:sort(dim, descending)
              local wv, wp = naive.sort(plain(x:to("i64")), dim < 0 and 3 or dim, descending)
              assert_equal(p, wp, "places")
              assert_equal(v, wv, "values")
            else
              check_sorted(x, dim, descending)
              check_sorted(x, dim, descending, 2)
            end
          end
        end
      end
    end)

    if dtype ~= "bool" and dtype ~= "uint8" then
      it("sort: " .. dtype .. ": long rows", function()
        local list = {}
        for i = 1, 2 * 2600 do list[i] = (i * 7919 + i // 3 * 104729) % 1009 - 500 end
        local x = hm.tensor(list, {dtype = dtype}):view({2, 2600})
        check_sorted(x, 2, false)
        check_sorted(x, 2, true)
        check_sorted(x, 2, true, 7)
        check_sorted(x, 2, false, 1500)
      end)
    end
  end

  it("sort: NaN counts as largest, zeros are equal, infinities have their place", function()
    for _, dtype in ipairs(FLOATS) do
      local x = hm.tensor({nan, inf, 0.0, -0.0, -inf, nan, 1, -1, 0.0}, {dtype = dtype})
      local v, p = x:sort()
      numbers.assert_same(v, {-inf, -1, 0, 0, 0, 1, inf, nan, nan})
      numbers.assert_same(p, {4, 7, 2, 3, 8, 6, 1, 0, 5})
      v, p = x:sort(1, true)
      numbers.assert_same(v, {nan, nan, inf, 1, 0, 0, 0, -1, -inf})
      numbers.assert_same(p, {0, 5, 1, 6, 2, 3, 8, 7, 4})
      numbers.assert_same(select(2, x:topk(3)), {0, 5, 1})
      numbers.assert_same(select(2, x:topk(3, 1, false)), {4, 7, 2})
    end
    local big = hm.tensor({math.maxinteger, math.mininteger, 0, -1}, {dtype = "i64"})
    numbers.assert_same(select(2, big:sort()), {1, 3, 2, 0})
    numbers.assert_same(hm.tensor({2147483647, -2147483648, 5}, {dtype = "i32"}):sort(), {-2147483648, 5, 2147483647})
  end)

  it("sort: 0-dim, empty, gradients, refusals", function()
    local v, p = hm.tensor(3):sort()
    assert.equal(3, v:item())
    assert.equal(0, p:item())
    assert.equal(3, (hm.tensor(3):topk(1)):item())
    assert.same({0, 4}, hm.ones({0, 4}):sort().shape)
    assert.same({3, 0}, hm.ones({3, 0}):sort().shape)
    assert.same({3, 0}, hm.ones({3, 5}):topk(0).shape)
    gradients.check(function(x) return (x:sort(1)) end, {real({5, 3}, "f64")})
    gradients.check(function(x) return (x:topk(2, 2)) end, {real({3, 5}, "f64")})
    gradients.check_second(function(x) return (x:sort(2, true)):pow(3) end, {real({2, 4}, "f64")})
    local x = hm.ones({3, 5})
    raises("topk: k must lie between 0 and 5", x.topk, x, 6)
    raises("topk: k must lie between 0 and 3", x.topk, x, 4, 1)
    raises("k must be 1 for a 0-dim tensor", function() hm.tensor(1):topk(0) end)
  end)
end)

-- ====== flip, tril, triu, pad ======

describe("placing", function()
  for _, dtype in ipairs(DTYPES) do
    it("flip, tril, triu: " .. dtype .. ", any memory order", function()
      for _, x in ipairs(orders(filled({3, 4, 5}, dtype))) do
        for _, dims in ipairs {{1}, {2, 3}, {1, 2, 3}, {-1}} do
          local want = naive.flip(plain(x), dims[1] == -1 and {3} or dims)
          assert_equal(x:flip(dims), want, "flip")
        end
        for diagonal = -5, 6 do
          assert_equal(x:tril(diagonal), naive.triangle(plain(x), true, diagonal), "tril")
          assert_equal(x:triu(diagonal), naive.triangle(plain(x), false, diagonal), "triu")
        end
      end
    end)

    it("pad: " .. dtype .. ": every mode, any memory order", function()
      for _, x in ipairs(orders(filled({2, 3, 4, 5}, dtype))) do
        for _, case in ipairs {{"constant", {1, 2}}, {"constant", {-1, 2, 0, -2, 3, 1}}, {"constant", {1, 0, 0, 1, 1, 0, 0, 2}},
          {"constant", {-3, 6}}, {"reflect", {4, 3}}, {"reflect", {1, 2, 3, 0}}, {"replicate", {3, 7, 1, 0}},
          {"circular", {5, 2, 1, 4}}, {"reflect", {0, 1, 2, 1, 1, 2}}} do
          local value = dtype == "bool" and 1 or 3
          local got = x:pad(case[2], {mode = case[1], value = value})
          assert.equal(dtype, got.dtype)
          assert_equal(got, naive.pad(plain(x), case[2], case[1], value), case[1])
        end
      end
    end)
  end

  it("tril and triu: diagonals far outside", function()
    local x = hm.ones({3, 3})
    assert.equal(9, x:tril(math.maxinteger):sum():item())
    assert.equal(0, x:tril(math.mininteger):sum():item())
    assert.equal(0, x:triu(math.maxinteger):sum():item())
    assert.equal(9, x:triu(math.mininteger):sum():item())
    numbers.assert_same(hm.tensor({{nan, nan}, {nan, nan}}):tril(-1), {{0, 0}, {nan, 0}})
  end)

  it("pad: keeps channels-last, takes empty tensors, passes NaN", function()
    local x = core.call("cast", filled({2, 3, 4, 5}, "float32"), {layout = "channels_last"})
    assert_equal(x:pad({1, 1, 2, 0}, "reflect"), naive.pad(plain(x), {1, 1, 2, 0}, "reflect"), "reflect")
    assert.equal(1, x:pad({1, 1}):stride(2))
    numbers.assert_same(hm.ones({2, 0}):pad({1, 2}, {value = 5}), {{5, 5, 5}, {5, 5, 5}})
    numbers.assert_same(hm.tensor({nan, 1}):pad({1, 0}, "replicate"), {nan, nan, 1})
    numbers.assert_same(hm.tensor({1, 2}):pad({1, 0}, {value = -inf}), {-inf, 1, 2})
  end)

  it("flip, tril, triu, pad: gradients", function()
    local x = real({3, 4}, "f64")
    gradients.check(function(y) return y:flip({1, 2}) end, {x})
    gradients.check(function(y) return y:tril(-1) end, {x})
    gradients.check(function(y) return y:triu(1) end, {x})
    for _, case in ipairs {{"constant", {1, -2, 2, 1}}, {"reflect", {3, 2, 1, 2}}, {"replicate", {2, 3, 0, 4}},
      {"circular", {4, 1, 3, 2}}} do
      gradients.check(function(y) return y:pad(case[2], case[1]) end, {x})
      gradients.check_second(function(y) return y:pad(case[2], case[1]):pow(3) end, {x})
    end
    gradients.check(function(y) return y:pad({2, 1, 1, 1, 1, 1}, "circular") end, {real({2, 2, 3}, "f64")})
  end)

  it("pad_backward: long rows, half types summed in float32", function()
    for _, dtype in ipairs {"float32", "float16", "bfloat16"} do
      local x = real({2, 3, 600}, dtype):requires_grad_()
      for _, mode in ipairs {"reflect", "replicate", "circular"} do
        local pad = {300, 599, 1, 2}
        local y = x:pad(pad, mode)
        local g = real(y.shape, dtype, 2)
        x.grad = nil
        y:backward(g)
        local want, flat = zeros(x.shape), numbers.flat(g)
        each_padded(x.shape, pad, mode, function(i, p) want.flat[p] = want.flat[p] + flat[i] end)
        local got = numbers.flat(x.grad)
        for i = 1, #got do
          local near = math.abs(got[i] - want.flat[i]) <= 1e-4
          assert.is_true(near or numbers.ulps(got[i], want.flat[i], dtype) <= 0.51)
        end
      end
    end
  end)

  it("flip and pad: refusals", function()
    local x = hm.ones({2, 3})
    raises("flip: dim 1 is given twice", x.flip, x, {1, -2})
    raises("must have at least 2 dims", function() hm.ones({3}):tril() end)
    raises("reflect needs pads smaller than the size: dim 2 has size 3", x.pad, x, {3, 0}, "reflect")
    raises("circular needs pads of at most the size", x.pad, x, {0, 4}, "circular")
    raises("negative pads cut in constant mode only", x.pad, x, {-1, 0}, "replicate")
    raises("replicate has nothing to repeat", function() hm.ones({2, 0}):pad({1, 0}, "replicate") end)
    raises("{left, right} for each dim", x.pad, x, {1})
    raises("3 pairs of pads for 2 dims", x.pad, x, {1, 1, 1, 1, 1, 1})
    raises("cut more than there is", x.pad, x, {-2, -2})
    raises("too large", x.pad, x, {math.maxinteger, math.maxinteger})
    raises("cut more than there is", x.pad, x, {math.mininteger, 5})
  end)
end)

-- ====== Any number of threads ======

it("the same bits for any number of threads", devices.cpu_only("counts the CPU's threads", function()
  local before_ = hm.cpu.features().threads
  local x, index = real({300, 400}, "bfloat16"), ids({300, 400}, 300)
  local list, w = ids({2000}, 350), real({2000, 96}, "float32")
  local function run()
    return {x:scatter_add(1, index, x), x:scatter_add(2, index, x), x:gather(1, index), (x:sort(2)), (x:sort(1)),
      core.call("embedding_backward", w, list, {shape = {400, 96}}), x:pad({3, 5, 7, 2}, "circular"),
      x:index_add(1, ids({400}, 300), x:transpose(1, 2):contiguous():narrow(2, 1, 300):pad({0, 100}))}
  end
  hm.set_num_threads(1)
  local one = run()
  hm.set_num_threads(3)
  local three = run()
  hm.set_num_threads(before_)
  for i = 1, #one do assert.is_true(one[i]:eq(three[i]):all():item(), "result " .. i) end
end))

-- ====== cuda against the CPU, to the bit ======

describe("on cuda", function()
  local cases, why = devices.cases("spec/ops_index_spec.lua")
  if not cases then
    it("index ops", function() pending(why) end)
    return
  end
  if not devices.is_cpu then return end -- the whole file runs there

  --- Runs fn(put) on both devices; put moves a tensor there.
  local function agree(fn)
    local want = table.pack(fn(function(t) return t end))
    local got = table.pack(fn(function(t) return t:to("cuda") end))
    for i = 1, want.n do
      assert.equal(want[i].dtype, got[i].dtype)
      assert.same(want[i].shape, got[i].shape)
      local a, b = numbers.flat(want[i]), numbers.flat(got[i])
      for k = 1, #a do
        if not numbers.same(a[k], b[k]) then
          error(("result %d, value %d: %s, on the CPU %s"):format(i, k, tostring(b[k]), tostring(a[k])), 2)
        end
      end
    end
  end
  local function case(name, fn) it("cuda: " .. name, function() cases:run(name, fn) end) end

  for _, dtype in ipairs(FLOATS) do
    case("adding and writing, " .. dtype, function()
      local x = real({6, 40}, dtype)
      agree(function(put)
        local few, many, wide = put(ids({6, 20}, 40)), put(ids({6, 70}, 40)), put(ids({50, 40}, 6))
        local list = put(ids({90}, 6))
        local y = put(x)
        return y:scatter_add(2, few, put(real({6, 20}, dtype, 2))), y:scatter_add(2, many, put(real({6, 70}, dtype, 3))),
          y:scatter_add(1, wide, put(real({50, 40}, dtype, 4))), y:scatter(2, few, put(real({6, 20}, dtype, 2))),
          y:scatter(2, many, put(real({6, 70}, dtype, 3))), y:scatter(1, wide, 0.1),
          y:index_add(1, list, put(real({90, 40}, dtype, 5))), y:index_add(2, few:select(1, 1), put(real({6, 20}, dtype, 6))),
          core.call("embedding_backward", put(real({90, 300}, dtype, 7)), list, {shape = {8, 300}, padding_idx = 3}),
          core.call("gather_backward", put(real({6, 70}, dtype, 3)), many, {shape = {6, 40}, dim = 1})
      end)
    end)

    case("picking and placing, " .. dtype, function()
      agree(function(put)
        local y = put(real({6, 40}, dtype))
        local image = core.call("cast", put(real({2, 3, 6, 7}, dtype)), {layout = "channels_last"})
        return y:gather(2, put(ids({6, 70}, 40))), y:gather(1, put(ids({9, 30}, 6, "int32"))), y:index_select(1, put(ids({9}, 6))),
          y:index_select(2, put(ids({9}, 40, "uint8"))), core.call("embedding", y, put(ids({2, 5}, 6))),
          y:flip({1, 2}), y:flip({1}), image:flip({3}), y:tril(1), y:triu(-2), y:pad({3, 2, 1, 1}, "reflect"),
          image:pad({1, 2, 3, 1}, "circular"), image:pad({1, -2, -1, 1}, {value = 0.3}),
          core.call("pad_backward", put(real({9, 45}, dtype)), {shape = {6, 40}, pad = {3, 2, 1, 2}, mode = "replicate"}),
          core.call("pad_backward", put(real({9, 45}, dtype)), {shape = {6, 40}, pad = {3, 2, 1, 2}, mode = "reflect"}),
          core.call("pad_backward", put(real({9, 45}, dtype)), {shape = {6, 40}, pad = {3, 2, 1, 2}, mode = "constant"})
      end)
    end)

    case("sort and topk, " .. dtype, function()
      agree(function(put)
        local x, long = put(real({7, 5, 33}, dtype)), put(real({2, 2500}, dtype):mul(8):round())
        local v1, p1 = x:sort(1)
        local v2, p2 = x:transpose(1, 3):sort(2, true)
        local v3, p3 = long:sort(2, true)
        local v4, p4 = long:topk(11)
        local v5, p5 = long:topk(1400, 2, false)
        return v1, p1, v2, p2, v3, p3, v4, p4, v5, p5
      end)
    end)
  end

  case("a bad id is told by the op's name", function()
    local x = hm.ones({4, 3}):to("cuda")
    local bad = hm.tensor({9}, {dtype = "i64"}):to("cuda")
    for name, fn in pairs {
      index_select = function() return x:index_select(1, bad) end,
      index_add = function() return x:index_add(1, bad, hm.ones({1, 3}):to("cuda")) end,
      embedding = function() return core.call("embedding", x, bad) end,
      scatter_add = function() return x:scatter_add(1, bad:view({1, 1}), hm.ones({1, 1}):to("cuda")) end,
      one_hot = function() return core.call("one_hot", bad, {num_classes = 4}) end,
    } do
      local ok, message = pcall(function()
        fn()
        hm.cuda.synchronize()
      end)
      assert.is_false(ok, name)
      assert.is_truthy(tostring(message):find(name .. ": index 9 is outside of [0, 4)", 1, true), tostring(message))
    end
    assert.equal(12, x:sum():item())
  end)
end)
