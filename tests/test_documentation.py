"""README.md and docs/: Python blocks run, command lines parse, links lead somewhere, versions agree."""

import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest

from ttr_cli.main import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language):
    return [
        pytest.param(path, text, id=f"{path.name}:{path.read_text()[: match.start()].count(chr(10)) + 1}")
        for path in PAGES
        for match in BLOCK.finditer(path.read_text())
        for found, text in [match.groups()]
        if found == language
    ]


@pytest.mark.parametrize(("page", "text"), blocks("python"))
def test_python_blocks_run(page, text):
    exec(compile(text, str(page), "exec"), {"__name__": "documentation"})


COMMANDS = [
    pytest.param(line, id=f"{block.id}-{line}")
    for block in blocks("bash")
    for line in block.values[1].splitlines()
    if "ttr-gpu " in line
]


@pytest.mark.parametrize("line", COMMANDS)
def test_command_lines_parse(line):
    words = shlex.split(line, comments=True)
    words = words[words.index("ttr-gpu") + 1 :]
    command = cli.get_command(click.Context(cli), words[0])
    assert command is not None, f"no command {words[0]}"
    command.make_context(words[0], words[1:])


def test_there_are_blocks_to_check():
    assert len(blocks("python")) >= 4
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_versions_agree():
    from ttr_gpu import __version__

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__
    assert f"version: {__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_make_targets_named_in_the_pages_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"\bmake ([a-z]+)", page.read_text())}
    assert named <= targets
