-- Methods of tensors and functions of hm that are no rows of the op table, and the forms in which rows are called:
-- values
-- that PyTorch gave, gradients, in-place forms, facts about dtypes, errors.
--
-- The line above each case is what was computed, with PyTorch 2.15 on the CPU in float64; f(shape, seed) there is the
-- same row of sines as here.

local hm = require "halfmoon"
local gradients = require "spec.support.gradients"
local numbers = require "spec.support.numbers"
local raises = require "spec.support.raises"
local support = require "spec.support.golden"

local f, ids, golden = support.filled, support.ids, support.declarer(it)

describe("methods, as PyTorch has them:", function()
  -- torch.movedim(f((2,3,1),1), 0, -1)
  golden("movedim", function() return f({2, 3, 1}, 1):movedim(1, -1) end,
    {3, 1, 2}, {-0.1163489298, -0.98313888874, -0.51417238509, -0.97144857673, -0.82117778378, -0.78817170272})
  -- torch.movedim(f((2,3,1),1), (0,1), (-1,0))
  golden("movedim of two", function() return f({2, 3, 1}, 1):movedim({1, 2}, {-1, 1}) end,
    {3, 1, 2}, {-0.1163489298, -0.98313888874, -0.51417238509, -0.97144857673, -0.82117778378, -0.78817170272})
  -- torch.swapaxes(f((2,3),1), 0, 1)
  golden("swapaxes", function() return f({2, 3}, 1):swapaxes(1, 2) end,
    {3, 2}, {-0.1163489298, -0.98313888874, -0.51417238509, -0.97144857673, -0.82117778378, -0.78817170272})
  -- f((2,6),1).unflatten(1, (2,-1))
  golden("unflatten", function() return f({2, 6}, 1):unflatten(2, {2, -1}) end,
    {2, 2, 3}, {-0.1163489298, -0.51417238509, -0.82117778378, -0.98313888874, -0.97144857673, -0.78817170272,
      -0.4656803855, -0.060936133587, 0.3545712425, 0.70745084607, 0.93537369808, 0.99808187905})
  -- torch.roll(f((2,3),1), 1, 1)
  golden("roll", function() return f({2, 3}, 1):roll(1, 2) end,
    {2, 3}, {-0.82117778378, -0.1163489298, -0.51417238509, -0.78817170272, -0.98313888874, -0.97144857673})
  -- torch.roll(f((2,3),1), (1,-4), (0,1))
  golden("roll of two dims", function() return f({2, 3}, 1):roll({1, -4}, {1, 2}) end,
    {2, 3}, {-0.97144857673, -0.78817170272, -0.98313888874, -0.51417238509, -0.82117778378, -0.1163489298})
  -- torch.roll(f((2,3),1), 2)
  golden("roll of all", function() return hm.roll(f({2, 3}, 1), 2) end,
    {2, 3}, {-0.97144857673, -0.78817170272, -0.1163489298, -0.51417238509, -0.82117778378, -0.98313888874})
  -- torch.tile(f((2,1),1), (2,3))
  golden("tile", function() return f({2, 1}, 1):tile(2, 3) end,
    {4, 3}, {-0.1163489298, -0.1163489298, -0.1163489298, -0.51417238509, -0.51417238509, -0.51417238509,
      -0.1163489298, -0.1163489298, -0.1163489298, -0.51417238509, -0.51417238509, -0.51417238509})
  -- torch.tile(f((2,),1), (2,2))
  golden("tile with more dims", function() return f({2}, 1):tile{2, 2} end,
    {2, 4}, {-0.1163489298, -0.51417238509, -0.1163489298, -0.51417238509, -0.1163489298, -0.51417238509,
      -0.1163489298, -0.51417238509})
  -- torch.tile(f((2,2),1), (2,))
  golden("tile with fewer dims", function() return f({2, 2}, 1):tile(2) end,
    {2, 4}, {-0.1163489298, -0.51417238509, -0.1163489298, -0.51417238509, -0.82117778378, -0.98313888874,
      -0.82117778378, -0.98313888874})
  -- torch.tile(f((1,2,1,1,1),1), (2,1,1,1,2))
  golden("tile of five dims", function() return f({1, 2, 1, 1, 1}, 1):tile(2, 1, 1, 1, 2) end,
    {2, 2, 1, 1, 2}, {-0.1163489298, -0.1163489298, -0.51417238509, -0.51417238509, -0.1163489298, -0.1163489298,
      -0.51417238509, -0.51417238509})
  -- torch.repeat_interleave(f((2,2),1), 2, 0)
  golden("repeat_interleave", function() return f({2, 2}, 1):repeat_interleave(2, 1) end,
    {4, 2}, {-0.1163489298, -0.51417238509, -0.1163489298, -0.51417238509, -0.82117778378, -0.98313888874,
      -0.82117778378, -0.98313888874})
  -- torch.repeat_interleave(f((2,2),1), 2)
  golden("repeat_interleave flat", function() return hm.repeat_interleave(f({2, 2}, 1), 2) end,
    {8}, {-0.1163489298, -0.1163489298, -0.51417238509, -0.51417238509, -0.82117778378, -0.82117778378,
      -0.98313888874, -0.98313888874})
  -- torch.repeat_interleave(f((2,2),1), torch.tensor([0,3]), 1)
  golden("repeat_interleave by numbers", function() return f({2, 2}, 1):repeat_interleave(ids {0, 3}, 2) end,
    {2, 3}, {-0.51417238509, -0.51417238509, -0.51417238509, -0.98313888874, -0.98313888874, -0.98313888874})
  -- f((2,3),1).index_put((ids(0,1,1), ids(2,0,1)), f((3,),2))
  golden("index_put", function() return f({2, 3}, 1):index_put({ids {0, 1, 1}, ids {2, 0, 1}}, f({3}, 2)) end,
    {2, 3}, {-0.1163489298, -0.51417238509, -0.18905852649, 0.2311174689, 0.61047128095, -0.78817170272})
  -- f((2,3),1).index_put((ids(0,1,1), ids(2,0,0)), f((3,),2), accumulate=True)
  golden("index_put that accumulates", function()
    return f({2, 3}, 1):index_put({ids {0, 1, 1}, ids {2, 0, 0}}, f({3}, 2), {accumulate = true})
  end,
    {2, 3}, {-0.1163489298, -0.51417238509, -1.0102363103, -0.1415501389, -0.97144857673, -0.78817170272})
  -- f((3,2),1).index_put((ids(2,0),), f((2,),2))
  golden("index_put of rows", function() return f({3, 2}, 1):index_put({ids {2, 0}}, f({2}, 2)) end,
    {3, 2}, {-0.18905852649, 0.2311174689, -0.82117778378, -0.98313888874, -0.18905852649, 0.2311174689})
  -- f((2,3),1).index_put((ids([[0],[1]]), ids(0,2)), f((2,2),2), accumulate=True)
  golden("index_put with indices that broadcast", function()
    return f({2, 3}, 1):index_put({ids {{0}, {1}}, ids {0, 2}}, f({2, 2}, 2), true)
  end,
    {2, 3}, {-0.30540745629, -0.51417238509, -0.59006031488, -0.3726676078, -0.97144857673, 0.093826099361})
  -- f((2,3),1).index_copy(1, ids(2,0), f((2,2),2))
  golden("index_copy", function() return f({2, 3}, 1):index_copy(2, ids {2, 0}, f({2, 2}, 2)) end,
    {2, 3}, {0.2311174689, -0.51417238509, -0.18905852649, 0.88199780208, -0.97144857673, 0.61047128095})
  -- f((2,3),1).index_fill(1, ids(2,0), 1.5)
  golden("index_fill", function() return f({2, 3}, 1):index_fill(2, ids {2, 0}, 1.5) end,
    {2, 3}, {1.5, -0.51417238509, 1.5, 1.5, -0.97144857673, 1.5})
  -- torch.masked_select(f((2,3),1), f((2,3),1) > 0)
  golden("masked_select", function() return f({2, 3}, 1):masked_select(f({2, 3}, 1):gt(0)) end,
    {0}, {})
  -- torch.masked_select(f((2,3),1), torch.tensor([True,False,True]))
  golden("masked_select with a mask that broadcasts", function()
    return f({2, 3}, 1):masked_select(hm.tensor {true, false, true})
  end,
    {4}, {-0.1163489298, -0.82117778378, -0.98313888874, -0.78817170272})
  -- f((2,3),1).relu().nonzero()
  golden("nonzero", function() return f({2, 3}, 1):relu():nonzero() end,
    {0, 2}, {})
  -- f((2,3),1).argsort(1, descending=True)
  golden("argsort", function() return f({2, 3}, 1):argsort(2, true) end,
    {2, 3}, {0, 1, 2, 2, 1, 0})
  -- F.one_hot(ids([[0,2],[1,1]]))
  golden("one_hot", function() return hm.one_hot(ids {{0, 2}, {1, 1}}) end,
    {2, 2, 3}, {1, 0, 0, 0, 0, 1, 0, 1, 0, 0, 1, 0})
  -- torch.logaddexp(f((2,1),1), f((3,),2) * 50)
  golden("logaddexp", function() return hm.logaddexp(f({2, 1}, 1), f({3}, 2) * 50) end,
    {2, 3}, {-0.11626079309, 11.555881972, 30.523564047, -0.51404118927, 11.555879173, 30.523564047})
  -- torch.cat(torch.var_mean(f((2,3),1), 1))
  golden("var_mean", function() return hm.cat({f({2, 3}, 1):var_mean(2)}) end,
    {4}, {0.12488325497, 0.011956546594, -0.48389969955, -0.91425305606})
  -- torch.stack(torch.std_mean(f((2,3),1), correction=0))
  golden("std_mean", function() return hm.stack({hm.std_mean(f({2, 3}, 1), {correction = 0})}) end,
    {2}, {0.30317366319, -0.69907637781})
  -- torch.stack(torch.meshgrid(f((2,),1), f((3,),2), indexing='ij'))
  golden("meshgrid", function() return hm.stack(hm.meshgrid(f({2}, 1), f({3}, 2))) end,
    {2, 2, 3}, {-0.1163489298, -0.1163489298, -0.1163489298, -0.51417238509, -0.51417238509, -0.51417238509,
      -0.18905852649, 0.2311174689, 0.61047128095, -0.18905852649, 0.2311174689, 0.61047128095})
  -- torch.stack(torch.meshgrid(f((2,),1), f((3,),2), indexing='xy'))
  golden("meshgrid xy", function() return hm.stack(hm.meshgrid({f({2}, 1), f({3}, 2)}, {indexing = 'xy'})) end,
    {2, 3, 2}, {-0.1163489298, -0.51417238509, -0.1163489298, -0.51417238509, -0.1163489298, -0.51417238509,
      -0.18905852649, -0.18905852649, 0.2311174689, 0.2311174689, 0.61047128095, 0.61047128095})
  -- torch.logspace(-1, 1, 4, base=2, dtype=torch.float64)
  golden("logspace", function() return hm.logspace(-1, 1, 4, 2, {dtype = 'f64'}) end,
    {4}, {0.5, 0.79370052598, 1.2599210499, 2})
  -- f((2,3),1).cumsum(0)
  golden("cumsum", function() return f({2, 3}, 1):cumsum(1) end,
    {2, 3}, {-0.1163489298, -0.51417238509, -0.82117778378, -1.0994878185, -1.4856209618, -1.6093494865})
  -- f((2,3),1).cumprod(-1)
  golden("cumprod", function() return f({2, 3}, 1):cumprod{dim = -1} end,
    {2, 3}, {-0.1163489298, 0.059823406737, -0.049125652562, -0.98313888874, 0.95506887419, -0.75275826079})
  -- f((2,3),1).gather(1, ids([[0,2],[1,1]]))
  golden("gather", function() return f({2, 3}, 1):gather(2, ids {{0, 2}, {1, 1}}) end,
    {2, 2}, {-0.1163489298, -0.82117778378, -0.97144857673, -0.97144857673})
  -- f((2,3),1).index_select(1, ids(2,0))
  golden("index_select", function() return f({2, 3}, 1):index_select(2, ids {2, 0}) end,
    {2, 2}, {-0.82117778378, -0.1163489298, -0.78817170272, -0.98313888874})
  -- f((2,3),1).index_add(1, ids(2,2), f((2,2),2))
  golden("index_add", function() return f({2, 3}, 1):index_add(2, ids {2, 2}, f({2, 2}, 2)) end,
    {2, 3}, {-0.1163489298, -0.51417238509, -0.77911884137, -0.98313888874, -0.97144857673, 0.70429738031})
  -- f((2,3),1).scatter(1, ids([[0,2],[1,1]]), 7)
  golden("scatter", function() return f({2, 3}, 1):scatter(2, ids {{0, 2}, {1, 1}}, 7) end,
    {2, 3}, {7, -0.51417238509, 7, -0.98313888874, 7, -0.78817170272})
  -- f((2,3),1).scatter_add(1, ids([[0,2],[1,1]]), f((2,2),2))
  golden("scatter_add", function() return f({2, 3}, 1):scatter_add(2, ids {{0, 2}, {1, 1}}, f({2, 2}, 2)) end,
    {2, 3}, {-0.30540745629, -0.51417238509, -0.59006031488, -0.98313888874, 0.5210205063, -0.78817170272})
  -- f((2,3),1).sort(-1, descending=True)[0]
  golden("sort", function() return (f({2, 3}, 1):sort(-1, true)) end,
    {2, 3}, {-0.1163489298, -0.51417238509, -0.82117778378, -0.78817170272, -0.97144857673, -0.98313888874})
  -- f((2,3),1).topk(2, 1)[0]
  golden("topk", function() return (f({2, 3}, 1):topk(2, 2)) end,
    {2, 2}, {-0.1163489298, -0.51417238509, -0.78817170272, -0.97144857673})
  -- f((2,3),1).topk(2, largest=False)[1]
  golden("topk, named", function() return select(2, f({2, 3}, 1):topk{k = 2, largest = false}) end,
    {2, 2}, {2, 1, 0, 1})
  -- f((2,3),1).var()
  golden("var", function() return f({2, 3}, 1):var() end,
    {}, {0.11029712406})
  -- f((2,3),1).var(dim=1, correction=0, keepdim=True)
  golden("var, named", function() return f({2, 3}, 1):var{dim = 2, correction = 0, keepdim = true} end,
    {2, 1}, {0.083255503311, 0.0079710310628})
  -- f((2,3),1).std(0)
  golden("std", function() return f({2, 3}, 1):std(1) end,
    {3}, {0.61291305783, 0.32334309598, 0.023338823734})
  -- f((2,3),1).prod(1, keepdim=True)
  golden("prod", function() return f({2, 3}, 1):prod(2, true) end,
    {2, 1}, {-0.049125652562, -0.75275826079})
  -- f((2,3),1).prod()
  golden("prod of all", function() return f({2, 3}, 1):prod() end,
    {}, {0.036979740783})
  -- f((2,3),1).logsumexp(1)
  golden("logsumexp", function() return f({2, 3}, 1):logsumexp(2) end,
    {2}, {0.65652110547, 0.18842332665})
  -- f((2,3,2),1).amax((0,2))
  golden("amax over two dims", function() return f({2, 3, 2}, 1):amax({1, 3}) end,
    {3}, {-0.060936133587, 0.70745084607, 0.99808187905})
  -- f((2,3),1).flip(0, 1)
  golden("flip", function() return f({2, 3}, 1):flip{1, 2} end,
    {2, 3}, {-0.78817170272, -0.97144857673, -0.98313888874, -0.82117778378, -0.51417238509, -0.1163489298})
  -- f((2,3),1).flip(0, 1)
  golden("flip, dims one after the other", function() return f({2, 3}, 1):flip(1, 2) end,
    {2, 3}, {-0.78817170272, -0.97144857673, -0.98313888874, -0.82117778378, -0.51417238509, -0.1163489298})
  -- f((3,3),1).tril(-1)
  golden("tril", function() return f({3, 3}, 1):tril(-1) end,
    {3, 3}, {0, 0, 0, -0.98313888874, 0, 0, -0.4656803855, -0.060936133587, 0})
  -- f((3,3),1).triu(1)
  golden("triu, named", function() return f({3, 3}, 1):triu{diagonal = 1} end,
    {3, 3}, {0, -0.51417238509, -0.82117778378, 0, 0, -0.78817170272, 0, 0, 0})
  -- F.pad(f((2,2),1), (1,0,0,1), value=3)
  golden("pad", function() return f({2, 2}, 1):pad({1, 0, 0, 1}, {value = 3}) end,
    {3, 3}, {3, -0.1163489298, -0.51417238509, 3, -0.82117778378, -0.98313888874, 3, 3, 3})
  -- F.pad(f((1,1,3),1), (2,1), 'reflect')
  golden("pad, reflecting", function() return f({1, 1, 3}, 1):pad({2, 1}, 'reflect') end,
    {1, 1, 6}, {-0.82117778378, -0.51417238509, -0.1163489298, -0.51417238509, -0.82117778378, -0.51417238509})
  -- f((2,3),1).clamp(max=0.2)
  golden("clamp, named", function() return f({2, 3}, 1):clamp{max = 0.2} end,
    {2, 3}, {-0.1163489298, -0.51417238509, -0.82117778378, -0.98313888874, -0.97144857673, -0.78817170272})
  -- f((2,3),1).clip(-0.5, 0.5)
  golden("clip", function() return f({2, 3}, 1):clip(-0.5, 0.5) end,
    {2, 3}, {-0.1163489298, -0.5, -0.5, -0.5, -0.5, -0.5})
  -- f((2,3),1).masked_fill(f((3,),2) < 0, -1)
  golden("masked_fill", function() return f({2, 3}, 1):masked_fill(f({3}, 2):lt(0), -1) end,
    {2, 3}, {-1, -0.51417238509, -0.82117778378, -1, -0.97144857673, -0.78817170272})
  -- torch.lerp(f((2,),1), f((2,),2), 0.25)
  golden("lerp", function() return hm.lerp(f({2}, 1), f({2}, 2), 0.25) end,
    {2}, {-0.13452632897, -0.32784992159})
  -- torch.addcmul(f((2,),1), f((2,),2), f((2,),3), value=0.5)
  golden("addcmul", function() return hm.addcmul(f({2}, 1), f({2}, 2), f({2}, 3), {value = 0.5}) end,
    {2}, {-0.16142122888, -0.50567606269})
end)

describe("the names of tensors and of hm", function()
  it("are all there", function()
    local names = [[
      size dim numel stride item totable to float half bfloat16 double cpu cuda clone detach contiguous is_contiguous
      view reshape permute transpose t squeeze unsqueeze flatten expand narrow select split chunk copy_ fill_ zero_
      backward retain_grad register_hook release add sub mul div pow neg add_ sub_ mul_ div_ eq ne lt le gt ge abs
      exp log sqrt rsqrt sin cos tanh sigmoid relu gelu silu softplus erf clamp maximum minimum sum mean var std max
      min argmax argmin prod norm logsumexp all any softmax log_softmax cumsum matmul mm bmm gather index_select
      scatter_add masked_fill tril triu topk sort one_hot isfinite isnan isinf]]
    for name in names:gmatch("%S+") do assert.is_function(hm.zeros({1})[name], name) end
    names = [[tensor zeros ones empty rand randn full randint arange linspace eye where cat stack einsum no_grad
      enable_grad manual_seed save load set_num_threads]]
    for name in names:gmatch("%S+") do assert.is_function(hm[name], name) end
  end)
end)

describe("rows called as in PyTorch", function()
  it("take a dtype to compute and answer in", function()
    local x = hm.tensor({60000, 60000}, {dtype = "f16"})
    assert.equal(120000, x:sum{dtype = "f32"}:item())
    numbers.assert_same(x:cumsum(1, {dtype = "f32"}), {60000, 120000})
    numbers.assert_same(x:cumsum(1), {60000, math.huge})
    assert.equal("float64", x:prod{dtype = "f64"}.dtype)
    assert.equal("float32", x:softmax(1, {dtype = "f32"}).dtype)
  end)

  it("are functions too", function()
    local x = f({2, 3}, 1)
    numbers.assert_same(hm.narrow(x, 2, 1, 2), x:narrow(2, 1, 2))
    numbers.assert_same(hm.select(x, 1, 2), x[2])
    assert.equal(3, #hm.split(x, 1, 2))
    assert.equal(2, #hm.chunk(x, 2))
    assert.equal(6, hm.numel(x))
  end)
end)

describe("dims in another order", function()
  it("are views", function()
    local x = f({2, 3, 4}, 1)
    for _, y in ipairs {x:movedim(1, 3), x:swapaxes(1, 2), x:unflatten(3, {2, 2}), x:unbind(2)[1],
      x:view_as(hm.zeros {6, 4})} do
      assert.equal(x:data_ptr(), y:data_ptr())
    end
    assert.same({3, 4, 2}, x:movedim(1, 3).shape)
    assert.same({2, 3, 2, 2}, x:unflatten(-1, {2, -1}).shape)
    assert.equal(3, #x:unbind(2))
    assert.same({2, 4}, x:unbind(2)[3].shape)
    numbers.assert_same(x:unbind(2)[3], x:select(2, 3))
    assert.same({5, 2}, hm.zeros({2}):expand_as(hm.zeros {5, 2}).shape)
  end)

  it("empty and 0-dim tensors", function()
    assert.same({0, 4}, hm.zeros({0, 2}):tile(1, 2).shape)
    assert.same({0}, hm.zeros({3}):tile(0).shape)
    assert.same({0, 2}, hm.zeros({0, 2}):roll(1, 1).shape)
    assert.same({}, hm.zeros({}):movedim({}, {}).shape)
    assert.same({1}, hm.zeros({}):nonzero():size(1) == 0 and {1} or {0})
    assert.same({0, 2}, hm.zeros({2, 2}):nonzero().shape)
    assert.same({1, 0}, hm.ones({}):nonzero().shape)
    assert.same({0}, hm.zeros({2}):masked_select(hm.tensor {false, false}).shape)
    assert.same({2}, hm.zeros({2}):masked_select(hm.tensor {true, true}).shape)
    assert.same({0}, hm.zeros({0}):masked_select(hm.zeros({0}, {dtype = "bool"})).shape)
    assert.same({0, 3}, hm.zeros({2, 3}):repeat_interleave(0, 1).shape)
  end)
end)

describe("gradients of methods:", function()
  local function checks(name, fn, ...)
    local inputs = {...}
    it(name, function() gradients.check(fn, inputs) end)
  end
  checks("roll", function(x) return x:roll({1, 1}, {1, 2}) end, f({2, 3}, 1))
  checks("tile", function(x) return x:tile(2, 2) end, f({2, 2}, 1))
  checks("repeat_interleave", function(x) return x:repeat_interleave(ids {2, 0, 1}, 2) end, f({2, 3}, 1))
  checks("index_put", function(x, v) return x:index_put({ids {0, 1}, ids {2, 0}}, v) end, f({2, 3}, 1), f({2}, 2))
  checks("index_put that accumulates", function(x, v) return x:index_put({ids {1, 1}}, v, true) end, f({2, 3}, 1), f({2,
    3}, 2))
  checks("index_copy", function(x, v) return x:index_copy(1, ids {1}, v) end, f({2, 3}, 1), f({1, 3}, 2))
  checks("masked_select", function(x) return x:masked_select(hm.tensor {true, false, true}) end, f({2, 3}, 1))
  checks("logaddexp", hm.logaddexp, f({2, 1}, 1), f({3}, 2))
  checks("var_mean", function(x) return hm.cat {x:var_mean(2)} end, f({2, 3}, 1))
  checks("meshgrid", function(x, y) return hm.stack(hm.meshgrid(x, y)) end, f({2}, 1), f({3}, 2))
end)

describe("in-place forms", function()
  it("write into their tensor and return it", function()
    local function check(want, method, x, ...)
      local before = x:version()
      assert.is_true(rawequal(x, x[method](x, ...)))
      assert.is_true(x:version() > before)
      numbers.assert_same(x, want, method)
    end
    check({0, 0, 5, 7, 0, 0}, "index_put_", hm.zeros {2, 3}, {ids {0, 1}, ids {2, 0}}, hm.tensor {5, 7})
    check({1, 1, 13}, "index_put_", hm.ones {3}, {ids {2, 2}}, hm.tensor {5, 7}, true)
    check({0, 4, 0}, "index_put_", hm.zeros {3}, ids {1}, 4)
    check({0, 5, 0}, "index_copy_", hm.zeros {3}, 1, ids {1}, hm.tensor {5})
    check({0, 6, 0}, "index_fill_", hm.zeros {3}, 1, ids {1}, 6)
    check({1, 6, 1}, "index_add_", hm.ones {3}, 1, ids {1}, hm.tensor {5})
    check({1, 9, 1}, "scatter_", hm.ones {3}, 1, ids {1}, 9)
    check({1, 6, 1}, "scatter_add_", hm.ones {3}, 1, ids {1}, hm.tensor {5})
    check({1, 0, 1, 1}, "tril_", hm.ones {2, 2})
    check({0, 1, 0, 0}, "triu_", hm.ones {2, 2}, 1)
    check({1, -1, 1}, "masked_fill_", hm.ones {3}, hm.tensor {false, true, false}, -1)
  end)

  it("keep the tensor's dtype", function()
    local x = hm.ones({3}, {dtype = "f16"})
    x:index_put_({ids {0}}, hm.tensor({0.1}, {dtype = "f16"}))
    assert.equal("float16", x.dtype)
    x:scatter_add_(1, ids {1}, hm.tensor({2}, {dtype = "f16"}))
    assert.equal(3, x[2]:item())
  end)

  it("are recorded", function()
    local v = hm.tensor({2, 3}, {requires_grad = true})
    local x = hm.zeros {3}
    x:index_put_({ids {2, 0}}, v)
    hm.sum(x * hm.tensor {10, 20, 30}):backward()
    numbers.assert_same(v.grad, {30, 10})
  end)
end)

describe("comparing", function()
  local inf, nan = math.huge, 0 / 0
  it("isclose and allclose", function()
    local x = hm.tensor({1, 1, inf, -inf, nan, 0, inf}, {dtype = "f64"})
    local y = hm.tensor({1.000001, 1.1, inf, inf, nan, 1e-9, 1}, {dtype = "f64"})
    numbers.assert_same(x:isclose(y), {true, false, true, false, false, true, false})
    numbers.assert_same(x:isclose(y, {equal_nan = true, rtol = 0.2}), {true, true, true, false, true, true, false})
    assert.is_true(hm.allclose(hm.ones {2}, 1))
    assert.is_true(hm.allclose(hm.ones {2}, hm.ones({2}) + 1e-6))
    assert.is_false(hm.allclose(hm.ones {2}, hm.ones({2}) + 1e-3))
    assert.is_true(hm.allclose(hm.ones {2}, hm.ones({2}) + 1e-3, {atol = 1e-2}))
    assert.is_true(hm.allclose(hm.zeros {0}, hm.zeros {0}))
    assert.is_true(hm.isclose(hm.tensor {inf}, inf):item())
  end)

  it("equal", function()
    assert.is_true(hm.equal(hm.ones {2}, hm.ones {2}))
    assert.is_false(hm.equal(hm.ones {2}, hm.ones {2, 1}))
    assert.is_false(hm.ones({2}):equal(hm.tensor {1, 2}))
    assert.is_false(hm.equal(hm.tensor {nan}, hm.tensor {nan}))
  end)

  it("logaddexp of infinities", function()
    numbers.assert_same(hm.logaddexp(hm.tensor {-inf, inf, -inf, 1000}, hm.tensor {-inf, -inf, 3, 0}), {-inf, inf, 3,
      1000})
    assert.equal("float16", hm.logaddexp(hm.zeros({2}, {dtype = "f16"}), 1.0).dtype)
  end)
end)

describe("tensors like others", function()
  it("have shape, dtype and device, or what is asked for", function()
    local x = hm.zeros({2, 3}, {dtype = "f16"})
    for _, name in ipairs {"zeros_like", "ones_like", "empty_like", "rand_like", "randn_like"} do
      local y = hm[name](x)
      assert.same({2, 3}, y.shape)
      assert.equal("float16", y.dtype)
      assert.equal(x.device, y.device)
      assert.is_false(y.requires_grad)
      local z = hm[name](x, {dtype = "f32", requires_grad = true})
      assert.equal("float32", z.dtype)
      assert.is_true(z.requires_grad)
      raises({name .. ": unknown option 'dtpe', did you mean 'dtype'?"}, hm[name], x, {dtpe = "f32"})
    end
    numbers.assert_same(hm.full_like(hm.zeros {2}, 7), {7, 7})
    local r = hm.randint_like(hm.zeros({100}, {dtype = "i64"}), 2, 4)
    assert.equal("int64", r.dtype)
    assert.equal(2, r:min():item())
    assert.equal(3, r:max():item())
    assert.equal("int32", hm.ones({2}):type_as(hm.zeros({1}, {dtype = "i32"})).dtype)
  end)

  it("logspace takes a base of 10 and options", function()
    numbers.assert_near(hm.logspace(0, 2, 3), {1, 10, 100}, 1e-7)
    assert.equal("float64", hm.logspace(0, 2, 3, {dtype = "f64"}).dtype)
  end)
end)

describe("random draws", function()
  it("randperm holds every number once, and follows the seed", function()
    hm.manual_seed(3)
    local p = hm.randperm(100)
    assert.equal("int64", p.dtype)
    numbers.assert_same(p:sort(), hm.arange(100))
    assert.is_false(hm.equal(p, hm.arange(100)))
    hm.manual_seed(3)
    numbers.assert_same(hm.randperm(100), p)
    assert.same({0}, hm.randperm(0).shape)
    assert.equal("int32", hm.randperm(3, {dtype = "i32"}).dtype)
    raises("randperm: n must be at least 0, not -1", hm.randperm, -1)
  end)

  it("bernoulli follows its probabilities", function()
    hm.manual_seed(1)
    local y = hm.full({10000}, 0.3, {dtype = "f16"}):bernoulli()
    assert.equal("float16", y.dtype)
    local mean = y:double():mean():item()
    assert.is_true(math.abs(mean - 0.3) < 0.02)
    numbers.assert_same(hm.bernoulli(hm.tensor {0, 1}), {0, 1})
    raises("bernoulli: the probabilities must be floating", hm.bernoulli, hm.ones({2}, {dtype = "i64"}))
  end)
end)

describe("what a dtype holds", function()
  it("finfo", function()
    assert.same({dtype = "float16", bits = 16, eps = 2.0 ^ -10, max = 65504.0, min = -65504.0, tiny = 2.0 ^ -14,
      smallest_subnormal = 2.0 ^ -24},
      hm.finfo("f16"))
    assert.equal(2.220446049250313e-16, hm.finfo("float64").eps)
    assert.equal(1.7976931348623157e308, hm.finfo("f64").max)
    assert.equal(3.4028234663852886e38, hm.finfo("f32").max)
    assert.equal(2.0 ^ -149, hm.finfo().smallest_subnormal)
    assert.equal(3.3895313892515355e38, hm.finfo(hm.zeros({1}, {dtype = "bf16"})).max)
    for _, dtype in ipairs {"f16", "bf16", "f32", "f64"} do -- eps is the step above 1
      local info = hm.finfo(dtype)
      local one = hm.tensor({1 + info.eps, 1 + info.eps / 4, info.max, info.smallest_subnormal}, {dtype = dtype})
      numbers.assert_same(one:double(), {1 + info.eps, 1, info.max, info.smallest_subnormal})
    end
    raises({"finfo: needs a floating dtype, not \"int64\"", "iinfo"}, hm.finfo, "int64")
  end)

  it("iinfo", function()
    assert.same({dtype = "uint8", bits = 8, min = 0, max = 255}, hm.iinfo("u8"))
    assert.equal(-2147483648, hm.iinfo("i32").min)
    assert.equal(math.maxinteger, hm.iinfo("i64").max)
    raises({"iinfo: needs an integer dtype", "finfo"}, hm.iinfo, "f32")
  end)
end)

describe("methods inside autocast", function()
  -- name, what is called with float32 operands x, y and low z, dtypes wanted for (x, y) and (z, z)
  local cases = {
    {"cumsum", function(x) return x:cumsum(1) end, "float32", "float32"},
    {"cumprod", function(x) return x:cumprod(1) end, "float32", "float32"},
    {"prod", function(x) return x:prod() end, "float32", "float32"},
    {"sum", function(x) return x:sum() end, "float32", "float32"},
    {"logsumexp", function(x) return x:logsumexp(1) end, "float32", "float32"},
    {"roll", function(x) return x:roll(1, 1) end, "float32", "low"},
    {"tile", function(x) return x:tile(2, 2) end, "float32", "low"},
    {"logaddexp", function(x, y) return x:logaddexp(y) end, "float32", "low"},
    {"index_put", function(x, y) return x:index_put({ids {0}}, y[1]) end, "float32", "low"},
    {"scatter_add", function(x, y) return x:scatter_add(1, ids {{0, 0}}, y) end, "float32", "low"},
    {"var", function(x) return x:var() end, "float32", "low"},
  }
  for _, case in ipairs(cases) do
    it(case[1], function()
      local x, z = f({2, 2}, 1, "f32"), f({2, 2}, 1, "f16")
      hm.amp.autocast("f16", function()
        assert.equal(case[3], case[2](x, x).dtype)
        assert.equal(case[4] == "low" and "float16" or case[4], case[2](z, z).dtype)
      end)
    end)
  end
  it("index_put promotes", function()
    local x, z = f({2, 2}, 1, "f32"), f({2, 2}, 1, "f16")
    hm.amp.autocast("f16", function()
      assert.equal("float32", z:index_put({ids {0}}, x[1]).dtype)
      assert.equal("float32", z:index_put({ids {0}}, x[1], true).dtype)
      assert.equal("float32", x:index_put({ids {0}}, z[1]).dtype)
    end)
  end)
end)

describe("errors of methods:", function()
  local x = hm.zeros {2, 3}
  it("dims and shapes", function()
    raises({"movedim: 2 dims cannot go to 1 places"}, hm.movedim, x, {1, 2}, 1)
    raises({"movedim: dim 0 is not among the 2 of f32[2,3]", "count from 1"}, hm.movedim, x, 0, 1)
    raises({"movedim: dim 1 is given twice"}, hm.movedim, x, {1, -2}, {1, 2})
    raises({"unflatten: dim 2 of f32[2,3]", "has 3 entries, which are no [2,2]"}, x.unflatten, x, 2, {2, 2})
    raises({"unflatten: dim 2 of f32[2,3]", "which are no [2,-1]"}, x.unflatten, x, 2, {2, -1})
    raises({"roll: 2 shifts for 1 dims"}, x.roll, x, {1, 2}, 1)
    raises({"roll: the shifts must be a whole number, not 1.5"}, x.roll, x, 1.5, 1)
    raises({"tile: a number of repeats must not be negative, came -1"}, x.tile, x, -1)
    raises({"repeat_interleave: 3 repeats for the 2 entries of dim 1"}, x.repeat_interleave, x, ids {1, 2, 3}, 1)
    raises({"meshgrid: argument 2 must be a vector"}, hm.meshgrid, hm.zeros {2}, x)
    raises({"meshgrid: option 'indexing' must be one of ij, xy"}, hm.meshgrid, hm.zeros {2}, {indexing = "yx"})
    raises({"unbind: dim 3 is not among the 2"}, hm.unbind, x, 3)
  end)

  it("ids and masks", function()
    raises({"index_put: index 1 must hold ids as integers, came a mask", "masked_fill"}, x.index_put, x, {x:gt(0)}, 1)
    raises({"index_put: index 1 must hold ids as integers, came f32[2,3]", "index:long()"}, x.index_put, x, {x}, 1)
    raises({"index_put: values must broadcast to [2,3]", "came f32[2]"}, x.index_put, x, {ids {0, 1}}, hm.zeros {2})
    raises({"index_put: the indices do not broadcast together: i64[2]"}, x.index_put, x, {ids {0, 1}, ids {0, 1, 2}}, 1)
    raises({"index_put: 3 indices for the dims of f32[2,3]"}, x.index_put, x, {ids {0}, ids {0}, ids {0}}, 1)
    raises({"index", "of"}, x.index_put, x, {ids {0}, ids {3}}, 1)
    raises({"index_copy: src must be [1,3]"}, x.index_copy, x, 1, ids {0}, hm.zeros {2, 3})
    raises({"masked_select: the mask must be bool", "x:gt(0)"}, x.masked_select, x, x)
    raises({"masked_select: x and mask do not broadcast together"}, x.masked_select, x, hm.zeros({2}, {dtype = "bool"}))
    raises({"one_hot: an empty index needs the number of classes"}, hm.one_hot, hm.zeros({0}, {dtype = "i64"}))
    raises({"one_hot: index must hold ids as integers"}, hm.one_hot, x)
  end)
end)
