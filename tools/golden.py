#!/usr/bin/env python3
"""Golden values for the equations of the crate, in float64, by the slow n x n form and PyTorch's autograd.

    pip install torch numpy safetensors
    python tools/golden.py [FILE]        default: tests/golden/attention_f64.safetensors

The file holds, as row-major float64 tensors:

    q, k [75, 16], v [75, 12]            inputs
    cotangent [75, 12]                   the loss is sum(output * cotangent)
    <map>.<parameter>                    b1: one block; b2a: two blocks, antithetic
    <map>.<case>.output [75, 12]         see `cases`
    <map>.<case>.grad.<name>             gradient of the loss for every input and parameter that has one
"""
import argparse
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

TOKENS, DIM, VALUE_DIM = 75, 16, 12


def dct_ii(d):
    """Orthonormal DCT-II matrix: row f, column i; y = C x."""
    f = torch.arange(d)[:, None]
    i = torch.arange(d)[None, :]
    c = torch.cos(math.pi * (2 * i + 1) * f / (2 * d)) * math.sqrt(2 / d)
    c[0] /= math.sqrt(2)
    return c


def log_features(x, scale, radii, antithetic, gaussian):
    """x [n, d], scale [G, d], radii [G*d] -> u [n, m], m = G*d or 2*G*d."""
    d = x.shape[1]
    u = torch.cat([(x * s) @ dct_ii(d).T for s in scale], 1) * radii
    if antithetic:
        u = torch.cat([u, -u], 1)
    if gaussian:
        u = u - 0.5 * (x * x).sum(1, keepdim=True)
    return u


def attention(q, k, v, p, causal, chunk=None, back=0, log_decay=None, antithetic=False, gaussian=False, valid=None, sinks=0,
              kept=0):
    """One head; `p` are the parameters of the map, `chunk` and `back` the window, `valid` a mask of keys, `sinks` how many of the first
    unmasked keys stay exact, and `kept` how many of those beyond the window, the largest first."""
    n, d = q.shape
    nk = k.shape[0]
    x, y = q * d**-0.25, k * d**-0.25
    a = log_features(x - p["query_center"], p["query_scale"], p["query_radii"], antithetic, gaussian)
    a = a + (x @ p["key_center"] - p["query_center"] @ p["key_center"])[:, None]
    b = log_features(y - p["key_center"], p["key_scale"], p["key_radii"], antithetic, gaussian)
    b = b + p["log_weight"] + (y @ p["query_center"])[:, None]
    far = torch.exp(a[:, None, :] + b[None, :, :]).sum(-1) * torch.exp(p["log_mix"])
    i, j = torch.arange(n)[:, None], torch.arange(nk)[None, :]
    if log_decay is not None:
        far = far * torch.exp(log_decay * (i - j).clamp(min=0))
    exact = torch.zeros(n, nk, dtype=torch.bool)
    if chunk is not None:
        exact |= i // chunk - j // chunk <= back
    present = torch.ones(nk, dtype=torch.bool) if valid is None else valid.bool()
    exact |= (present & (present.cumsum(0) <= sinks))[None, :]
    if kept:
        score = b.detach().max(1).values - (0 if log_decay is None else log_decay.detach()) * torch.arange(nk)
        for query in range(n):
            beyond = [key for key in range(query + 1) if present[key] and not exact[query, key]]
            exact[query, sorted(beyond, key=lambda key: -score[key])[:kept]] = True
    w = torch.where(exact & (j <= i), torch.exp(x @ y.T), far)
    if causal:
        w = w * (j <= i)
    if valid is not None:
        w = w * valid[None, :]
    total = w.sum(1, keepdim=True)
    return (w / torch.where(total > 0, total, 1.0)) @ v  # a row without a key gives zeros


def cases():
    """Arguments of `attention` for every case."""
    j = torch.arange(TOKENS)
    return {
        "full": dict(causal=False),
        "causal": dict(causal=True),
        "causal_gaussian": dict(causal=True, gaussian=True),
        "decay": dict(causal=True, log_decay=torch.tensor(-0.05)),
        "local": dict(causal=True, chunk=16, back=1),
        "local0": dict(causal=True, chunk=8, back=0),
        "local_decay": dict(causal=True, chunk=16, back=1, log_decay=torch.tensor(-0.05)),
        "full_masked": dict(causal=False, valid=(j % 5 != 2).double()),
        "causal_masked": dict(causal=True, valid=((j % 5 != 2) | (j == 0)).double()),
        "local_sinks": dict(causal=True, chunk=16, back=1, sinks=4),
        "local_sinks_decay": dict(causal=True, chunk=8, back=0, sinks=3, log_decay=torch.tensor(-0.05)),
        "local_sinks_masked": dict(causal=True, chunk=8, back=1, sinks=4, valid=((j % 5 != 2) & (j > 8)).double()),
        "local_kept": dict(causal=True, chunk=8, back=1, kept=10),
        "local_kept_decay": dict(causal=True, chunk=8, back=0, sinks=3, kept=7, log_decay=torch.tensor(-0.05)),
        "local_kept_masked": dict(causal=True, chunk=4, back=1, kept=5, valid=((j % 5 != 2) & (j > 8)).double()),
    }


def parameters(blocks, antithetic):
    """Random parameters of a map."""
    m = blocks * DIM * (2 if antithetic else 1)
    return {
        "query_center": torch.randn(DIM) * 0.3,
        "key_center": torch.randn(DIM) * 0.3,
        "query_scale": torch.randn(blocks, DIM),
        "key_scale": torch.randn(blocks, DIM),
        "query_radii": torch.randn(blocks * DIM),
        "key_radii": torch.randn(blocks * DIM),
        "log_weight": torch.randn(m) * 0.2 - math.log(m),
        "log_mix": torch.tensor(-0.4),
    }


def main():
    default = Path(__file__).resolve().parent.parent / "tests" / "golden" / "attention_f64.safetensors"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=default)
    file = parser.parse_args().file

    torch.set_default_dtype(torch.float64)
    torch.manual_seed(20240329)
    inputs = {"q": torch.randn(TOKENS, DIM) * 1.5, "k": torch.randn(TOKENS, DIM) * 1.5, "v": torch.randn(TOKENS, VALUE_DIM)}
    cotangent = torch.randn(TOKENS, VALUE_DIM)
    out = dict(inputs, cotangent=cotangent)
    for blocks, antithetic in [(1, False), (2, True)]:
        tag = f"b{blocks}{'a' if antithetic else ''}"
        params = parameters(blocks, antithetic)
        out.update({f"{tag}.{name}": tensor for name, tensor in params.items()})
        for case, kw in cases().items():
            leaves = {name: tensor.clone().requires_grad_() for name, tensor in dict(params, **inputs).items()}
            if "log_decay" in kw:
                leaves["log_decay"] = kw["log_decay"].requires_grad_()
            o = attention(leaves["q"], leaves["k"], leaves["v"], leaves, antithetic=antithetic, **kw)
            (o * cotangent).sum().backward()
            out[f"{tag}.{case}.output"] = o.detach()
            for name, tensor in leaves.items():
                if tensor.grad is not None:
                    out[f"{tag}.{case}.grad.{name}"] = tensor.grad
    save_file({name: tensor.contiguous() for name, tensor in out.items()}, file)
    print(len(out), "tensors in", file)


if __name__ == "__main__":
    main()
