#!/usr/bin/env bash
# Prints the performance table: a federation of release programs on this
# machine, each number beside a peer's from the same run. As root.
#
#   .ci/bench.sh [--quick] [--only start,stopped,tokens,auth,http,ssh,moves,hogs,storage,backup] [--runs N] [--json]
set -euo pipefail
cd "$(dirname "$0")/.."

if [ "$(id -u)" -ne 0 ]; then
  echo "bench.sh: Btrfs volumes and containers of their own need root" >&2
  exit 1
fi
target=${CARGO_TARGET_DIR:-target}
dir=$(mktemp -d "${TMPDIR:-/tmp}/cocalc-bench-XXXXXX")

# The program cleans up after itself; this is for when it was killed.
clean_up() {
  local status=$?
  trap - EXIT
  if [ -e "$dir/data" ]; then
    timeout 120 "$target/release/cocalc" down --dir "$dir/data" >/dev/null || status=1
  fi
  timeout 60 podman ps --all --quiet --filter 'name=^cocalc-bench-[0-9]+$' 2>/dev/null |
    timeout 60 xargs --no-run-if-empty podman rm --force --time 0 >/dev/null 2>&1 || true
  timeout 60 podman rmi --force localhost/cocalc-bench >/dev/null 2>&1 || true
  [ "$status" -eq 0 ] || tail -n 5 "$dir"/data/log/*.log "$dir"/nginx/error.log 2>/dev/null >&2 || true
  if mountpoint -q "$dir/bench-source"; then umount "$dir/bench-source" || status=1; fi
  for volume in "$dir"/bench-*/; do
    if mountpoint -q "$volume"; then umount "$volume" || status=1; fi
  done
  rm -rf --one-file-system "$dir" /dev/shm/"$(basename "$dir")"-*
  exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

mkdir -p target
timeout --foreground --kill-after=600 10800 \
  "$target/release/cocalc-bench" --dir "$dir" --out target/bench.json "$@"
