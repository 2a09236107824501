"""Pages as HTML files that hold their pictures, styles and script, and load nothing.

What stands in a page is prepared by its own package, whose templates extend page.html.jinja of this one.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from guided_diffusion.errors import UserError
from guided_diffusion.files import write_text

LOG = logging.getLogger(__name__)

LIMIT = 25_000_000              # bytes of a page
QUALITIES = (None, 90, 80, 65, 50, 35)      # of pictures: None is without loss, else WebP of that quality


class Pages:
    """The pages of a package, by the templates in its folder templates/.

    styles, scripts: file names of that folder, or else of the one of this package, in order; without scripts (None) a
    page has none, with () it has that of all pages alone. inline_styles: whether elements have styles of their own,
    which the security policy then allows. Raises UserError where jinja2 is missing.
    """

    def __init__(self, package: str, styles: Sequence[str] = (), scripts: Sequence[str] | None = None, *,
                 inline_styles: bool = False) -> None:
        try:
            from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
            from markupsafe import Markup
        except ImportError:
            raise UserError("pages need jinja2: pip install 'guided-pixels[eval]'") from None
        self._markup = Markup
        self.environment = Environment(loader=ChoiceLoader([PackageLoader(package), PackageLoader(__package__)]),
                                       autoescape=True, trim_blocks=True, lstrip_blocks=True,
                                       undefined=StrictUndefined)
        self.environment.filters["minus"] = lambda text: text.replace("-", "\N{MINUS SIGN}")
        style = _joined(package, ["page.css", *styles])
        script = "" if scripts is None else _joined(package, ["page.js", *scripts])
        self.environment.globals |= {
            "style": Markup(style), "style_source": "'unsafe-inline'" if inline_styles else _hash(style),
            "script": Markup(script), "script_source": _hash(script) if script else "'none'"}

    def render(self, template: str, title: str, *, data: Any = None, **content: Any) -> str:
        """The page. title: of the document. data: what the script reads, as JSON can hold it. content: of the template.

        Texts are escaped, and names that nobody has given are refused.
        """
        return self.environment.get_template(template).render(title=title, data=self._markup(_json(data)), **content)


pages_of = functools.cache(Pages)       # templates are compiled once in a process


def _joined(package: str, names: Sequence[str]) -> str:
    """Files of templates/ of the package, or else of this one, each after the line end that stands in the page."""
    folders = [package_files(one) / "templates" for one in (package, __package__)]
    return "".join("\n" + next(folder / name for folder in folders if (folder / name).is_file())
                   .read_text(encoding="utf-8") for name in names)


def _hash(text: str) -> str:
    """What a content security policy calls a script or a style sheet."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json(value: Any) -> str:
    """JSON that may stand in an HTML element: nothing in it can end the element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def write_page(path: str | Path, page: Callable[[int | None], str], too_large: Callable[[int, int], Exception],
               limit: int = LIMIT) -> int:
    """Writes a page whose pictures are as good as the limit lets them be; returns its size in bytes.

    page: the text of the page, by the quality of its pictures, one of QUALITIES. Loss is logged. too_large: what is
    raised, by the size and the limit, where even the lowest quality takes more than `limit` bytes. Raises UserError
    where the file cannot be written.
    """
    for quality in QUALITIES:
        text = page(quality)
        size = len(text.encode(errors="backslashreplace"))          # as `write_text` does
        if size <= limit:
            if quality is not None:
                LOG.info("%s: pictures are compressed with loss (WebP, quality %d), to keep the page small", path,
                         quality)
            write_text(path, text)
            return size
    raise too_large(size, limit)


def lossy(quality: int | None) -> str:
    """What a page says of pictures of that quality."""
    if quality is None:
        return "pictures are without loss"
    return f"pictures are compressed with loss (WebP, quality {quality}), to keep the page small"
