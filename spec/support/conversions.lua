-- conversions.lua -- run by convert_spec.lua in a process of its own for each instruction set: every conversion
-- between float16, bfloat16, the 8-bit floats and the wider types, at every pattern and every place where rounding turns.
--
-- What is expected comes from the bits alone: between two neighbours h and h + 1 of the narrow type lies one midpoint;
-- below it h is right, above it h + 1, and on it the even one of the two.  The device may be named as an argument.
-- Prints one line for each check that failed, and "checked N" at the end.

local hm = require "halfmoon"
local core = require "halfmoon.core"
local bits = require "spec.support.bits"

hm.set_default_device(arg[1] or "cpu")
local checked = 0

-- Digits after the leading one, exponent bias; first pattern that is no finite number.
local NARROW = {
  float16 = {mantissa = 10, bias = 15, top = 0x7c00}, bfloat16 = {mantissa = 7, bias = 127, top = 0x7f80},
}
local ORDER = {"float16", "bfloat16"}

--- The value of a positive pattern below or at `top`, as if there were one more binade in place of infinity.
local function value(f, h)
  local e, m = h >> f.mantissa, h & ((1 << f.mantissa) - 1)
  if e == 0 then return m * 2.0 ^ (1 - f.bias - f.mantissa) end
  return (m + (1 << f.mantissa)) * 2.0 ^ (e - f.bias - f.mantissa)
end

local function f32_bits(x) return (string.unpack("<I4", string.pack("<f", x))) end
local function f64_bits(x) return (string.unpack("<i8", string.pack("<d", x))) end

local function is_nan(f, h) return (h & 0x7fff) > f.top end

-- The arithmetic of a GPU has one NaN: there its sign and payload are not compared.  The test double's are the host's.
local one_nan = hm.get_default_device() ~= "cpu" and not hm.cuda.properties().name:find("test double", 1, true)
-- Without their sign, NaNs lie above this pattern.
local BELOW_NAN = {
  float16 = 0x7c00, bfloat16 = 0x7f80, float32 = 0x7f800000, float64 = 0x7ff << 52, float8_e4m3 = 0x7e, float8_e5m2 = 0x7c,
}

--- The patterns of a tensor; with what tells a NaN, where one stands for all.
local function patterns_of(t)
  local list = bits.patterns(t)
  list.below_nan = one_nan and BELOW_NAN[t.dtype] or nil
  list.unsigned = (1 << (8 * t:element_size() - 1)) - 1
  return list
end

local function differ(got, want, i)
  if got[i] == want[i] then return false end
  local below = got.below_nan
  return not (below and got[i] & got.unsigned > below and want[i] & got.unsigned > below)
end

--- Compares arrays of patterns; says where they differ first.
local function compare(what, got, want, inputs)
  checked = checked + #want
  if #got ~= #want then print(("%s: %d results for %d inputs"):format(what, #got, #want)) return end
  local wrong, first = 0, nil
  for i = 1, #want do
    if differ(got, want, i) then
      wrong = wrong + 1
      first = first or i
    end
  end
  if wrong > 0 then
    print(("%s: %d wrong, first: %s gave 0x%x, expected 0x%x"):format(what, wrong, inputs
      and ("0x%x"):format(inputs[first]) or "entry " .. first,
      got[first], want[first]))
  end
end

-- ====== Widening: exact ======

local patterns = {}
for h = 0, 65535 do patterns[h + 1] = h end

local wide = {} -- dtype -> float32 tensor of all patterns
for _, name in ipairs(ORDER) do
  local f = NARROW[name]
  local t = bits.from_patterns(name, patterns)
  local f32, f64, back, quiet = {}, {}, {}, {}
  for i, h in ipairs(patterns) do
    local sign, a = h >> 15, h & 0x7fff
    back[i] = is_nan(f, h) and h | 1 << (f.mantissa - 1) or h
    quiet[i] = back[i]
    if a >= f.top then
      local payload = (back[i] & ((1 << f.mantissa) - 1))
      f32[i] = sign << 31 | 0x7f800000 | payload << (23 - f.mantissa)
      f64[i] = sign << 63 | 0x7ff << 52 | payload << (52 - f.mantissa)
    else
      local v = value(f, a)
      f32[i] = sign << 31 | f32_bits(v)
      f64[i] = sign << 63 | f64_bits(v)
    end
  end
  wide[name] = t:float()
  local got = patterns_of(wide[name])
  for i, h in ipairs(patterns) do -- a signalling NaN may stay or come out quiet
    if is_nan(f, h) then got[i] = got[i] | 0x400000 end
  end
  compare(name .. " to float32", got, f32, patterns)
  got = patterns_of(t:double())
  for i, h in ipairs(patterns) do
    if is_nan(f, h) then got[i] = got[i] | 1 << 51 end
  end
  compare(name .. " to float64", got, f64, patterns)
  compare(name .. " to float32 and back", patterns_of(wide[name]:to(name)), quiet, patterns)
  compare(name .. " to float64 and back", patterns_of(t:double():to(name)), quiet, patterns)
  compare(name .. " stays under a copy", patterns_of(t:clone()), patterns, patterns)
  compare(name .. " times 1", patterns_of(t * 1), quiet, patterns)
  -- odd lengths, odd starts, strides
  compare(name .. " from the fourth on", patterns_of(t:narrow(1, 4, 65530):float():to(name)), table.move(quiet, 4, 65533, 1, {}), nil)
  local pairs_of = t:view(32768, 2)
  local firsts = {}
  for i = 1, 32768 do firsts[i] = quiet[2 * i - 1] end
  compare(name .. " with a stride", patterns_of(pairs_of:select(2, 1):float():to(name)), firsts, nil)
end

-- ====== Narrowing: every midpoint and its neighbours, of float32 and of float64 ======

--- Inputs (bits) and results for one narrow type; step(bits, +-1) is the neighbouring wide number.
local function boundaries(f, to_bits, sign_bit)
  local inputs, want = {}, {}
  local n = 0
  local function add(b, h)
    n = n + 1
    inputs[n], want[n] = b, h
    n = n + 1
    inputs[n], want[n] = b | sign_bit, h | (f.sign or 0x8000)
  end
  for h = 0, f.top - 1 do
    local low, high = value(f, h), value(f, h + 1)
    local middle = to_bits((low + high) / 2)
    local exact = to_bits(low)
    add(middle, h % 2 == 0 and h or h + 1)
    add(middle - 1, h)
    add(middle + 1, h + 1)
    add(exact, h)
    add(exact + 1, h)
    if exact > 0 then add(exact - 1, h) end
  end
  return inputs, want
end

for _, name in ipairs(ORDER) do
  local f = NARROW[name]
  local inputs, want = boundaries(f, f32_bits, 1 << 31)
  local t = bits.from_patterns("float32", inputs)
  compare("float32 to " .. name, patterns_of(t:to(name)), want, inputs)
  local out = hm.zeros({#inputs}, {dtype = name})
  compare("float32 copied into " .. name, patterns_of(out:copy_(t)), want, inputs)
  -- A result that is rounded by the op itself.  (The inputs for bfloat16 include float32 subnormals.)
  if name == "float16" then
    compare("float32 times 1 written as float16", patterns_of(core.call("mul", t, 1, {out_dtype = "f16"})), want, inputs)
  end
  inputs, want = boundaries(f, f64_bits, math.mininteger)
  t = bits.from_words("float64", inputs)
  compare("float64 to " .. name, patterns_of(t:to(name)), want, inputs)
end

-- Overflow, the smallest subnormal, NaN with its payload, infinities.
for _, name in ipairs(ORDER) do
  local f = NARROW[name]
  local shift = 23 - f.mantissa
  local inputs, want = {}, {}
  local function add(b, h)
    for sign = 0, 1 do
      inputs[#inputs + 1], want[#want + 1] = b | sign << 31, h | sign << 15
    end
  end
  add(0x7f800000, f.top)
  add(0x7f7fffff, f.top) -- the largest float32
  add(0, 0)
  add(1, 0) -- the smallest float32
  local quiet = 1 << (f.mantissa - 1)
  for _, payload in ipairs {1, 0x1fff, 0x2000, 0x3fffff, 0x400000, 0x400001, 0x5a5a5a, 0x7fffff} do
    add(0x7f800000 | payload, f.top | quiet | payload >> shift)
  end
  for _ = 1, 3 do -- long enough for vectors
    table.move(inputs, 1, #inputs, #inputs + 1)
    table.move(want, 1, #want, #want + 1)
  end
  compare("special float32 to " .. name, patterns_of(bits.from_patterns("float32", inputs):to(name)), want, inputs)
end

-- ====== From one narrow type to the other ======

for i, from in ipairs(ORDER) do
  local to = ORDER[3 - i]
  local direct = patterns_of(bits.from_patterns(from, patterns):to(to))
  compare(from .. " to " .. to, direct, patterns_of(wide[from]:to(to)), patterns)
end

-- ====== Integers: rounded once ======

do
  local inputs = {float32 = {}, float16 = {}, bfloat16 = {}}
  local want = {float32 = {}, float16 = {}, bfloat16 = {}}
  local function add(name, n, v)
    for sign = 1, -1, -2 do
      inputs[name][#inputs[name] + 1] = sign * n
      want[name][#want[name] + 1] = sign * v
    end
  end
  for name, digits in pairs {float32 = 24, bfloat16 = 8} do
    for e = digits, 62 do
      local step = 1 << (e - digits + 1) -- between neighbours of the narrow type in [2^e, 2^(e+1))
      for _, m in ipairs {1 << (digits - 1), (1 << (digits - 1)) + 1, (1 << (digits - 1)) + 2, (1 << digits) - 2, (1 << digits) - 3} do
        local low, half = m * step, step // 2
        local high = m * 1.0 * step + step -- a float: 2^63 is no integer
        add(name, low, low + 0.0)
        add(name, low + half, m % 2 == 0 and low + 0.0 or high)
        add(name, low + half + 1, half > 1 and high or (low + half + 1) + 0.0)
        add(name, low + half - 1, low + 0.0)
      end
    end
  end
  for n = 2048, 65519, 7 do
    local step = 1 << (math.floor(math.log(n, 2) + 1e-12) - 10)
    local low = n // step * step
    local rest = n - low
    local up = rest * 2 > step or (rest * 2 == step and low // step % 2 == 1)
    add("float16", n, (up and low + step or low) + 0.0)
  end
  add("float16", 65519, 65504.0)
  add("float16", 65520, math.huge)
  add("float16", math.maxinteger, math.huge)
  for name, list in pairs(inputs) do
    local got = bits.from_words("int64", list):to(name):totable()
    local wrong, first = 0, nil
    for i = 1, #list do
      if got[i] ~= want[name][i] then
        wrong = wrong + 1
        first = first or i
      end
    end
    checked = checked + #list
    if wrong > 0 then
      print(("int64 to %s: %d wrong, first: %d gave %.17g, expected %.17g"):format(name, wrong, list[first], got[first],
        want[name][first]))
    end
    -- the same numbers, one by one, as Lua integers
    for i = 1, #list, name == "float16" and 301 or 7 do
      local one = hm.full({1}, list[i], {dtype = name}):item()
      local two = hm.tensor({list[i]}, {dtype = name}):item()
      if one ~= want[name][i] or two ~= want[name][i] then
        print(("Lua integer %d to %s: full gave %.17g, tensor gave %.17g, expected %.17g"):format(list[i], name, one, two,
          want[name][i]))
      end
      checked = checked + 2
    end
  end
end

-- ====== Lua numbers: rounded once, from double ======

for _, name in ipairs(ORDER) do
  local f = NARROW[name]
  for h = 1, f.top - 1, 997 do
    local middle = (value(f, h) + value(f, h + 1)) / 2
    local above = string.unpack("<d", string.pack("<i8", f64_bits(middle) + 1))
    local below = string.unpack("<d", string.pack("<i8", f64_bits(middle) - 1))
    for x, want in pairs {[above] = h + 1, [below] = h, [middle] = h % 2 == 0 and h or h + 1} do
      local target = hm.zeros({3}, {dtype = name})
      target[1] = x
      target:narrow(1, 2, 1):fill_(x)
      target[{{3, 3}}] = {x}
      local got = patterns_of(hm.cat {target, hm.full({1}, x, {dtype = name}), hm.tensor({x}, {dtype = name})})
      compare(("the Lua number %a to %s"):format(x, name), got, {want, want, want, want, want})
    end
  end
end

-- ====== The 8-bit floats ======

-- e4m3 has no infinity: behind 448 (0x7e) comes NaN, and midpoints as if 480 stood there.
local EIGHT = {
  float8_e4m3 = {mantissa = 3, bias = 7, top = 0x7f, sign = 0x80}, float8_e5m2 = {mantissa = 2, bias = 15, top = 0x7c, sign = 0x80},
}
local codes = {}
for h = 0, 255 do codes[h + 1] = h end

--- NaN has no one pattern in each dtype.
local function plain(x) return hm.where(x:isnan(), 7.0, x) end

--- What a code becomes when it is widened and narrowed: a NaN is quiet then.
local function there_and_back(name, h)
  return name == "float8_e5m2" and (h & 0x7f) > 0x7c and h | 2 or h
end

for name, f in pairs(EIGHT) do
  local t = bits.from_patterns(name, codes)
  local back, f32 = {}, {}
  for i, h in ipairs(codes) do
    local a, sign = h & 0x7f, h >> 7
    back[i] = there_and_back(name, h)
    if a < f.top then f32[i] = sign << 31 | f32_bits(value(f, a))
    elseif name == "float8_e4m3" then f32[i] = sign << 31 | 0x7fc00000
    else f32[i] = sign << 31 | 0x7f800000 | (back[i] & 3) << 21 end
  end
  compare(name .. " to float32", patterns_of(t:float()), f32, codes)
  for _, wider in ipairs {"float32", "float16", "bfloat16", "float64"} do
    compare(name .. " to " .. wider .. " and back", patterns_of(t:to(wider):to(name)), back, codes)
    compare(name .. " to " .. wider, patterns_of(plain(t:to(wider):float())), patterns_of(plain(t:float())), codes)
  end
  compare(name .. " stays under a copy", patterns_of(t:clone()), codes, codes)
  compare(name .. " from the fourth on", patterns_of(t:narrow(1, 4, 250):float():to(name)), table.move(back, 4, 253, 1, {}), nil)
  local firsts, turned = {}, {}
  for i = 1, 128 do firsts[i] = back[2 * i - 1] end
  compare(name .. " with a stride", patterns_of(t:view(128, 2):select(2, 1):float():to(name)), firsts, nil)
  for i = 0, 255 do turned[i + 1] = codes[i % 16 * 16 + i // 16 + 1] end
  compare(name .. " transposed", patterns_of(t:view(16, 16):t():contiguous():view(256)), turned, nil)

  local inputs, want = boundaries(f, f32_bits, 1 << 31)
  local wide32 = bits.from_patterns("float32", inputs)
  compare("float32 to " .. name, patterns_of(wide32:to(name)), want, inputs)
  compare("float32 copied into " .. name, patterns_of(hm.zeros({#inputs}, {dtype = name}):copy_(wide32)), want, inputs)
  inputs, want = boundaries(f, f64_bits, math.mininteger)
  compare("float64 to " .. name, patterns_of(bits.from_words("float64", inputs):to(name)), want, inputs)
  for _, half in ipairs(ORDER) do
    compare(half .. " to " .. name, patterns_of(bits.from_patterns(half, patterns):to(name)), patterns_of(wide[half]:to(name)),
      patterns)
  end
  local whole = hm.arange(-70000, 70001, 7)
  compare("int64 to " .. name, patterns_of(whole:to(name)), patterns_of(whole:double():to(name)), nil)
  compare("int32 to " .. name, patterns_of(whole:int():to(name)), patterns_of(whole:double():to(name)), nil)
  local bytes = hm.arange(256):byte()
  compare("uint8 to " .. name, patterns_of(bytes:to(name)), patterns_of(bytes:double():to(name)), nil)
  for _, to in ipairs {"int64", "int32", "uint8", "bool"} do
    local finite = bits.from_patterns(name, table.move(codes, 1, f.top, 1, {}))
    compare(name .. " to " .. to, finite:to(to):long():totable(), finite:double():to(to):long():totable(), codes)
  end
  local limit = f.top -- what is too large, or infinite
  inputs, want = {0x7f800000, 0x7f7fffff, 0, 1, 0x7fc00000, 0x7f800001}, {limit, limit, 0, 0, 0x7f, 0x7f}
  if name == "float8_e5m2" then want[5], want[6] = 0x7e, 0x7e end
  for i = 1, 6 do inputs[i + 6], want[i + 6] = inputs[i] | 1 << 31, want[i] | 0x80 end
  for _ = 1, 3 do
    table.move(inputs, 1, #inputs, #inputs + 1)
    table.move(want, 1, #want, #want + 1)
  end
  compare("special float32 to " .. name, patterns_of(bits.from_patterns("float32", inputs):to(name)), want, inputs)
  for h = 1, f.top - 1, 5 do -- Lua numbers, from double
    local middle = (value(f, h) + value(f, h + 1)) / 2
    local above = string.unpack("<d", string.pack("<i8", f64_bits(middle) + 1))
    local target = hm.zeros({3}, {dtype = name})
    target[1] = above
    target:narrow(1, 2, 1):fill_(middle)
    target[{{3, 3}}] = {above}
    compare(("the Lua number %a to %s"):format(above, name),
      patterns_of(hm.cat {target, hm.full({1}, above, {dtype = name}), hm.tensor({middle}, {dtype = name})}),
      {h + 1, h % 2 == 0 and h or h + 1, h + 1, h + 1, h % 2 == 0 and h or h + 1})
  end
end
for _, pair in ipairs {{"float8_e4m3", "float8_e5m2"}, {"float8_e5m2", "float8_e4m3"}} do
  local t = bits.from_patterns(pair[1], codes)
  compare(pair[1] .. " to " .. pair[2], patterns_of(t:to(pair[2])), patterns_of(t:float():to(pair[2])), codes)
end

print(("checked %d, %s"):format(checked, core.features().isa))
