"""README and docs: links that lead somewhere, commands that their scripts take, code that is Python, names that exist.

timm's own scripts are not in its wheel: their options are checked where TIMM_SOURCE names a clone of timm's repository.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import os
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import timm

import timm_ltm
from timm_ltm import cli
from timm_ltm.reduction import METHODS
from timm_ltm.reduction.reducer import setting_names

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
TIMMS = {"train.py", "validate.py", "benchmark.py", "inference.py", "onnx_export.py"}
SOURCE = os.environ.get("TIMM_SOURCE")
ADDRESS = re.compile(r"[a-z]+:")


class Parsed(Exception):
    """A script has parsed its arguments."""


def blocks(text, language=""):
    """The fenced blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(text):
    """Command lines of a page that run python: words of each, without the variables in front of it."""
    fenced = [line for block in blocks(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    indented = re.findall(r"^    (python .*)$", text, flags=re.MULTILINE)
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))]
    for line in [*fenced, *indented, *inline]:
        for part in re.split(r"&&|;", line):
            try:
                words = shlex.split(part, comments=True)
            except ValueError:  # an apostrophe: no command
                continue
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            if words[1:] and words[0] in cli.COMMANDS:  # in a table of commands
                words = ["python", "-m", "timm_ltm", *words]
            if words and words[0] in ("python", "torchrun") and words[1:] not in ([], ["-m"]):
                yield words


def without_ellipsis(words):
    """A placeholder where a value is left out, nothing where more may follow."""
    for before, word in zip(["", *words], words, strict=False):
        if word != "...":
            yield word
        elif before.startswith("--"):
            yield "1"


def anchors(page):
    """What GitHub calls a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def parse(monkeypatch, script, words):
    """What the parser of a script makes of a command's words; SystemExit if it takes them not."""
    original = argparse.ArgumentParser.parse_args

    def then_stop(self, args=None, namespace=None):
        raise Parsed(original(self, args, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", then_stop)
    monkeypatch.setattr(sys, "argv", [str(script), *words])
    monkeypatch.syspath_prepend(str(script.parent))
    with pytest.raises(Parsed) as found:
        runpy.run_path(str(script), run_name="__main__")
    return found.value.args[0]


def check(monkeypatch, words):
    """That a command can be run: its script is there and takes its options."""
    words = list(without_ellipsis(words))
    if words[0] == "torchrun":  # whose own options are torch's
        start = next((i for i, word in enumerate(words) if word.endswith(".py") or word == "-m"), None)
        words = ["python", *words[start:]] if start is not None else words
    program, *rest = words[1:]
    if program == "-m":
        module, *rest = rest
        assert module in ("timm_ltm", "pytest", "build"), words
        if module == "pytest":
            for path in (word for word in rest if word.endswith(".py")):
                assert (ROOT / path).is_file(), words
        if module != "timm_ltm" or not rest:
            return
        if rest[0] in cli.COMMANDS:
            cli.parser().parse_args(rest)
            return
        program, *rest = rest[1:] if rest[0] == "run" else rest
    if program.isupper():  # a placeholder
        return
    script = ROOT / program
    if Path(program).name in TIMMS and not script.is_file():
        if SOURCE is not None and (Path(SOURCE) / Path(program).name).is_file():
            options = set(re.findall(r"'(--[\w-]+)'", (Path(SOURCE) / Path(program).name).read_text()))
            assert {word for word in rest if word.startswith("--")} <= options, words
        return
    assert script.is_file(), f"{program}: there is no such script"
    if rest:
        parse(monkeypatch, script, rest)


def models_in(text):
    """Names of models: after --model, in create_model, and in backticks with a method in front."""
    methods = "|".join(sorted(METHODS, key=len, reverse=True))
    yield from re.findall(r"--models? ([a-z]\w+\.?\w*)", text)
    yield from re.findall(r"create_model\(\s*\"([a-z]\w+\.?\w*)\"", text)
    yield from re.findall(rf"[`']((?:{methods})_[a-z]\w+\.?\w*)[`']", text)
    yield from re.findall(r"-m timm_ltm (?:show|measure|convert) ([a-z]\w+\.?\w*)", text)


def exists(name):
    """Whether timm has a model of this name, and weights of its tag."""
    plain, _, tag = name.partition(".")
    return timm.is_model(plain) and (not tag or name in timm.list_models(f"{plain}*", pretrained=True))


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_resolve(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"<img src=\"([^\"]+)\"", text)
    for link in (link for link in links if not ADDRESS.match(link)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: there is no {target}"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading, but {sorted(anchors(target))}"


def test_every_page_and_picture_of_docs_is_linked():
    linked = set()
    for page in PAGES:
        for link in re.findall(r"(?:\]\(|src=\")([^)\s\"#]+)", page.read_text()):
            linked.add((page.parent / link).resolve())
    files = {file for file in ROOT.glob("docs/**/*") if file.is_file() and file != ROOT / "docs/README.md"}
    assert not files - linked


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_are_taken(page, monkeypatch, capsys):
    refused = []
    for words in commands(page.read_text()):
        with monkeypatch.context() as patch:
            try:
                check(patch, words)
            except SystemExit as end:  # of argparse; 0 is that of --help
                refused += [f"{' '.join(words)}: {capsys.readouterr().err}"] if end.code else []
    assert not refused


def test_commands_are_found():
    found = [" ".join(words) for page in PAGES for words in commands(page.read_text())]
    for begin in (
        "python train.py",
        "python examples/train.py",
        "python -m timm_ltm show",
        "python benchmarks/cost.py",
    ):
        assert any(command.startswith(begin) for command in found), begin


@pytest.mark.parametrize(
    "wrong", ["examples/train.py DATA --pre-trained", "examples/none.py DATA", "-m timm_ltm show --x"]
)
def test_wrong_commands_are_not_taken(wrong, monkeypatch):
    with pytest.raises((SystemExit, AssertionError)):
        check(monkeypatch, ["python", *wrong.split()])


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_is_python_of_this_package(page):
    """It parses; what it takes of the package is there; settings that convert is given are the method's."""
    for block in blocks(page.read_text(), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("timm_ltm"):
                module = importlib.import_module(node.module)
                for alias in node.names:  # of which one may be a module of the package
                    inner = f"{node.module}.{alias.name}"
                    assert hasattr(module, alias.name) or importlib.util.find_spec(inner), inner
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "timm_ltm":
                assert hasattr(timm_ltm, node.attr), node.attr
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "timm_ltm.convert":
                method = node.args[1].value
                assert {keyword.arg for keyword in node.keywords} <= set(setting_names(METHODS[method])), method


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_models_exist(page):
    for name in set(models_in(page.read_text())):
        assert exists(name), f"{name}: timm has no such model, or no such weights"


def test_methods_and_families_have_a_page():
    from timm_ltm.models.registry import MODULES

    assert all((ROOT / f"docs/methods/{method}.md").is_file() for method in METHODS)
    families = (ROOT / "docs/models/README.md").read_text()
    assert all(f"`{module}`" in families for module in MODULES)
