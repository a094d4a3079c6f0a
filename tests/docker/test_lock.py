"""The image's lock files: a hash for every file, the tested versions, all that is needed, nothing that was poisoned."""

import re
import tomllib
from importlib.metadata import requires

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT

IMAGE = {**default_environment(), "sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
LOCKS = {name: ROOT / "docker" / f"{name}.lock" for name in ("build", "requirements")}
PIN = re.compile(r"([\w.-]+)==(\S+) \\")
HASH = re.compile(r" {4}--hash=sha256:[0-9a-f]{64}( \\)?")
# What torch's CUDA build asks for, and what builds wheels: constraints.txt is of a machine without the one, and pip
# leaves out the other.
BESIDES = re.compile(r"nvidia-.+|cuda-.+|triton|pip|setuptools")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins(text: str) -> dict[str, str]:
    """Return the version of each name that a lock file or constraints.txt pins."""
    found = re.findall(r"^([\w.-]+)==(\S+)", text, re.M)
    return {canonicalize_name(name): version for name, version in found}


TESTED = pins((ROOT / "constraints.txt").read_text())
LOCKED = {name: pins(file.read_text()) for name, file in LOCKS.items()}


@pytest.mark.parametrize("name", LOCKS)
def test_every_file_has_a_hash_and_nothing_else_is_said(name: str) -> None:
    lines = [line for line in LOCKS[name].read_text().splitlines() if not line.startswith("#")]
    for line, next_ in zip(lines, [*lines[1:], ""], strict=True):
        assert PIN.fullmatch(line) or HASH.fullmatch(line), line
        assert bool(HASH.fullmatch(next_)) == line.endswith("\\"), line
    assert len(LOCKED[name]) == sum(bool(PIN.fullmatch(line)) for line in lines) >= 3


@pytest.mark.parametrize("name", LOCKS)
def test_versions_are_those_that_were_tested(name: str) -> None:
    assert not {each: version for each, version in LOCKED[name].items() if TESTED.get(each, version) != version}
    assert not [each for each in LOCKED[name] if each not in TESTED and not BESIDES.fullmatch(each)]


def test_both_files_agree() -> None:
    shared = {*LOCKED["build"]} & {*LOCKED["requirements"]}
    assert {name: LOCKED["build"][name] for name in shared} == {name: LOCKED["requirements"][name] for name in shared}


def needed(wanted: list[str]) -> set[str]:
    """Return the names of all that requirements lead to, as the packages installed here tell."""
    met, left = set(), [Requirement(each) for each in wanted]
    while left:
        asked = left.pop()
        for extra in {"", *asked.extras} - {extra for name, extra in met if name == canonicalize_name(asked.name)}:
            met.add((canonicalize_name(asked.name), extra))
            further = map(Requirement, requires(asked.name) or [])
            left += [r for r in further if not r.marker or r.marker.evaluate({**IMAGE, "extra": extra})]
    return {name for name, _ in met}


def test_all_that_the_package_needs_is_locked() -> None:
    wanted = needed(PROJECT["project"]["dependencies"])
    assert len(wanted) > 60
    assert not wanted - {*LOCKED["requirements"]}, "run `make lock`"
    building = needed(PROJECT["build-system"]["requires"])
    assert not building - {*LOCKED["build"]}, "run `make lock`"
    assert not {*LOCKED["requirements"]} & {"pytest", "ruff", "pyright", "trl"}, "an image is no workplace"


def test_poisoned_releases_are_nowhere() -> None:
    """lightning 2.6.2 and 2.6.3 stole credentials at import (GHSA-w37p-236h-pfx3)."""
    for name in ("lightning", "pytorch-lightning"):
        for file in (TESTED, LOCKED["requirements"]):
            assert file[name] not in ("2.6.2", "2.6.3")
    (asked,) = (r for r in map(Requirement, PROJECT["project"]["dependencies"]) if r.name == "lightning")
    assert not [version for version in ("2.6.2", "2.6.3") if asked.specifier.contains(version)]


def test_torch_is_the_cuda_build() -> None:
    assert LOCKED["requirements"]["torch"] == TESTED["torch"], "no local version: +cpu has another hash"
    assert [name for name in LOCKED["requirements"] if name.startswith("nvidia-")]
