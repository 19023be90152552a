--- data/dataset.lua -- data sets in memory: tensors with one row for each example; IDX files; Fashion-MNIST, CIFAR-10.
--
-- Constructors raise when files are missing or damaged, with what to do about it.

local core = require "halfmoon.core"
local errors = require "halfmoon.errors"
local options = require "halfmoon.options"

local raise, describe = errors.raise, errors.describe

local dataset = {}

-- ====== Dataset ======

---@class Dataset
---@field tensors Tensor[] equal in size along dim 1
---@field classes string[]? names of the class ids, from 0: classes[id + 1]
local Dataset = {}
Dataset.__index = Dataset
Dataset.__name = "Dataset"
dataset.Dataset = Dataset

--- A data set from tensors that have one row for each example: data.TensorDataset(images, labels).
---@param ... Tensor
---@return Dataset
function dataset.TensorDataset(...)
  local tensors = {...}
  if #tensors == 0 then raise("TensorDataset: expected at least one tensor") end
  for i, t in ipairs(tensors) do
    if not core.is_tensor(t) then raise("TensorDataset: argument %d is %s, not a tensor", i, describe(t)) end
    if t:dim() == 0 then raise("TensorDataset: argument %d has no dims: %s", i, describe(t)) end
    if t:size(1) ~= tensors[1]:size(1) then
      raise("TensorDataset: the number of rows differs: %s and %s", describe(tensors[1]), describe(t))
    end
  end
  return setmetatable({tensors = tensors}, Dataset)
end

--- The number of examples.
---@return integer
function Dataset:size() return self.tensors[1]:size(1) end

function Dataset:__len() return self.tensors[1]:size(1) end

--- The tensors of one example, as views.
---@param i integer from 1
---@return ... Tensor
function Dataset:get(i)
  local row = {}
  for n, t in ipairs(self.tensors) do row[n] = t:select(1, i) end
  return table.unpack(row)
end

--- The examples from first to last as a data set that shares memory.
---@param first integer
---@param last integer
---@return Dataset
function Dataset:slice(first, last)
  local size = self:size()
  if math.type(first) ~= "integer" or math.type(last) ~= "integer" or first < 1 or last > size or last < first then
    raise("Dataset:slice: {%s, %s} is not a range within 1 to %d", tostring(first), tostring(last), size)
  end
  local part = {}
  for n, t in ipairs(self.tensors) do part[n] = t:narrow(1, first, last - first + 1) end
  local new = setmetatable({}, Dataset)
  for key, value in pairs(self) do new[key] = value end
  new.tensors = part
  if self.images then new.images, new.labels = part[1], part[2] end
  return new
end

function Dataset:__tostring()
  local parts = {}
  for i, t in ipairs(self.tensors) do parts[i] = describe(t) end
  return ("Dataset(%d examples: %s)"):format(self:size(), table.concat(parts, ", "))
end

-- ====== Files ======

--- Reads an IDX file, plain or gzip.
---@param path string
---@return Tensor tensor of the file's dtype
function dataset.idx(path)
  if type(path) ~= "string" then raise("data.idx: expected a path, not %s", describe(path)) end
  local ok, result = pcall(core.idx, path)
  if not ok then raise("%s", (tostring(result):gsub("^[^\n]-:%d+: ", ""))) end
  return result
end

local FASHION_ROOT = "/usr/share/datasets/fashion-mnist"
local FASHION_CLASSES = {
  "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
}

--- The path of a file that may be there as it is or as .gz, in root or in root/fashion-mnist; nil if it is not.
local function existing(root, name)
  for _, folder in ipairs {"/", "/fashion-mnist/"} do
    for _, suffix in ipairs {"", ".gz"} do
      local path = root .. folder .. name .. suffix
      if core.exists(path) then return path end
    end
  end
end

--- Fashion-MNIST: images u8 [60000, 1, 28, 28] (10,000 for the test set) and labels i64, from Debian's package
--- dataset-fashion-mnist.
--- root: their folder, by default HALFMOON_DATA or /usr/share/datasets/fashion-mnist.
---@param opts {root: string, train: boolean}?
---@return Dataset fields images, labels, classes
function dataset.fashion_mnist(opts)
  opts = options.check("data.fashion_mnist", opts, {
    root = {"string", os.getenv("HALFMOON_DATA") or FASHION_ROOT}, train = {"boolean", true},
  })
  local prefix = opts.train and "train" or "t10k"
  local paths = {}
  for i, name in ipairs {"images-idx3-ubyte", "labels-idx1-ubyte"} do
    paths[i] = existing(opts.root, prefix .. "-" .. name)
    if not paths[i] then
      raise("data.fashion_mnist: %s-%s.gz is not in %s\n  the files come with Debian's package dataset-fashion-mnist:\n"
        .. "    sudo apt-get install dataset-fashion-mnist\n"
        .. "  or give their folder: HALFMOON_DATA=/path, or {root = \"/path\"}", prefix, name, opts.root)
    end
  end
  local images, labels = dataset.idx(paths[1]), dataset.idx(paths[2])
  if images:dim() ~= 3 or labels:dim() ~= 1 or images:size(1) ~= labels:size(1) then
    raise("data.fashion_mnist: %s and %s do not belong together: %s and %s", paths[1], paths[2], describe(images),
      describe(labels))
  end
  local new = dataset.TensorDataset(images:unsqueeze(2), labels:to("int64"))
  new.images, new.labels, new.classes = new.tensors[1], new.tensors[2], FASHION_CLASSES
  return new
end

local CIFAR_ROOT = "cifar-10-batches-bin"
local CIFAR_CLASSES = {"airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"}

--- CIFAR-10: images u8 [50000, 3, 32, 32] (10,000 for the test set) and labels i64, from the files of its binary version.
--- root: their folder, by default HALFMOON_DATA, there or in cifar-10-batches-bin below it.
---@param opts {root: string, train: boolean}?
---@return Dataset fields images, labels, classes
function dataset.cifar10(opts)
  opts = options.check("data.cifar10", opts, {
    root = {"string", os.getenv("HALFMOON_DATA") or "."}, train = {"boolean", true},
  })
  local names = {"test_batch.bin"}
  if opts.train then
    for i = 1, 5 do names[i] = ("data_batch_%d.bin"):format(i) end
  end
  local root = core.exists(opts.root .. "/" .. names[1]) and opts.root or opts.root .. "/" .. CIFAR_ROOT
  local paths = {}
  for i, name in ipairs(names) do
    paths[i] = root .. "/" .. name
    if not core.exists(paths[i]) then
      raise("data.cifar10: %s is not in %s\n  the files come with cifar-10-binary.tar.gz from "
        .. "https://www.cs.toronto.edu/~kriz/cifar.html:\n    tar xzf cifar-10-binary.tar.gz\n"
        .. "  then give their folder: HALFMOON_DATA=/path, or {root = \"/path\"}", name, opts.root)
    end
  end
  local images, labels = core.cifar(paths)
  if not images then raise("%s", labels) end
  local new = dataset.TensorDataset(images, labels)
  new.images, new.labels, new.classes = images, labels, CIFAR_CLASSES
  return new
end

return dataset
