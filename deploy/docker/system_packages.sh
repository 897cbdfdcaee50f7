#!/bin/sh
# system_packages.sh PART: what the part loads at run time beside its Python packages.
set -eu
case "$1" in
  rollout-cpu) packages="libnuma1" ;;
  rollout) packages="gcc libc6-dev" ;; # triton compiles the launcher of every kernel on the machine that runs it
  *) exit 0 ;;
esac
apt-get update -q
# shellcheck disable=SC2086
DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $packages
rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log
