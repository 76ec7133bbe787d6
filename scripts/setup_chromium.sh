#!/usr/bin/env bash
# Chromium's Debian package, for the test that opens a run's report in a browser. Quick when it is there; where it cannot be
# installed that test is skipped.
set -euo pipefail
command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null && exit 0
if ! command -v apt-get >/dev/null || [ "$(id -u)" -ne 0 ]; then
    echo "Chromium is installed by apt as root, which cannot be done here: the browser test will be skipped." >&2
    exit 0
fi
echo "installing chromium for the tests (once) ..." >&2
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
install() { apt-get install -y -qq --no-install-recommends chromium >"$log" 2>&1; }
if ! install; then
    apt-get update -qq >/dev/null 2>&1 || true
    install || { tail -n 3 "$log" >&2; echo "apt could not install it: the test is skipped." >&2; }
fi
