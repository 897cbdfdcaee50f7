"""Where the replicas are: the URLs of the settings, or every address of a name. Knows nothing of what is there."""

import socket
from collections.abc import Callable
from urllib.parse import urlsplit

from flashrl_trainer.settings import RolloutSettings


def finder(settings: RolloutSettings) -> Callable[[], list[str]]:
    """A function that gives the URLs there are at the moment; none while the name has no address."""
    if not settings.discover:
        return lambda: list(settings.urls)
    parts = urlsplit(settings.discover)
    return lambda: addresses(parts.hostname or "", parts.port or 80)


def addresses(host: str, port: int) -> list[str]:
    """`["http://10.0.0.2:8000", "http://[fd00::2]:8000"]`, each address once."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror:
        return []
    hosts = sorted({str(address[0]) for *_, address in found})
    return [f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}" for host in hosts]
