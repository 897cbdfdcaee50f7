#!/bin/sh
# with_uv.sh COMMAND...: run a command of a build with uv at /opt/uv, and leave no uv behind in the layer.
set -eu
python -m venv /opt/uv
/opt/uv/bin/pip install --no-cache-dir --disable-pip-version-check --quiet uv==0.13.9
"$@"
rm -rf /opt/uv /tmp/* "$HOME/.cache"
