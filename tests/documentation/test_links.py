"""The documentation holds together: links, names of options, the tree, the README's size."""

import importlib.util
import re

import pytest
from documentation.pages import EXAMPLES, PAGES, ROOT, Page

BY_NAME = {page.name: page for page in PAGES}
# The demo checkpoint's own card is no page of the documentation, and its links are followed too.
LINKING = (*PAGES, Page("model_export/demo/checkpoint/README.md"))


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Page):
    for link in page.links:
        name, _, anchor = link.partition("#")
        target = (ROOT / page.name).parent / name if name else ROOT / page.name
        assert target.exists(), link
        if anchor:
            found = target.resolve().relative_to(ROOT.resolve()).as_posix()
            assert anchor in BY_NAME[found].anchors, link


def test_every_page_is_reached_from_the_readme():
    reached, new = set(), {"README.md"}
    while new:
        reached |= new
        links = {(BY_NAME[name], link) for name in new for link in BY_NAME[name].links}
        paths = {(ROOT / page.name).parent / link.partition("#")[0] for page, link in links}
        names = {path.resolve().relative_to(ROOT.resolve()).as_posix() for path in paths}
        new = names & set(BY_NAME) - reached
    assert reached == set(BY_NAME)


def test_every_block_says_what_it_is():
    known = {"console", "sh", "python", "json", "mermaid", "text"}
    assert {language for page in PAGES for language, _ in page.blocks} <= known


def test_the_readme_is_read_in_two_minutes():
    text = BY_NAME["README.md"].text
    assert len(text.splitlines()) <= 200
    assert len(text.encode()) <= 12_000
    # The ones that continuous integration runs.
    assert len(re.findall(r"^\$ pip install -e ", text, re.MULTILINE)) == 2


def test_modules_that_are_shown_are_there():
    for example in EXAMPLES:
        module = re.match(r"python -m ((benchmarks|tests)\.[\w.]+)", example.text)
        if module:
            assert importlib.util.find_spec(module[1]), example.text


def test_the_tree_names_every_folder_and_nothing_else():
    (tree,) = re.findall(r"## The tree\n\n```text\n(.*?)```", BY_NAME["docs/design.md"].text, re.S)
    named: dict[str, set[str]] = {}
    for line in tree.splitlines():
        # Several names, then two spaces or more, then what they are.
        if not line.startswith(" "):
            top = line.split()[0]
            named[top] = set()
            assert (ROOT / top).is_dir()
            continue
        listed = re.match(r"  ((?:\w+, )*\w+) ", line)
        assert listed, line
        for name in listed[1].split(", "):
            named[top].add(name)
            folder = ROOT / top
            assert (folder / name).is_dir() or (folder / f"{name}.py").is_file(), f"{top}/{name}"
    for package in ("fastvlm_mlx", "model_export"):
        folders = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
        assert folders <= named[package]


def test_the_table_of_options_has_every_choice():
    from model_export.options import BITS, DTYPES, GROUP_SIZES, METHODS, PRECISIONS

    page = BY_NAME["docs/export.md"].text
    table = dict(re.findall(r"^\| `(--[a-z-]+)`[^|]* \| ([^|]*) \|", page, re.MULTILINE))
    assert all(str(bits) in table["--llm-bits"] for bits in BITS)
    assert all(str(size) in table["--group-size"] for size in GROUP_SIZES)
    assert all(dtype in table["--dtype"] for dtype in DTYPES)
    assert all(method in table["--method"] for method in METHODS)
    assert all(precision in table["--encoder-precision"] for precision in PRECISIONS)
