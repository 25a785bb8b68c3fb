#!/usr/bin/env bash
# Runs each fuzz target for some seconds. The stable toolchain builds them
# with the sanitizer-coverage flags that libFuzzer needs.
set -euo pipefail
cd "$(dirname "$0")/../fuzz"

seconds=${1:?usage: fuzz.sh SECONDS}
target=$(rustc -vV | sed -n 's/^host: //p')
export RUSTC_BOOTSTRAP=1
# What `cargo fuzz build` passes, without the address sanitizer: our parsers
# have no unsafe code, and the build stays small.
export RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 -Cdebug-assertions"
cargo build --release --target "$target"
for source in fuzz_targets/*.rs; do
  name=$(basename "$source" .rs)
  mkdir -p "target/corpus/$name"
  # Committed seeds are read, new inputs stay in target/.
  seeds=(); [ -d "seeds/$name" ] && seeds=("seeds/$name")
  echo "fuzzing $name for $seconds s"
  "target/$target/release/$name" -max_total_time="$seconds" -print_final_stats=1 -verbosity=0 \
    "target/corpus/$name" "${seeds[@]}" 2>&1 | tail -n 12
done
