"""The documentation as a site: every page and every module is in it, and no link of the front pages is broken."""

import importlib.util
import re

import pytest
import yaml
from commands import REPOSITORY

from guided_diffusion import __version__

DOCS = REPOSITORY / "docs"
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


@pytest.fixture(scope="module")
def hook():
    spec = importlib.util.spec_from_file_location("modules", DOCS / "hooks" / "modules.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pages(entry):
    """The pages of a part of the navigation."""
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]


def test_every_page_is_in_the_navigation_or_linked_from_one_that_is():
    shown = pages(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"])
    assert len(set(shown)) == len(shown)
    linked = {(DOCS / page).parent / link for page in shown for link in LINK.findall((DOCS / page).read_text())}
    assert {path for path in DOCS.rglob("*.md") if path.relative_to(DOCS).as_posix() not in shown} <= linked


def test_every_module_is_in_the_reference_once(hook):
    reference = [name for page in (DOCS / "reference").glob("*.md")
                 for name in re.findall(r"^::: ([\w.]+)$", hook.expanded(page.read_text()), re.MULTILINE)]
    assert len(set(reference)) == len(reference)
    packages = ("guided_diffusion", "evaluations")
    assert {name for package in packages for name in hook.modules(package)} - set(packages) == set(reference)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_the_front_pages_lead_to_files(name):
    assert all((REPOSITORY / link).exists() for link in LINK.findall((REPOSITORY / name).read_text()))


def test_the_site_asks_no_other_server():
    theme = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["theme"]
    assert theme["font"] is False


def test_the_version_is_one_everywhere():
    assert yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())["version"] == __version__
    assert re.search(r"^## ([\d.]+)", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == __version__


def test_the_golden_cases_are_few_enough_for_every_clone():
    golden = REPOSITORY / "tests" / "golden"
    assert sum(path.stat().st_size for path in golden.rglob("*") if path.is_file()) < 3_200_000
