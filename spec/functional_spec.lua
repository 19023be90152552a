-- nn.functional: layers, activations, normalization, attention: values that PyTorch gave, gradients, autocast, errors.
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
local attention = F.scaled_dot_product_attention

describe("layers, as PyTorch has them:", function()
  -- F.linear(f((2,3),1), f((2,3),2), f((2,),3))
  golden("linear", function() return F.linear(f({2, 3}, 1), f({2, 3}, 2), f({2}, 3)) end,
    {2, 2}, {-0.12133502091, -1.3117511612, -0.042996239914, -2.5015647121})
  -- F.embedding(ids([[0,2],[1,2]]), f((3,2),1), padding_idx=-1)
  golden("embedding", function() return F.embedding(ids {{0, 2}, {1, 2}}, f({3, 2}, 1), {padding_idx = -1}) end,
    {2, 2, 2}, {-0.1163489298, -0.51417238509, -0.97144857673, -0.78817170272, -0.82117778378, -0.98313888874,
      -0.97144857673, -0.78817170272})
  -- F.one_hot(ids(1,0), 3)
  golden("one_hot", function() return F.one_hot(ids {1, 0}, 3) end,
    {2, 3}, {0, 1, 0, 1, 0, 0})
  -- F.pad(f((2,2),1), (1,1), value=2)
  golden("pad", function() return F.pad(f({2, 2}, 1), {1, 1}, {value = 2}) end,
    {2, 4}, {2, -0.1163489298, -0.51417238509, 2, 2, -0.82117778378, -0.98313888874, 2})
  -- F.pad(f((1,1,2,2),1), (0,1,1,0), 'replicate')
  golden("pad, replicating", function() return F.pad(f({1, 1, 2, 2}, 1), {0, 1, 1, 0}, 'replicate') end,
    {1, 1, 3, 3}, {-0.1163489298, -0.51417238509, -0.51417238509, -0.1163489298, -0.51417238509, -0.51417238509,
      -0.82117778378, -0.98313888874, -0.98313888874})
  -- F.pad(f((1,1,3),1), (1,2), 'circular')
  golden("pad, circular", function() return F.pad(f({1, 1, 3}, 1), {1, 2}, {mode = 'circular'}) end,
    {1, 1, 6}, {-0.82117778378, -0.1163489298, -0.51417238509, -0.82117778378, -0.1163489298, -0.51417238509})
  -- F.conv1d(f((2,2,5),1), f((3,2,2),2), f((3,),3), stride=2, padding=1)
  golden("conv1d", function()
    return F.conv1d(f({2, 2, 5}, 1), f({3, 2, 2}, 2), f({3}, 3), {stride = 2, padding = 1})
  end,
    {2, 3, 3}, {-0.24524808401, 0.046198000874, 1.278585601, -0.31891440546, -1.5622386073, -1.3113358978,
      0.47554448564, 0.48899108771, -0.80492382855, 0.53086264371, -0.61325071644, -1.0317328141, 0.88410780309,
      1.1833400622, -0.14082171946, -0.59557592104, 0.47515856708, 1.2183566503})
  -- F.conv1d(f((1,2,6),1), f((2,1,3),2), groups=2, dilation=2)
  golden("conv1d with groups and dilation", function()
    return F.conv1d(f({1, 2, 6}, 1), f({2, 1, 3}, 2), nil, {groups = 2, dilation = 2})
  end,
    {1, 2, 2}, {-0.76083323068, -0.61116808702, 0.81971618439, 1.5875539678})
  -- F.conv2d(f((1,2,4,3),1), f((2,2,3,2),2), f((2,),3), padding=(1,0), stride=(2,1))
  golden("conv2d", function()
    return F.conv2d(f({1, 2, 4, 3}, 1), f({2, 2, 3, 2}, 2), f({2}, 3), {padding = {1, 0}, stride = {2, 1}})
  end,
    {1, 2, 2, 2}, {-1.5729519718, -1.1313056596, 2.1511924192, 1.8928796038, 0.48945561081, 0.28299215232,
      0.52594734304, -0.18263394846})
  -- F.conv1d(f((1,1,4),1), f((1,1,4),2), padding='same')
  golden("conv1d, same", function() return F.conv1d(f({1, 1, 4}, 1), f({1, 1, 4}, 2), nil, {padding = 'same'}) end,
    {1, 1, 4}, {-1.0650547451, -1.4652692556, -0.69275791417, -0.071969909749})
  -- F.conv2d(f((1,1,3,3),1), f((1,1,3,2),2), padding='same', dilation=(1,3))
  golden("conv2d, same", function()
    return F.conv2d(f({1, 1, 3, 3}, 1), f({1, 1, 3, 2}, 2), nil, {padding = 'same', dilation = {1, 3}})
  end,
    {1, 1, 3, 3}, {-1.4629886263, -1.0519421334, -1.283138066, -0.55263337913, -1.0428080434, -0.55663104391,
      0.13057080758, -0.098413711802, 0.14646087695})
  -- F.conv2d(f((1,1,3,2),1), f((1,1,3,3),2), padding='same')
  golden("conv2d, same with an odd kernel", function()
    return F.conv2d(f({1, 1, 3, 2}, 1), f({1, 1, 3, 3}, 2), nil, {padding = 'same'})
  end,
    {1, 1, 3, 2}, {-0.83857749988, -1.5531511977, -2.3869995743, -2.7763245577, -2.497928805, -1.7151738163})
  -- F.conv2d(f((1,1,3,2),1), f((1,1,3,2),2), padding='valid')
  golden("conv2d, valid", function()
    return F.conv2d(f({1, 1, 3, 2}, 1), f({1, 1, 3, 2}, 2), nil, {padding = 'valid'})
  end,
    {1, 1, 1, 1}, {-3.1732314729})
  -- F.conv_transpose2d(f((1,2,2,2),1), f((2,1,2,2),2), f((1,),3))
  golden("conv_transpose2d", function()
    return F.conv_transpose2d(f({1, 2, 2, 2}, 1), f({2, 1, 2, 2}, 2), f({1}, 3))
  end,
    {1, 1, 3, 3}, {-0.47044593862, -1.1497494388, -0.38073795051, -0.59450095262, -1.3507177368, -0.54441435784,
      -0.35569465312, -1.0584230238, -0.41222829459})
  -- F.conv_transpose2d(f((1,4,2,1),1), f((4,1,2,3),2), f((2,),3), stride=(3,2), padding=(0,1), output_padding=(2,1),
  --   groups=2, dilation=(1,2))
  golden("conv_transpose2d with everything", function()
    return F.conv_transpose2d(f({1, 4, 2, 1}, 1), f({4, 1, 2, 3}, 2), f({2}, 3), {stride = {3, 2}, padding = {0, 1},
      output_padding = {2, 1}, groups = 2, dilation = {1, 2}})
  end,
    {1, 2, 7, 4}, {0.47680789562, 0.15465959063, 0.47680789562, 0.45144626917, 0.47680789562, 1.0052459261,
      0.47680789562, 1.1644414991, 0.47680789562, 0.47680789562, 0.47680789562, 0.47680789562, 0.47680789562,
      0.0044818226131, 0.47680789562, 0.21759320233, 0.47680789562, 0.73544215712, 0.47680789562, 0.9487122846,
      0.47680789562, 0.47680789562, 0.47680789562, 0.47680789562, 0.47680789562, 0.47680789562, 0.47680789562,
      0.47680789562, 0.073523844303, 0.40852178751, 0.073523844303, 0.15308620721, 0.073523844303, -0.35234448671,
      0.073523844303, -0.51306558504, 0.073523844303, 0.073523844303, 0.073523844303, 0.073523844303,
      0.073523844303, 0.66220712542, 0.073523844303, 0.42685034048, 0.073523844303, -0.17849291384, 0.073523844303,
      -0.44155785353, 0.073523844303, 0.073523844303, 0.073523844303, 0.073523844303, 0.073523844303,
      0.073523844303, 0.073523844303, 0.073523844303})
  -- F.max_pool2d(f((1,1,5,4),1), 2, stride=(2,1), padding=1)
  golden("max_pool2d", function() return F.max_pool2d(f({1, 1, 5, 4}, 1), 2, {stride = {2, 1}, padding = 1}) end,
    {1, 1, 3, 5}, {-0.1163489298, -0.1163489298, -0.51417238509, -0.82117778378, -0.98313888874, 0.3545712425,
      0.70745084607, 0.93537369808, 0.99808187905, 0.99808187905, 0.88449926883, 0.88449926883, 0.61468791705,
      0.23630449167, -0.18381729875})
  -- F.max_pool2d(f((1,1,6,5),1), 2, dilation=2, stride=3, ceil_mode=True)
  golden("max_pool2d with dilation and ceil_mode", function()
    return F.max_pool2d(f({1, 1, 6, 5}, 1), 2, {dilation = 2, stride = 3, ceil_mode = true})
  end,
    {1, 1, 2, 2}, {0.93537369808, 0.61468791705, 0.95731623537, 0.55946050825})
  -- F.max_pool2d(f((2,2,5,4),1), (3,2), stride=2, padding=1, return_indices=True)[1]
  golden("max_pool2d, where", function()
    return select(2, F.max_pool2d(f({2, 2, 5, 4}, 1), {3, 2}, {stride = 2, padding = 1, return_indices = true}))
  end,
    {2, 2, 3, 3}, {0, 6, 7, 12, 10, 11, 12, 13, 15, 4, 6, 7, 4, 6, 7, 16, 18, 19, 0, 1, 3, 12, 14, 15, 16, 14, 15,
      0, 6, 7, 12, 10, 11, 12, 13, 15})
  -- F.max_pool1d(f((1,2,6),1), 3, stride=2, padding=1)
  golden("max_pool1d", function() return F.max_pool1d(f({1, 2, 6}, 1), 3, {stride = 2, padding = 1}) end,
    {1, 2, 3}, {-0.1163489298, -0.51417238509, -0.78817170272, -0.060936133587, 0.70745084607, 0.99808187905})
  -- F.max_pool1d(f((1,2,6),1), 2, dilation=2, stride=1, return_indices=True)[1]
  golden("max_pool1d, where", function()
    return select(2, F.max_pool1d(f({1, 2, 6}, 1), 2, {dilation = 2, stride = 1, return_indices = true}))
  end,
    {1, 2, 4}, {0, 1, 2, 5, 2, 3, 4, 5})
  -- F.avg_pool2d(f((1,1,4,5),1), 2, padding=1)
  golden("avg_pool2d", function() return F.avg_pool2d(f({1, 1, 4, 5}, 1), 2, {padding = 1}) end,
    {1, 1, 3, 3}, {-0.02908723245, -0.33383754222, -0.48864686637, 0.036800498838, 0.3389911572, 0.47825362432,
      -0.045954324688, -0.35741461727, -0.48658167152})
  -- F.avg_pool2d(f((1,1,4,5),1), (2,3), stride=2, padding=(1,1), count_include_pad=False, ceil_mode=True)
  golden("avg_pool2d without the padding", function()
    return F.avg_pool2d(f({1, 1, 4, 5}, 1), {2, 3}, {stride = 2, padding = {1, 1}, count_include_pad = false,
      ceil_mode = true})
  end,
    {1, 1, 3, 3}, {-0.31526065744, -0.77282968587, -0.97729373273, 0.16990087223, 0.38753729806, 0.47825362432,
      -0.37764440708, -0.80765988428, -0.97316334305})
  -- F.avg_pool2d(f((1,1,4,4),1), 2, divisor_override=3)
  golden("avg_pool2d with a divisor", function()
    return F.avg_pool2d(f({1, 1, 4, 4}, 1), 2, {divisor_override = 3})
  end,
    {1, 1, 2, 2}, {-0.79671386478, -0.77697773053, 0.85373642482, 0.66198092335})
  -- F.avg_pool1d(f((1,2,5),1), 3, stride=2, padding=1)
  golden("avg_pool1d", function() return F.avg_pool1d(f({1, 2, 5}, 1), 3, {stride = 2, padding = 1}) end,
    {1, 2, 3}, {-0.21017377163, -0.77282968587, -0.65152915516, -0.41795069607, -0.057348425528, 0.35400736286})
  -- F.adaptive_avg_pool2d(f((1,1,5,4),1), (3,2))
  golden("adaptive_avg_pool2d", function() return F.adaptive_avg_pool2d(f({1, 1, 5, 4}, 1), {3, 2}) end,
    {1, 1, 3, 2}, {-0.59753539858, -0.5827332979, 0.13359816583, 0.24322104183, 0.017382179202, -0.47345987329})
  -- F.adaptive_avg_pool1d(f((1,2,5),1), 3)
  golden("adaptive_avg_pool1d", function() return F.adaptive_avg_pool1d(f({1, 2, 5}, 1), 3) end,
    {1, 2, 3}, {-0.31526065744, -0.77282968587, -0.97729373273, -0.62692604411, -0.057348425528, 0.53101104428})
  -- F.adaptive_max_pool2d(f((1,1,5,4),1), 3)
  golden("adaptive_max_pool2d", function() return F.adaptive_max_pool2d(f({1, 1, 5, 4}, 1), 3) end,
    {1, 1, 3, 3}, {-0.1163489298, -0.4656803855, -0.060936133587, 0.88449926883, 0.93537369808, 0.99808187905,
      0.88449926883, 0.61468791705, 0.23630449167})
  -- F.adaptive_max_pool2d(f((1,2,5,4),1), 2, return_indices=True)[1]
  golden("adaptive_max_pool2d, where", function()
    return select(2, F.adaptive_max_pool2d(f({1, 2, 5, 4}, 1), 2, {return_indices = true}))
  end,
    {1, 2, 2, 2}, {9, 11, 12, 11, 5, 6, 8, 19})
  -- F.interpolate(f((1,1,2,3),1), size=(3,5))
  golden("interpolate nearest", function() return F.interpolate(f({1, 1, 2, 3}, 1), {size = {3, 5}}) end,
    {1, 1, 3, 5}, {-0.1163489298, -0.1163489298, -0.51417238509, -0.51417238509, -0.82117778378, -0.1163489298,
      -0.1163489298, -0.51417238509, -0.51417238509, -0.82117778378, -0.98313888874, -0.98313888874,
      -0.97144857673, -0.97144857673, -0.78817170272})
  -- F.interpolate(f((1,1,3,2),1), scale_factor=1.6)
  golden("interpolate nearest by a scale", function()
    return F.interpolate(f({1, 1, 3, 2}, 1), {scale_factor = 1.6})
  end,
    {1, 1, 4, 3}, {-0.1163489298, -0.1163489298, -0.51417238509, -0.1163489298, -0.1163489298, -0.51417238509,
      -0.82117778378, -0.82117778378, -0.98313888874, -0.82117778378, -0.82117778378, -0.98313888874})
  -- F.interpolate(f((1,2,3),1), scale_factor=2)
  golden("interpolate nearest of lines", function() return F.interpolate(f({1, 2, 3}, 1), {scale_factor = 2}) end,
    {1, 2, 6}, {-0.1163489298, -0.1163489298, -0.51417238509, -0.51417238509, -0.82117778378, -0.82117778378,
      -0.98313888874, -0.98313888874, -0.97144857673, -0.97144857673, -0.78817170272, -0.78817170272})
  -- F.interpolate(f((1,1,2,3),1), size=(3,4), mode='bilinear')
  golden("interpolate bilinear", function()
    return F.interpolate(f({1, 1, 2, 3}, 1), {size = {3, 4}, mode = 'bilinear'})
  end,
    {1, 1, 3, 4}, {-0.1163489298, -0.36498858935, -0.6292994096, -0.82117778378, -0.54974390927, -0.67041051654,
      -0.76600957929, -0.80467474325, -0.98313888874, -0.97583244373, -0.90271974897, -0.78817170272})
  -- F.interpolate(f((1,1,2,3),1), size=(3,4), mode='bilinear', align_corners=True)
  golden("interpolate bilinear with corners", function()
    return F.interpolate(f({1, 1, 2, 3}, 1), {size = {3, 4}, mode = 'bilinear', align_corners = true})
  end,
    {1, 1, 3, 4}, {-0.1163489298, -0.38156456666, -0.61650751798, -0.82117778378, -0.54974390927, -0.67845495703,
      -0.76343190169, -0.80467474325, -0.98313888874, -0.9753453474, -0.91035628539, -0.78817170272})
  -- F.interpolate(f((1,1,4,5),1), scale_factor=(0.6,1.3), mode='bilinear')
  golden("interpolate bilinear by scales", function()
    return F.interpolate(f({1, 1, 4, 5}, 1), {scale_factor = {0.6, 1.3}, mode = 'bilinear'})
  end,
    {1, 1, 2, 6}, {-0.34028985411, -0.44341350907, -0.52752033394, -0.5618930564, -0.53840968046, -0.4455823793,
      0.93537369808, 0.97637520102, 0.9500276978, 0.83261247041, 0.62506527674, 0.33817695235})
  -- F.interpolate(f((1,2,3),1), size=5, mode='linear')
  golden("interpolate linear", function() return F.interpolate(f({1, 2, 3}, 1), {size = 5, mode = 'linear'}) end,
    {1, 2, 5}, {-0.1163489298, -0.27547831191, -0.51417238509, -0.6983756243, -0.82117778378, -0.98313888874,
      -0.97846276394, -0.97144857673, -0.86148245232, -0.78817170272})
end)

describe("activations, as PyTorch has them:", function()
  -- F.relu(f((2,4),1) * 4)
  golden("relu", function() return F.relu(f({2, 4}, 1) * 4) end,
    {2, 4}, {0, 0, 0, 0, 0, 0, 0, 0})
  -- F.relu6(f((2,4),1) * 4)
  golden("relu6", function() return F.relu6(f({2, 4}, 1) * 4) end,
    {2, 4}, {0, 0, 0, 0, 0, 0, 0, 0})
  -- F.gelu(f((2,4),1) * 4)
  golden("gelu", function() return F.gelu(f({2, 4}, 1) * 4) end,
    {2, 4}, {-0.1493101393, -0.040841842635, -0.0016766311595, -0.00016526082436, -0.00019816743183,
      -0.0025501338278, -0.058211401878, -0.098403163804})
  -- F.gelu(f((2,4),1) * 4, approximate='tanh')
  golden("gelu, tanh", function() return F.gelu(f({2, 4}, 1) * 4, {approximate = 'tanh'}) end,
    {2, 4}, {-0.14932338264, -0.040694710992, -0.0013856500365, -9.6519286125e-05, -0.00011974501164,
      -0.0021998364838, -0.05822906934, -0.098404278302})
  -- F.silu(f((2,4),1) * 4)
  golden("silu", function() return F.silu(f({2, 4}, 1) * 4) end,
    {2, 4}, {-0.17950619699, -0.23318372435, -0.1185761923, -0.07557194777, -0.078176165032, -0.12921457394,
      -0.2503239753, -0.10709251911})
  -- F.tanh(f((2,4),1) * 4)
  golden("tanh", function() return F.tanh(f({2, 4}, 1) * 4) end,
    {2, 4}, {-0.43447164719, -0.96782134917, -0.99719871409, -0.99923248134, -0.99915726912, -0.99635373251,
      -0.95292967144, -0.23902948593})
  -- F.sigmoid(f((2,4),1) * 4)
  golden("sigmoid", function() return F.sigmoid(f({2, 4}, 1) * 4) end,
    {2, 4}, {0.38570659246, 0.11337818362, 0.036099427748, 0.019217007036, 0.020118451688, 0.040985540807,
      0.13438614933, 0.43936377647})
  -- F.logsigmoid(f((2,4),1) * 4)
  golden("logsigmoid", function() return F.logsigmoid(f({2, 4}, 1) * 4) end,
    {2, 4}, {-0.95267832172, -2.1770262905, -3.3214782656, -3.9519596089, -3.9061178906, -3.1945359377,
      -2.0070379118, -0.82242756105})
  -- F.mish(f((2,4),1) * 4)
  golden("mish", function() return F.mish(f({2, 4}, 1) * 4) end,
    {2, 4}, {-0.21038539655, -0.24630756048, -0.12071501282, -0.076297944417, -0.078962394351, -0.13186022147,
      -0.26697036285, -0.12716336805})
  -- F.softsign(f((2,4),1) * 4)
  golden("softsign", function() return F.softsign(f({2, 4}, 1) * 4) end,
    {2, 4}, {-0.31759047273, -0.67284868587, -0.7666120379, -0.7972653346, -0.79532498972, -0.7591920495,
      -0.65068205715, -0.19597636622})
  -- F.softplus(f((2,4),1) * 4)
  golden("softplus", function() return F.softplus(f({2, 4}, 1) * 4) end,
    {2, 4}, {0.48728260253, 0.12033675018, 0.036767130509, 0.019404053914, 0.020323583692, 0.041849126847,
      0.14431636978, 0.5786830267})
  -- F.softplus(f((2,4),1) * 4, beta=3, threshold=2)
  golden("softplus, steeper", function() return F.softplus(f({2, 4}, 1) * 4, {beta = 3, threshold = 2}) end,
    {2, 4}, {0.073724268643, 0.0006963030706, 1.750941261e-05, 2.5073535725e-06, 2.8849599599e-06,
      2.6018265458e-05, 0.0012449686267, 0.13097670684})
  -- F.elu(f((2,4),1) * 4)
  golden("elu", function() return F.elu(f({2, 4}, 1) * 4) end,
    {2, 4}, {-0.37211341075, -0.87212339972, -0.96254859807, -0.98040646384, -0.97946848604, -0.95726285416,
      -0.84475046324, -0.21631218599})
  -- F.elu(f((2,4),1) * 4, 0.5)
  golden("elu, scaled", function() return F.elu(f({2, 4}, 1) * 4, 0.5) end,
    {2, 4}, {-0.18605670538, -0.43606169986, -0.48127429904, -0.49020323192, -0.48973424302, -0.47863142708,
      -0.42237523162, -0.10815609299})
  -- F.selu(f((2,4),1) * 4)
  golden("selu", function() return F.selu(f({2, 4}, 1) * 4) end,
    {2, 4}, {-0.65421234216, -1.5332795742, -1.6922560558, -1.7236519578, -1.7220028997, -1.6829631929,
      -1.4851552326, -0.38029831161})
  -- F.leaky_relu(f((2,4),1) * 4)
  golden("leaky_relu", function() return F.leaky_relu(f({2, 4}, 1) * 4) end,
    {2, 4}, {-0.0046539571919, -0.020566895404, -0.032847111351, -0.03932555555, -0.038857943069, -0.031526868109,
      -0.01862721542, -0.0024374453435})
  -- F.leaky_relu(f((2,4),1) * 4, 0.2)
  golden("leaky_relu, steeper", function() return F.leaky_relu(f({2, 4}, 1) * 4, {negative_slope = 0.2}) end,
    {2, 4}, {-0.093079143838, -0.41133790807, -0.65694222702, -0.78651111099, -0.77715886138, -0.63053736218,
      -0.3725443084, -0.04874890687})
  -- F.hardtanh(f((2,4),1) * 4)
  golden("hardtanh", function() return F.hardtanh(f({2, 4}, 1) * 4) end,
    {2, 4}, {-0.46539571919, -1, -1, -1, -1, -1, -1, -0.24374453435})
  -- F.hardtanh(f((2,4),1) * 4, -2, 0.5)
  golden("hardtanh, wider", function() return F.hardtanh(f({2, 4}, 1) * 4, {min_val = -2, max_val = 0.5}) end,
    {2, 4}, {-0.46539571919, -2, -2, -2, -2, -2, -1.862721542, -0.24374453435})
  -- F.hardsigmoid(f((2,4),1) * 4)
  golden("hardsigmoid", function() return F.hardsigmoid(f({2, 4}, 1) * 4) end,
    {2, 4}, {0.4224340468, 0.15721840994, 0, 0, 0, 0, 0.18954640967, 0.45937591094})
  -- F.hardswish(f((2,4),1) * 4)
  golden("hardswish", function() return F.hardswish(f({2, 4}, 1) * 4) end,
    {2, 4}, {-0.19659899702, -0.32334945928, -0, -0, -0, -0, -0.3530721805, -0.1119703675})
  -- F.prelu(f((2,4),1) * 4, torch.tensor([0.3]).double()*0+0.3)
  golden("prelu", function() return F.prelu(f({2, 4}, 1) * 4, hm.tensor({0.3}, {dtype = 'f64'})) end,
    {2, 4}, {-0.13961871576, -0.61700686211, -0.98541334053, -1.1797666665, -1.1657382921, -0.94580604327,
      -0.5588164626, -0.073123360304})
  -- F.prelu(f((2,4),1) * 4, f((4,),2))
  golden("prelu, by channel", function() return F.prelu(f({2, 4}, 1) * 4, f({4}, 2)) end,
    {2, 4}, {0.087987028907, -0.47533688087, -2.0052218142, -3.4685053561, 0.73464254592, -0.72864099595,
      -1.1371380058, -0.21498214356})
  -- F.glu(f((2,4),1) * 4)
  golden("glu", function() return F.glu(f({2, 4}, 1) * 4) end,
    {2, 2}, {-0.016800519139, -0.039523417368, -0.522196934, -1.3851763833})
  -- F.glu(f((2,4),1) * 4, 0)
  golden("glu, dim 1", function() return F.glu(f({2, 4}, 1) * 4, 1) end,
    {1, 4}, {-0.0093630412923, -0.084294533082, -0.44141968111, -1.7278224598})
  -- F.softmax(f((2,4),1) * 4, 1)
  golden("softmax", function() return F.softmax(f({2, 4}, 1) * 4, 2) end,
    {2, 4}, {0.77249053979, 0.15732692125, 0.046076559343, 0.024105979619, 0.020486320919, 0.042643074768,
      0.1549078085, 0.78196279581})
  -- F.log_softmax(f((2,4),1) * 4, 0)
  golden("log_softmax", function() return F.log_softmax(f({2, 4}, 1) * 4, 1) end,
    {2, 4}, {-0.032176149496, -0.28833646836, -1.6380953028, -3.7135053024, -3.4525747372, -1.3843337389,
      -0.21610570966, -0.024694281756})
  -- F.softmin(f((2,4),1) * 4, -1)
  golden("softmin", function() return F.softmin(f({2, 4}, 1) * 4, -1) end,
    {2, 4}, {0.01827449801, 0.089729568978, 0.30637871042, 0.58561722259, 0.61017993316, 0.29313885073,
      0.080695363586, 0.015985852519})
end)

describe("normalization, as PyTorch has it:", function()
  -- F.batch_norm(f((3,2),1), None, None, f((2,),2), f((2,),3), True)
  golden("batch_norm, training", function()
    return F.batch_norm(f({3, 2}, 1), nil, nil, {training = true, weight = f({2}, 2), bias = f({2}, 3)})
  end,
    {3, 2}, {0.2130940128, 0.37103925096, 0.5705587691, -0.1923437044, 0.64677090497, 0.041875986351})
  -- F.batch_norm(f((2,2,2),1), f((2,),2), f((2,),3).square(), eps=0.1)
  golden("batch_norm, not training", function()
    return F.batch_norm(f({2, 2, 2}, 1), f({2}, 2), f({2}, 3):square(), {eps = 0.1})
  end,
    {2, 2, 2}, {0.12708326658, -0.5682404117, -3.2411971476, -3.7400570162, -1.3674767547, -1.047141821,
      -2.1462219965, -0.89956055671})
  -- F.relu(F.batch_norm(f((3,2),1), None, None, None, None, True))
  golden("batch_norm with relu", function()
    return F.batch_norm(f({3, 2}, 1), nil, nil, {training = true, activation = 'relu'})
  end,
    {3, 2}, {1.3948796054, 1.2872908659, 0, 0, 0, 0})
  -- F.instance_norm(f((2,2,3),1), weight=f((2,),2), bias=f((2,),3))
  golden("instance_norm", function()
    return F.instance_norm(f({2, 2, 3}, 1), {weight = f({2}, 2), bias = f({2}, 3)})
  end,
    {2, 2, 3}, {0.23599427377, 0.49664209445, 0.69778731865, -0.10468661296, -0.074443299216, 0.39970144508,
      0.70732669077, 0.47883329216, 0.24426370394, -0.24628101517, 0.17541577141, 0.29143677667})
  -- F.instance_norm(f((2,2,2),1), f((2,),2), f((2,),3).square(), use_input_stats=False)
  golden("instance_norm by running statistics", function()
    return F.instance_norm(f({2, 2, 2}, 1), {running_mean = f({2}, 2), running_var = f({2}, 3):square(),
      use_input_stats = false})
  end,
    {2, 2, 2}, {0.15248908065, -0.68184002742, -14.299079447, -16.499882597, -1.6408554702, -1.2564808719,
      -9.4684147374, -3.9685607761})
  -- F.layer_norm(f((2,4),1), (4,), f((4,),2), f((4,),3))
  golden("layer_norm", function() return F.layer_norm(f({2, 4}, 1), 4, f({4}, 2), f({4}, 3)) end,
    {2, 4}, {0.19509945186, 0.13964728368, -0.73528286871, -1.6979204195, 0.69532254965, -0.071173554633,
      -0.15592868533, 0.60322634583})
  -- F.layer_norm(f((2,2,2),1), (2,2), f((2,2),2), None, 0.1)
  golden("layer_norm over two dims", function()
    return F.layer_norm(f({2, 2, 2}, 1), {2, 2}, f({2, 2}, 2), nil, 0.1)
  end,
    {2, 2, 2}, {-0.20352866971, 0.04777285151, -0.28359947085, -0.72207697627, 0.16129702738, -0.10680867341,
      0.13790008496, 0.96085567474})
  -- F.rms_norm(f((2,4),1), (4,), f((4,),2))
  golden("rms_norm", function() return F.rms_norm(f({2, 4}, 1), {4}, f({4}, 2)) end,
    {2, 4}, {0.031759466452, -0.17157580963, -0.72379731113, -1.2519786253, 0.27489468789, -0.27264897776,
      -0.42550380307, -0.080443815274})
  -- F.rms_norm(f((2,4),1), (4,), None, 0.5)
  golden("rms_norm with eps", function() return F.rms_norm(f({2, 4}, 1), 4, nil, 0.5) end,
    {2, 4}, {-0.11754808081, -0.51947170617, -0.82964125803, -0.9932716162, -0.99859245021, -0.81019451844,
      -0.47869226258, -0.062638789539})
  -- F.group_norm(f((2,4,2),1), 2, f((4,),2), f((4,),3))
  golden("group_norm", function() return F.group_norm(f({2, 4, 2}, 1), 2, f({4}, 2), f({4}, 3)) end,
    {2, 4, 2}, {0.19509945186, 0.42271765279, -0.075085877612, -0.18836864145, -1.0483320125, -0.72494889944,
      -0.428566764, 0.60322634583, 0.77256416514, 0.50787525192, 0.2445389623, 0.30203923454, 0.41047448821,
      0.0012204922937, -1.0307353583, -1.951418484})
  -- F.normalize(f((2,3),1))
  golden("normalize", function() return F.normalize(f({2, 3}, 1)) end,
    {2, 3}, {-0.11923079438, -0.52690800018, -0.84151766293, -0.61791231262, -0.61056483831, -0.49537354808})
  -- F.normalize(f((2,3),1), p=1, dim=0)
  golden("normalize of p 1 along dim 1", function() return F.normalize(f({2, 3}, 1), {p = 1, dim = 1}) end,
    {2, 3}, {-0.1058210267, -0.34609930682, -0.51025447901, -0.8941789733, -0.65390069318, -0.48974552099})
  -- F.normalize(f((1,3),1) * 0)
  golden("normalize of zeros", function() return F.normalize(f({1, 3}, 1) * 0) end,
    {1, 3}, {-0, -0, -0})
  -- F.cosine_similarity(f((2,3),1), f((2,3),2))
  golden("cosine_similarity", function() return F.cosine_similarity(f({2, 3}, 1), f({2, 3}, 2)) end,
    {2}, {-0.90196201361, -0.99387353495})
  -- F.cosine_similarity(f((3,2),1), f((1,2),2), dim=-1, eps=1)
  golden("cosine_similarity that broadcasts", function()
    return F.cosine_similarity(f({3, 2}, 1), f({1, 2}, 2), {dim = -1, eps = 1})
  end,
    {3}, {-0.096837462991, -0.056183728747, 0.0011993788805})
end)

describe("attention, as PyTorch has it:", function()
  -- S(f((1, 2, 2, 2),1), f((1, 2, 3, 2),2), f((1, 2, 3, 2),3))
  golden("plain", function() return attention(f({1, 2, 2, 2}, 1), f({1, 2, 3, 2}, 2), f({1, 2, 3, 2}, 3)) end,
    {1, 2, 2, 2}, {-0.17601140851, -0.46849630218, 0.031485209359, -0.30030122832, 0.18185748868, 0.50610645985,
      -0.061313933087, 0.26557169924})
  -- S(f((1, 1, 3, 2),1), f((1, 1, 3, 2),2), f((1, 1, 3, 2),3), is_causal=True)
  golden("causal", function()
    return attention(f({1, 1, 3, 2}, 1), f({1, 1, 3, 2}, 2), f({1, 1, 3, 2}, 3), {is_causal = true})
  end,
    {1, 1, 3, 2}, {0.47680789562, 0.073523844303, 0.24272407367, -0.1469778163, 0.035993796049, -0.29717122567})
  -- S(f((1, 1, 2, 2),1), f((1, 1, 3, 2),2), f((1, 1, 3, 1),3), is_causal=True)
  golden("causal, more keys", function()
    return attention(f({1, 1, 2, 2}, 1), f({1, 1, 3, 2}, 2), f({1, 1, 3, 1}, 3), {is_causal = true})
  end,
    {1, 1, 2, 1}, {0.47680789562, 0.36162060568})
  -- S(f((2, 2, 2),1), f((2, 3, 2),2), f((2, 3, 1),3), scale=0.3)
  golden("a scale, three dims", function()
    return attention(f({2, 2, 2}, 1), f({2, 3, 2}, 2), f({2, 3, 1}, 3), {scale = 0.3})
  end,
    {2, 2, 1}, {0.089991322387, 0.13962261763, -0.91175735619, -0.88763908158})
  -- S(f((2, 1, 1, 2, 2),1), f((2, 1, 1, 2, 2),2), f((2, 1, 1, 2, 1),3))
  golden("five dims", function()
    return attention(f({2, 1, 1, 2, 2}, 1), f({2, 1, 1, 2, 2}, 2), f({2, 1, 1, 2, 1}, 3))
  end,
    {2, 1, 1, 2, 1}, {0.30542607083, 0.36162060568, -0.56574135584, -0.53120423708})
  -- S(f((2, 2),1), f((3, 2),2), f((3, 2),3))
  golden("two dims", function() return attention(f({2, 2}, 1), f({3, 2}, 2), f({3, 2}, 3)) end,
    {2, 2}, {-0.17601140851, -0.46849630218, 0.031485209359, -0.30030122832})
  -- S(f((1, 2, 2, 2),1), f((1, 2, 3, 2),2), f((1, 2, 3, 1),3), attn_mask=f((2,3),4) > -0.5)
  golden("a bool mask", function()
    return attention(f({1, 2, 2, 2}, 1), f({1, 2, 3, 2}, 2), f({1, 2, 3, 1}, 3), {attn_mask = f({2, 3}, 4):gt(-0.5)})
  end,
    {1, 2, 2, 1}, {-0.12920652811, 0.23483582025, -0.97749609735, -0.90265760314})
  -- S(f((2, 2, 2),1), f((2, 3, 2),2), f((2, 3, 1),3), attn_mask=f((2,2,3),4))
  golden("a float mask by batch, three dims", function()
    return attention(f({2, 2, 2}, 1), f({2, 3, 2}, 2), f({2, 3, 1}, 3), {attn_mask = f({2, 2, 3}, 4)})
  end,
    {2, 2, 1}, {0.010711529009, 0.16468671385, -0.93368744243, -0.8637590954})
  -- S(f((1, 2, 2, 2),1), f((1, 2, 2, 2),2), f((1, 2, 2, 1),3), attn_mask=f((2,1,2),4))
  golden("a float mask by head", function()
    return attention(f({1, 2, 2, 2}, 1), f({1, 2, 2, 2}, 2), f({1, 2, 2, 1}, 3), {attn_mask = f({2, 1, 2}, 4)})
  end,
    {1, 2, 2, 1}, {0.27049834335, 0.33094176772, -0.59750713437, -0.5663374948})
  -- S(f((1, 4, 2, 2),1), f((1, 2, 2, 2),2), f((1, 2, 2, 1),3), enable_gqa=True)
  golden("grouped heads", function()
    return attention(f({1, 4, 2, 2}, 1), f({1, 2, 2, 2}, 2), f({1, 2, 2, 1}, 3), {enable_gqa = true})
  end,
    {1, 4, 2, 1}, {0.30542607083, 0.36162060568, 0.36122719771, 0.30433098932, -0.48886687485, -0.46902435559,
      -0.48292448108, -0.52303218047})
  -- S(f((1, 1, 2, 2),1), f((1, 1, 2, 2),2), f((1, 1, 2, 2),3), attn_mask=torch.tensor([[True,False],[False,False]]))
  golden("a row without keys", function()
    return attention(f({1, 1, 2, 2}, 1), f({1, 1, 2, 2}, 2), f({1, 1, 2, 2}, 3), {attn_mask = hm.tensor {{true, false},
      {false, false}}})
  end,
    {1, 1, 2, 2}, {0.47680789562, 0.073523844303, 0, 0})
end)

describe("gradients of nn.functional:", function()
  local function checks(name, fn, ...)
    local inputs = {...}
    it(name, function() gradients.check(fn, inputs) end)
  end
  checks("conv1d", function(x, w, b) return F.conv1d(x, w, b, {padding = 1, stride = 2}) end, f({1, 2, 4}, 1), f({2, 2,
    3}, 2), f({2}, 3))
  checks("conv_transpose2d", function(x, w, b) return F.conv_transpose2d(x, w, b, {stride = 2, padding = 1}) end,
    f({1, 2, 2, 2}, 1), f({2, 1, 3, 2}, 2), f({1}, 3))
  checks("max_pool1d", function(x) return F.max_pool1d(x, 2) end, f({1, 2, 4}, 1))
  checks("avg_pool2d", function(x) return F.avg_pool2d(x, 2, {padding = 1, count_include_pad = false}) end, f({1, 1, 3,
    3}, 1))
  checks("adaptive_avg_pool2d", function(x) return F.adaptive_avg_pool2d(x, {2, 1}) end, f({1, 1, 3, 3}, 1))
  checks("adaptive_max_pool2d", function(x) return F.adaptive_max_pool2d(x, 2) end, f({1, 1, 3, 3}, 1))
  checks("interpolate", function(x) return F.interpolate(x, {size = {3, 4}, mode = "bilinear"}) end, f({1, 1, 2, 3}, 1))
  checks("interpolate of lines", function(x) return F.interpolate(x, {scale_factor = 1.7}) end, f({1, 2, 3}, 1))
  checks("embedding", function(w) return F.embedding(ids {2, 0, 2}, w) end, f({3, 2}, 1))
  checks("glu", F.glu, f({2, 4}, 1))
  checks("prelu", F.prelu, f({2, 3}, 1), f({3}, 2))
  checks("hardswish", function(x) return F.hardswish(x * 4) end, f({5}, 1))
  checks("instance_norm", function(x, w, b) return F.instance_norm(x, {weight = w, bias = b}) end, f({2, 2, 3}, 1),
    f({2}, 2), f({2}, 3))
  checks("batch_norm", function(x, w, b) return F.batch_norm(x, nil, nil, {training = true, weight = w, bias = b}) end,
    f({3, 2}, 1), f({2}, 2), f({2}, 3))
  checks("layer_norm", function(x, w, b) return F.layer_norm(x, {2, 2}, w, b) end, f({2, 2, 2}, 1), f({2, 2}, 2), f({2,
    2}, 3))
  checks("rms_norm", function(x, w) return F.rms_norm(x, 3, w) end, f({2, 3}, 1), f({3}, 2))
  checks("group_norm", function(x, w, b) return F.group_norm(x, 2, w, b) end, f({1, 4, 2}, 1), f({4}, 2), f({4}, 3))
  checks("normalize", function(x) return F.normalize(x) end, f({2, 3}, 1))
  checks("cosine_similarity", function(a, b) return F.cosine_similarity(a, b) end, f({2, 3}, 1), f({2, 3}, 2))
  checks("attention", function(q, k, v) return attention(q, k, v, {is_causal = true}) end, f({1, 1, 3, 2}, 1), f({1, 1,
    3, 2}, 2), f({1, 1, 3, 2}, 3))
  checks("attention by a float mask", function(q, k, v, m) return attention(q, k, v, {attn_mask = m, enable_gqa = true,
    scale = 0.7}) end,
    f({1, 2, 2, 2}, 1), f({1, 1, 3, 2}, 2), f({1, 1, 3, 2}, 3), f({2, 3}, 4))
  checks("attention by a float mask, causal", function(q, k, v, m) return attention(q, k, v, {attn_mask = m,
    is_causal = true}) end,
    f({2, 2, 2}, 1), f({2, 2, 2}, 2), f({2, 2, 1}, 3), f({2, 2, 2}, 4))
end)

describe("second derivatives of nn.functional:", function()
  local function checks(name, fn, ...)
    local inputs = {...}
    it(name, function() gradients.check_second(fn, inputs) end)
  end
  checks("conv1d", F.conv1d, f({1, 1, 4}, 1), f({1, 1, 2}, 2))
  checks("conv_transpose2d", function(x, w) return F.conv_transpose2d(x, w, nil, {stride = 2}) end,
    f({1, 1, 2, 2}, 1), f({1, 1, 2, 2}, 2))
  checks("avg_pool1d", function(x) return F.avg_pool1d(x, 2):square() end, f({1, 1, 4}, 1))
  checks("max_pool1d", function(x) return F.max_pool1d(x, 2):square() end, f({1, 1, 4}, 1))
  checks("interpolate", function(x) return F.interpolate(x, {size = 5, mode = "linear"}):square() end, f({1, 1, 3}, 1))
  checks("embedding", function(w) return F.embedding(ids {1, 1, 0}, w):square() end, f({2, 2}, 1))
  checks("glu", F.glu, f({2, 2}, 1))
  checks("mish", F.mish, f({3}, 1))
  checks("normalize", function(x) return F.normalize(x) end, f({2, 3}, 1))
  checks("cosine_similarity", function(a, b) return F.cosine_similarity(a, b) end, f({2, 3}, 1), f({2, 3}, 2))
  checks("attention by a float mask", function(q, k, m) return attention(q, k, k, {attn_mask = m}) end,
    f({1, 2, 2}, 1), f({1, 2, 2}, 2), f({2, 2}, 4))
  checks("cross_entropy, weighted", function(x)
    return F.cross_entropy(x, ids {0, 2}, {weight = f({3}, 2):abs(), label_smoothing = 0.1})
  end, f({2, 3}, 1))
  checks("binary_cross_entropy", function(x) return F.binary_cross_entropy(x, f({2, 2}, 3):sigmoid()) end, f({2, 2},
    1):sigmoid())
  checks("binary_cross_entropy_with_logits", F.binary_cross_entropy_with_logits, f({2, 2}, 1), f({2, 2}, 2):sigmoid())
  checks("huber_loss", function(x, t) return F.huber_loss(x, t, {delta = 0.7}) end, f({2, 3}, 1) * 2, f({2, 3}, 2))
  checks("kl_div", F.kl_div, f({2, 2}, 1), f({2, 2}, 2):sigmoid())
end)

describe("windows", function()
  it("max_pool2d's places pick the values out of the image", function()
    local x = f({2, 3, 7, 6}, 1)
    local y, at = F.max_pool2d(x, 3, {stride = 2, padding = 1, return_indices = true})
    numbers.assert_same(x:flatten(3):gather(3, at:flatten(3)), y:flatten(3))
  end)

  it("interpolate to the same size gives the same", function()
    local x = f({1, 2, 3, 4}, 1)
    numbers.assert_near(F.interpolate(x, {size = {3, 4}, mode = "bilinear"}), x, 1e-15, 1e-15)
    numbers.assert_same(F.interpolate(x, {scale_factor = 1}), x)
  end)

  it("are methods too", function()
    local x = f({1, 2, 4, 4}, 1)
    numbers.assert_same(x:avg_pool2d(2), F.avg_pool2d(x, 2))
    numbers.assert_same(x:adaptive_avg_pool2d(1), F.adaptive_avg_pool2d(x, {1, 1}))
    numbers.assert_same(x:glu(2), F.glu(x, 2))
  end)
end)

describe("batch and instance statistics", function()
  it("move by momentum", function()
    local x = f({4, 2, 3}, 1, "f32")
    local mean, var = hm.zeros {2}, hm.ones {2}
    F.batch_norm(x, mean, var, {training = true, momentum = 0.5})
    numbers.assert_near(mean, x:mean({1, 3}) * 0.5, 1e-5, 1e-6)
    numbers.assert_near(var, x:var({1, 3}) * 0.5 + 0.5, 1e-5, 1e-6)
    F.batch_norm(x, mean:clone(), var, {})
    numbers.assert_near(mean, x:mean({1, 3}) * 0.5, 1e-5, 1e-6)
  end)

  for _, n in ipairs {1, 3} do
    it("of instances are averaged over the batch of " .. n, function()
      local x = f({n, 2, 4}, 1, "f32")
      local mean, var = hm.ones {2}, hm.ones {2}
      F.instance_norm(x, {running_mean = mean, running_var = var, momentum = 0.25})
      numbers.assert_near(mean, x:mean(3):mean(1) * 0.25 + 0.75, 1e-5, 1e-6)
      numbers.assert_near(var, x:var(3):mean(1) * 0.25 + 0.75, 1e-5, 1e-6)
    end)
  end
end)

describe("dropout", function()
  it("keeps, scales and zeroes by the probability", function()
    hm.manual_seed(5)
    local x = hm.ones {4000}
    local y = F.dropout(x, 0.25)
    local kept = y:ne(0):sum():item()
    assert.is_true(math.abs(kept / 4000 - 0.75) < 0.03)
    numbers.assert_near(y:max(), {1 / 0.75}, 1e-6)
    assert.is_true(rawequal(x, F.dropout(x, 0.25, false)))
    assert.is_true(rawequal(x, F.dropout(x, 0)))
    assert.equal(0, F.dropout(x, 1):ne(0):sum():item())
    assert.is_true(math.abs(F.dropout(x):ne(0):sum():item() / 4000 - 0.5) < 0.04)
  end)

  it("passes gradients where it passed values", function()
    local x = hm.ones({100}, {requires_grad = true})
    local y = F.dropout(x, 0.5)
    y:sum():backward()
    numbers.assert_same(x.grad, y:detach())
  end)

  it("of channels takes them whole", function()
    hm.manual_seed(2)
    local y = F.dropout2d(hm.ones {20, 10, 3, 3}, 0.5)
    local sums = y:sum{dim = {3, 4}}:totable()
    local dropped = 0
    for _, row in ipairs(sums) do
      for _, s in ipairs(row) do
        assert.is_true(s == 0 or s == 18)
        if s == 0 then dropped = dropped + 1 end
      end
    end
    assert.is_true(dropped > 60 and dropped < 140)
  end)

  it("refuses what is no probability", function()
    raises("dropout: the probability must lie between 0 and 1, not 1.5", F.dropout, hm.ones {2}, 1.5)
    raises("dropout: the probability must lie between 0 and 1, not nan", F.dropout, hm.ones {2}, math.abs(0 / 0))
    raises("dropout: training must be true or false, not 1", F.dropout, hm.ones {2}, 0.5, 1)
    raises("dropout2d: x must be [N, C, d...]", F.dropout2d, hm.ones {2})
  end)

  it("of attention drops weights, and says so by the probability", function()
    hm.manual_seed(1)
    local q, k, v = hm.zeros {1, 1, 200, 4}, hm.zeros {1, 1, 50, 4}, hm.ones {1, 1, 50, 1}
    local y = attention(q, k, v, {dropout_p = 0.5})
    assert.is_true(math.abs(y:mean():item() - 1) < 0.05)
    assert.is_true(y:var():item() > 1e-3)
  end)
end)

describe("attention", function()
  it("gives the same with a mask that wants a gradient and without", function()
    local q, k, v, m = f({2, 2, 3, 4}, 1), f({2, 2, 5, 4}, 2), f({2, 2, 5, 2}, 3), f({2, 1, 3, 5}, 4)
    local plain = attention(q, k, v, {attn_mask = m})
    numbers.assert_near(attention(q, k, v, {attn_mask = m:clone():requires_grad_()}), plain, 1e-12, 1e-12)
  end)

  it("puts the triangle into a mask, bool or float", function()
    local q, k, v = f({1, 2, 3, 4}, 1), f({1, 2, 3, 4}, 2), f({1, 2, 3, 2}, 3)
    local m = f({3, 3}, 4)
    local triangle = hm.ones({3, 3}, {dtype = "bool"}):tril()
    local want = attention(q, k, v, {attn_mask = m:masked_fill(triangle:logical_not(), -math.huge)})
    numbers.assert_near(attention(q, k, v, {attn_mask = m, is_causal = true}), want, 1e-12, 1e-12)
    want = attention(q, k, v, {attn_mask = m:gt(-0.3):logical_and(triangle)})
    numbers.assert_near(attention(q, k, v, {attn_mask = m:gt(-0.3), is_causal = true}), want, 1e-12, 1e-12)
  end)

  it("a mask that wants a gradient may close a row", function()
    local m = hm.tensor({{0, -math.huge}, {-math.huge, -math.huge}}, {dtype = "f64", requires_grad = true})
    local v = f({1, 2, 1}, 3):requires_grad_()
    local y = attention(f({1, 2, 2}, 1), f({1, 2, 2}, 2), v, {attn_mask = m})
    assert.equal(0, y[{1, 2, 1}]:item())
    y:sum():backward()
    numbers.assert_same(m.grad, {0, 0, 0, 0})
    numbers.assert_same(v.grad, {1, 0})
  end)

  it("refuses shapes that do not fit", function()
    local x = hm.zeros {1, 2, 3, 4}
    raises({"heads differ", "enable_gqa"}, attention, x, hm.zeros {1, 1, 3, 4}, hm.zeros {1, 1, 3, 4})
    raises({"sizes differ", "4 (last dim of q) must equal 5"}, attention, x, hm.zeros {1, 2, 3, 5}, x)
    raises({"lengths differ", "3 (dim -2 of k) must equal 4"}, attention, x, x, hm.zeros {1, 2, 4, 4})
    raises({"as many dims"}, attention, x, hm.zeros {2, 3, 4}, x)
    raises({"unknown option 'causal', did you mean 'is_causal'?"}, attention, x, x, x, {causal = true})
    raises({"attn_mask is f32[1,1,1,3,3]", "more dims than q"}, attention, x, x, x, {attn_mask = hm.zeros {1, 1, 1, 3,
      3}})
    raises({"scale must be above 0"}, attention, x, x, x, {scale = -1})
    raises({"option 'dropout_p' must lie between 0 and 1"}, attention, x, x, x, {dropout_p = 2})
    raises({"q must be a tensor, not nil"}, attention, nil, x, x)
  end)
end)

describe("nn.functional inside autocast:", function()
  local images, lines, rows = {1, 2, 4, 4}, {1, 2, 4}, {2, 4}
  -- name, what is called, shape of x, dtype with float32 x, with low x
  local cases = {
    {"conv1d", function(x) return F.conv1d(x, f({2, 2, 3}, 2, "f32"), f({2}, 3, "f32")) end, lines, "low", "low"},
    {"conv_transpose2d", function(x) return F.conv_transpose2d(x, f({2, 1, 2, 2}, 2, "f32"), f({1}, 3, "f32")) end,
      images, "low", "low"},
    {"prelu", function(x) return F.prelu(x, hm.ones {1}) end, rows, "low", "low"},
    {"attention", function(x) return attention(x, x, x) end, images, "low", "low"},
    {"attention by a float mask", function(x) return attention(x, x, x, {attn_mask = hm.zeros({4, 4},
      {requires_grad = true})}) end, images, "low", "low"},
    {"max_pool2d", function(x) return F.max_pool2d(x, 2) end, images, "float32", "low"},
    {"avg_pool2d", function(x) return F.avg_pool2d(x, 2) end, images, "float32", "low"},
    {"interpolate", function(x) return F.interpolate(x, {size = {2, 2}}) end, images, "float32", "float32"},
    {"batch_norm", function(x) return F.batch_norm(x, nil, nil, {training = true}) end, images, "float32", "low"},
    {"instance_norm", function(x) return F.instance_norm(x) end, images, "float32", "low"},
    {"layer_norm", function(x) return F.layer_norm(x, 4) end, rows, "float32", "float32"},
    {"rms_norm", function(x) return F.rms_norm(x, 4) end, rows, "float32", "float32"},
    {"group_norm", function(x) return F.group_norm(x, 1) end, images, "float32", "float32"},
    {"cosine_similarity", function(x) return F.cosine_similarity(x, x) end, rows, "float32", "float32"},
    {"normalize", function(x) return F.normalize(x) end, rows, "float32", "float32"},
    {"softmin", function(x) return F.softmin(x, 2) end, rows, "float32", "float32"},
    {"softplus", function(x) return F.softplus(x) end, rows, "float32", "float32"},
    {"glu", function(x) return F.glu(x) end, rows, "float32", "low"},
    {"gelu", function(x) return F.gelu(x) end, rows, "float32", "low"},
    {"selu", function(x) return F.selu(x) end, rows, "float32", "low"},
    {"hardswish", function(x) return F.hardswish(x) end, rows, "float32", "low"},
    {"dropout", function(x) return F.dropout(x) end, rows, "float32", "low"},
    {"dropout2d", function(x) return F.dropout2d(x) end, images, "float32", "low"},
    {"embedding", function(x) return F.embedding(ids {0}, x) end, rows, "float32", "low"},
    {"pad", function(x) return F.pad(x, {1, 1}) end, rows, "float32", "low"},
  }
  for _, case in ipairs(cases) do
    it(case[1], function()
      for _, low in ipairs {"float16", "bfloat16"} do
        local x, z = f(case[3], 1, "f32"), f(case[3], 1, low)
        hm.amp.autocast(low, function()
          assert.equal(case[4] == "low" and low or case[4], case[2](x).dtype)
          assert.equal(case[5] == "low" and low or case[5], case[2](z).dtype)
        end)
      end
    end)
  end
end)

describe("errors of nn.functional:", function()
  it("convolution", function()
    raises({"conv1d: input must be [N, C, L], came f32[2,5]", "x:unsqueeze(1)"}, F.conv1d, hm.zeros {2, 5}, hm.zeros {1,
      2, 3})
    raises({"conv1d: channels differ: input is f32[1,2,3]", "2 (dim 2 of input) must equal 3", "x:transpose(2, 3)"},
      F.conv1d,
      hm.zeros {1, 2, 3}, hm.zeros {1, 3, 2})
    raises({"conv1d: the kernel is longer than the input", "4 (length with padding) must be at least 5"}, F.conv1d,
      hm.zeros {1, 1, 2}, hm.zeros {1, 1, 5}, nil, {padding = 1})
    raises({"conv1d: 'stride' must be one number, came an array of 2"}, F.conv1d, hm.zeros {1, 1, 2}, hm.zeros {1, 1,
      1}, nil, {stride = {1, 1}})
    raises({"conv1d: bias must be [1]"}, F.conv1d, hm.zeros {1, 1, 2}, hm.zeros {1, 1, 1}, hm.zeros {2})
    raises({"conv1d: 'padding' must be a number, an array, \"same\" or \"valid\", not \"full\""}, F.conv1d, hm.zeros {1,
      1, 2},
      hm.zeros {1, 1, 1}, nil, {padding = "full"})
    raises({"conv2d: padding = \"same\" needs a stride of 1"}, F.conv2d, hm.zeros {1, 1, 2, 2}, hm.zeros {1, 1, 1, 1},
      nil,
      {padding = "same", stride = {1, 2}})
    raises({"conv_transpose2d: dtypes differ", "autocast"}, F.conv_transpose2d, hm.zeros {1, 1, 2, 2}, hm.zeros {1, 1,
      1, 1},
      hm.zeros({1}, {dtype = "f16"}))
    raises({"conv_transpose2d: channels differ", "2 (dim 2 of input) must equal 3 (dim 1 of weight)"},
      F.conv_transpose2d,
      hm.zeros {1, 2, 3, 3}, hm.zeros {3, 1, 2, 2})
    raises({"conv_transpose2d: output_padding 2 must be below the stride or the dilation"}, F.conv_transpose2d,
      hm.zeros {1, 2, 3, 3}, hm.zeros {2, 1, 2, 2}, nil, {output_padding = 2})
    raises({"conv_transpose2d: the result would have no height"}, F.conv_transpose2d, hm.zeros {1, 1, 1, 1},
      hm.zeros {1, 1, 1, 1}, nil, {padding = 1})
    raises({"conv_transpose2d: unknown option 'outputpadding', did you mean 'output_padding'?"}, F.conv_transpose2d,
      hm.zeros {1, 1, 1, 1}, hm.zeros {1, 1, 1, 1}, nil, {outputpadding = 1})
  end)

  it("pooling", function()
    local x = hm.zeros {1, 1, 4, 4}
    raises({"max_pool1d: input must be [N, C, L]"}, F.max_pool1d, x, 2)
    raises({"avg_pool2d: the kernel size is missing"}, F.avg_pool2d, x)
    raises({"avg_pool2d: padding 2 is more than half of the kernel size 3"}, F.avg_pool2d, x, 3, {padding = 2})
    raises({"avg_pool2d: unknown option 'dilation'"}, F.avg_pool2d, x, 3, {dilation = 2})
    raises({"avg_pool2d: a window of 5x5 does not fit into the image"}, F.avg_pool2d, x, 5)
    raises({"max_pool2d: a window of 3x3 does not fit into the image"}, F.max_pool2d, x, 3, {dilation = 2})
    raises({"max_pool2d: a window may have at most 256 places, not 17x17"}, F.max_pool2d, x, 17)
    raises({"adaptive_avg_pool2d: 'size' must be at least 1"}, F.adaptive_avg_pool2d, x, 0)
    raises({"adaptive_max_pool2d: input must be [N, C, H, W]"}, F.adaptive_max_pool2d, hm.zeros {2}, 1)
  end)

  it("interpolate", function()
    local x = hm.zeros {1, 1, 4, 4}
    raises({"interpolate: x must be [N, C, H, W] or [N, C, L], came f32[2]"}, F.interpolate, hm.zeros {2}, {size = 3})
    raises({"interpolate: give one of size and scale_factor, not both"}, F.interpolate, x, {size = 3, scale_factor = 2})
    raises({"interpolate: give one of size and scale_factor"}, F.interpolate, x)
    raises({"align_corners has a meaning only with"}, F.interpolate, x, {size = 3, align_corners = true})
    raises({"must be one of nearest, linear, bilinear"}, F.interpolate, x, {size = 3, mode = "bicubic"})
    raises({"mode \"linear\" does not fit f32[1,1,4,4]", "use \"bilinear\""}, F.interpolate, x, {size = 3,
      mode = "linear"})
    raises({"scale_factor must be above 0, not -1"}, F.interpolate, x, {scale_factor = -1})
    raises({"scale_factor 0.1 leaves nothing"}, F.interpolate, x, {scale_factor = 0.1})
  end)

  it("normalization", function()
    local x = hm.zeros {2, 4}
    raises({"batch_norm: running_mean and running_var are missing", "{training = true}"}, F.batch_norm, x)
    raises({"batch_norm: training needs more than one value for each channel"}, F.batch_norm, hm.zeros {1, 4}, nil, nil,
      {training = true})
    raises({"batch_norm: weight must be [4]"}, F.batch_norm, x, nil, nil, {training = true, weight = hm.ones {3}})
    raises({"option 'activation' must be one of relu"}, F.batch_norm, x, nil, nil, {activation = "gelu"})
    raises({"instance_norm: x must be [N, C, d...]"}, F.instance_norm, x)
    raises({"instance_norm: needs more than one value"}, F.instance_norm, hm.zeros {2, 3, 1})
    raises({"layer_norm: x must end in [3], the normalized shape, came f32[2,4]"}, F.layer_norm, x, 3)
    raises({"layer_norm: weight must be [4], the normalized shape"}, F.layer_norm, x, 4, hm.ones {2})
    raises({"layer_norm: bias must be [4], the normalized shape"}, F.layer_norm, x, 4, nil, hm.ones {2, 2})
    raises({"layer_norm: weight must be a tensor, not 3"}, F.layer_norm, x, 4, 3)
    raises({"rms_norm: weight must be [2,4], the normalized shape, came f32[4]"}, F.rms_norm, x, {2, 4}, hm.ones {4})
    raises({"rms_norm: the normalized shape must be a number"}, F.rms_norm, x)
    raises({"group_norm: 4 channels cannot be split into 3 groups"}, F.group_norm, x, 3)
    raises({"group_norm: bias must be [4]"}, F.group_norm, x, 2, nil, hm.zeros {2})
    raises({"cosine_similarity: unknown option 'dims', did you mean 'dim'?"}, F.cosine_similarity, x, x, {dims = 1})
  end)

  it("activations and tables", function()
    local x = hm.zeros {2, 3}
    raises({"glu: dim 2 of f32[2,3]", "has an odd size"}, F.glu, x)
    raises({"prelu: 2 slopes for f32[2,3]"}, F.prelu, x, hm.ones {2})
    raises({"prelu: weight must be [1] or [channels]"}, F.prelu, x, x)
    raises({"hardtanh: min_val 1 is above max_val 0"}, F.hardtanh, x, {min_val = 1, max_val = 0})
    raises({"leaky_relu: unknown option 'slope'"}, F.leaky_relu, x, {slope = 1})
    raises({"embedding: index must hold ids as int64, came f32[2,3]"}, F.embedding, x, x)
    raises({"embedding: index must hold ids", "the index comes first"}, F.embedding, x, ids {1})
    raises({"embedding: padding_idx 2 is not among the ids 0 to 1"}, F.embedding, ids {1}, x, {padding_idx = 2})
    raises({"pad: the pads must be an array"}, F.pad, x, 1)
    raises({"pad: option 'mode' must be one of constant"}, F.pad, x, {1, 1}, "mirror")
  end)
end)
