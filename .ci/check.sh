#!/usr/bin/env bash
# Format, lints, documentation, licences, and the guards that keep light crates light.
set -euo pipefail
cd "$(dirname "$0")/.."

cargo fmt --all --check
.ci/assets.sh
cargo clippy --workspace --all-targets -- -D warnings
RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --quiet

# An integrator who takes a light crate never builds what it does not need.
guard() {
  local crate=$1; shift
  local tree forbidden
  tree=$(cargo tree --package "$crate" --edges normal --prefix none --format '{p}' | cut -d' ' -f1 | sort -u)
  for forbidden in "$@"; do
    if grep -qx "$forbidden" <<<"$tree"; then
      echo "$crate must not depend on $forbidden:" >&2
      cargo tree --package "$crate" --edges normal --invert "$forbidden" >&2
      exit 1
    fi
  done
}
guard cocalc-ids tokio rustic_core
guard cocalc-auth tokio hyper russh rusqlite rustic_core cocalc-core openidconnect hpke
guard cocalc-auth-sealed tokio hyper russh rusqlite rustic_core cocalc-core
guard cocalc-auth-ssh tokio hyper russh rusqlite rustic_core cocalc-core
# An HTTP client, for the master alone. RSA also for users' SSH keys.
guard cocalc-auth-live openidconnect reqwest rsa
guard cocalc-host openidconnect
guard cocalc-proxy openidconnect
guard cocalc-core hyper russh rusqlite rustic_core rustls podman
guard cocalc-storage hyper russh rusqlite rustls rustic_core
# rustic and the cloud clients are built for one program only, the worker.
guard cocalc-backup hyper russh rusqlite rustls rustic_core object_store reqwest
guard cocalc-podman hyper russh rusqlite rustls rustic_core
guard cocalc-http russh rusqlite rustic_core
guard cocalc-ssh hyper rusqlite rustic_core
guard cocalc-conat russh rusqlite rustic_core

if ! command -v cargo-deny >/dev/null; then
  # Without optimization: it checks for three seconds, and compiles for two
  # minutes instead of seven.
  CARGO_PROFILE_DEV_DEBUG=0 cargo install --quiet --debug --locked cargo-deny --version 0.20.2
fi
cargo deny check licenses bans sources
