"""Attention on an NVIDIA GPU: whether this crate is right, then its times beside PyTorch's.

    python tools/gpu_compare.py path/to/check [--setups N] [--window] [--backward] [--decode]
                                              [--windowless] [--fla path/to/packages]

`check` is the example of crates/dijiang-cuda, built in release. Needs PyTorch with CUDA. First N
random setups (200) against the CPU engine in f64, forward, without windows, and gradients; nothing
is timed if one of them is beyond its limit. Then 16 heads, bf16, d = e = 64 and 128 (and m = d for
ours), 16384 tokens in all or one longer sequence; medians of CUDA events after warm-up. `--window`
adds PyTorch's sliding window (flex attention, compiled), `--backward` the gradients of q, k and v,
where ours computes the forward pass again, `--decode` a token of 64 streams, `--windowless` ours
without windows, `--fla` the linear attention of flash-linear-attention (fla-core, unpacked there)
at n = 16384: the sums alone, of features that are given.
"""

import argparse
import json
import re
import subprocess
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS, TOKENS = 16, 16384
LENGTHS = [1024, 2048, 4096, 8192, 16384, 32768, 65536]
PROCESSES = 10


def correct(check, what, setups):
    """Runs the setups in some processes side by side and prints one table of all."""
    each = -(-setups // PROCESSES)
    command = [check, what, str(each)]
    running = [
        subprocess.Popen(command + [str(1000 * i)], stdout=subprocess.PIPE, text=True)
        for i in range(PROCESSES)
    ]
    texts = [process.communicate()[0] for process in running]
    header, table = "", {}
    for line in "".join(texts).splitlines():
        row = re.match(r"(bf16|f16|f32) +\d+ +(\d+) +(\S+) +(.*)", line)
        if line.startswith("type"):
            header = line
        elif row and "Setup" not in line:
            name, failed, limit, errors = row.groups()
            old = table.get(name, (0, limit, []))
            errors = list(map(float, errors.split()))
            most = [max(pair) for pair in zip(errors, old[2])] if old[2] else errors
            table[name] = (old[0] + int(failed), limit, most)
        else:
            print(line)
    print(f"{what}: {each * PROCESSES} setups\n{header}")
    for name, (failed, limit, most) in table.items():
        errors = "  ".join(f"{error:.1e}" for error in most)
        print(f"{name:5} {each * PROCESSES:6} {failed:6}  {limit}   {errors}", flush=True)
    if any(process.returncode for process in running):
        sys.exit("errors beyond the limit: nothing is timed")


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


def sdpa_ms(backend, q, k, v, backward=False):
    attend = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    try:
        with sdpa_kernel([backend]):
            if not backward:
                return median_ms(attend)
            inputs = [x.requires_grad_() for x in (q, k, v)]
            out, grad = attend(), torch.randn_like(v)
            return median_ms(
                lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)
            )
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


def times(check, command, what):
    command = [check, "time", command]
    lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [line for line in map(json.loads, lines.splitlines()) if line.get("what") == what]


def compare(check, what, window):
    ours = {(line["d"], line["n"], line["chunk"]): line for line in times(check, what, what)}
    backward = what == "backward"
    own = "times maps" if backward else "times TFLOP/s  GB/s"
    print(f"{what}\n  d      n   flash   cudnn  window |   c=64 {own} |  c=128 {own}")
    for d in (64, 128):
        for n in LENGTHS:
            shape = (max(TOKENS // n, 1), HEADS, n, d)
            q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
            flash = sdpa_ms(SDPBackend.FLASH_ATTENTION, q, k, v, backward)
            cudnn = sdpa_ms(SDPBackend.CUDNN_ATTENTION, q, k, v, backward)
            near = window_ms(q, k, v, 128) if window and not backward else float("nan")
            best = min(x for x in (flash, cudnn) if x == x)
            row = f"{d:3} {n:6} {flash:7.3f} {cudnn:7.3f} {near:7.3f}"
            for chunk in (64, 128):
                line = ours[d, n, chunk]
                row += f" | {line['ms']:6.3f} {best / line['ms']:5.2f}"
                if backward:
                    row += f" {line['with_maps_ms']:6.3f}"
                else:
                    row += f" {line['tflops']:7.1f} {line['gbytes_per_s']:5.0f}"
            print(row, flush=True)


def compare_fla(path):
    """The sums of features that are given, without what they are divided by."""
    sys.path.insert(0, path)
    import fla
    from fla.ops.linear_attn import chunk_linear_attn

    print(f"fla {fla.__version__}, chunk_linear_attn\n  d      n      ms")
    for d in (64, 128):
        shape = (1, TOKENS, HEADS, d)
        q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        q, k = (x.exp() / d for x in (q, k))
        with torch.no_grad():
            ms = median_ms(lambda: chunk_linear_attn(q, k, v, normalize=False))
        print(f"{d:3} {TOKENS:6} {ms:7.3f}", flush=True)


def print_decode(lines, rate):
    for line in lines:
        floor = 2 * line["state_mb"] * 1e6 / rate * 1e3
        print(f"{line} over reading and writing once: {line['ms'] / floor:.2f}")


def copy_rate():
    """Bytes per second that the card's memory gives, read and written."""
    a = torch.empty(2**32, dtype=torch.uint8, device="cuda").random_()
    b = torch.empty_like(a)
    return 2 * a.numel() / median_ms(lambda: b.copy_(a)) * 1e3


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("check")
    parser.add_argument("--setups", type=int, default=200)
    for flag in ("--window", "--backward", "--decode", "--windowless"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--fla")
    given = parser.parse_args()
    driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(driver, stdout=subprocess.PIPE, text=True).stdout.split()
    device = torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {device}, driver {' '.join(driver)}", flush=True)
    if given.setups:
        correct(given.check, "correct", given.setups)
        correct(given.check, "windowless", given.setups)
        correct(given.check, "backward", given.setups)
    compare(given.check, "forward", given.window)
    if given.backward:
        compare(given.check, "backward", False)
    rate = copy_rate()
    print(f"a copy moves {rate / 1e12:.2f} TB/s")
    if given.decode:
        print("decode")
        print_decode(times(given.check, "decode", "decode"), rate)
    if given.windowless:
        print("without windows")
        print(*times(given.check, "windowless", "forward"), sep="\n")
        print_decode(times(given.check, "windowless", "decode"), rate)
    if given.fla:
        compare_fla(given.fla)


main()
