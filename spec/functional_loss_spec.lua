-- Losses of nn.functional: values that PyTorch gave, gradients, autocast, errors.
--
-- The line above each case is what was computed, with PyTorch 2.15 on the CPU in float64; f(shape, seed) there is the
-- same row of sines as here.

local hm = require "halfmoon"
local gradients = require "spec.support.gradients"
local numbers = require "spec.support.numbers"
local raises = require "spec.support.raises"
local support = require "spec.support.golden"

local F = hm.nn.functional
local f, ids, golden = support.filled, support.ids, support.declarer(it)

describe("losses, as PyTorch has them:", function()
  -- F.cross_entropy(f((3,4),1) * 3, ids(1,-100,3))
  golden("cross_entropy 1", function() return F.cross_entropy(f({3, 4}, 1) * 3, ids {1, -100, 3}) end,
    {}, {1.2348478273})
  -- F.cross_entropy(f((3,4),1) * 3, ids(1,-100,3), f((4,),2).abs())
  golden("cross_entropy 2", function()
    return F.cross_entropy(f({3, 4}, 1) * 3, ids {1, -100, 3}, {weight = f({4}, 2):abs()})
  end,
    {}, {1.0226898424})
  -- F.cross_entropy(f((3,4),1) * 3, ids(1,-100,3), f((4,),2).abs(), reduction='sum')
  golden("cross_entropy 3", function()
    return F.cross_entropy(f({3, 4}, 1) * 3, ids {1, -100, 3}, {weight = f({4}, 2):abs(), reduction = 'sum'})
  end,
    {}, {1.138371681})
  -- F.cross_entropy(f((3,4),1) * 3, ids(1,-100,3), f((4,),2).abs(), label_smoothing=0.2)
  golden("cross_entropy 4", function()
    return F.cross_entropy(f({3, 4}, 1) * 3, ids {1, -100, 3}, {weight = f({4}, 2):abs(), label_smoothing = 0.2})
  end,
    {}, {1.1317981674})
  -- F.cross_entropy(f((3,4),1) * 3, ids(1,-100,3), f((4,),2).abs(), label_smoothing=0.2, reduction='none')
  golden("cross_entropy 5", function()
    return F.cross_entropy(f({3, 4}, 1) * 3, ids {1, -100, 3}, {weight = f({4}, 2):abs(), label_smoothing = 0.2,
      reduction = 'none'})
  end,
    {3}, {0.52706443085, 0, 0.73275739291})
  -- F.cross_entropy(f((3,4),1) * 3, ids(1,-100,3), label_smoothing=0.2)
  golden("cross_entropy 6", function()
    return F.cross_entropy(f({3, 4}, 1) * 3, ids {1, -100, 3}, {label_smoothing = 0.2})
  end,
    {}, {1.3379726997})
  -- F.cross_entropy(f((2,3,2),1), ids([[0,1],[2,2]]), f((3,),2).abs(), label_smoothing=0.1, ignore_index=1)
  golden("cross_entropy of images, weighted", function()
    return F.cross_entropy(f({2, 3, 2}, 1), ids {{0, 1}, {2, 2}}, {weight = f({3}, 2):abs(), label_smoothing = 0.1,
      ignore_index = 1})
  end,
    {}, {0.67732177468})
  -- F.nll_loss(f((3,4),1), ids(1,-100,3))
  golden("nll_loss", function() return F.nll_loss(f({3, 4}, 1), ids {1, -100, 3}) end,
    {}, {-0.24195474698})
  -- F.nll_loss(f((2,3,2),1), ids([[0,1],[2,2]]), f((3,),2).abs(), ignore_index=1)
  golden("nll_loss, weighted", function()
    return F.nll_loss(f({2, 3, 2}, 1), ids {{0, 1}, {2, 2}}, {weight = f({3}, 2):abs(), ignore_index = 1})
  end,
    {}, {-0.82150457552})
  -- F.nll_loss(f((3,4),1), ids(1,0,3), reduction='none')
  golden("nll_loss, none", function() return F.nll_loss(f({3, 4}, 1), ids {1, 0, 3}, {reduction = 'none'}) end,
    {3}, {0.51417238509, 0.97144857673, -0.99808187905})
  -- F.mse_loss(f((2,3),1) * 2, f((2,3),2))
  golden("mse_loss", function() return F.mse_loss(f({2, 3}, 1) * 2, f({2, 3}, 2)) end,
    {}, {4.9569201492})
  -- F.mse_loss(f((2,3),1) * 2, f((2,3),2), reduction='none')
  golden("mse_loss, reduction = 'none'", function()
    return F.mse_loss(f({2, 3}, 1) * 2, f({2, 3}, 2), {reduction = 'none'})
  end,
    {2, 3}, {0.0019043913937, 1.5862451316, 5.0752288093, 8.1126737772, 8.6473316635, 6.3181371221})
  -- F.l1_loss(f((2,3),1) * 2, f((2,3),2))
  golden("l1_loss", function() return F.l1_loss(f({2, 3}, 1) * 2, f({2, 3}, 2)) end,
    {}, {1.9764048421})
  -- F.l1_loss(f((2,3),1) * 2, f((2,3),2), reduction='sum')
  golden("l1_loss, reduction = 'sum'", function()
    return F.l1_loss(f({2, 3}, 1) * 2, f({2, 3}, 2), {reduction = 'sum'})
  end,
    {}, {11.858429053})
  -- F.smooth_l1_loss(f((2,3),1) * 2, f((2,3),2))
  golden("smooth_l1_loss", function() return F.smooth_l1_loss(f({2, 3}, 1) * 2, f({2, 3}, 2)) end,
    {}, {1.5526236525})
  -- F.smooth_l1_loss(f((2,3),1) * 2, f((2,3),2), beta=0.5, reduction='none')
  golden("smooth_l1_loss, beta = 0.5, reduction = 'none'", function()
    return F.smooth_l1_loss(f({2, 3}, 1) * 2, f({2, 3}, 2), {beta = 0.5, reduction = 'none'})
  end,
    {2, 3}, {0.0019043913937, 1.0094622391, 2.0028268485, 2.5982755796, 2.6906345682, 2.2635904842})
  -- F.smooth_l1_loss(f((2,3),1) * 2, f((2,3),2), beta=0.)
  golden("smooth_l1_loss, beta = 0", function()
    return F.smooth_l1_loss(f({2, 3}, 1) * 2, f({2, 3}, 2), {beta = 0})
  end,
    {}, {1.9764048421})
  -- F.huber_loss(f((2,3),1) * 2, f((2,3),2), delta=0.7)
  golden("huber_loss, delta = 0.7", function() return F.huber_loss(f({2, 3}, 1) * 2, f({2, 3}, 2), {delta = 0.7}) end,
    {}, {1.1743841666})
  -- F.huber_loss(f((2,3),1) * 2, f((2,3),2), delta=2., reduction='none')
  golden("huber_loss, delta = 2, reduction = 'none'", function()
    return F.huber_loss(f({2, 3}, 1) * 2, f({2, 3}, 2), {delta = 2, reduction = 'none'})
  end,
    {2, 3}, {0.00095219569684, 0.79312256582, 2.505653697, 3.6965511591, 3.8812691363, 3.0271809684})
  -- F.binary_cross_entropy_with_logits(f((2,3),1) * 2, f((2,3),2).sigmoid())
  golden("binary_cross_entropy_with_logits", function()
    return F.binary_cross_entropy_with_logits(f({2, 3}, 1) * 2, f({2, 3}, 2):sigmoid())
  end,
    {}, {1.2008074818})
  -- F.binary_cross_entropy_with_logits(f((2,3),1) * 2, f((2,3),2).sigmoid(), pos_weight=f((3,),3).abs())
  golden("binary_cross_entropy_with_logits, pos_weight = f(3, 3):abs()", function()
    return F.binary_cross_entropy_with_logits(f({2, 3}, 1) * 2, f({2, 3}, 2):sigmoid(), {pos_weight = f({3},
      3):abs()})
  end,
    {}, {0.4220760111})
  -- F.binary_cross_entropy_with_logits(f((2,3),1) * 2, f((2,3),2).sigmoid(), weight=f((2,1),3), reduction='sum')
  golden("binary_cross_entropy_with_logits, weight = f(2, 1, 3), reduction = sum", function()
    return F.binary_cross_entropy_with_logits(f({2, 3}, 1) * 2, f({2, 3}, 2):sigmoid(), {weight = f({2, 1}, 3),
      reduction = 'sum'})
  end,
    {}, {1.6626391526})
  -- F.binary_cross_entropy(f((2,3),1).sigmoid(), f((2,3),2).sigmoid())
  golden("binary_cross_entropy", function()
    return F.binary_cross_entropy(f({2, 3}, 1):sigmoid(), f({2, 3}, 2):sigmoid())
  end,
    {}, {0.8877570668})
  -- F.binary_cross_entropy(torch.tensor([0.,1,1,0]), torch.tensor([1.,0,1,0]), reduction='none')
  golden("binary_cross_entropy at 0 and 1", function()
    return F.binary_cross_entropy(hm.tensor({0, 1, 1, 0}, {dtype = 'f64'}), hm.tensor({1, 0, 1, 0}, {dtype = 'f64'}),
      {reduction = 'none'})
  end,
    {4}, {100, 100, -0, 0})
  -- F.binary_cross_entropy(f((2,3),1).sigmoid(), f((2,3),2).sigmoid(), weight=f((2,3),3), reduction='sum')
  golden("binary_cross_entropy, weighted", function()
    return F.binary_cross_entropy(f({2, 3}, 1):sigmoid(), f({2, 3}, 2):sigmoid(), {weight = f({2, 3}, 3),
      reduction = 'sum'})
  end,
    {}, {-2.5302351783})
  -- F.kl_div(f((2,3),1).log_softmax(1), f((2,3),2).softmax(1), reduction='mean')
  golden("kl_div, mean", function()
    return F.kl_div(f({2, 3}, 1):log_softmax(2), f({2, 3}, 2):softmax(2), {reduction = 'mean'})
  end,
    {}, {0.031312725526})
  -- F.kl_div(f((2,3),1).log_softmax(1), f((2,3),2).softmax(1), reduction='batchmean')
  golden("kl_div, batchmean", function()
    return F.kl_div(f({2, 3}, 1):log_softmax(2), f({2, 3}, 2):softmax(2), {reduction = 'batchmean'})
  end,
    {}, {0.093938176578})
  -- F.kl_div(f((2,3),1).log_softmax(1), f((2,3),2).softmax(1), reduction='sum')
  golden("kl_div, sum", function()
    return F.kl_div(f({2, 3}, 1):log_softmax(2), f({2, 3}, 2):softmax(2), {reduction = 'sum'})
  end,
    {}, {0.18787635316})
  -- F.kl_div(f((2,3),1).log_softmax(1), f((2,3),2).softmax(1), reduction='none')
  golden("kl_div, none", function()
    return F.kl_div(f({2, 3}, 1):log_softmax(2), f({2, 3}, 2):softmax(2), {reduction = 'none'})
  end,
    {2, 3}, {-0.16528971745, 0.010715794242, 0.33731334192, 0.0046661000554, 0.041979089523, -0.041508255137})
  -- F.kl_div(f((2,3),1).log_softmax(1), f((2,3),2).log_softmax(1), log_target=True)
  golden("kl_div of logarithms", function()
    return F.kl_div(f({2, 3}, 1):log_softmax(2), f({2, 3}, 2):log_softmax(2), {log_target = true})
  end,
    {}, {0.031312725526})
  -- F.kl_div(torch.zeros(2) - 1, torch.tensor([0.,1]), reduction='none')
  golden("kl_div with a target of 0", function()
    return F.kl_div(hm.zeros({2}, {dtype = 'f64'}) - 1, hm.tensor({0, 1}, {dtype = 'f64'}), {reduction = 'none'})
  end,
    {2}, {0, 1})
end)

describe("gradients of losses:", function()
  local function checks(name, fn, ...)
    local inputs = {...}
    it(name, function() gradients.check(fn, inputs) end)
  end
  local target = ids {1, -100, 2}
  checks("cross_entropy, weighted and smoothed", function(x)
    return F.cross_entropy(x, target, {weight = f({3}, 2):abs(), label_smoothing = 0.1})
  end, f({3, 3}, 1))
  checks("cross_entropy, weighted, none", function(x)
    return F.cross_entropy(x, target, {weight = f({3}, 2):abs(), reduction = "none", label_smoothing = 0.1})
  end, f({3, 3}, 1))
  checks("nll_loss", function(x) return F.nll_loss(x, target, {weight = f({3}, 2):abs()}) end, f({3, 3}, 1))
  for _, name in ipairs {"mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy_with_logits"} do
    checks(name, F[name], f({2, 3}, 1) * 2, f({2, 3}, 2))
  end
  checks("binary_cross_entropy_with_logits, weighted", function(x, t, p)
    return F.binary_cross_entropy_with_logits(x, t, {pos_weight = p, weight = f({2, 1}, 4)})
  end, f({2, 3}, 1), f({2, 3}, 2):sigmoid(), f({3}, 3):abs())
  checks("binary_cross_entropy", function(x, t) return F.binary_cross_entropy(x, t) end, f({2, 3}, 1):sigmoid(), f({2,
    3}, 2):sigmoid())
  checks("kl_div", function(x, t) return F.kl_div(x, t, {reduction = "batchmean"}) end, f({2, 3}, 1), f({2, 3},
    2):sigmoid())
  checks("kl_div of logarithms", function(x, t) return F.kl_div(x, t, {log_target = true}) end, f({2, 3}, 1), f({2, 3},
    2))

  -- torch: x = tensor([0., 1, 1, 0.3], requires_grad=True); F.binary_cross_entropy(x, tensor([1., 0, 1, 1]),
  -- reduction='sum').backward()
  it("binary_cross_entropy at 0 and 1 are finite", function()
    local x = hm.tensor({0, 1, 1, 0.3}, {dtype = "f64", requires_grad = true})
    F.binary_cross_entropy(x, hm.tensor({1, 0, 1, 1}, {dtype = "f64"}), {reduction = "sum"}):backward()
    numbers.assert_near(x.grad, {-1e12, 1e12, 0, -1 / 0.3}, 1e-9)
  end)
end)

describe("losses inside autocast", function()
  local low, x, t
  before_each(function() low, x, t = "float16", f({2, 3}, 1, "f16"), f({2, 3}, 2, "f16"):sigmoid() end)

  it("answer in float32", function()
    hm.amp.autocast(low, function()
      for _, name in ipairs {"mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy_with_logits",
        "kl_div"} do
        assert.equal("float32", F[name](x, t).dtype)
        assert.equal("float32", F[name](x, t:float()).dtype)
        assert.equal("float32", F[name](x, t, {reduction = "none"}).dtype)
      end
      assert.equal("float32", F.nll_loss(x, ids {0, 2}).dtype)
      assert.equal("float32", F.cross_entropy(x, ids {0, 2}).dtype)
      assert.equal("float32", F.cross_entropy(x, ids {0, 2}, {weight = hm.ones({3}, {dtype = "f16"}),
        label_smoothing = 0.1}).dtype)
      assert.equal("float32", F.binary_cross_entropy_with_logits(x, t, {weight = t, pos_weight = t}).dtype)
    end)
  end)

  it("do not overflow where float16 would", function()
    local far = hm.full({2}, 400, {dtype = "f16"})
    hm.amp.autocast(low, function() assert.equal(160000, F.mse_loss(far, far * 0):item()) end)
  end)

  it("binary_cross_entropy is refused, with advice", function()
    hm.amp.autocast(low, function()
      raises({"binary_cross_entropy: is unsafe inside autocast", "binary_cross_entropy_with_logits"},
        F.binary_cross_entropy, t, t)
      hm.amp.autocast({enabled = false}, function() assert.equal("float16", F.binary_cross_entropy(t, t).dtype) end)
    end)
  end)
end)

describe("errors of losses:", function()
  local x = hm.zeros {2, 3}
  it("shapes", function()
    for _, name in ipairs {"mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div",
      "binary_cross_entropy_with_logits",
      "binary_cross_entropy"} do
      raises({name .. ": shapes differ: input is f32[2,3]", "target is f32[2,1]", "use reshape"}, F[name], x,
        hm.zeros {2, 1})
      raises({name .. ": target must be a tensor, not nil"}, F[name], x)
      raises({name .. ": unknown option 'reductoin', did you mean 'reduction'?"}, F[name], x, x, {reductoin = "sum"})
    end
    raises({"nll_loss: shapes differ: input is f32[2,3]", "target must be [2]"}, F.nll_loss, x, ids {0, 1, 2})
    local wanting = hm.ones({3}, {requires_grad = true})
    raises("nll_loss: the weight has no derivative", F.nll_loss, x, ids {0, 1}, {weight = wanting})
    raises("nll_loss: the weight has no derivative", F.cross_entropy, x, ids {0, 1}, {weight = wanting})
    raises({"nll_loss: target must hold class ids as int64"}, F.nll_loss, x, x)
    raises({"nll_loss: weight must be [3], one number for each class, came f32[2]"}, F.nll_loss, x, ids {0, 1},
      {weight = hm.ones {2}})
    raises({"cross_entropy: weight must be [3]"}, F.cross_entropy, x, ids {0, 1}, {weight = hm.ones {2}})
    raises({"cross_entropy: shapes differ"}, F.cross_entropy, x, ids {0}, {weight = hm.ones {3}})
    raises({"weight and pos_weight must broadcast to f32[2,3]"}, F.binary_cross_entropy_with_logits, x, x,
      {weight = hm.ones {4, 2, 3}})
  end)

  it("options and values", function()
    raises({"huber_loss: option 'delta' must be above 0"}, F.huber_loss, x, x, {delta = 0})
    raises({"smooth_l1_loss: option 'beta' must be at least 0"}, F.smooth_l1_loss, x, x, {beta = -1})
    raises({"must be one of mean, batchmean, sum, none"}, F.kl_div, x, x, {reduction = "avg"})
    raises({"binary_cross_entropy: x must hold probabilities between 0 and 1", "takes logits"}, F.binary_cross_entropy,
      x + 2, x)
    raises({"cross_entropy: option 'label_smoothing' must lie between 0 and 1"}, F.cross_entropy, x, ids {0, 1},
      {label_smoothing = 2})
  end)
end)
