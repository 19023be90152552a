"""gpu_peer.py -- the steps of gpu.lua in PyTorch, for scripts/gpu-check.sh.

    python3 gpu_peer.py [--device cuda] [--rounds 7] [--quick]

The same models, batch, optimizer and precision.  Batches lie on the device before the clock starts; each round ends with a wait for the
device; figures are medians over the rounds.  Modes: eager, channels-last where there are images (the faster way for convolutions in half
types), and torch.compile.  A mode that does not work is told and left out.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

BATCH, BATCHES, WARMUP = 128, 8, 10
LOW = {"f32": None, "bf16": torch.bfloat16, "f16": torch.float16}


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(784, 512), nn.Linear(512, 512), nn.Linear(512, 10)

    def forward(self, x):
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1))))))


class CNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(64 * 7 * 7, 128), nn.Linear(128, 10)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def training(workload, run, mode, device):
    torch.manual_seed(1)
    model = {"mlp": MLP, "cnn": CNN}[workload]().to(device)
    layout = torch.channels_last if workload == "cnn" and mode != "eager" else torch.contiguous_format
    model = model.to(memory_format=layout)
    fused = {"fused": True} if device == "cuda" else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, **fused)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**16) if run == "f16" else None
    batches = [(torch.randn(BATCH, 1, 28, 28, device=device).to(memory_format=layout), torch.randint(0, 10, (BATCH,), device=device))
               for _ in range(BATCHES)]

    def loss_of(x, y):
        if LOW[run] is None:
            return F.cross_entropy(model(x), y)
        with torch.autocast(device, dtype=LOW[run]):
            return F.cross_entropy(model(x), y)

    if mode == "compiled":
        loss_of = torch.compile(loss_of)
    at = 0

    def step():
        nonlocal at
        x, y = batches[at % BATCHES]
        at += 1
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(x, y)
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        return loss

    return step


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(fn, device):
    wait(device)
    begin = time.perf_counter()
    fn()
    wait(device)
    return time.perf_counter() - begin


def report(workload, run, mode, options):
    device = options.device
    step = training(workload, run, mode, device)
    for _ in range(1 if options.quick else WARMUP):
        step()
    rough = seconds(step, device)
    steps = 1 if options.quick else max(10, min(1000, int(0.3 / rough) + 1))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    values = []
    for _ in range(options.rounds):
        values.append(seconds(lambda: [step() for _ in range(steps)], device) / steps * 1e3)
    peak = torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else 0
    print(f"  PyTorch   {workload:<4} {run:<6} {statistics.median(values):8.3f} ms a step ({min(values):.3f} to {max(values):.3f}), {mode}, "
          f"loss {step().item():.4f}, peak {peak:.1f} MB", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    options.rounds = 1 if options.quick else options.rounds
    name = torch.cuda.get_device_name() if options.device == "cuda" else "the CPU (no GPU run)"
    print(f"  PyTorch {torch.__version__} on {name}")
    print(f"  TF32 in products: {torch.backends.cuda.matmul.allow_tf32}, in convolutions: {torch.backends.cudnn.allow_tf32}")
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, as in gpu.lua
    torch.backends.cudnn.benchmark = True
    for workload in ["mlp", "cnn"]:
        for run in LOW:
            for mode in ["eager", "channels-last", "compiled"] if workload == "cnn" else ["eager", "compiled"]:
                try:
                    report(workload, run, mode, options)
                except Exception as error:  # told; the other modes go on
                    lines = str(error).strip().splitlines() or [""]
                    print(f"  PyTorch   {workload:<4} {run:<6} {mode}: {type(error).__name__}: {lines[0][:160]}", flush=True)


if __name__ == "__main__":
    main()
