#!/usr/bin/env bash
# The files of npm packages that the project page uses. They are in the
# repository, so that it builds without npm; this fetches them again.
#
#   .ci/assets.sh            checks what is there against its sums
#   .ci/assets.sh --compare  fetches the packages, and compares
#   .ci/assets.sh --update   fetches them, and writes files and sums
set -euo pipefail
cd "$(dirname "$0")/../cocalc-core/http/assets/vendor"

xterm=6.0.0
fit=0.11.0

sha256sum --quiet --check SHA256SUMS || [ "${1:-}" = --update ]
[ -n "${1:-}" ] || exit 0

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
for package in "@xterm/xterm@$xterm" "@xterm/addon-fit@$fit"; do
  archive=$(npm pack --silent --pack-destination "$place" "$package")
  mkdir -p "$place/${archive%-*}"
  tar -xzf "$place/$archive" -C "$place/${archive%-*}" --strip-components=1
done
mkdir "$place/new"
cp "$place/xterm-xterm/lib/xterm.js" "$place/xterm-xterm/css/xterm.css" "$place/xterm-addon-fit/lib/addon-fit.js" "$place/new/"
cp "$place/xterm-xterm/LICENSE" "$place/new/xterm.LICENSE"
cp "$place/xterm-addon-fit/LICENSE" "$place/new/addon-fit.LICENSE"
# Their maps are not served.
sed -i '/^\/\/# sourceMappingURL=/d; s/\/\/# sourceMappingURL=.*$//' "$place/new/xterm.js" "$place/new/addon-fit.js"
case $1 in
  --compare) for file in "$place"/new/*; do cmp "$file" "$(basename "$file")"; done ;;
  --update)
    cp "$place"/new/* .
    sha256sum -- *.js *.css *.LICENSE >SHA256SUMS
    ;;
  *) echo "assets.sh: unknown option $1" >&2; exit 2 ;;
esac
