"""HTML pages that need nothing beside themselves: no network, no folder, no server; texts in them run nothing."""

import re
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import Any

import jinja2  # torch and transformers bring it


def render(template: str, **values: Any) -> str:
    """A template of this folder as one string of HTML, each value escaped: it is shown as it is, whatever it holds.

    The template's style and script, in which nothing is filled in, are all that its Content-Security-Policy allows, by
    their hashes: nothing loads from outside, nothing injected runs.
    """
    folder, policy = Path(__file__).parent, "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'"
    text = "".join((folder / name).read_text(encoding="utf-8") for name in ("base.html", template))
    for tag in ("style", "script"):
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        hashes = (f"'sha256-{b64encode(sha256(part.encode()).digest()).decode()}'" for part in parts)
        policy += f"; {tag}-src {' '.join(hashes)}"
    # StrictUndefined: what the caller forgot would be left out without a word.
    how = dict(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(folder), autoescape=True, **how)
    environment.policies["json.dumps_kwargs"] = {}  # JSON keeps the order of its keys
    return environment.get_template(template).render(policy=policy, **values)
