"""Generated parts of a page, between their marks."""

import re
from collections.abc import Mapping
from pathlib import Path


def update_page(page: Path, parts: Mapping[str, str]) -> None:
    """Replaces the text between `<!-- NAME -->` and `<!-- end of NAME -->` for every part.

    Raises:
      ValueError: the page lacks one of the marks.
    """
    text = page.read_text(encoding="utf-8")
    for name, part in parts.items():
        marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        if not marks.search(text):
            raise ValueError(
                f"{page} must have the marks '<!-- {name} -->' and '<!-- end of {name} -->'. Add "
                "them."
            )
        text = marks.sub(lambda found, part=part: f"{found[1]}{part}\n{found[2]}", text)
    page.write_text(text, encoding="utf-8")
