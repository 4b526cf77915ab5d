"""What the documents name exists: files and folders, modules and what is in them, types, flags, and links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_ep.command_line import own_flags
from elastic_ep.run import make_parser
from tests.test_dependencies import ARROWS

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "elastic_ep"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "train").glob("*.md")])
NAMED = sorted(set(DOCUMENTS) - {ROOT / "docs" / "api.md", ROOT / "CHANGELOG.md"})
"""docs/api.md is written by a program, from the tables that requests are read by; the changelog tells of what was."""

ELSEWHERE = {
    "config.json", "tokenizer.json", "generation_config.json", "additional_chat_templates/", "build/model",
    "events.jsonl", "ranks/", "torch.compile",
}  # fmt: skip
"""Of a model's folder, a run, or a library."""
OTHERS_TYPES = {"TransferEngine", "TaskGroup", "ResourceTracker"}
"""CamelCase names that are not ours."""

CODE = re.compile(r"`([^`\n]+)`")
COMMAND = re.compile(r"-m ((?:elastic_ep|bench|train)[\w.]*)")
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
ENDS = (".py", ".md", ".json", ".jsonl", ".svg", ".png", ".toml", ".txt", ".yaml", ".mmd")
OUR_PACKAGES = {"elastic_ep", "bench", "train", "tests"}
IN_MODULE = re.compile(r"((?:\w+/)*\w+)\.([A-Z]\w+)")
CAMEL = re.compile(r"(?:[A-Z][a-z0-9]+){2,}")


def words(document: Path) -> Iterator[str]:
    for code in CODE.findall(document.read_text()):
        yield from (word.strip(",;:()\"'") for word in code.split())


def is_path(word: str) -> bool:
    """Not a URL, a placeholder, or `module.Name`."""
    if (
        word in ELSEWHERE
        or any(sign in word for sign in "<>*{}$=|")
        or word.startswith(("/", "-", "http", ".venv"))
    ):
        return False
    if IN_MODULE.fullmatch(word):
        return False
    return word.endswith(ENDS) or ("/" in word and (word.endswith("/") or word.split("/")[0] in FOLDERS))


FOLDERS = {path.name for place in (ROOT, SOURCE) for path in place.iterdir() if path.is_dir()}


def found(path: str, document: Path) -> bool:
    """From the root, from the sources, or from where the document is; a bare name, anywhere in those and in bench/."""
    places = (ROOT, SOURCE, document.parent)
    return any((place / path).exists() for place in places) or (
        "/" not in path and any(any(place.rglob(path)) for place in (SOURCE, ROOT / "bench"))
    )


def module_file(name: str) -> tuple[Path, str] | None:
    """The file of a dotted name of ours, and what is left of the name behind the module."""
    parts = name.split(".")
    start = SOURCE.parent if parts[0] == "elastic_ep" else ROOT
    for length in range(len(parts), 0, -1):
        path = start.joinpath(*parts[:length])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.exists():
                return file, ".".join(parts[length:])
    return None


@pytest.mark.parametrize("document", NAMED, ids=lambda path: path.name)
def test_paths(document: Path) -> None:
    assert [word for word in words(document) if is_path(word) and not found(word, document)] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links(document: Path) -> None:
    links = [link for link in LINK.findall(document.read_text()) if not link.startswith("http")]
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_modules(document: Path) -> None:
    dotted = {
        word
        for word in words(document)
        if word.split(".")[0] in OUR_PACKAGES and "." in word and not is_path(word)
    }
    missing = []
    for name in dotted | set(COMMAND.findall(document.read_text())):
        there = module_file(name.rstrip("."))
        if there is None or (
            there[1] and not re.search(rf"\b{there[1].split('.')[0]}\b", there[0].read_text())
        ):
            missing.append(name)
    assert missing == []


@pytest.mark.parametrize("document", NAMED, ids=lambda path: path.name)
def test_what_is_in_a_module(document: Path) -> None:
    """`module.Name` and `folder/module.Name`: some module of that name has it."""
    missing = []
    for word in words(document):
        if match := IN_MODULE.fullmatch(word):
            files = [file for file in SOURCE.rglob(f"{match[1].split('/')[-1]}.py") if match[1] in str(file)]
            if not any(re.search(rf"\b{match[2]}\b", file.read_text()) for file in files):
                missing.append(word)
    assert missing == []


def test_types() -> None:
    sources = "\n".join(file.read_text() for file in SOURCE.rglob("*.py"))
    names = {word for document in NAMED for word in words(document) if CAMEL.fullmatch(word)} - OTHERS_TYPES
    assert len(names) > 5
    assert {name for name in names if not re.search(rf"\b{name}\b", sources)} == set()


def test_flags_of_the_server() -> None:
    """In the documents of those who run it; a flag of a bench stands behind the bench's name."""
    known = own_flags(make_parser())
    sources = "\n".join(file.read_text() for file in SOURCE.rglob("*.py"))
    missing = set()
    for document in NAMED:
        for code in CODE.findall(document.read_text()):
            if "bench." not in code:
                missing |= {
                    flag
                    for flag in re.findall(r"(?<!\w)--[a-z][a-z-]+[a-z]", code)
                    if flag not in known and flag not in sources
                }
    assert missing == set()


def test_every_folder_and_every_top_module_is_on_the_map() -> None:
    text = (ROOT / "docs" / "map.md").read_text()
    folders = [path.relative_to(SOURCE) for path in SOURCE.rglob("__init__.py") for path in [path.parent]]
    assert len(folders) > 10
    assert [str(folder) for folder in folders if str(folder) != "." and f"`{folder}/`" not in text] == []
    assert [file.name for file in SOURCE.glob("[a-z]*.py") if f"`{file.name}`" not in text] == []


def test_arrows_in_the_architecture_are_those_that_are_tested() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `(\w+)/` \| (.*) \|$", text, re.MULTILINE)
    told = {folder: set(re.findall(r"`(\w+)/`", others)) for folder, others in rows}
    assert told == {folder: others & set(ARROWS) for folder, others in ARROWS.items()}
