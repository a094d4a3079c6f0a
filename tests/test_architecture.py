"""The rules of the house as tables: who may import whom, and how long a file and a function may be."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import dpo_lightning

PACKAGE = Path(dpo_lightning.__file__).parent
FILES = {file.relative_to(PACKAGE).as_posix(): file for file in sorted(PACKAGE.rglob("*.py"))}
FILE_LINES, FUNCTION_LINES = 300, 40

# room or top-level file: the others of this package that it may import
MAY_USE = {
    "__init__": set(),
    "types": set(),
    "keys": set(),
    "metrics_file": {"types"},
    "paths": {"types"},
    "cache": {"types"},
    "contradictions": {"types", "paths"},
    "config": {"types", "paths", "keys", "contradictions"},
    "cli": {"types", "paths", "keys", "config", "cluster"},
    "data": {"types", "cache"},
    "objective": {"types"},
    "model": {"types", "paths", "cache"},
    "cluster": {"types"},
    "checkpoints": {"types", "paths", "cache", "cluster"},
    "training": {"types", "metrics_file", "data", "objective", "model", "cluster", "checkpoints"},
    "outputs": {"types", "paths", "metrics_file", "model"},
    "finish": {"data", "model", "cluster", "training", "outputs"},
    "resolve": {"types", "data", "model", "checkpoints", "training"},
    "train": {"types", "cache", "data", "model", "cluster", "checkpoints", "training", "resolve", "finish"},
    "__main__": {"types", "paths", "keys", "config", "cli", "data", "cluster", "checkpoints", "outputs", "train"},
}
VERBS = r"(train|resolve|config|contradictions|__main__|cli/\w+)\.py"
# package of others: the files that may import it
ONLY_IN = {
    "hydra": VERBS,
    "omegaconf": VERBS,
    "deepspeed": r"training/(zero|shards)\.py",
    "wandb": r"training/wandb_run\.py",
    "lightning": r"data/datamodule\.py|(cluster|checkpoints|training)/.*|train\.py",
}
NEVER_AT_THE_TOP = {
    "deepspeed": r".*",
    "torch": r"(__init__|cache|config|contradictions|keys|paths|types|__main__|cli/\w+)\.py",
}


class Import(NamedTuple):
    file: str
    line: int
    name: str
    at_top: bool  # runs when the file is imported


def imports(file: str) -> Iterator[Import]:
    def walk(node: ast.AST, at_top: bool) -> Iterator[Import]:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: import by the full name"
            names = [f"{node.module}.{name}" for name in names]
        yield from (Import(file, getattr(node, "lineno", 0), name, at_top) for name in names)
        typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        inside = typing or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, at_top and not inside)

    return walk(ast.parse(FILES[file].read_text()), True)


IMPORTS = [found for file in FILES for found in imports(file)]


def room(file: str) -> str:
    return file.partition("/")[0].removesuffix(".py")


def test_every_room_has_a_rule() -> None:
    assert {room(file) for file in FILES} == {*MAY_USE}


def test_rooms_import_only_what_lies_before_them() -> None:
    own = [found for found in IMPORTS if found.name.startswith("dpo_lightning.")]
    used = {(room(found.file), found.name.split(".")[1]): found for found in own}
    seen = {pair for pair in used if pair[1] in MAY_USE and pair[0] != pair[1]}
    allowed = {(this, other) for this, others in MAY_USE.items() for other in others}
    assert len(own) > 50
    assert not [used[pair] for pair in seen - allowed]
    assert not allowed - seen, "what nobody uses is not allowed either"


@pytest.mark.parametrize("package", ONLY_IN)
def test_package_is_imported_only_in(package: str) -> None:
    assert not [i for i in IMPORTS if i.name.split(".")[0] == package and not re.fullmatch(ONLY_IN[package], i.file)]


@pytest.mark.parametrize("package", NEVER_AT_THE_TOP)
def test_package_is_not_imported_with_the_file(package: str) -> None:
    at_top = [found for found in IMPORTS if found.name.split(".")[0] == package and found.at_top]
    assert not [found for found in at_top if re.fullmatch(NEVER_AT_THE_TOP[package], found.file)]


def test_no_drawer_for_everything() -> None:
    drawers = r"(.*/)?_?(utils?|helpers?|common|misc)(\.py|/.*)"
    assert not [file for file in FILES if re.fullmatch(drawers, file)]


def test_files_and_functions_are_short() -> None:
    texts = {name: file.read_text() for name, file in FILES.items()}
    functions = [
        (name, node.name, (node.end_lineno or 0) - node.lineno + 1)
        for name, text in texts.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert len(functions) > 100
    assert not [(name, len(text.splitlines())) for name, text in texts.items() if len(text.splitlines()) > FILE_LINES]
    assert not [found for found in functions if found[2] > FUNCTION_LINES]


def test_telling_a_mistake_loads_nothing_heavy() -> None:
    """What runs before the training's own imports: configuration, and the rows of files."""
    code = (
        "import sys, dpo_lightning, dpo_lightning.config, dpo_lightning.__main__, dpo_lightning.data.prepare;"
        "print(*{'torch', 'lightning', 'deepspeed', 'transformers', 'datasets', 'wandb'} & {*sys.modules})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert result.stdout.split() == []
