#!/usr/bin/env bash
# Prints the line coverage of the tests, file by file, by cargo-tarpaulin, which it installs where it is absent (ten minutes).
# Before that, the public functions that no test, example or doc test names.
#
#     tools/coverage.sh [--names]        --names: the list of functions only
set -euo pipefail
cd "$(dirname "$0")/.."

echo "public functions named in no test, example, bench or doc comment:"
grep -rhoP '^\s*pub (const |unsafe )?fn \K\w+' src | sort -u | while read -r name; do
    grep -rqwE "$name" tests examples benches || grep -rqE "^\s*//[/!].*\b$name\b" src || echo "  $name"
done
[[ ${1:-} == --names ]] && exit

cargo tarpaulin --version >/dev/null 2>&1 || cargo install --locked cargo-tarpaulin
# Counted code is slow, some thirty times: fewer random cases, and without those that take very many tokens through what others
# cover. A quarter of an hour on two cores, without what it compiles first.
export DIJIANG_FUZZ_CASES=${DIJIANG_FUZZ_CASES:-500}
cargo tarpaulin --locked --engine llvm --timeout 3600 --all-features --lib --tests --doc --skip-clean \
    --exclude-files 'tests/*' 'examples/*' 'benches/*' 'fuzz/*' --out Stdout -- --skip a_million --skip of_a_million --skip allocate
