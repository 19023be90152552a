#!/usr/bin/env python3
"""make_torch_files.py -- writes the .safetensors files beside it, which spec/nn_torch_spec.lua reads.

Run it with a Python that has PyTorch (the files were written by 2.15 on a CPU):  python spec/data/make_torch_files.py

Each file has the state dict of a model ("state.NAME"), its inputs ("in.NAME"), what it gives ("out.NAME") and where asked
for the gradients of a weighted sum of outputs ("grad.NAME" of parameters, "grad.in.NAME" of inputs).  Everything is seeded.
The bytes are written here: eight bytes with the length of a JSON header, the header, the data.
"""

import json
import os
import struct

import torch
from torch import nn

HERE = os.path.dirname(os.path.abspath(__file__))
NAMES = {torch.float32: "F32", torch.int64: "I64", torch.uint8: "U8"}


def write(name, tensors):
    """Writes a safetensors file; bool tensors become uint8."""
    header, chunks, at = {"__metadata__": {"made_by": "make_torch_files.py", "torch": torch.__version__.split("+")[0]}}, [], 0
    for key in sorted(tensors):
        t = tensors[key].detach().contiguous()
        if t.dtype == torch.bool:
            t = t.to(torch.uint8)
        data = t.numpy().tobytes()
        header[key] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + len(data)]}
        chunks.append(data)
        at += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(os.path.join(HERE, name + ".safetensors"), "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + b"".join(chunks))


def state(model, prefix="state."):
    return {prefix + key: value.clone() for key, value in model.state_dict().items()}


def weighted(*outputs):
    """A scalar in which every element of the outputs has a weight of its own; the spec makes the same one."""
    total = 0
    for y in outputs:
        w = torch.cos(torch.arange(y.numel(), dtype=torch.float32) * 1.7) + 0.3
        total = total + (y * w.reshape(y.shape)).sum()
    return total


def gradients(model, inputs=None):
    found = {"grad." + key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    for key, x in (inputs or {}).items():
        found["grad.in." + key] = x.grad.clone()
    return found


def shake(model):
    """Moves parameters that begin as ones or zeros, so that a mix-up shows."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)


def conv_net():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
                          nn.Conv2d(4, 4, 3, stride=2, groups=2), nn.GroupNorm(2, 4), nn.PReLU(4),
                          nn.ConvTranspose2d(4, 2, 2, stride=2), nn.BatchNorm2d(2, momentum=None), nn.MaxPool2d(2),
                          nn.Flatten(), nn.Linear(8, 3))
    shake(model)
    for _ in range(3):
        model(torch.randn(4, 2, 6, 6) * 2 + 1)
    tensors = state(model)
    x = torch.randn(3, 2, 6, 6, requires_grad=True)
    model.eval()
    tensors["out.eval"] = model(x)
    model.train()
    y = model(x)
    weighted(y).backward()
    tensors.update({"in.x": x, "out.train": y, **gradients(model, {"x": x})})
    tensors.update(state(model, "after."))
    write("torch_conv_net", {k: v for k, v in tensors.items() if not k.startswith("after.") or "running" in k or "batches" in k})


def recurrent():
    torch.manual_seed(2)
    model = nn.LSTM(3, 4, num_layers=2, bidirectional=True)
    x, h, c = (torch.randn(*s, requires_grad=True) for s in ((5, 2, 3), (4, 2, 4), (4, 2, 4)))
    y, (hn, cn) = model(x, (h, c))
    weighted(y, hn, cn).backward()
    write("torch_lstm", {**state(model), "in.x": x, "in.h": h, "in.c": c, "out.y": y, "out.h": hn, "out.c": cn,
                         **gradients(model, {"x": x, "h": h, "c": c}), "out.zero": model(x)[0]})
    model = nn.GRU(3, 4, num_layers=2, batch_first=True)
    x, h = torch.randn(2, 5, 3, requires_grad=True), torch.randn(2, 2, 4, requires_grad=True)
    y, hn = model(x, h)
    weighted(y, hn).backward()
    write("torch_gru", {**state(model), "in.x": x, "in.h": h, "out.y": y, "out.h": hn,
                        **gradients(model, {"x": x, "h": h}), "out.alone": model(x[0])[0]})
    tensors = {}
    x, h, c = torch.randn(2, 3), torch.randn(2, 4), torch.randn(2, 4)
    rnn = nn.RNN(3, 4, nonlinearity="relu", bias=False, bidirectional=True)
    lstm, gru = nn.LSTMCell(3, 4), nn.GRUCell(3, 4)
    for name, model in (("rnn", rnn), ("lstm", lstm), ("gru", gru)):
        tensors.update(state(model, "state." + name + "."))
    sequence = torch.randn(4, 2, 3)
    tensors["out.rnn"], tensors["out.rnn_h"] = rnn(sequence)
    tensors["out.lstm_h"], tensors["out.lstm_c"] = lstm(x, (h, c))
    tensors["out.gru_h"] = gru(x, h)
    write("torch_cells", {**tensors, "in.x": x, "in.h": h, "in.c": c, "in.sequence": sequence})


def attention():
    torch.manual_seed(3)
    model = nn.MultiheadAttention(8, 2)
    shake(model)
    x, other = torch.randn(4, 3, 8, requires_grad=True), torch.randn(5, 3, 8)
    padding = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]], dtype=torch.bool)
    mask = torch.triu(torch.ones(4, 4, dtype=torch.bool), 1)
    floating = torch.randn(6, 4, 5)
    tensors = {**state(model), "in.x": x, "in.other": other, "in.padding": padding, "in.mask": mask, "in.floating": floating}
    y, weights = model(x, x, x, attn_mask=mask)
    weighted(y).backward()
    tensors.update({"out.self": y, "out.weights": weights, **gradients(model, {"x": x})})
    float_padding = torch.zeros(3, 5).masked_fill(padding, float("-inf"))
    tensors["out.cross"], tensors["out.cross_weights"] = model(
        x, other, other, key_padding_mask=float_padding, attn_mask=floating, average_attn_weights=False)
    wide = nn.MultiheadAttention(8, 4, kdim=3, vdim=6, batch_first=True)
    shake(wide)
    key, value = torch.randn(3, 5, 3), torch.randn(3, 5, 6)
    q = torch.randn(3, 4, 8)
    tensors.update({**state(wide, "wide."), "in.key": key, "in.value": value, "in.q": q})
    tensors["out.wide"] = wide(q, key, value, key_padding_mask=padding)[0]
    write("torch_attention", tensors)


def transformer():
    torch.manual_seed(4)
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, batch_first=True, dropout=0.3)
    model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8), enable_nested_tensor=False)
    shake(model)
    model.eval()
    x = torch.randn(2, 5, 8, requires_grad=True)
    padding = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
    mask = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
    y = model(x, mask=mask, src_key_padding_mask=padding)
    weighted(y).backward()
    tensors = {**state(model), "in.x": x, "in.padding": padding, "in.mask": mask, "out.masked": y, **gradients(model, {"x": x})}
    tensors["out.plain"] = model(x)
    first = nn.TransformerEncoderLayer(8, 4, dim_feedforward=12, norm_first=True, activation="gelu", layer_norm_eps=1e-3)
    shake(first)
    first.eval()
    sequence = torch.randn(5, 2, 8, requires_grad=True)
    tensors.update({**state(first, "first."), "in.sequence": sequence, "out.first": first(sequence)})
    write("torch_transformer", tensors)


def embedding():
    torch.manual_seed(5)
    model = nn.ModuleDict({"embedding": nn.Embedding(7, 4, padding_idx=0), "norm": nn.LayerNorm(4),
                           "rms": nn.RMSNorm(4, eps=1e-6), "head": nn.Linear(4, 7)})
    shake(model)
    ids = torch.tensor([[1, 5, 0, 3], [6, 0, 5, 5]])
    y = model["head"](model["rms"](model["norm"](model["embedding"](ids))))
    weighted(y).backward()
    write("torch_embedding", {**state(model), "in.ids": ids, "out.y": y, **gradients(model)})


def losses():
    torch.manual_seed(6)
    x, t, p = torch.randn(4, 3), torch.rand(4, 3), torch.rand(4, 3)
    ids = torch.tensor([2, 0, 1, 2])
    weight, pos = torch.rand(3) + 0.5, torch.rand(3) + 0.5
    logs, log_t = x.log_softmax(1), torch.randn(4, 3).log_softmax(1)
    out = {"in.x": x, "in.t": t, "in.p": p, "in.ids": ids, "in.weight": weight, "in.pos": pos, "in.logs": logs,
           "in.log_t": log_t}
    for r in ("mean", "sum", "none"):
        out["out.ce_" + r] = nn.CrossEntropyLoss(weight=weight, ignore_index=1, label_smoothing=0.1, reduction=r)(x, ids)
        out["out.nll_" + r] = nn.NLLLoss(weight=weight, ignore_index=0, reduction=r)(logs, ids)
        out["out.mse_" + r] = nn.MSELoss(reduction=r)(x, t)
        out["out.l1_" + r] = nn.L1Loss(reduction=r)(x, t)
        out["out.smooth_" + r] = nn.SmoothL1Loss(reduction=r, beta=0.5)(x, t)
        out["out.huber_" + r] = nn.HuberLoss(reduction=r, delta=0.7)(x, t)
        out["out.bce_" + r] = nn.BCELoss(weight=weight, reduction=r)(p, t)
        out["out.logits_" + r] = nn.BCEWithLogitsLoss(weight=weight, pos_weight=pos, reduction=r)(x, t)
        out["out.kl_" + r] = nn.KLDivLoss(reduction=r)(logs, t)
        out["out.kllog_" + r] = nn.KLDivLoss(reduction=r, log_target=True)(logs, log_t)
    out["out.kl_batchmean"] = nn.KLDivLoss(reduction="batchmean")(logs, t)
    write("torch_losses", out)


def plain_layers():
    """Layers without parameters, and norms: one output each for one image and one sequence."""
    torch.manual_seed(7)
    x, s, r = torch.randn(2, 4, 5, 4), torch.randn(2, 4, 7), torch.randn(3, 4) * 2
    instance = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    shake(instance)
    one = nn.BatchNorm1d(4)
    shake(one)
    conv1 = nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2)
    same = nn.Conv2d(4, 2, (3, 2), padding="same", padding_mode="reflect", bias=False)
    transpose = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=(1, 2))
    out = {"in.x": x, "in.s": s, "in.r": r, **state(instance, "instance."), **state(one, "one."), **state(conv1, "conv1."),
           **state(same, "same."), **state(transpose, "transpose.")}
    out["out.instance"] = instance(x)
    out.update({"after." + k: v for k, v in instance.state_dict().items() if "running" in k})
    out["out.instance_eval"] = instance.eval()(x)
    out["out.one"], out["out.one_s"] = one(r), one(s)
    out["out.conv1"], out["out.same"], out["out.transpose"] = conv1(s), same(x), transpose(x)
    for name, layer, value in (
        ("max", nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True), x), ("max_dilated", nn.MaxPool2d(2, 1, dilation=2), x),
        ("avg", nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False), x), ("max1", nn.MaxPool1d(3, stride=2), s),
        ("avg_divisor", nn.AvgPool2d(2, divisor_override=3, ceil_mode=True), x), ("avg1", nn.AvgPool1d(2, padding=1), s),
        ("adaptive_avg", nn.AdaptiveAvgPool2d((3, 2)), x), ("adaptive_max", nn.AdaptiveMaxPool2d((2, 3)), x),
        ("nearest", nn.Upsample(scale_factor=2), x), ("bilinear", nn.Upsample(size=(3, 6), mode="bilinear"), x),
        ("corners", nn.Upsample(scale_factor=1.5, mode="bilinear", align_corners=True), x),
        ("relu6", nn.ReLU6(), r), ("gelu", nn.GELU(), r), ("gelu_tanh", nn.GELU(approximate="tanh"), r), ("silu", nn.SiLU(), r),
        ("softplus", nn.Softplus(beta=2, threshold=3), r), ("elu", nn.ELU(alpha=0.5), r), ("leaky", nn.LeakyReLU(0.2), r),
        ("hardtanh", nn.Hardtanh(-0.5, 2), r), ("mish", nn.Mish(), r), ("softsign", nn.Softsign(), r), ("selu", nn.SELU(), r),
        ("logsigmoid", nn.LogSigmoid(), r), ("glu", nn.GLU(), r), ("softmax", nn.Softmax(0), r), ("logsoftmax", nn.LogSoftmax(1), r),
        ("hardsigmoid", nn.Hardsigmoid(), r), ("hardswish", nn.Hardswish(), r), ("softmin", nn.Softmin(1), r),
    ):
        out["out." + name] = layer(value)
    write("torch_layers", out)


if __name__ == "__main__":
    for make in (conv_net, recurrent, attention, transformer, embedding, losses, plain_layers):
        make()
