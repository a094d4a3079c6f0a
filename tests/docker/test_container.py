"""The image's recipe: what hadolint looks for, and that Apptainer and compose run the same program the same way."""

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from typing import NamedTuple

import pytest
import yaml

from dpo_lightning.cli.secrets import NAMES, kind_of
from tests.conftest import ROOT

DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
APPTAINER = (ROOT / "docker" / "apptainer.def").read_text()
COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
IGNORED = (ROOT / ".dockerignore").read_text()
ENTRYPOINT, CMD = ["python", "-m", "dpo_lightning"], ["--help"]
PINNED = re.compile(r"[\w./:-]+@sha256:[0-9a-f]{64}")


class Line(NamedTuple):
    """An instruction, in capitals, and the rest of its line."""

    word: str
    rest: str


def parse(text: str) -> list[Line]:
    """Return a Dockerfile's instructions; comments go, continued lines are joined."""
    kept = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", "", kept)
    return [Line(*line.strip().split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def variables(lines: list[Line], word: str) -> dict[str, str]:
    """Return what the ENV or ARG instructions set."""
    words = [each for line in lines if line.word == word for each in shlex.split(line.rest)]
    return {name: value for name, _, value in (each.partition("=") for each in words)}


def last_stage(lines: list[Line]) -> list[Line]:
    begins = [number for number, line in enumerate(lines) if line.word == "FROM"]
    return lines[begins[-1] :]


def faults(text: str) -> Iterator[str]:
    """Yield what is wrong with a Dockerfile."""
    lines = parse(text)
    yield from faults_of_bases(lines)
    for word, rest in lines:
        if word == "RUN":
            yield from faults_of_commands(rest)
        if word == "ADD":
            yield "ADD unpacks and downloads: use COPY"
        if word in ("COPY", "ADD") and {*rest.split()[:-1]} & {".", "./", "*"}:
            yield "the whole folder is copied"
        if word == "WORKDIR" and not rest.startswith("/"):
            yield f"WORKDIR {rest} depends on the one before"
        if word in ("ENTRYPOINT", "CMD") and not rest.startswith("["):
            yield f"{word} is run by a shell, which gets the signals"
    for name, value in (variables(lines, "ARG") | variables(lines, "ENV")).items():
        if NAMES.search(name) or kind_of(value):
            yield f"{name} is kept in the image"
    users = [line.rest for line in last_stage(lines) if line.word == "USER"]
    if not users or not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", users[-1]):
        yield "the last USER is not a number other than 0"


def faults_of_bases(lines: list[Line]) -> Iterator[str]:
    defaults, stages = variables(lines, "ARG"), set()
    for line in lines:
        if line.word == "FROM":
            base, _, name = re.sub(r"\$\{(\w+)\}", lambda m: defaults[m[1]], line.rest).partition(" AS ")
            if base not in stages and not PINNED.fullmatch(base):
                yield f"base not pinned by its digest: {base}"
            stages.add(name)


def faults_of_commands(text: str) -> Iterator[str]:
    commands = re.split(r"&&|;", text)
    if re.search(r"\b(curl|wget)\b.*\|\s*(sudo\s+)?(\w*sh|python\d?)\b", text):
        yield "a download is run as it comes"
    if re.search(r"\bsudo\b", text):
        yield "sudo"
    for command in commands:
        if "apt-get install" in command and not ("--yes" in command and "--no-install-recommends" in command):
            yield f"apt-get asks, or installs what is only recommended: {command}"
        if "pip install" in command and "--require-hashes" not in command and "--no-index" not in command:
            yield f"pip takes files without a hash: {command}"
        if "pip install" in command and "--no-deps" not in command:
            yield f"pip looks for what the lock file does not name: {command}"
    if "apt-get install" in text and ("apt-get update" not in text or "rm -rf /var/lib/apt/lists" not in text):
        yield "apt's lists are old, or stay in the layer"


def test_the_dockerfile_has_no_fault() -> None:
    assert not list(faults(DOCKERFILE))
    assert len(parse(DOCKERFILE)) > 15


DIGEST = DOCKERFILE.partition("@sha256:")[2].partition("\n")[0]
BROKEN = {
    "not pinned": (f"@sha256:{DIGEST}", "", "not pinned"),
    "latest": (f"bookworm-slim@sha256:{DIGEST}", "latest", "not pinned"),
    "cut digest": (DIGEST, DIGEST[:12], "not pinned"),
    "other base": ("FROM base AS build", "FROM python:3.11 AS build", "not pinned"),
    "root": ("USER 10001:10001", "USER root", "USER"),
    "uid 0": ("USER 10001:10001", "USER 0:0", "USER"),
    "named": ("USER 10001:10001", "USER dpo", "USER"),
    "no user": ("USER 10001:10001\n", "", "USER"),
    "shell": ("&& rm -rf", "&& curl -sSf https://example.org/i | sh && rm -rf", "a download"),
    "python": ("&& rm -rf", "&& wget -qO- https://example.org/i | python3 && rm -rf", "a download"),
    "sudo": ("&& rm -rf", "&& sudo rm -rf", "sudo"),
    "ADD": ("COPY conf conf", "ADD https://example.org/conf.tar conf", "ADD"),
    "all": ("COPY conf conf", "COPY . .", "whole folder"),
    "ARG": ("ARG LOCK", "ARG HF_TOKEN\nARG LOCK", "HF_TOKEN"),
    "ENV": ("ENV HOME=/cache", "ENV WANDB_API_KEY=x HOME=/cache", "WANDB_API_KEY"),
    "value": ("ENV HOME=/cache", f"ENV MINE=hf_{'a1B2' * 8} HOME=/cache", "MINE"),
    "lists": (" \\\n && rm -rf /var/lib/apt/lists/*", "", "apt's lists"),
    "recommended": (" --no-install-recommends", "", "apt-get"),
    "unhashed": (" --require-hashes", "", "without a hash"),
    "loose": (" --no-deps", "", "does not name"),
    "relative": ("WORKDIR /work", "WORKDIR work", "WORKDIR"),
    "shell form": ('ENTRYPOINT ["python", "-m", "dpo_lightning"]', "ENTRYPOINT python -m dpo_lightning", "signals"),
}


@pytest.mark.parametrize(("old", "new", "told"), BROKEN.values(), ids=BROKEN)
def test_a_broken_dockerfile_is_told_of(old: str, new: str, told: str) -> None:
    assert old in DOCKERFILE
    assert any(told in fault for fault in faults(DOCKERFILE.replace(old, new)))


def test_the_image_runs_the_program() -> None:
    last = {line.word: line.rest for line in last_stage(parse(DOCKERFILE))}
    assert json.loads(last["ENTRYPOINT"]) == ENTRYPOINT
    assert json.loads(last["CMD"]) == CMD


def test_what_is_built_is_what_is_copied() -> None:
    """Every file that the wheel is made of is copied, and is not kept out by .dockerignore."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    about = [project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml"]
    needed = [*wheel["packages"], *wheel["force-include"], *about]
    copied = [word for line in parse(DOCKERFILE) if line.word == "COPY" for word in line.rest.split()[:-1]]
    for name in needed:
        assert any(name == word or name.startswith(f"{word}/") for word in copied), name
    patterns = [line for line in IGNORED.splitlines() if line and not line.startswith("#")]
    assert patterns[0] == "*", "what is not named does not come along"
    open_ = [pattern[1:] for pattern in patterns[1:] if pattern.startswith("!")]
    sources = [word for word in copied if not word.startswith(("/", "--", "$"))]
    assert len(sources) >= 7
    for name in sources:
        assert (ROOT / name).exists(), name
        assert any(fnmatch(name, pattern) for pattern in open_), name
    assert not [pattern for pattern in open_ if not any(fnmatch(name, pattern) for name in sources)]


def section(name: str) -> str:
    return re.split(r"^%\w+$", APPTAINER.partition(f"\n%{name}\n")[2], maxsplit=1, flags=re.M)[0]


def test_apptainer_adds_nothing_but_where_to_write() -> None:
    environment = variables(last_stage(parse(DOCKERFILE)), "ENV")
    in_cache = {name for name, value in environment.items() if value.startswith("/cache")}
    assert {*re.findall(r"export (\w+)=", section("environment"))} == in_cache
    head = APPTAINER.partition("\n%")[0]
    assert re.findall(r"^(\w+):", head, re.M) == ["Bootstrap", "From"]
    assert re.findall(r"^%(\w+)", APPTAINER, re.M) == ["environment", "runscript", "test"]
    assert f'exec {" ".join(ENTRYPOINT)} "$@"' in section("runscript")
    assert f"set -- {' '.join(CMD)}" in section("runscript")


def test_compose_runs_the_image_as_it_is() -> None:
    (service,) = COMPOSE["services"].values()
    assert not {"entrypoint", "command", "privileged"} & {*service}
    build = {"context": "..", "dockerfile": "docker/Dockerfile"}
    assert service["build"] == build and (ROOT / "docker" / ".." / build["dockerfile"]).is_file()
    own = [line.rest for line in last_stage(parse(DOCKERFILE)) if line.word == "USER"]
    assert service["user"] == f"${{DPO_USER:-{own[-1]}}}"
    for variable in service["environment"]:  # names alone: no value stands in the file
        assert re.fullmatch(r"[A-Z_]+", variable)
    environment = variables(last_stage(parse(DOCKERFILE)), "ENV")
    assert not {*service["environment"]} & {*environment}
    mounted = {volume.split(":")[1] for volume in service["volumes"]}
    assert mounted == {"/cache", "/work/runs"} and environment["XDG_CACHE_HOME"] == "/cache"
    assert service["read_only"] and service["cap_drop"] == ["ALL"]


def test_the_recipes_name_no_registry_but_the_base_image() -> None:
    for name in ("Dockerfile", "apptainer.def", "compose.yaml", "build.lock", "requirements.lock"):
        text = (ROOT / "docker" / name).read_text()
        assert "://" not in text, name
