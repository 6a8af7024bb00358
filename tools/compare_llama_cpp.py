#!/usr/bin/env python3
"""Speed of llama.cpp and of the example candle_gguf on one GGUF file, in turns, as a table.

    pip install llama-cpp-python         (compiled for this CPU: CMAKE_ARGS="-DGGML_NATIVE=ON")
    cargo build --release --features candle --example candle_gguf
    python tools/compare_llama_cpp.py --model model.gguf --maps maps.safetensors --text text.txt

Every context is read by llama.cpp, then by candle with linear and with softmax attention, `--repeat` times over; medians are
shown. Without `--ours` given or built, llama.cpp is measured alone. `--check` prints instead whether the first 20 tokens that
both continue five prompts by are the same, softmax attention on our side: with the weights as they are, where both round what
they multiply them by to 8 bits, and with the same weights in f32, where neither does and the tokens must be the same. Where they
part, it says by how much llama.cpp preferred its token to its second choice, in logits.
"""
import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import llama_cpp
from llama_cpp import Llama

PROMPTS = [
    "The capital of France is",
    "Once upon a time, there was a",
    "def fibonacci(n):",
    "The three laws of motion say that",
    "Water boils at 100 degrees Celsius because",
]


def llama(args, path, context, **more):
    threads = {"n_threads": args.threads, "n_threads_batch": args.threads}
    return Llama(model_path=str(path), n_ctx=context, verbose=False, **threads, **more)


def of_llama_cpp(model, tokens, context, decode):
    """Seconds for reading `context` tokens at once, and for `decode` more one by one."""
    model.reset()
    start = time.perf_counter()
    model.eval(tokens[:context])
    prefill = time.perf_counter() - start
    start = time.perf_counter()
    for token in tokens[context : context + decode]:
        model.eval([token])
        model.sample(temp=0.0)
    return prefill, time.perf_counter() - start


def of_candle(args, context):
    command = [args.ours, "bench", "--model", args.model, "--text", args.text, "--contexts", context, "--json"]
    command += ["--decode", args.decode, "--threads", args.threads]
    command += ["--maps", args.maps] if args.maps else []
    command += ["--linear-only"] if args.linear_only else []
    out = subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE)
    return json.loads(out.stdout)["rows"]


def compare(args):
    text = args.text.read_bytes()
    longest = max(args.contexts)
    model = llama(args, args.model, longest + args.decode)
    tokens = model.tokenize(text, add_bos=False, special=True)[: longest + args.decode]
    if len(tokens) < longest + args.decode:
        sys.exit(f"{args.text}: {longest + args.decode} tokens are needed, found {len(tokens)}")
    # The cache of keys and values, f16.
    cache_bytes = lambda context: 2 * 2 * context * kv_width(model)
    rows = []
    for context in args.contexts:
        found = {}
        for _ in range(args.repeat):
            prefill, decode = of_llama_cpp(model, tokens, context, args.decode)
            speeds = (context / prefill, args.decode / decode, cache_bytes(context))
            found.setdefault("llama.cpp, softmax", []).append(speeds)
            for row in of_candle(args, context) if args.ours.exists() else []:
                speeds = (row["prefill_tokens_per_second"], row["decode_tokens_per_second"], row["state_bytes"])
                found.setdefault(f"candle, {row['engine']}", []).append(speeds)
        for engine, speeds in found.items():
            rows.append((engine, context, *(statistics.median(column) for column in zip(*speeds))))
    if args.json:
        keys = ["engine", "context", "prefill_tokens_per_second", "decode_tokens_per_second", "state_bytes"]
        print(json.dumps({"rows": [dict(zip(keys, row)) for row in rows]}))
        return
    print(f"{args.model.name}, {args.threads} threads, {cpu()}, llama-cpp-python {version('llama-cpp-python')}, medians of {args.repeat}\n")
    print("| engine | context | prefill tokens/s | decode tokens/s | keys and values, or state |\n| --- | ---: | ---: | ---: | ---: |")
    for engine, context, prefill, decode, size in rows:
        print(f"| {engine} | {context} | {prefill:.0f} | {decode:.1f} | {size / 1e6:.1f} MB |")


def kv_width(model):
    """Elements of a token's keys, all layers."""
    metadata = model.metadata
    number = lambda key: int(metadata[f"llama.{key}"])
    head = number("embedding_length") // number("attention.head_count")
    return number("block_count") * number("attention.head_count_kv") * head


def cpu():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def check(args):
    """Whether both continue the prompts by the same 20 tokens, as they must with weights in f32."""
    print(f"{args.model.name} as it is:")
    continued_alike(args, args.model)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "f32.gguf")
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize = llama_cpp.LLAMA_FTYPE_ALL_F32, True
        if llama_cpp.llama_model_quantize(str(args.model).encode(), str(copy).encode(), params):
            sys.exit(f"{args.model}: llama.cpp makes no copy in f32")
        print("the same weights in f32:")
        sys.exit(not continued_alike(args, copy))


def continued_alike(args, path):
    # Keys and values in f32, as candle has them.
    f32 = llama_cpp.GGML_TYPE_F32
    model = llama(args, path, 512, logits_all=True, type_k=f32, type_v=f32, flash_attn=False)
    same = 0
    for prompt in PROMPTS:
        command = [args.ours, "run", "--model", path, "--softmax", "--generate", "20", "--endless"]
        command += ["--threads", args.threads, "--prompt", prompt]
        out = subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        ours = out.stdout.decode()[:-1]
        tokens = model.tokenize(prompt.encode(), add_bos=False, special=True)
        model.reset()
        model.eval(tokens)
        continued, parted = [], None
        for step in range(20):
            logits = model.scores[model.n_tokens - 1]
            second, first = sorted(logits)[-2:]
            continued.append(int(logits.argmax()))
            theirs = model.detokenize(continued).decode(errors="ignore")
            if parted is None and not ours.startswith(theirs):
                parted = f"at token {step + 1}, preferred by {first - second:.3f}"
            model.eval(continued[-1:])
        same += parted is None
        print(f"{prompt!r} + {ours!r}: " + ("same" if parted is None else f"parted {parted}: {theirs!r}"), flush=True)
    return same == len(PROMPTS)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="GGUF file")
    parser.add_argument("--maps", type=Path, help="what candle_gguf plan wrote")
    parser.add_argument("--text", type=Path, help="text to read")
    parser.add_argument("--contexts", type=lambda text: [int(n) for n in text.split(",")], default=[64, 2048, 8000])
    parser.add_argument("--decode", type=int, default=64, help="tokens whose decoding is timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--ours", type=Path, default=Path("target/release/examples/candle_gguf"), help="the example's program")
    parser.add_argument("--linear-only", action="store_true", help="leave candle's softmax attention out")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="compare what is generated instead of speed")
    args = parser.parse_args()
    if args.check:
        check(args)
    elif args.text is None:
        parser.error("--text is needed")
    else:
        compare(args)


main()
