#!/usr/bin/env bash
# lock.sh: write constraints-cpu.txt and constraints-cuda.txt anew from pyproject.toml. Run it after changing a dependency.
set -euo pipefail
cd "$(dirname "$0")/../.."
uv=${UV:-.venv/bin/uv}
lock() { # FILE ARGUMENTS...
  local file=deploy/docker/$1
  shift
  "$uv" pip compile --quiet --no-header --no-annotate --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
    --extra trainer pyproject.toml -o "$file" "$@"
}
export UV_FIND_LINKS=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}
options=()
if ! compgen -G "${UV_FIND_LINKS:-/nonexistent}/torch-2.13.0+cpu*.whl" >/dev/null; then
  options=(--extra-index-url https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match)
fi
[ -n "$UV_FIND_LINKS" ] || unset UV_FIND_LINKS
lock constraints-cpu.txt --extra rollout-cpu --override scripts/cpu-overrides.txt "${options[@]}"
unset UV_FIND_LINKS # whose torch is the CPU's
lock constraints-cuda.txt --extra rollout
