-- Products, norms and diagonals that are made of other ops: values that PyTorch gave, gradients, autocast, errors.
--
-- The line above each case is what was computed, with PyTorch 2.15 on the CPU in float64; f(shape, seed) there is the
-- same row of sines as here.

local hm = require "halfmoon"
local gradients = require "spec.support.gradients"
local numbers = require "spec.support.numbers"
local raises = require "spec.support.raises"
local support = require "spec.support.golden"

local f, golden = support.filled, support.declarer(it)

describe("linalg, as PyTorch has it:", function()
  -- torch.mm(f((2,3),1), f((3,2),2))
  golden("mm", function() return hm.mm(f({2, 3}, 1), f({3, 2}, 2)) end,
    {2, 2}, {-1.1112105163, -1.2500356627, -1.1935590644, -1.822747707})
  -- torch.bmm(f((2,2,3),1), f((2,3,1),2))
  golden("bmm", function() return f({2, 2, 3}, 1):bmm(f({2, 3, 1}, 2)) end,
    {2, 2, 1}, {-0.59814291654, -0.51980413554, -0.13920647563, 2.4926767521})
  -- torch.mv(f((2,3),1), f((3,),2))
  golden("mv", function() return f({2, 3}, 1):mv(f({3}, 2)) end,
    {2}, {-0.59814291654, -0.51980413554})
  -- torch.dot(f((5,),1), f((5,),2))
  golden("dot", function() return f({5}, 1):dot(f({5}, 2)) end,
    {}, {-2.434519847})
  -- torch.outer(f((2,),1), f((3,),2))
  golden("outer", function() return hm.outer(f({2}, 1), f({3}, 2)) end,
    {2, 3}, {0.021996757227, -0.026890270164, -0.07102768021, 0.097208673488, -0.11883422022, -0.31388747455})
  -- torch.addmm(f((2,),3), f((2,3),1), f((3,2),2), beta=0.5, alpha=2)
  golden("addmm", function() return hm.addmm(f({2}, 3), f({2, 3}, 1), f({3, 2}, 2), {beta = 0.5, alpha = 2}) end,
    {2, 2}, {-1.9840170849, -2.4633094032, -2.148714181, -3.6087334918})
  -- torch.addmv(f((2,),3), f((2,3),1), f((3,),2))
  golden("addmv", function() return hm.addmv(f({2}, 3), f({2, 3}, 1), f({3}, 2)) end,
    {2}, {-0.12133502091, -0.44628029123})
  -- torch.baddbmm(f((2,2,1),3), f((2,2,3),1), f((2,3,1),2), alpha=-1)
  golden("baddbmm", function() return f({2, 2, 1}, 3):baddbmm(f({2, 2, 3}, 1), f({2, 3, 1}, 2), {alpha = -1}) end,
    {2, 2, 1}, {1.0749508122, 0.59332797984, -0.20354021772, -3.1911547758})
  -- torch.tensordot(f((2,3,2),1), f((3,2,2),2))
  golden("tensordot of two dims", function() return hm.tensordot(f({2, 3, 2}, 1), f({3, 2, 2}, 2)) end,
    {2, 2}, {-1.1377892142, -0.39107579393, 0.072368793708, -0.97415579577})
  -- torch.tensordot(f((2,3,2),1), f((3,2,2),2), dims=([1],[0]))
  golden("tensordot of named dims", function() return hm.tensordot(f({2, 3, 2}, 1), f({3, 2, 2}, 2), {{2}, {1}}) end,
    {2, 2, 2, 2}, {-0.74330036386, -0.34874484624, 0.10740932992, 0.54459184038, -0.83987520844, -0.67696834976,
      -0.39448885029, -0.042330947684, 0.38979330409, -0.20646909877, -0.76626294976, -1.1907120915, 0.66186690637,
      0.18890423676, -0.31742451039, -0.767686697})
  -- torch.tensordot(f((2,3,4),1), f((4,2,3),2), dims=([1,0],[2,1]))
  golden("tensordot of dims out of order", function()
    return hm.tensordot(f({2, 3, 4}, 1), f({4, 2, 3}, 2), {{2, 1}, {3, 2}})
  end,
    {4, 4}, {-0.47376855331, 0.3112233919, -0.039601477827, -0.24589985764, -0.34603779804, 0.093993119258,
      0.19099401979, -0.40904207907, -0.15718652903, -0.13983911933, 0.38785432236, -0.49993536654, 0.059428531868,
      -0.34897163186, 0.51620807572, -0.50252527614})
  -- torch.tensordot(f((2,),1), f((2,),2), dims=0)
  golden("tensordot of no dims", function() return hm.tensordot(f({2}, 1), f({2}, 2), 0) end,
    {2, 2}, {0.021996757227, -0.026890270164, 0.097208673488, -0.11883422022})
  -- torch.kron(f((2,1),1), f((1,3),2))
  golden("kron", function() return hm.kron(f({2, 1}, 1), f({1, 3}, 2)) end,
    {2, 3}, {0.021996757227, -0.026890270164, -0.07102768021, 0.097208673488, -0.11883422022, -0.31388747455})
  -- torch.kron(f((2,),1), f((2,2),2))
  golden("kron of unequal dims", function() return hm.kron(f({2}, 1), f({2, 2}, 2)) end,
    {2, 4}, {0.021996757227, -0.026890270164, 0.097208673488, -0.11883422022, -0.07102768021, -0.10261950036,
      -0.31388747455, -0.45349891354})
  -- torch.einsum('ij,jk->ik', f((2,3),1), f((3,2),2))
  golden("einsum of a matrix product", function() return hm.einsum("ij,jk->ik", f({2, 3}, 1), f({3, 2}, 2)) end,
    {2, 2}, {-1.1112105163, -1.2500356627, -1.1935590644, -1.822747707})
  -- torch.einsum('kj,ji', f((2,3),1), f((3,2),2))
  golden("einsum with the result left out", function() return hm.einsum("kj,ji", f({2, 3}, 1), f({3, 2}, 2)) end,
    {2, 2}, {-1.1112105163, -1.1935590644, -1.2500356627, -1.822747707})
  -- torch.einsum('aB', f((2,3),1))
  golden("einsum with capitals, which come first", function() return hm.einsum("aB", f({2, 3}, 1)) end,
    {3, 2}, {-0.1163489298, -0.98313888874, -0.51417238509, -0.97144857673, -0.82117778378, -0.78817170272})
  -- torch.einsum('ii', f((3,3),1))
  golden("einsum of a trace", function() return hm.einsum("ii", f({3, 3}, 1)) end,
    {}, {-0.73322626402})
  -- torch.einsum('ii->i', f((3,3),1))
  golden("einsum of a diagonal", function() return hm.einsum("ii->i", f({3, 3}, 1)) end,
    {3}, {-0.1163489298, -0.97144857673, 0.3545712425})
  -- torch.einsum('iiij->ji', f((2,2,2,3),1))
  golden("einsum of a label three times", function() return hm.einsum("iiij->ji", f({2, 2, 2, 3}, 1)) end,
    {3, 2}, {-0.1163489298, -0.40424005009, -0.51417238509, 0.0072815048787, -0.82117778378, 0.41751693064})
  -- torch.einsum('ij->ji', f((2,3),1))
  golden("einsum of a transpose", function() return hm.einsum("ij->ji", f({2, 3}, 1)) end,
    {3, 2}, {-0.1163489298, -0.98313888874, -0.51417238509, -0.97144857673, -0.82117778378, -0.78817170272})
  -- torch.einsum('ijk->j', f((2,3,2),1))
  golden("einsum of a sum", function() return hm.einsum("ijk->j", f({2, 3, 2}, 1)) end,
    {3}, {-1.157137834, -0.74229458395, 0.17383529768})
  -- torch.einsum('bij,bjk->bik', f((2,2,3),1), f((2,3,1),2))
  golden("einsum of batches", function() return hm.einsum("bij,bjk->bik", f({2, 2, 3}, 1), f({2, 3, 1}, 2)) end,
    {2, 2, 1}, {-0.59814291654, -0.51980413554, -0.13920647563, 2.4926767521})
  -- torch.einsum('i,j->ji', f((2,),1), f((3,),2))
  golden("einsum of an outer product", function() return hm.einsum("i,j->ji", f({2}, 1), f({3}, 2)) end,
    {3, 2}, {0.021996757227, 0.097208673488, -0.026890270164, -0.11883422022, -0.07102768021, -0.31388747455})
  -- torch.einsum('...ij,...jk->...ik', f((2,1,2,2),1), f((3,2,1),2))
  golden("einsum with an ellipsis that broadcasts", function()
    return hm.einsum("...ij,...jk->...ik", f({2, 1, 2, 2}, 1), f({3, 2, 1}, 2))
  end,
    {2, 3, 2, 1}, {-0.096837462991, -0.071969909749, -0.52452659375, -1.3684317926, -0.59799224631, -1.7407638505,
      0.0015003874915, 0.07395744254, -1.2882071665, -0.33803003734, -1.7079622174, -0.5217389571})
  -- torch.einsum('i...->i', f((2,3,2),1))
  golden("einsum with an ellipsis summed over", function() return hm.einsum("i...->i", f({2, 3, 2}, 1)) end,
    {2}, {-4.1944582669, 2.4688611466})
  -- torch.einsum('b...a,a', f((2,2,3),1), f((3,),2))
  golden("einsum with an ellipsis and no arrow", function()
    return hm.einsum("b...a,a", f({2, 2, 3}, 1), f({3}, 2))
  end,
    {2, 2}, {-0.59814291654, 0.29041300314, -0.51980413554, 0.69173191024})
  -- torch.einsum('bn,anm,bm->ba', f((2,3),1), f((2,3,2),2), f((2,2),3))
  golden("einsum of three operands", function()
    return hm.einsum("bn,anm,bm->ba", f({2, 3}, 1), f({2, 3, 2}, 2), f({2, 2}, 3))
  end,
    {2, 2}, {-0.62174137532, 0.35441743391, 1.6822376388, -0.59085483079})
  -- torch.einsum('i,i,i,j->j', f((3,),1), f((3,),2), f((3,),3), f((2,),4))
  golden("einsum of four vectors", function()
    return hm.einsum("i,i,i,j->j", f({3}, 1), f({3}, 2), f({3}, 3), f({2}, 4))
  end,
    {2}, {-0.12497579682, -0.064446890353})
  -- torch.einsum('ij,kl->il', f((2,3),1), f((2,2),2))
  golden("einsum with a label in one operand only", function()
    return hm.einsum("ij,kl->il", f({2, 3}, 1), f({2, 2}, 2))
  end,
    {2, 2}, {-0.6117645158, -1.6159084356, -1.1558336959, -3.0530071147})
  -- torch.einsum('ij,jk->ik', f((2,1),1), f((3,2),2))
  golden("einsum with a size of 1 that broadcasts", function()
    return hm.einsum("ij,jk->ik", f({2, 1}, 1), f({3, 2}, 2))
  end,
    {2, 2}, {-0.16511660341, -0.23855746509, -0.72968782728, -1.0542396996})
  -- torch.einsum(',i->i', f((),1), f((2,),2))
  golden("einsum of a number", function() return hm.einsum(",i->i", f({}, 1), f({2}, 2)) end,
    {2}, {0.021996757227, -0.026890270164})
  -- torch.einsum('ij,ij->ij', f((2,2),1), f((2,2),2))
  golden("einsum elementwise", function() return hm.einsum("ij,ij->ij", f({2, 2}, 1), f({2, 2}, 2)) end,
    {2, 2}, {0.021996757227, -0.11883422022, -0.50130545355, -0.86712633901})
  -- torch.norm(f((2,3),1))
  golden("norm", function() return f({2, 3}, 1):norm() end,
    {}, {1.8664759073})
  -- torch.linalg.vector_norm(f((2,3),1), 1, dim=1)
  golden("norm of p 1 along a dim", function() return f({2, 3}, 1):norm(1, 2) end,
    {2}, {1.4516990987, 2.7427591682})
  -- torch.linalg.vector_norm(f((2,3,2),1), 3, dim=(0,2), keepdim=True)
  golden("norm of p 3 over two dims", function() return hm.norm(f({2, 3, 2}, 1), 3, {1, -1}, true) end,
    {1, 3, 1}, {0.62034089227, 1.239139776, 1.4765278547})
  -- torch.linalg.vector_norm(f((2,3),1), 0.5, dim=0)
  golden("norm of p 0.5", function() return f({2, 3}, 1):norm(0.5, 1) end,
    {3}, {1.775911229, 2.899115966, 3.2183604772})
  -- torch.linalg.vector_norm(f((2,3),1), -2, dim=0)
  golden("norm of p -2", function() return f({2, 3}, 1):norm(-2, 1) end,
    {3}, {0.1155426336, 0.45444330992, 0.56863206444})
  -- torch.linalg.vector_norm(torch.tensor([[0.,2,3],[0,0,-1]]), 0, dim=1)
  golden("norm of p 0", function() return hm.tensor({{0, 2, 3}, {0, 0, -1}}, {dtype = 'f64'}):norm(0, 2) end,
    {2}, {2, 1})
  -- torch.linalg.vector_norm(f((2,3),1), math.inf, dim=1)
  golden("norm of p inf", function() return f({2, 3}, 1):norm(math.huge, 2) end,
    {2}, {0.82117778378, 0.98313888874})
  -- torch.linalg.vector_norm(f((2,3),1), -math.inf, dim=0, keepdim=True)
  golden("norm of p -inf", function() return f({2, 3}, 1):norm{p = '-inf', dim = 1, keepdim = true} end,
    {1, 3}, {0.1163489298, 0.51417238509, 0.78817170272})
  -- torch.norm(f((2,3,2),1), 'fro', dim=(1,2))
  golden("norm fro", function() return f({2, 3, 2}, 1):norm('fro', {2, 3}) end,
    {2}, {1.8664759073, 1.6485964612})
  -- f((2,3),1).diagonal()
  golden("diagonal", function() return f({2, 3}, 1):diagonal() end,
    {2}, {-0.1163489298, -0.97144857673})
  -- f((2,3),1).diagonal(1)
  golden("diagonal above", function() return f({2, 3}, 1):diagonal(1) end,
    {2}, {-0.51417238509, -0.78817170272})
  -- f((3,2,2),1).diagonal(-1, 0, 2)
  golden("diagonal below, of other dims", function() return f({3, 2, 2}, 1):diagonal(-1, 1, 3) end,
    {2, 2}, {-0.97144857673, 0.70745084607, -0.4656803855, 0.99808187905})
  -- torch.diag(f((2,),1), -1)
  golden("diag of a vector", function() return f({2}, 1):diag(-1) end,
    {3, 3}, {0, 0, 0, -0.1163489298, 0, 0, 0, -0.51417238509, 0})
  -- torch.diag(f((2,3),1), 1)
  golden("diag of a matrix", function() return f({2, 3}, 1):diag(1) end,
    {2}, {-0.51417238509, -0.78817170272})
  -- torch.trace(f((3,3),1))
  golden("trace", function() return f({3, 3}, 1):trace() end,
    {}, {-0.73322626402})
  -- torch.diff(f((2,4),1))
  golden("diff", function() return f({2, 4}, 1):diff() end,
    {2, 3}, {-0.39782345529, -0.30700539869, -0.16196110497, 0.183276874, 0.32249131722, 0.40474425191})
  -- torch.diff(f((3,2),1), n=2, dim=0)
  golden("diff twice along dim 1", function() return f({3, 2}, 1):diff(2, 1) end,
    {1, 2}, {0.55455806103, 0.66393368968})
  -- torch.diff(f((3,),1), prepend=f((1,),2), append=f((1,),3))
  golden("diff with something before", function() return f({3}, 1):diff{prepend = f({1}, 2), append = f({1}, 3)} end,
    {4}, {0.072709596695, -0.39782345529, -0.30700539869, 1.2979856794})
end)

describe("linalg", function()
  it("takes integers where that has a meaning", function()
    local a, b = hm.tensor({1, 2, 3}, {dtype = "i64"}), hm.tensor({4, 5, 6}, {dtype = "i64"})
    assert.equal(32, a:dot(b):item())
    assert.equal("int64", a:outer(b).dtype)
    numbers.assert_same(hm.einsum("i,j->ij", a, b), a:outer(b))
    assert.equal(32, hm.einsum("i,i", a, b):item())
    assert.equal(90, hm.einsum("i,j->", a, b):item())
    numbers.assert_same(hm.tensor({3, 1, 4}, {dtype = "i64"}):diff(), {-2, 3})
    assert.equal(3, hm.eye(3):trace():item())
  end)

  it("gives empty and one-element results where sizes are 0", function()
    assert.same({0, 2}, hm.mm(hm.zeros {0, 3}, hm.zeros {3, 2}).shape)
    numbers.assert_same(hm.mm(hm.zeros {2, 0}, hm.zeros {0, 2}), {0, 0, 0, 0})
    numbers.assert_same(hm.einsum("ij,jk->ik", hm.zeros {2, 0}, hm.zeros {0, 1}), {0, 0})
    assert.same({0}, f({2, 3}, 1):diagonal(3).shape)
    assert.same({2, 0}, hm.zeros({2, 1}):diff().shape)
    assert.equal(0, hm.zeros({0}):norm():item())
    assert.equal(0, hm.zeros({0}):dot(hm.zeros {0}):item())
  end)

  it("einsum takes its operands as an array, and spaces in the equation", function()
    numbers.assert_same(hm.einsum(" i j , j -> i ", {f({2, 3}, 1), f({3}, 2)}), f({2, 3}, 1):mv(f({3}, 2)))
  end)

  it("einsum reads strided operands", function()
    local x = f({3, 2, 4}, 1):permute(3, 1, 2)
    local y = f({4, 3}, 2):t()
    numbers.assert_near(hm.einsum("abc,ba->c", x, y), hm.einsum("abc,ba->c", x:contiguous(), y:contiguous()), 1e-15,
      1e-15)
  end)

  it("a beta of 0 leaves NaN out", function()
    local x = hm.full({2, 2}, 0 / 0)
    numbers.assert_same(hm.addmm(x, hm.eye(2), hm.eye(2), {beta = 0}), hm.eye(2))
    assert.is_true(hm.addmm(x, hm.eye(2), hm.eye(2)):isnan():all():item())
  end)

  it("norm passes NaN on and does not overflow on the way", function()
    for _, p in ipairs {1, 2, 3, math.huge, -math.huge} do
      local n = hm.tensor({1, 0 / 0, 2}):norm(p):item()
      assert.is_true(n ~= n)
    end
    assert.equal(5e300, hm.tensor({3e300, 4e300}, {dtype = "f64"}):norm():item())
    numbers.assert_near(hm.tensor({3e30, 4e30}):norm(), {5e30}, 1e-6)
  end)
end)

describe("gradients of linalg:", function()
  local function checks(name, fn, ...)
    local inputs = {...}
    it(name, function() gradients.check(fn, inputs) end)
  end
  checks("mm", hm.mm, f({2, 3}, 1), f({3, 2}, 2))
  checks("mv", hm.mv, f({2, 3}, 1), f({3}, 2))
  checks("dot", hm.dot, f({3}, 1), f({3}, 2))
  checks("outer", hm.outer, f({3}, 1), f({2}, 2))
  checks("addmm", function(x, a, b) return hm.addmm(x, a, b, {beta = 0.5, alpha = 3}) end, f({2}, 3), f({2, 3}, 1),
    f({3, 2}, 2))
  checks("baddbmm", hm.baddbmm, f({1, 2, 2}, 3), f({2, 2, 3}, 1), f({2, 3, 2}, 2))
  checks("tensordot", function(x, y) return x:tensordot(y, {{2, 1}, {1, 3}}) end, f({2, 3, 2}, 1), f({3, 2, 2}, 2))
  checks("kron", hm.kron, f({2, 2}, 1), f({2}, 2))
  checks("einsum", function(x, y, z) return hm.einsum("bn,anm,bm->ba", x, y, z) end, f({2, 3}, 1), f({2, 3, 2}, 2),
    f({2, 2}, 3))
  checks("einsum with a diagonal", function(x, y) return hm.einsum("iij,j->i", x, y) end, f({2, 2, 3}, 1), f({3}, 2))
  checks("einsum that broadcasts", function(x, y) return hm.einsum("...ij,...j->...i", x, y) end, f({2, 1, 2, 2}, 1),
    f({3, 2}, 2))
  checks("norm", function(x) return x:norm(2, 2) end, f({2, 3}, 1))
  checks("norm of p 3", function(x) return x:norm(3, {1, 2}) end, f({2, 3}, 1))
  checks("norm of p 1", function(x) return x:norm(1, 1, true) end, f({2, 3}, 1))
  checks("norm of p inf", function(x) return x:norm(math.huge, 2) end, f({2, 3}, 1))
  checks("norm of p -2", function(x) return x:norm(-2, 2) end, f({2, 3}, 1))
  checks("diagonal", function(x) return x:diagonal(1, 3, 1) end, f({3, 2, 3}, 1))
  checks("diag", function(x) return x:diag(1) end, f({3}, 1))
  checks("trace", hm.trace, f({3, 2}, 1))
  checks("diff", function(x) return x:diff(2) end, f({2, 4}, 1))
  it("second derivatives of einsum and norm", function()
    gradients.check_second(function(x, y) return hm.einsum("ij,jk->k", x, y) end, {f({2, 3}, 1), f({3, 2}, 2)})
    gradients.check_second(function(x) return x:norm(3, 2) end, {f({2, 3}, 1)})
  end)
end)

describe("linalg inside autocast", function()
  -- name, what is called, dtype with float32 operands, dtype with one float32 and one low
  local cases = {
    {"mm", function(x, y) return hm.mm(x, y) end, "low", "low"},
    {"bmm", function(x, y) return hm.bmm(x:unsqueeze(1), y:unsqueeze(1)) end, "low", "low"},
    {"mv", function(x, y) return hm.mv(x, y[1]) end, "low", "low"},
    {"addmm", function(x, y) return hm.addmm(x, x, y) end, "low", "low"},
    {"addmv", function(x, y) return hm.addmv(x[1], x, y[1]) end, "low", "low"},
    {"baddbmm", function(x, y) return hm.baddbmm(x:unsqueeze(1), x:unsqueeze(1), y:unsqueeze(1)) end, "low", "low"},
    {"einsum", function(x, y) return hm.einsum("ij,jk->ik", x, y) end, "low", "low"},
    {"einsum of one", function(x) return hm.einsum("ij->j", x) end, "low", "low"},
    {"einsum elementwise", function(x, y) return hm.einsum("ij,ij->ij", x, y) end, "low", "low"},
    {"dot", function(x, y) return hm.dot(x[1], y[1]) end, "float32", "float32"},
    {"tensordot", function(x, y) return hm.tensordot(x, y, 1) end, "float32", "float32"},
    {"norm", function(x) return x:norm() end, "float32", "float32"},
    {"norm of p inf", function(x) return x:norm(math.huge, 1) end, "float32", "float32"},
    {"norm of p -2", function(x) return x:norm(-2, 1) end, "float32", "float32"},
    {"outer", function(x, y) return hm.outer(x[1], y[1]) end, "float32", "float32"},
    {"trace", function(x) return hm.trace(x) end, "float32", "float32"},
  }
  for _, low in ipairs {"float16", "bfloat16"} do
    for _, case in ipairs(cases) do
      it(("%s in %s"):format(case[1], low), function()
        local x, y = f({2, 2}, 1, "f32"), f({2, 2}, 2, "f32")
        hm.amp.autocast(low, function()
          assert.equal(case[3] == "low" and low or case[3], case[2](x, y).dtype)
          assert.equal(case[4] == "low" and low or case[4], case[2](x, y:to(low)).dtype)
        end)
      end)
    end
    it("dot and tensordot stay low with low operands in " .. low, function()
      local x = f({2, 2}, 1, low)
      hm.amp.autocast(low, function()
        assert.equal(low, hm.dot(x[1], x[2]).dtype)
        assert.equal(low, hm.tensordot(x, x).dtype)
        assert.equal("float32", x:norm(2, 1).dtype)
        assert.equal("float32", x:norm(math.huge).dtype)
      end)
    end)
  end
  it("gives float32 weights float32 gradients", function()
    local w = f({3, 2}, 1, "f32"):requires_grad_()
    local x = f({4, 3}, 2, "f32")
    local y = hm.amp.autocast("f16", function() return hm.einsum("bi,io->bo", x, w) + hm.addmm(w[1], x, w) end)
    y:float():sum():backward()
    assert.equal("float32", w.grad.dtype)
    local want = x:sum(1):unsqueeze(2):expand(3, 2) * 2
    want = want + hm.tensor {{4, 4}, {0, 0}, {0, 0}}
    numbers.assert_near(w.grad, want, 5e-3, 5e-3)
  end)

  it("leaves float64 alone", function()
    local x = f({2, 2}, 1)
    hm.amp.autocast("f16", function()
      assert.equal("float64", hm.einsum("ij,jk", x, x).dtype)
      assert.equal("float64", x:mm(x).dtype)
      assert.equal("float64", hm.addmm(x, x, x).dtype)
    end)
  end)
end)

describe("errors of linalg:", function()
  it("products", function()
    raises({"mm: x must be a matrix [n, k], came f32[2,3,4]"}, hm.mm, hm.zeros {2, 3, 4}, hm.zeros {4, 2})
    raises({"mm: inner sizes differ: x is f32[2,3]", "3 (dim 2 of x) must equal 4 (dim 1 of y)"}, hm.mm, hm.zeros {2,
      3}, hm.zeros {4, 2})
    raises({"bmm: batches differ", "matmul broadcasts"}, hm.bmm, hm.zeros {2, 3, 4}, hm.zeros {1, 4, 2})
    raises({"dot: y must be a vector"}, hm.dot, hm.zeros {2}, hm.zeros {2, 2})
    raises({"mv: y must be a tensor, not 3"}, hm.mv, hm.zeros {2, 2}, 3)
    raises({"addmm: unknown option 'apha', did you mean 'alpha'?"}, hm.addmm, hm.zeros {2, 2}, hm.eye(2), hm.eye(2),
      {apha = 1})
    raises({"addmm: x is f32[3]", "does not broadcast to the product f32[2,2]"}, hm.addmm, hm.zeros {3}, hm.eye(2),
      hm.eye(2))
    raises({"tensordot: sizes differ", "3 (dim 2 of x) must equal 2 (dim 1 of y)"}, hm.tensordot, hm.zeros {2, 3},
      hm.zeros {2, 2}, 1)
    raises({"tensordot: 3 dims are more than there are"}, hm.tensordot, hm.zeros {2, 3}, hm.zeros {2, 2}, 3)
    raises({"kron: takes tensors of up to 4 dims"}, hm.kron, hm.zeros {1, 1, 1, 1, 1}, hm.zeros {1})
  end)

  it("einsum", function()
    local x = hm.zeros {2, 3}
    raises({"einsum: the equation comes first, as a string, not f32[2,3]"}, hm.einsum, x, "ij")
    raises({"einsum: \"ij,jk\" names 2 operands, came 1 tensor"}, hm.einsum, "ij,jk", x)
    raises({"\"ijk\" names 3 dims, operand 1 is f32[2,3]"}, hm.einsum, "ijk", x)
    raises({"\"i\" names 1 dim, operand 1 is f32[2,3]"}, hm.einsum, "i", x)
    raises({"\"i...jk\" names 3 dims"}, hm.einsum, "i...jk", x)
    raises({"names \"i\" twice"}, hm.einsum, "ij->ii", x)
    raises({"names \"k\", which no operand has"}, hm.einsum, "ij->k", x)
    raises({"\"j\"", "stands for sizes 3 and 2", "operand 2 is f32[2,2]"}, hm.einsum, "ij,jk->ik", x, hm.zeros {2, 2})
    raises({"\"i\"", "stands for sizes 2 and 3"}, hm.einsum, "ii", x)
    raises({"may hold letters"}, hm.einsum, "i1", x)
    raises({"may hold letters"}, hm.einsum, "i....", x)
    raises({"einsum: operand 2 must be a tensor, not 3"}, hm.einsum, "i,i", x, 3)
  end)

  it("norms and diagonals", function()
    raises({"norm: p must be a number, \"fro\", \"inf\" or \"-inf\", not \"nuc\""}, hm.norm, hm.zeros {2}, "nuc")
    raises({"norm: needs a floating dtype", "x:float()"}, hm.norm, hm.zeros({2}, {dtype = "i64"}))
    raises({"norm: dim 3 is not among the 2 of f32[2,3]"}, hm.norm, hm.zeros {2, 3}, 2, 3)
    raises({"norm: unknown option 'dims', did you mean 'dim'?"}, hm.norm, hm.zeros {2, 3}, {dims = 1})
    raises({"norm: dim 1 is given twice"}, hm.norm, hm.zeros {2, 3}, 2, {1, -2})
    raises({"diag: x must be a vector or a matrix"}, hm.diag, hm.zeros {2, 2, 2})
    raises({"diagonal: x must have at least 2 dims"}, hm.diagonal, hm.zeros {2})
    raises({"trace: x must be a matrix"}, hm.trace, hm.zeros {2})
    raises({"diff: option 'n' must be at least 0, not -1"}, hm.diff, hm.zeros {2}, -1)
  end)
end)
