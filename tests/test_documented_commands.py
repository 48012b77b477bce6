"""Commands in the READMEs, the docs and the help of the tools: the tools are there and take these options."""

import argparse
import ast
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmengine")
REPOSITORY = Path(__file__).resolve().parents[1]
TEXTS = [
    REPOSITORY / "README.md",
    *REPOSITORY.glob("*_configs/README.md"),
    *REPOSITORY.glob("docs/*.md"),
    *REPOSITORY.glob("tools/[a-z]*.py"),
]
COMMAND = re.compile(r"(?:python|tools/launch/\w+\.sh) +((?:tools/\w+\.py|train|test) (?:[^\n`#]|\\\n)*)")


class Understood(Exception):  # noqa: N818 - no error
    """The arguments are parsed; what the tool checks then depends on the machine."""


def text_of(file: Path) -> str:
    """Of a document, or of the help of a tool."""
    return ast.get_docstring(ast.parse(file.read_text())) if file.suffix == ".py" else file.read_text()


def commands_in(text: str) -> list[str]:
    """Those with arguments, from the tool on, each in one line."""
    joined = re.sub(r"\s*\\{1,2}\n\s*", " ", text)
    return [match.strip() for match in COMMAND.findall(joined)]


def documented() -> list[tuple[str, str]]:
    """(file, command), each command once."""
    found = {command: file.name for file in TEXTS for command in commands_in(text_of(file))}
    return sorted((file, command) for command, file in found.items())


@pytest.fixture(scope="module", autouse=True)
def _import_tools() -> None:
    sys.path.insert(0, str(REPOSITORY / "tools"))
    yield
    sys.path.remove(str(REPOSITORY / "tools"))


def test_there_are_some_for_every_tool() -> None:
    tools = {path.name for path in (REPOSITORY / "tools").glob("[a-z]*.py")}
    named = {Path(command.split()[0]).name for _, command in documented()}
    assert tools - named == set()


@pytest.mark.parametrize(("file", "command"), documented(), ids=lambda value: value[:60])
def test_command_is_understood(file: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser, argv: list[str]) -> None:
        parse(parser, argv)
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    tool, *arguments = shlex.split(re.sub(r"[…\[\]]", "", command.replace(" NAME ", " vig_small ")))
    module = importlib.import_module(Path(tool).stem)
    with pytest.raises(Understood):
        module.parse_args(arguments)
