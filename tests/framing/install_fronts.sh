#!/usr/bin/env bash
# haproxy and nginx for the tests behind fronts, where this machine allows it; no service of theirs is started.
set -euo pipefail
PATH="$PATH:/usr/sbin"
command -v haproxy >/dev/null && command -v nginx >/dev/null && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "haproxy or nginx is not installed: the tests behind them will be skipped (apt-get install haproxy nginx-light)"
  exit 0
fi
# Debian's way to say that an installation may start nothing.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  trap 'rm -f "$policy"' EXIT
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod +x "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends haproxy nginx-light; } >/dev/null; then
  echo "haproxy and nginx could not be installed: the tests behind them will be skipped"
fi
