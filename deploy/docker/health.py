"""Whether the process of this container does its work: exit code 0 or 1. Docker and Kubernetes ask.

Imports next to nothing, since it runs every few seconds. Knows two URLs; knows nothing of why an answer is as it is.
"""

import http.client
import os
import sys
from collections.abc import Mapping
from pathlib import Path

TIMEOUT_S = 4.0
TRAINER_PORT = "FLASHRL_TRAINER_RUN__METRICS_PORT"


def answers(port: int, path: str, token: str = "") -> bool:
    """Whether this container answers 200 at `path`."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {token}"} if token else {})
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def is_well(environ: Mapping[str, str]) -> bool:
    """A service: ready to sample. A trainer: answering where it has a port for metrics."""
    if environ.get("FLASHRL_PART") == "trainer":
        port = int(environ.get(TRAINER_PORT) or 0)
        return not port or answers(port, "/metrics")
    file = environ.get("FLASHRL_ROLLOUT_TOKEN_FILE")
    token = Path(file).read_text().strip() if file else environ.get("FLASHRL_TOKEN", "")
    return answers(int(environ.get("FLASHRL_ROLLOUT_PORT", "8000")), "/ready", token)


if __name__ == "__main__":
    sys.exit(not is_well(os.environ))
