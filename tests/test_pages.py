"""README and BUILD pages: links lead somewhere, the map of the package is complete."""

import re

from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_build_page_names_every_folder_and_top_module():
    page = (ROOT / "BUILD.md").read_text(encoding="utf-8")
    named = {name for row in re.findall(r"^\| (`.*?) \|", page, re.M) for name in row.split(", ")}
    package = ROOT / "layerwise_jax"
    folders = {f"`{path.parent.name}/`" for path in package.glob("*/__init__.py")}
    modules = {f"`{path.name}`" for path in package.glob("*.py") if path.stem != "__init__"}
    assert named == folders | modules
