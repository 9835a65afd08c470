"""Parts of a page that are made from results, put between its marks."""

import re
from collections.abc import Mapping
from pathlib import Path


def update_page(page: Path, parts: Mapping[str, str]) -> None:
    """Replace what stands between `<!-- NAME -->` and `<!-- end of NAME -->`, for every part.

    Raises:
      ValueError: the page lacks one of the marks.
    """
    text = page.read_text(encoding="utf-8")
    for name, part in parts.items():
        marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        if not marks.search(text):
            raise ValueError(
                f"{page} has no marks '<!-- {name} -->' and '<!-- end of {name} -->'; put them in."
            )
        text = marks.sub(lambda found, part=part: f"{found[1]}{part}\n{found[2]}", text)
    page.write_text(text, encoding="utf-8")
