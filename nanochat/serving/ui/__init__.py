"""The web page: one file, index.html, with its style and its script in it.

The content security policy names both by their hashes: nothing else may run, be it from the network or from a model's
answer, and the page may talk to its own server only.
"""

import base64
import hashlib
import re
from pathlib import Path


def page() -> tuple[bytes, str]:
    """The page, and the policy to send with it."""
    text = (Path(__file__).parent / "index.html").read_text(encoding="utf-8")

    def sources(tag: str) -> str:
        inner = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        hashes = (base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() for content in inner)
        return " ".join(f"'sha256-{each}'" for each in hashes)

    policy = (
        f"default-src 'none'; script-src {sources('script')}; style-src {sources('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text.encode(), policy
