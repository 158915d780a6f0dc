"""The documentation: its pages exist, every public name is in the reference and has a docstring, README fits a page."""

import importlib.util
import re
from pathlib import Path

import pytest

import mfp

ROOT = Path(__file__).parent.parent
SITE = (ROOT / "mkdocs.yml").read_text()
PAGES = [path.relative_to(ROOT / "docs").as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]


def hook():
    spec = importlib.util.spec_from_file_location("check_docstrings", ROOT / "docs" / "check_docstrings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_public_names_have_docstrings(monkeypatch):
    assert hook().undocumented() == []

    class Silent:
        def quiet(self): ...

    monkeypatch.setattr(mfp, "FilterPlan", Silent)
    assert hook().undocumented() == ["FilterPlan", "FilterPlan.quiet"]


def test_every_public_name_is_in_the_reference():
    shown = set(re.findall(r"^::: mfp\.(?:.*\.)?(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE))
    assert set(mfp.__all__) - shown == {"PAPER_CRITERIA", "backend", "ops", "optim"}


@pytest.mark.parametrize("page", PAGES)
def test_every_page_is_in_the_navigation(page):
    assert f" {page}\n" in SITE


def test_every_example_has_a_page():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {
        Path(page).stem for page in PAGES if page.startswith("examples/")
    }


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_to_files_lead_somewhere(name):
    links = re.findall(r"\]\(([^)#]+)", (ROOT / name).read_text())
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not missing


def test_readme_fits_a_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
