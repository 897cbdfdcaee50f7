"""The page at `/`: one file that needs nothing else, and the headers that hold a browser to it.

Knows the file; knows nothing of the service, whose state the page's script asks of `/status`.
"""

import base64
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

_FILE = Path(__file__).with_name("status_page.html")


@dataclass(frozen=True)
class Page:
    """What is sent for it. Nothing in it depends on the service, so a stranger may have it too."""

    content: bytes
    headers: dict[str, str]


def read_page() -> Page:
    """The page and a policy under which only its own script and style run, and nothing is fetched from elsewhere."""
    html = _FILE.read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src {_hash(html, 'script')}; style-src {_hash(html, 'style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-store",
    }
    return Page(html.encode(), headers)


def _hash(html: str, tag: str) -> str:
    """The policy's name for the only element of this kind."""
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
