#!/usr/bin/env bash
# Runs the tests: all crates, then the demo end to end on real Btrfs and podman.
set -euo pipefail
cd "$(dirname "$0")/.."

# One image for all tests that run projects, kept between runs.
if [ "$(id -u)" -eq 0 ]; then
  export COCALC_IMAGE_CACHE=${COCALC_IMAGE_CACHE:-/var/cache/cocalc}
fi
# The daemons that the end-to-end tests start are built first, so that every
# test finds them, and nothing is compiled twice.
cargo build --workspace --bins
cargo test --workspace --all-targets --no-run

# Two lanes, since the end-to-end tests of the command line mostly wait: those,
# and beside them everything else. Targets are chosen by name, so that both have
# the features of the whole workspace, and nothing is compiled again.
targets() {
  cargo metadata --no-deps --format-version 1 | python3 -c '
import json, sys
cli, others = set(), set()
for package in json.load(sys.stdin)["packages"]:
    for target in package["targets"]:
        if "test" in target["kind"]:
            (cli if package["name"] == "cocalc-cli" else others).add(target["name"])
print(*("--test " + name for name in sorted(cli - others if sys.argv[1] == "end-to-end" else others)))
' "$1"
}
end_to_end_targets=$(targets end-to-end)
other_targets=$(targets others)
mkdir -p target/tests
# With a process group of its own, and no interrupts ignored, which tests of
# terminals need. What is ignored needs what is installed with COCALC_FULL only.
set -m
# shellcheck disable=SC2086
cargo test --workspace --no-fail-fast $end_to_end_targets ${COCALC_FULL:+-- --include-ignored} \
  >target/tests/end-to-end.log 2>&1 </dev/null &
end_to_end=$!
set +m
trap 'kill -- "-$end_to_end" 2>/dev/null || true; cat target/tests/end-to-end.log' EXIT
failed=0
# shellcheck disable=SC2086
cargo test --workspace --no-fail-fast --lib --bins --examples --benches $other_targets \
  ${COCALC_FULL:+-- --include-ignored} 2>&1 | tee target/tests/others.log || failed=1
wait "$end_to_end" || failed=1
trap - EXIT
cat target/tests/end-to-end.log
if [ "$failed" -ne 0 ]; then
  echo "== what failed:" >&2
  grep -hE -A8 '^test .* FAILED|^thread .* panicked at|^error' target/tests/*.log >&2 || true
  exit 1
fi
cargo test --workspace --doc

# Each example is a program that an integrator would start.
cargo run --quiet -p verify-tokens
cargo run --quiet -p own-storage
cargo run --quiet -p example-embedded-host -- --once
