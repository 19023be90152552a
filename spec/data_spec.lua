-- Data: IDX files plain and compressed, Fashion-MNIST, and batches from the loader.

local hm = require "halfmoon"
local files = require "spec.support.files"
local numbers = require "spec.support.numbers"
local process = require "spec.support.process"
local raises = require "spec.support.raises"

local data = hm.data
local scratch = files.folder(setup, teardown)
local folder, write = scratch.path, scratch.write

--- The bytes of an IDX file.
local function idx(code, sizes, bytes)
  local head = string.pack(">BBBB", 0, 0, code, #sizes)
  for _, n in ipairs(sizes) do head = head .. string.pack(">I4", n) end
  return head .. bytes
end

describe("data.idx", function()
  local small = idx(0x08, {2, 3}, "\0\1\2\3\4\255")

  it("reads plain files and gzip, with any number of dims and all types", function()
    local t = data.idx(write("plain", small))
    assert.equal("uint8", t.dtype)
    assert.same({{0, 1, 2}, {3, 4, 255}}, t:totable())
    os.execute(("gzip -kf %s/plain"):format(folder))
    numbers.assert_same(data.idx(folder .. "/plain.gz"), t)
    assert.same({5}, data.idx(write("labels", idx(0x08, {5}, "abcde"))).shape)
    assert.same({1, 2, 1, 2}, data.idx(write("deep", idx(0x08, {1, 2, 1, 2}, "abcd"))).shape)
    assert.same({0, 3}, data.idx(write("none", idx(0x08, {0, 3}, ""))).shape)
    assert.same({1, -2, 1 << 30}, data.idx(write("i32", idx(0x0c, {3}, string.pack(">i4i4i4", 1, -2, 1 << 30)))):totable())
    assert.same({1.5, -2}, data.idx(write("f32", idx(0x0d, {2}, string.pack(">ff", 1.5, -2)))):totable())
    assert.same({0.1, -2e300}, data.idx(write("f64", idx(0x0e, {2}, string.pack(">dd", 0.1, -2e300)))):totable())
  end)

  for name, row in pairs {
    ["nothing at all"] = {"", "ends in its header"},
    ["three bytes"] = {"\0\0\8", "ends in its header"},
    ["a header that is cut"] = {small:sub(1, 9), "header"},
    ["data that are cut"] = {small:sub(1, -2), "6 bytes"},
    ["bytes behind the data"] = {small .. "xy", "2 more"},
    ["another format"] = {"PK\3\4 and more", "not an IDX file"},
    ["a type that does not exist"] = {idx(0x0f, {1}, "x"), "type code 0x0f"},
    ["no dims"] = {idx(0x08, {}, "x"), "0 dims"},
    ["a promise beyond its size"] = {idx(0x08, {60000, 28, 28}, "x"), "promises 47040000 bytes"},
    ["a promise beyond all bounds"] = {idx(0x0e, {0xffffffff, 0xffffffff, 0xffffffff}, "x"), "more elements than can be counted"},
  } do
    it("refuses " .. name .. ", and says where", function()
      raises({"idx", folder .. "/bad", row[2]}, data.idx, write("bad", row[1]))
    end)
  end

  it("refuses gzip that is cut or damaged", function()
    local noise, seed = {}, 1
    for i = 1, 40000 do
      seed = (seed * 1664525 + 1013904223) % 4294967296
      noise[i] = string.char(seed >> 24)
    end
    write("noise", idx(0x08, {40000}, table.concat(noise)))
    os.execute(("gzip -kf %s/noise"):format(folder))
    local f = assert(io.open(folder .. "/noise.gz", "rb"))
    local bytes = f:read("a")
    f:close()
    assert.same({40000}, data.idx(folder .. "/noise.gz").shape)
    raises({"idx", "cut.gz"}, data.idx, write("cut.gz", bytes:sub(1, #bytes // 2)))
    raises({"idx", "cut.gz"}, data.idx, write("cut.gz", bytes:sub(1, -5)))
    raises({"idx", "crc.gz"}, data.idx, write("crc.gz", bytes:sub(1, 20000) .. "\0\1\2\3" .. bytes:sub(20005)))
    raises({"idx"}, data.idx, write("empty.gz", bytes:sub(1, 10)))
  end)

  it("refuses what is no file", function()
    raises({folder .. "/absent", "No such file"}, data.idx, folder .. "/absent")
    raises("idx", data.idx, folder)
    raises("path", data.idx, 3)
  end)
end)

describe("data.fashion_mnist", function()
  it("names the package when the files are absent", function()
    raises({"t10k-images-idx3-ubyte", folder, "dataset-fashion-mnist", "apt-get install"}, data.fashion_mnist,
      {root = folder, train = false})
    local said = process.script("require('halfmoon').data.fashion_mnist()", {HALFMOON_DATA = folder})
    assert.truthy(said:find("dataset-fashion-mnist", 1, true), said)
    raises("unknown option", data.fashion_mnist, {rot = folder})
  end)

  it("refuses files that do not belong together", function()
    write("t10k-images-idx3-ubyte", idx(0x08, {2, 1, 1}, "ab"))
    write("t10k-labels-idx1-ubyte", idx(0x08, {3}, "\0\1\2"))
    raises({"do not belong together", "u8[2,1,1]", "u8[3]"}, data.fashion_mnist, {root = folder, train = false})
  end)

  it("gives images, labels and the names of the classes", function()
    local test = data.fashion_mnist {train = false}
    assert.equal(10000, #test)
    assert.same({10000, 1, 28, 28}, test.images.shape)
    assert.equal("uint8", test.images.dtype)
    assert.equal("int64", test.labels.dtype)
    assert.equal(10, #test.classes)
    for class = 0, 9 do assert.equal(1000, test.labels:eq(class):sum():item()) end
    assert.equal("ankle boot", test.classes[test.labels[1]:item() + 1])
    local part = test:slice(11, 20)
    assert.equal(10, #part)
    assert.is_true(part.images:eq(test.images:narrow(1, 11, 10)):all():item())
    raises("range", test.slice, test, 0, 3)
    raises("range", test.slice, test, 1, 10001)
    local image, label = test:get(3)
    assert.same({1, 28, 28}, image.shape)
    assert.equal(test.labels[3]:item(), label:item())
  end)
end)

describe("DataLoader", function()
  local N = 103
  local xs = hm.arange(N, {device = "cpu"}):mul(2):to("u8"):view(N, 1):expand(N, 5):contiguous()
  local ys = hm.arange(N, {device = "cpu"})

  local function loader(opts)
    opts[1] = data.TensorDataset(xs, ys)
    return data.DataLoader(opts)
  end

  --- All labels of one epoch, in order.
  local function epoch(l)
    local seen = {}
    for x, y in l:batches() do
      assert.equal(#x, #y)
      assert.equal("int64", y.dtype)
      for _, v in ipairs(y:totable()) do seen[#seen + 1] = v end
      assert.is_true(x:select(2, 1):to("i64"):eq((y * 2) % 256):all():item())
    end
    return seen
  end

  local function sorted(list)
    list = table.move(list, 1, #list, 1, {})
    table.sort(list)
    return list
  end

  local all = ys:totable()

  it("gives every example once, in order unless shuffled", function()
    local l = loader {batch_size = 10}
    assert.equal(11, #l)
    assert.same(all, epoch(l))
    l = loader {batch_size = 10, shuffle = true}
    local first = epoch(l)
    assert.not_same(all, first)
    assert.same(all, sorted(first))
    assert.same(all, sorted(epoch(l)))
  end)

  it("shuffles by seed and epoch alone, whatever the batch size and prefetch", function()
    local a = loader {batch_size = 10, shuffle = true, seed = 7}
    local first, second = epoch(a), epoch(a)
    assert.not_same(first, second)
    for _, opts in ipairs {
      {batch_size = 10, prefetch = 0}, {batch_size = 10, prefetch = 3}, {batch_size = 1, prefetch = 5}, {batch_size = 1000},
        {batch_size = 7},
    } do
      opts.shuffle, opts.seed = true, 7
      hm.manual_seed(math.random(1 << 30))
      local b = loader(opts)
      assert.same(first, epoch(b))
      assert.same(second, epoch(b))
    end
    assert.not_same(first, epoch(loader {batch_size = 10, shuffle = true, seed = 8}))
  end)

  it("does not draw from the generator of hm.manual_seed", function()
    hm.manual_seed(1)
    local before = hm.rng_state().offset
    epoch(loader {batch_size = 10, shuffle = true})
    assert.equal(before, hm.rng_state().offset)
  end)

  it("ends with a smaller batch, or drops it", function()
    local sizes = {}
    for x in loader({batch_size = 25}):batches() do sizes[#sizes + 1] = #x end
    assert.same({25, 25, 25, 25, 3}, sizes)
    local l = loader {batch_size = 25, drop_last = true}
    assert.equal(4, #l)
    sizes = {}
    for x in l:batches() do sizes[#sizes + 1] = #x end
    assert.same({25, 25, 25, 25}, sizes)
    l = loader {batch_size = 200, drop_last = true}
    assert.equal(0, #l)
    for _ in l:batches() do error("a batch came") end
  end)

  it("normalizes bytes as 0 to 1, and other types as they are", function()
    for _, prefetch in ipairs {0, 2} do
      local l = loader {batch_size = N, normalize = {mean = 0.25, std = 0.5}, prefetch = prefetch}
      for x in l:batches() do
        assert.equal("float32", x.dtype)
        numbers.assert_near(x, (xs:double() / 255 - 0.25) / 0.5, 1e-6, 2e-7)
      end
      l = loader {batch_size = N, normalize = {mean = 0.25, std = 0.5}, dtype = "f16", prefetch = prefetch}
      for x in l:batches() do
        assert.equal("float16", x.dtype)
        numbers.assert_near(x, (xs:double() / 255 - 0.25) / 0.5, 5e-4, 1e-4)
      end
    end
    local wide = hm.linspace(-3, 3, 300, {device = "cpu"}):view(30, 10)
    for x in data.DataLoader({{wide}, batch_size = 30, normalize = {mean = 1, std = 2}}):batches() do
      numbers.assert_near(x, (wide - 1) / 2, 1e-6, 1e-6)
    end
    for x in loader({batch_size = 3}):batches() do assert.equal("uint8", x.dtype) end
  end)

  it("passes batches through transforms", function()
    local l = loader {batch_size = 50, transforms = {
      function(x, y) return x:float() + 1, y end,
      function(x) return x * 2 end,
    }}
    for x, y in l:batches() do
      assert.equal((y[1]:item() * 2 % 256 + 1) * 2, x[{1, 1}]:item())
      assert.equal("int64", y.dtype)
    end
    l = loader {batch_size = 50, transforms = function() error("transform is broken") end}
    raises("transform is broken", function() for _ in l:batches() do end end) -- luacheck: ignore 542
    assert.equal(3, #l)
  end)

  it("may be left in the middle, with a <close> inside and closures that hold the variables", function()
    local l = loader {batch_size = 10, prefetch = 3}
    local kept = {}
    for round = 1, 3 do
      local n = 0
      for x, y in l:batches() do
        local _ <close> = hm.amp.autocast("f16")
        kept[#kept + 1] = function() return x, y end
        n = n + 1
        if n == 1 + round then break end
      end
    end
    assert.is_false(require("halfmoon.core").autocast_state().enabled)
    assert.equal(9, #kept)
    local _, y = kept[1]()
    numbers.assert_same(y, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9})
    assert.same(all, epoch(l))
    local function first()
      for x, labels in l:batches() do
        local _ <close> = hm.no_grad()
        if #x > 0 then return function() return labels end end
      end
    end
    numbers.assert_same(first()(), y)
    for x in l:batches() do -- goto, too
      local _ <close> = hm.no_grad()
      if #x then goto out end
    end
    ::out::
    assert.is_true(hm.is_grad_enabled())
  end)

  it("leaves tensors of earlier batches alone", function()
    local kept = {}
    for _, y in loader({batch_size = 10, prefetch = 2}):batches() do kept[#kept + 1] = y end
    for i, y in ipairs(kept) do assert.equal((i - 1) * 10, y[1]:item()) end
  end)

  it("works beside another, and is dropped without being closed", function()
    local a, b = loader {batch_size = 10, shuffle = true, seed = 1}, loader {batch_size = 7, prefetch = 1}
    local one = epoch(loader {batch_size = 10, shuffle = true, seed = 1})
    local seen, other = {}, b:batches()
    for _, y in a:batches() do
      for _, v in ipairs(y:totable()) do seen[#seen + 1] = v end
      local _, z = other()
      if z then assert.equal(z[1]:item() % 7, 0) end
    end
    assert.same(one, seen)
    for i = 1, 20 do
      local l = loader {batch_size = 5, prefetch = 4}
      l:batches()()
      if i % 5 == 0 then collectgarbage() end
    end
    collectgarbage()
  end)

  it("can be closed, twice, and says so when it is used afterwards", function()
    local l = loader {batch_size = 10}
    l:batches()()
    l:close()
    l:close()
    raises("closed", l.batches, l)
    do
      local scoped <close> = loader {batch_size = 10}
      scoped:batches()()
    end
  end)

  it("prints itself, and takes its data set in several forms", function()
    local l = loader {batch_size = 10}
    assert.equal("DataLoader(103 examples in 11 batches of 10, 0 epochs begun)", tostring(l))
    for _, form in ipairs {data.DataLoader(data.TensorDataset(xs, ys), {batch_size = 10}), data.DataLoader {xs, ys, batch_size = 10},
                           data.DataLoader {{xs, ys}, batch_size = 10}, data.DataLoader {dataset = data.TensorDataset(xs,
                             ys), batch_size = 10}} do
      assert.same(all, epoch(form))
    end
  end)

  it("refuses options that make no sense", function()
    raises("batch_size", loader, {batch_size = 0})
    raises("batch_size", loader, {batch_size = 1.5})
    raises("prefetch", loader, {prefetch = -1})
    raises("'std' must be above 0", loader, {normalize = {std = 0}})
    raises({"unknown option", "did you mean 'shuffle'"}, loader, {shufle = true})
    raises({"unknown option", "did you mean 'mean'"}, loader, {normalize = {men = 0}})
    raises("dtype", loader, {dtype = "f17"})
    raises("transforms[1]", loader, {transforms = {3}})
    raises("missing", data.DataLoader, {batch_size = 3})
    local two, three = hm.zeros({2}, {device = "cpu"}), hm.zeros({3}, {device = "cpu"})
    raises({"rows differs", "f32[2]", "f32[3]"}, data.TensorDataset, two, three)
    raises({"rows differs", "f32[2]", "f32[3]"}, data.DataLoader, {two, three})
    raises("not a tensor", data.TensorDataset, 3)
  end)
end)
