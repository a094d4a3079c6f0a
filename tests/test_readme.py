"""What the README says is so: its commands run, its tree is the repository."""

import itertools
import re
import shlex
import subprocess

import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = [shlex.split(line, comments=True)[3:] for line in re.findall(r"^python -m dpo_lightning.*$", README, re.M)]
VERBS = ("export", "report", "compare", "check")


def test_there_are_commands():
    assert len(COMMANDS) >= 15
    assert README.split("\n\n")[1].lstrip().startswith("make demo")


@pytest.mark.parametrize("words", [c for c in COMMANDS if not c or c[0] not in VERBS], ids=" ".join)
def test_each_command_composes(words, cli, capsys):
    show = [] if "--cfg" in words else ["--cfg", "job"]
    words = [word for word in words if word != "--multirun"]
    words = [word.split(",")[0] for word in words]
    assert cli(*words, *show) == 0
    assert "run_dir:" in capsys.readouterr().out


def test_the_verbs_run(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = ["model=tiny", "logger=none", "callbacks=none", "samples.count=0", "trainer.max_steps=1"]
    for run in ("runs/mine", "runs/other"):
        assert cli(*tiny, f"run_dir={run}") == 0
    for words in (c for c in COMMANDS if c and c[0] in VERBS):
        assert cli(*words, *(["model=tiny"] if words[0] == "check" else [])) == 0, words


def test_a_sweep_runs_each_trial_in_a_folder_of_its_own(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = ["model=tiny", "logger=none", "callbacks=none", "samples.count=0", "trainer.max_steps=1"]
    assert cli("--multirun", "loss.beta=0.05,0.1", *tiny) == 0
    configs = sorted((tmp_path / "runs").glob("*/config.yaml"))
    assert [re.findall(r"beta: (\S+)", c.read_text())[0] for c in configs] == ["0.05", "0.1"]


def test_make_targets_exist():
    for target in re.findall(r"^    make (\w+)", README, re.M):
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_make_clean_leaves_what_was_trained():
    done = subprocess.run(["make", "-n", "clean"], cwd=ROOT, check=True, capture_output=True, text=True)
    assert "rm -rf .venv" in done.stdout and "runs" not in done.stdout


def expand(pattern):
    """conf/{a,b}.yaml -> conf/a.yaml, conf/b.yaml."""
    parts = [p.split(",") for p in re.split(r"[{}]", pattern)]
    return {"".join(choice) for choice in itertools.product(*parts)}


def test_the_tree_is_the_repository():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    block = README.split("## The house")[1].split("```\n")[1]
    folders, shown = [], set()
    for line in block.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders = [*folders[:depth], name]
        if not name.endswith("/"):
            shown |= expand("".join(folders))
    assert shown == set(tracked.stdout.split())
