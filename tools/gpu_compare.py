"""Times of attention on an NVIDIA GPU: PyTorch's beside this crate's.

    python tools/gpu_compare.py path/to/check [--window]

`check` is the example of crates/dijiang-cuda, built in release. Needs PyTorch with CUDA. 16 heads,
bf16, d = e = 64 and 128 (and m = d for ours), 16384 tokens in all or one longer sequence; medians
of CUDA events after warm-up. `--window` adds PyTorch's sliding window (flex attention, compiled).
"""

import json
import subprocess
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS, TOKENS = 16, 16384
LENGTHS = [1024, 2048, 4096, 8192, 16384, 32768, 65536]


def median_ms(call, repeats=11):
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2]


def sdpa_ms(backend, q, k, v):
    try:
        with sdpa_kernel([backend]):
            return median_ms(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    except RuntimeError:
        return float("nan")


def window_ms(q, k, v, window):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    n = q.shape[2]
    torch._dynamo.reset()
    mask = create_block_mask(
        lambda b, h, i, j: (i >= j) & (i - j < window), None, None, n, n, device="cuda"
    )
    attend = torch.compile(flex_attention, dynamic=False)
    return median_ms(lambda: attend(q, k, v, block_mask=mask))


def main():
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    ours = {}
    command = [sys.argv[1], "time", "forward"]
    lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    for line in map(json.loads, lines.splitlines()):
        if line.get("what") == "forward":
            ours[line["d"], line["n"], line["chunk"]] = line
    own = "ratio TFLOP/s  GB/s"
    print(f"  d      n   flash   cudnn  window |  c=64  {own} |  c=128 {own}")
    for d in (64, 128):
        for n in LENGTHS:
            shape = (max(TOKENS // n, 1), HEADS, n, d)
            q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
            flash = sdpa_ms(SDPBackend.FLASH_ATTENTION, q, k, v)
            cudnn = sdpa_ms(SDPBackend.CUDNN_ATTENTION, q, k, v)
            window = window_ms(q, k, v, 128) if "--window" in sys.argv else float("nan")
            best = min(x for x in (flash, cudnn) if x == x)
            row = f"{d:3} {n:6} {flash:7.3f} {cudnn:7.3f} {window:7.3f}"
            for chunk in (64, 128):
                own = ours[d, n, chunk]
                row += (
                    f" | {own['ms']:6.3f} {best / own['ms']:5.2f} {own['tflops']:7.1f}"
                    f" {own['gbytes_per_s']:5.0f}"
                )
            print(row, flush=True)


main()
