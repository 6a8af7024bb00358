#!/usr/bin/env bash
# Runs the tests of src/low, the only folder with unsafe code, under valgrind's memcheck, and under miri where the nightly
# toolchain has it.
#
#     tools/valgrind.sh
#
# Valgrind runs no AVX-512 and hides it from programs: what is covered is AVX2 and the portable loops, which share one body with
# AVX-512. Miri has none of the vector instructions: portable loops only, on its strictest rules.
set -euo pipefail
cd "$(dirname "$0")/.."

command -v valgrind >/dev/null || { echo "valgrind is not installed (apt-get install valgrind)" >&2; exit 1; }
tests=$(cargo test --locked --lib --features states,safetensors --no-run 2>&1 | tee /dev/stderr | sed -n 's/.*(\(target[^)]*\)).*/\1/p' | tail -1)
valgrind --error-exitcode=1 --leak-check=full --errors-for-leak-kinds=definite --child-silent-after-fork=yes "$tests" low:: --test-threads=1

if cargo +nightly miri --version >/dev/null 2>&1; then
    # The general matrix product is another crate's and too slow here; its own test stands for it under valgrind.
    if ! MIRIFLAGS=-Zmiri-disable-isolation cargo +nightly miri setup >/dev/null 2>&1; then
        echo "miri cannot be set up here (it needs rust-src): skipped" >&2
        exit 0
    fi
    MIRIFLAGS=-Zmiri-disable-isolation cargo +nightly miri test --locked --lib -- low::simd --skip strided_operands
else
    echo "no miri on the nightly toolchain: skipped" >&2
fi
