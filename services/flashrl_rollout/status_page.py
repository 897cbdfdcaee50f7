"""The page at `/`: one document that needs nothing else, and the headers that hold a browser to it.

Knows its three files; knows nothing of the service, whose state the page's script asks of `/status`.
"""

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path

_FILE = Path(__file__).with_name("status_page.html")
_PARTS = {"style": ".css", "script": ".js"}


@dataclass(frozen=True)
class Page:
    """What is sent for it. Nothing in it depends on the service, so a stranger may have it too."""

    content: bytes
    headers: dict[str, str]


def read_page() -> Page:
    """The page and a policy under which only its own script and style run, and nothing is fetched from elsewhere."""
    html = _FILE.read_text(encoding="utf-8")
    rules = ["default-src 'none'"]
    for tag, suffix in _PARTS.items():
        content = _FILE.with_suffix(suffix).read_text(encoding="utf-8")
        html = html.replace(f"<{tag}></{tag}>", f"<{tag}>{content}</{tag}>")
        rules.append(f"{tag}-src '{_hash(content)}'")
    rules += ["connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"]
    headers = {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": "; ".join(rules),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-store",
    }
    return Page(html.encode(), headers)


def _hash(content: str) -> str:
    """The policy's name for an element with this content."""
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
