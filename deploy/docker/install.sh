#!/bin/sh
# install.sh PART TORCH: install what a part needs, and nothing of ours, into /opt/flashrl.
set -eu
part=$1
kind=$2
[ "$part" = rollout ] && kind=cuda
[ -n "${UV_FIND_LINKS:-}" ] || unset UV_FIND_LINKS

python -m venv --without-pip /opt/flashrl

install() {
  /opt/uv/bin/uv pip install --quiet --no-cache --compile-bytecode --python /opt/flashrl/bin/python \
    --constraint "constraints-$kind.txt" "$@"
}

set -- --extra "$part" --override image-overrides.txt
if [ "$kind" = cpu ]; then
  # PyPI's torch for Linux is the CUDA one, of several GB; the CPU's is on PyTorch's index, which is asked for
  # nothing else, unless a folder of local wheels has it
  if ls "${UV_FIND_LINKS:-/nonexistent}"/torch-2.13.0+cpu-*.whl >/dev/null 2>&1; then
    install --no-index --no-deps "torch==2.13.0+cpu"
  else
    install --index-url https://download.pytorch.org/whl/cpu --no-deps "torch==2.13.0+cpu"
  fi
  set -- --override cpu-overrides.txt "$@"
fi
install -r pyproject.toml "$@"
cd /opt/flashrl/lib/python3*/site-packages
rm -rf torch/test
[ "$kind" = cuda ] || rm -rf torch/include # which kernels are compiled with, where they are compiled at run time
