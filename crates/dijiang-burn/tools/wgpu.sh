#!/usr/bin/env bash
# The tests of the tensor path on burn's wgpu backend, on a machine without a GPU: with Mesa's Vulkan driver for CPUs, which
# is installed from Debian's packages if it is missing. Slow, and a large build: no part of `.ci`.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! dpkg -s mesa-vulkan-drivers libvulkan1 >/dev/null 2>&1; then
    sudo=$(command -v sudo || true)
    $sudo apt-get update && $sudo apt-get install -y --no-install-recommends mesa-vulkan-drivers libvulkan1
fi
drivers=(/usr/share/vulkan/icd.d/lvp_icd*.json)
export VK_DRIVER_FILES=${VK_DRIVER_FILES:-${drivers[0]}} VK_ICD_FILENAMES=${VK_ICD_FILENAMES:-${drivers[0]}}
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/../../target/burn} CARGO_INCREMENTAL=0

export XDG_RUNTIME_DIR=${XDG_RUNTIME_DIR:-/tmp}

# With the feature, burn's default device is wgpu's; all tests share it. burn 0.22.1 says that it has f64 there, but what
# comes out in f64 is wrong, zeros and NaN among it.
cargo test --locked --features wgpu --test layer --test exchange "$@" -- --test-threads 1 --skip f64
