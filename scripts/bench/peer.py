"""peer.py -- the benchmark's workloads in PyTorch, driven line by line.

run.lua starts it, sends one command per line to its standard input and reads one answer per line from the file named by its only
argument: `ok key=value ...` or `error text`.  What torch itself prints goes to standard error.  A model lives from `make` to `drop`,
so that its steps can be run in turns with the steps of others.

    hello                                       torch, threads, compile (yes or no)
    data PATH                                   images and labels from a safetensors file
    make NAME WORKLOAD DTYPE MODE INIT WARMUP   a model with the weights of safetensors file INIT; MODE is eager or compiled.
                                                For eager, row-major and channels-last are both tried and the faster is kept.
    run NAME STEPS                              ms (per step), loss (of the last step)
    memory NAME                                 peak (bytes of tensors in a step, without data), fixed (parameters, optimizer state)
    op NAME GRAD COUNT                          ns (per call on tensors of one element), NAME is add or relu, GRAD is on or off
    drop NAME
    quit
"""

import gc
import json
import os
import struct
import sys
import time

# Python's own switch: matrix products of other libraries must not be slowed down by it.
os.environ.pop("OPENBLAS_CORETYPE", None)

import numpy
import torch
import torch.nn.functional as F
from torch import nn

BATCH = 128
SETTLE = 0.1  # seconds; see settle in workloads.lua
LOW = {"f32": None, "bf16": torch.bfloat16, "f16": torch.float16}


def settle():
    """Multiplies matrices for a tenth of a second, so that the threads are where they belong before the clock starts."""
    x = torch.ones(512, 512)
    begin = time.perf_counter()
    while time.perf_counter() - begin < SETTLE:
        x @ x


# ====== Files ======

def load_safetensors(path):
    """name -> tensor.  Only the dtypes that run.lua writes."""
    kinds = {"F32": numpy.float32, "I64": numpy.int64}
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        body = file.read()
    out = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            flat = numpy.frombuffer(body[begin:end], kinds[entry["dtype"]])
            out[name] = torch.from_numpy(flat.reshape(entry["shape"]).copy())
    return out


# ====== Models ======

class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(784, 512)
        self.fc2 = nn.Linear(512, 512)
        self.fc3 = nn.Linear(512, 10)

    def forward(self, x):
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))


class CNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.fc1 = nn.Linear(64 * 7 * 7, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


WORKLOADS = {"mlp": MLP, "cnn": CNN}


def make_optimizer(parameters):
    """AdamW in the fastest form that this torch has on the CPU."""
    for options in ({"fused": True}, {"foreach": True}, {}):
        try:
            return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01, **options)
        except (RuntimeError, TypeError, ValueError):
            continue
    raise RuntimeError("no AdamW")


def make_scaler(low):
    if low != torch.float16:
        return None
    return torch.amp.GradScaler("cpu", init_scale=2.0**16)


class Run:
    """One model in training."""

    def __init__(self, workload, dtype, mode, init, channels_last, batches):
        self.low = LOW[dtype]
        self.model = WORKLOADS[workload]()
        self.model.load_state_dict(load_safetensors(init))
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model = self.model.to(memory_format=layout)
        # One channel fits both layouts as it is; the strides are what convolutions look at.
        self.batches = [(x.to(memory_format=layout), y) for x, y in batches]
        self.optimizer = make_optimizer(self.model.parameters())
        self.scaler = make_scaler(self.low)
        self.at = 0
        self.loss_of = torch.compile(self.loss) if mode == "compiled" else self.loss

    def loss(self, x, y):
        if self.low is None:
            return F.cross_entropy(self.model(x), y)
        with torch.autocast("cpu", dtype=self.low):
            return F.cross_entropy(self.model(x), y)

    def step(self):
        x, y = self.batches[self.at % len(self.batches)]
        self.at += 1
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss_of(x, y)
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return loss

    def run(self, steps):
        """(seconds per step, loss of the last one)"""
        begin = time.perf_counter()
        for _ in range(steps):
            loss = self.step()
        loss = loss.item()
        return (time.perf_counter() - begin) / steps, loss

    def fixed_bytes(self):
        total = sum(p.numel() * p.element_size() for p in self.model.parameters())
        for state in self.optimizer.state.values():
            total += sum(v.numel() * v.element_size() for v in state.values() if torch.is_tensor(v))
        return total

    def peak_bytes(self):
        """The most that tensors take at once during a step, without the batch itself."""
        self.optimizer.zero_grad(set_to_none=True)  # the profiler does not see what was there before being released
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            self.step()
        events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
        begin = "start_ns" if hasattr(events[0], "start_ns") else "start_us"
        live = peak = 0
        for event in sorted(events, key=lambda e: getattr(e, begin)()):
            live += event.nbytes()
            peak = max(peak, live)
        return self.fixed_bytes() + peak


# ====== Commands ======

class Peer:
    def __init__(self):
        self.batches = []
        self.runs = {}

    def hello(self):
        compiles = "no"
        if hasattr(torch, "compile"):
            try:
                from torch._inductor.cpp_builder import get_cpp_compiler
                get_cpp_compiler()
                compiles = "yes"
            except Exception:  # no compiler, or none that torch takes
                pass
        return {"torch": torch.__version__, "threads": torch.get_num_threads(), "compile": compiles}

    def data(self, path):
        tensors = load_safetensors(path)
        x, y = tensors["images"], tensors["labels"]
        self.batches = [(x[i:i + BATCH], y[i:i + BATCH]) for i in range(0, len(y), BATCH)]
        return {"batches": len(self.batches)}

    def make(self, name, workload, dtype, mode, init, warmup):
        layouts = [False] if workload == "mlp" else [True] if mode == "compiled" else [False, True]
        best, best_time = None, None
        for channels_last in layouts:
            run = Run(workload, dtype, mode, init, channels_last, self.batches)
            run.run(2)  # torch compiles in the first of these, and packs weights
            seconds, _ = run.run(int(warmup) - 2)
            if best is None or seconds < best_time:
                best, best_time = run, seconds
                best.layout = "channels_last" if channels_last else "row-major"
        self.runs[name] = best
        return {"ms": best_time * 1e3, "layout": best.layout}

    def run(self, name, steps):
        settle()
        seconds, loss = self.runs[name].run(int(steps))
        return {"ms": seconds * 1e3, "loss": loss}

    def memory(self, name):
        run = self.runs[name]
        return {"peak": run.peak_bytes(), "fixed": run.fixed_bytes()}

    def op(self, name, grad, count):
        count = int(count)
        x = torch.ones(1, requires_grad=grad == "on")
        y = torch.ones(1)
        with torch.set_grad_enabled(grad == "on"):
            begin = time.perf_counter()
            if name == "add":
                for _ in range(count):
                    x + y
            else:
                for _ in range(count):
                    x.relu()
            seconds = time.perf_counter() - begin
        return {"ns": seconds / count * 1e9}

    def drop(self, name):
        self.runs.pop(name, None)
        gc.collect()
        return {}


def main(path):
    peer = Peer()
    with open(path, "w") as answers:
        for line in sys.stdin:
            words = line.split()
            if not words:
                continue
            if words[0] == "quit":
                break
            try:
                reply = getattr(peer, words[0])(*words[1:])
                text = "ok " + " ".join(f"{k}={v}" for k, v in reply.items())
            except Exception as error:  # told to the driver, which goes on without this figure
                lines = str(error).strip().splitlines() or [""]
                text = f"error {type(error).__name__}: {lines[0][:160]}"
            answers.write(text + "\n")
            answers.flush()


if __name__ == "__main__":
    torch.manual_seed(1)
    main(sys.argv[1])
