"""`hovit page`: one self-contained web page with all claims, tables, curves and records.

It reads records only and loads nothing from a network; the same records give the same bytes. The
folder `web/` has the Jinja2 template, the style, and the script that sorts, filters and draws.
"""

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from ...config.plan import Plan
from ...utils.code_hash import code_hash
from ...utils.files import digest, file_digest, write_text
from ..readme import PICTURE
from ..sources import Sources, load_sources
from .content import collect

PAGE = Path("results/index.html")
WEB = Path(__file__).parent / "web"
SCRIPTS = ("tables.js", "detail.js", "charts.js", "curves.js", "analyses.js")


def page_code() -> str:
    """sha256, in hex, of the code, templates and pictures of the page."""
    files = [path for path in sorted(WEB.iterdir()) if path.is_file()]
    pictures = [PICTURE] if PICTURE.exists() else []
    return digest([code_hash("page"), *map(file_digest, files + pictures)])


def write_page(plan: Plan, root: Path = Path()) -> None:
    """Write `results/index.html`.

    The page lists records that cannot be used and omits them. It states why a table is refused.
    """
    write_page_from(load_sources(plan, root), root)


def write_page_from(sources: Sources, root: Path = Path()) -> None:
    """As `write_page`, from sources that are read already."""
    picture = root / PICTURE
    front = base64.b64encode(picture.read_bytes()).decode() if picture.exists() else ""
    write_text(root / PAGE, render(collect(sources) | {"front": front}))


def render(content: dict[str, Any]) -> str:
    """Render the page from `collect`'s content."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(WEB), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["code"] = _code
    style = (WEB / "page.css").read_text(encoding="utf-8")
    script = "\n".join((WEB / name).read_text(encoding="utf-8") for name in SCRIPTS)
    return environment.get_template("page.html").render(
        content,
        style=Markup(style),
        script=Markup(script),
        data=Markup(_embedded(content["data"])),
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
    )


def _code(text: str) -> str:
    """Escape text; render backticks as `<code>` and double asterisks as `<b>`."""
    from markupsafe import Markup, escape

    bold = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", str(escape(text)))
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", bold))


def _embedded(data: dict[str, Any]) -> str:
    """Encode as JSON in which no string can end the script element."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def _csp_hash(text: str) -> str:
    """Return the source expression that allows an inline element in a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
