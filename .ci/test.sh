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
# What is ignored needs what is installed with COCALC_FULL only.
cargo test --workspace --all-targets --no-fail-fast ${COCALC_FULL:+-- --include-ignored}
cargo test --workspace --doc

# Each example is a program that an integrator would start.
cargo run --quiet -p verify-tokens
cargo run --quiet -p own-storage
cargo run --quiet -p example-embedded-host -- --once
