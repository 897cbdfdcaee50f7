"""The scripts that containers run are imported from where the Dockerfile takes them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "deploy" / "docker"))
