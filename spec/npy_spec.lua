-- NumPy's files: what NumPy wrote is read, what we write are its bytes, and every kind of damage is told.

local hm = require "halfmoon"
local bits = require "spec.support.bits"
local files = require "spec.support.files"
local numbers = require "spec.support.numbers"
local raises = require "spec.support.raises"

local data = hm.data
local nan, inf = 0 / 0, math.huge
local scratch = files.folder(setup, teardown)
local path_of, write, read = scratch.path_of, scratch.write, files.read

local function golden(name) return "spec/data/numpy_" .. name end

--- An npy file: the header's text, the data, and the version.
local function npy(header, body, major)
  local length = (major or 1) == 1 and string.pack("<I2", #header) or string.pack("<I4", #header)
  return "\x93NUMPY" .. string.char(major or 1, 0) .. length .. header .. body
end

local function dict(descr, shape, fortran)
  return ("{'descr': '%s', 'fortran_order': %s, 'shape': (%s), }\n"):format(descr, fortran and "True" or "False", shape)
end

--- A zip archive of entries {name, bytes, and what differs from the truth}.
local function zip(entries)
  local locals, records, at = {}, {}, 0
  for _, e in ipairs(entries) do
    local packed = e.packed or e[2]
    local common = string.pack("<I2I2I2I2I2I4I4I4I2I2", 20, e.flags or 0, e.method or 0, 0, 0, e.crc or 0,
      #packed, e.size or #e[2], #e[1], 0)
    locals[#locals + 1] = "PK\3\4" .. common .. e[1] .. packed
    records[#records + 1] = "PK\1\2" .. string.pack("<I2", 20) .. common
      .. string.pack("<I2I2I2I4I4", 0, 0, 0, 0, e.at or at) .. e[1]
    at = at + #locals[#locals]
  end
  local directory = table.concat(records)
  return table.concat(locals) .. directory .. "PK\5\6"
    .. string.pack("<I2I2I2I2I4I4I2", 0, 0, #entries, #entries, #directory, at, 0)
end

describe("npy files of NumPy", function()
  local rows = {{0.5, -1.25, inf}, {nan, 3e-8, 65504}}

  it("are read: rows, Fortran order, big-endian, 0 dims, no elements", function()
    local t = data.npy(golden "rows.npy")
    assert.equal("float32", t.dtype)
    numbers.assert_same(t, hm.tensor(rows))
    local f = data.npy(golden "fortran.npy")
    assert.equal("float64", f.dtype)
    assert.is_true(f:is_contiguous())
    numbers.assert_same(f, hm.arange(24, {dtype = "f64"}):view(2, 3, 4))
    assert.same({1, -2, 1 << 30}, data.npy(golden "big_endian.npy"):totable())
    local s = data.npy(golden "scalar.npy")
    assert.same({}, s.shape)
    assert.equal("float16", s.dtype)
    assert.equal(7.25, s:item())
    assert.same({0, 3}, data.npy(golden "empty.npy").shape)
  end)

  it("are read in versions 2 and 3; integers without a dtype here grow, bools stay", function()
    local t = data.npy(golden "version2.npy")
    assert.equal("int32", t.dtype)
    assert.same({0, 1, 2}, t:totable())
    assert.same({true, false, true}, data.npy(golden "version3.npy"):totable())
    assert.same({0, math.maxinteger}, data.npy(golden "u64.npy"):totable())
    for descr, row in pairs {
      ["|i1"] = {"b", "int32", {-128, 127}}, ["<i2"] = {"<h", "int32", {-32768, 5}}, [">u2"] = {">H", "int32", {65535, 1}},
      ["<u4"] = {"<I4", "int64", {4294967295, 1}}, [">i8"] = {">i8", "int64", {-5, 1 << 60}}, [">f8"] = {">d", "float64", {0.1, -2}},
      [">f2"] = {">I2", "float16", {1.0, 2.0}, {0x3c00, 0x4000}},
    } do
      local raw = row[4] or row[3]
      local got = data.npy(write("kind", npy(dict(descr, "2,"), string.pack(row[1]:rep(2), raw[1], raw[2]))))
      assert.equal(row[2], got.dtype)
      assert.same(row[3], got:totable())
    end
  end)

  it("are what hm.save writes, to the byte", function()
    local positive = {rows[1], {-(0 / 0), rows[2][2], rows[2][3]}} -- 0 / 0 has its sign bit set, NumPy's NaN has not
    assert.is_true(hm.save(path_of("rows.npy"), hm.tensor(positive)))
    assert.equal(read(golden "rows.npy"), read(path_of("rows.npy")))
    assert.is_true(hm.save(path_of("scalar.npy"), hm.tensor(7.25, {dtype = "f16"})))
    assert.equal(read(golden "scalar.npy"), read(path_of("scalar.npy")))
    assert.is_true(hm.save(path_of("empty.npy"), hm.zeros({0, 3}, {dtype = "i64"})))
    assert.equal(read(golden "empty.npy"), read(path_of("empty.npy")))
  end)

  it("keep every dtype but bfloat16, and memory in other orders", function()
    for _, dtype in ipairs {"float32", "float16", "float64", "int64", "int32", "uint8", "bool"} do
      local t = hm.arange(6, {dtype = "f32"}):view(2, 3):to(dtype)
      assert.is_true(hm.save(path_of("x.npy"), t))
      local back = assert(hm.load(path_of("x.npy")))
      assert.equal(dtype, back.dtype)
      assert.equal(bits.bytes(t), bits.bytes(back))
    end
    local x = hm.arange(24, {dtype = "f32"}):view(2, 3, 4):permute(3, 1, 2)
    assert.is_true(hm.save(path_of("x.NPY"), x))
    numbers.assert_same(hm.load(path_of("x.NPY")), x)
    raises({"no bfloat16", "hint"}, hm.save, path_of("x.npy"), hm.ones({1}, {dtype = "bf16"}))
    numbers.assert_same(hm.load(path_of("x.NPY")), x)
  end)

  it("hold one tensor, and no metadata", function()
    raises({"one tensor", ".npz"}, hm.save, path_of("x.npy"), {a = hm.ones({1})})
    raises("no metadata", hm.save, path_of("x.npy"), hm.ones({1}), {a = "b"})
    raises("into", hm.load, path_of("x.npy"), {into = {}})
    raises("path", data.npy, 3)
    local _, _, code = hm.load(path_of("absent.npy"))
    assert.equal("ENOENT", code)
    raises("absent.npy", data.npy, path_of("absent.npy"))
  end)

  for name, words in pairs {
    ["objects.npy"] = {"'|O'", "never executed"}, ["fields.npy"] = {"structured", "hint"}, ["complex.npy"] = {"'<c8'", "hint"},
  } do
    it("are refused where there is nothing for them: " .. name, function() raises(words, data.npy, golden(name)) end)
  end

  local good = dict("<f4", "2, 2")
  local body = ("x"):rep(16)
  for name, row in pairs {
    ["nothing at all"] = {"", "too few"},
    ["another format"] = {"PK\3\4 and a little more", "\\x93NUMPY"},
    ["a version that does not exist"] = {npy(good, body, 4), "version 4.0"},
    ["a header that is cut"] = {npy(good, ""):sub(1, 30), "claims"},
    ["a header beyond all bounds"] = {"\x93NUMPY\2\0\255\255\255\127{}", "claims"},
    ["a header beyond the file, with the sign bit set"] = {"\x93NUMPY\2\0\255\255\255\255{}", "claims"},
    ["data that are cut"] = {npy(good, body:sub(1, 15)), {"promises 16 bytes", "15 are there", "cut off"}},
    ["bytes behind the data"] = {npy(good, body .. "y"), "17 are there"},
    ["a size that is a lie"] = {npy(dict("<f4", "1000000, 1000000"), body), "promises 4000000000000 bytes"},
    ["sizes whose product overflows"] = {npy(dict("<f8", "4294967296, 4294967296, 4294967296"), body), "can be counted"},
    ["sizes whose product overflows in memory only"] = {npy(dict("|i1", "2305843009213693952,"), body), "can be counted"},
    ["a size beyond 64 bits"] = {npy(dict("<f4", "99999999999999999999,"), body), "a size"},
    ["a negative size"] = {npy(dict("<f4", "-1,"), body), "a size"},
    ["too many dims"] = {npy(dict("<f4", ("1,"):rep(70)), body), "dims"},
    ["no shape"] = {npy("{'descr': '<f4', 'fortran_order': False}", body), "no 'shape'"},
    ["a key twice"] = {npy("{'shape': (4,), 'shape': (4,), }", body), "twice the key 'shape'"},
    ["a key of its own"] = {npy("{'descr': '<f4', 'colour': 3}", body), "unknown key 'colour'"},
    ["code in the header"] = {npy("__import__('os').system('true')", body), "expected '{'"},
    ["text behind the header"] = {npy(good .. "import os", body), "expected its end"},
    ["an order that is neither"] = {npy("{'fortran_order': 0, }", body), "True or False"},
    ["a type without a size"] = {npy(dict("<f", "4,"), body), "'<f'"},
    ["a type of no known size"] = {npy(dict("<f16", "1,"), body), "'<f16'"},
    ["a type whose size never ends"] = {npy(dict("<f" .. ("9"):rep(50), "1,"), body), "<f9"},
    ["a string without end"] = {npy("{'descr", body), "a key"},
    ["a bool that is none"] = {npy(dict("|b1", "2,"), "\1\2"), "0 or 1"},
    ["an integer that int64 cannot hold"] = {npy(dict("<u8", "1,"), ("\255"):rep(8)), "too large"},
  } do
    it("are refused with a reason: " .. name, function()
      local path = write("bad.npy", row[1])
      local words = {path}
      for _, word in ipairs(type(row[2]) == "table" and row[2] or {row[2]}) do words[#words + 1] = word end
      raises(words, data.npy, path)
      local t, message, code = hm.load(path)
      assert.is_nil(t)
      assert.equal("string", type(message))
      assert.equal("EFORMAT", code)
    end)
  end

  it("may have been written by others: any spaces, either quotes, any order of keys", function()
    local header = '{  "shape":(2L,),"fortran_order" :True ,\n\'descr\':"=f4"}'
    assert.same({1.5, -2.0}, data.npy(write("free.npy", npy(header, string.pack("<ff", 1.5, -2)))):totable())
  end)

  it("are refused or read wherever one byte is damaged or missing, and never crash", function()
    local bytes = npy(good, body)
    for i = 1, #bytes do
      for _, byte in ipairs {"\0", "\255", "9", "'"} do
        local ok, why = pcall(data.npy, write("flip.npy", bytes:sub(1, i - 1) .. byte .. bytes:sub(i + 1)))
        assert(ok or type(why) == "string")
      end
    end
    for i = 0, #bytes - 1 do raises("cut.npy", data.npy, write("cut.npy", bytes:sub(1, i))) end
  end)
end)

describe("npz archives", function()
  local function check(arrays)
    assert.equal("float16", arrays.w.dtype)
    numbers.assert_same(arrays.w, hm.tensor({{0.5, -1.25, inf}, {nan, 3e-8, 65504}}, {dtype = "f16"}))
    assert.equal("int64", arrays.b.dtype)
    assert.same({0, 1, 2, 3, 4}, arrays.b:totable())
    assert.same({250, 7}, arrays["deep/name"]:totable())
  end

  it("of NumPy are read, stored and deflated", function()
    local stored, packed = data.npz(golden "stored.npz"), data.npz(golden "packed.npz")
    check(stored)
    check(packed)
    assert.is_nil(stored.zeros)
    numbers.assert_same(packed.zeros, hm.zeros({5000}))
  end)

  it("keep what hm.save was given", function()
    local state = {["fc.weight"] = hm.randn({3, 4}), b = hm.tensor({1, 2}, {dtype = "f16"}), t = hm.arange(6):view(2, 3):t(),
      none = hm.zeros({0}), flag = hm.tensor({true})}
    assert.is_true(hm.save(path_of("state.npz"), state))
    local back = assert(hm.load(path_of("state.npz")))
    for name, t in pairs(state) do
      assert.equal(t.dtype, back[name].dtype)
      numbers.assert_same(back[name], t)
    end
    for name in pairs(back) do assert(state[name], name) end
    assert.is_true(hm.save(path_of("module.npz"), hm.nn.Linear(3, 2)))
    assert.same({2, 3}, data.npz(path_of("module.npz")).weight.shape)
    assert.is_true(hm.save(path_of("none.npz"), {}))
    assert.same({}, data.npz(path_of("none.npz")))
  end)

  it("have the same bytes for the same arrays", function()
    local state = {a = hm.ones({3}), b = hm.zeros({2})}
    assert.is_true(hm.save(path_of("one.npz"), state))
    assert.is_true(hm.save(path_of("two.npz"), state))
    assert.equal(read(path_of("one.npz")), read(path_of("two.npz")))
  end)

  it("refuse what is no table of tensors, and leave the old file", function()
    assert.is_true(hm.save(path_of("kept.npz"), {a = hm.ones({1})}))
    local before = read(path_of("kept.npz"))
    raises("npz file holds a table", hm.save, path_of("kept.npz"), {a = 1})
    raises("no bfloat16", hm.save, path_of("kept.npz"), {a = hm.ones({1}), b = hm.ones({1}, {dtype = "bf16"})})
    raises("too long", hm.save, path_of("kept.npz"), {[("n"):rep(2000)] = hm.ones({1})})
    assert.equal(before, read(path_of("kept.npz")))
  end)

  local array = npy(dict("|u1", "4,"), "abcd")
  for name, row in pairs {
    ["nothing at all"] = {"", "too short"},
    ["no archive"] = {("x"):rep(100), {"no directory", "hint"}},
    ["an entry that is no array"] = {zip {{"readme.txt", "hello"}}, {"readme.txt", "no array"}},
    ["an entry that is encrypted"] = {zip {{"a.npy", array, flags = 1}}, {"a.npy", "encrypted"}},
    ["a method that is not known"] = {zip {{"a.npy", array, method = 93}}, {"a.npy", "method 93"}},
    ["a name that comes twice"] = {zip {{"a.npy", array, crc = 0}, {"a.npy", array}}, {"a.npy", "twice"}},
    ["a checksum that does not agree"] = {zip {{"a.npy", array, crc = 12345}}, {"a", "checksum"}},
    ["more than deflate can make: a bomb"] = {zip {{"a.npy", array, method = 8, packed = ("\0"):rep(20), size = 1 << 30}},
      {"a.npy", "promises 1073741824", "at most 20640"}},
    ["a stored entry with two sizes"] = {zip {{"a.npy", array, size = #array + 1}}, {"a.npy", "promises"}},
    ["packed data that are none"] = {zip {{"a.npy", array, method = 8, packed = ("\255"):rep(20), size = 70}}, {"a", "damaged"}},
    ["packed data that end too early"] = {zip {{"a.npy", array, method = 8, packed = "\0\5\0\250\255hel", size = 70}},
      {"a", "too early"}},
    ["packed data with less in them"] = {zip {{"a.npy", array, method = 8, packed = "\1\5\0\250\255hello" .. ("x"):rep(20), size = 70}},
      {"a", "fewer bytes"}},
    ["a place beyond the directory"] = {zip {{"a.npy", array, at = 100000}}, {"a.npy", "before the directory"}},
    ["a place in the middle of something"] = {zip {{"a.npy", array, at = 3}}, {"a", "not where"}},
    ["entries that overlap"] = {zip {{"a.npy", array .. ("x"):rep(500), crc = 1}, {"b.npy", "", packed = "", at = 0, size = 0}}, {}},
    ["sizes of zip64"] = {zip {{"a.npy", array, at = 0xffffffff}}, {"zip64", "hint"}},
    ["a name that is empty"] = {zip {{"", array}}, "proper name"},
    ["an array that is shorter than its entry"] = {zip {{"a.npy", array .. "more"}}, {"a", "8 are there"}},
  } do
    it("are refused with a reason: " .. name, function()
      local path = write("bad.npz", row[1])
      local words = {path}
      for _, word in ipairs(type(row[2]) == "table" and row[2] or {row[2]}) do words[#words + 1] = word end
      raises(words, data.npz, path)
      local t, _, code = hm.load(path)
      assert.is_nil(t)
      assert.equal("EFORMAT", code)
    end)
  end

  it("are refused wherever they are cut, and wherever one byte is damaged refused or read", function()
    for _, name in ipairs {"stored.npz", "packed.npz"} do
      local bytes = read(golden(name))
      for i = 0, #bytes - 1, 7 do raises("cut.npz", data.npz, write("cut.npz", bytes:sub(1, i))) end
      for i = 1, #bytes, 3 do
        local flipped = string.char(bytes:byte(i) ~ 0x81)
        local ok, why = pcall(data.npz, write("flip.npz", bytes:sub(1, i - 1) .. flipped .. bytes:sub(i + 1)))
        assert(ok or type(why) == "string")
      end
    end
  end)

  it("give their memory back when they are refused", function()
    local path = write("bad.npz", zip {{"a.npy", array, crc = 12345}})
    raises("bad.npz", data.npz, path)
    collectgarbage()
    local before = hm.cpu.memory_stats().live
    for _ = 1, 20 do assert.is_false((pcall(data.npz, path))) end
    collectgarbage()
    assert.equal(before, hm.cpu.memory_stats().live)
  end)
end)
