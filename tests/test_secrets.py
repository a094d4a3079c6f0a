"""Secrets: no configuration takes one, and those of the environment are in nothing that a run leaves."""

import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dpo_lightning.cli.process import PRIVATE
from dpo_lightning.cli.secrets import NAMES, in_arguments, kind_of
from dpo_lightning.config import CONF, keys_of
from tests.ranks import environment, fault, run_ranks

HF = "hf_CANARY" + "a1B2c3D4" * 4
WANDB = "ca9a27" * 6 + "ca9a"
ENVIRONMENT = {"HF_TOKEN": HF, "WANDB_API_KEY": WANDB}
PARTS = (HF[:9], HF[-16:], WANDB[:20])  # neither whole nor cut short
MARK = "harmless-mark"
RUN = [
    "model=tiny", "logger=wandb", f"logger.tags=[{MARK}]", "callbacks=none", "samples.count=1",
    "samples.max_new_tokens=4", "trainer.precision=32-true", "trainer.accelerator=cpu", "trainer.max_steps=6",
    "trainer.limit_val_batches=1", "data.max_pairs=40", "data.max_length=160", "data.batch_size=4",
    "checkpoint.every_n_steps=2",
]  # fmt: skip


def contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of every file below a folder, and of what lies within an archive."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        yield name, file.read_bytes()
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                yield from ((f"{name}!{member}", archive.read(member)) for member in archive.namelist())


def found(folder: Path, text: str) -> list[str]:
    return [name for name, content in contents(folder) if text.encode() in name.encode() + content]


def test_no_secret_of_the_environment_is_left_anywhere(tmp_path):
    """Crash, resume and SIGTERM, resume and end, report, export: as trials of a W&B sweep, offline."""
    home, cache, run = tmp_path / "home", tmp_path / "cache", tmp_path / "run"
    home.mkdir()
    more = {**ENVIRONMENT, "HOME": str(home), "WANDB_SWEEP_ID": "sweep"}
    words = [*RUN, f"run_dir={run}"]
    crash = dict(word.removeprefix("env:").split("=", 1) for word in fault("at=step.end;do=raise;step=3"))
    crashed = subprocess.run(
        [sys.executable, "-m", "dpo_lightning", *words], env=environment(cache, **more, **crash), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=240,
    )  # fmt: skip
    assert crashed.returncode == 1, crashed.stdout
    assert "Traceback" in crashed.stdout
    runs = [
        [*words, *fault("at=step.end;do=SIGTERM;step=4")], words, ["report", f"run_dir={run}"],
        ["export", f"run_dir={run}", "export.merge=true"],
    ]  # fmt: skip
    outputs = run_ranks(runs, cache, world=1, code=[143, 0, 0, 0], **more)
    (tmp_path / "output").write_text(crashed.stdout + "".join(outputs))

    for part in PARTS:
        assert not found(tmp_path, part)
    marked = found(tmp_path, MARK)  # what a run does keep is found, wherever it is kept
    for kind in ("config.yaml", "/config.json", ".wandb"):
        assert any(name.endswith(kind) for name in marked), kind
    names = [name for name, _ in contents(tmp_path)]
    for kind in ("state.ckpt!", "adapter/", "model/", "report.html", "samples", "wandb/offline-run-", "output"):
        assert any(kind in name for name in names), kind


SCRIPT = """
import sys
if sys.argv[1] == "ours":
    from dpo_lightning.cli.process import prepare
    prepare(outlives=True)
import wandb
with wandb.init(dir=sys.argv[1], mode="offline", project="p"):
    print("printed-" + "mark")
"""


def test_wandb_is_not_given_code_git_state_or_console(tmp_path):
    """W&B by itself keeps all that; the environment that the command line sets keeps it from that."""

    def git(*words: str) -> str:
        command = ["git", "-c", "user.name=x", "-c", "user.email=x@x", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    (tmp_path / "script.py").write_text(SCRIPT)
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "x")
    env = {name: value for name, value in environment(tmp_path).items() if name not in PRIVATE}
    kept = {}
    for who in ("ours", "wandbs"):
        (tmp_path / who).mkdir()
        command = [sys.executable, "script.py", who]
        subprocess.run(command, cwd=tmp_path, env={**env, "WANDB_SAVE_CODE": "true"}, capture_output=True, check=True)
        assert list((tmp_path / who).glob("wandb/offline-run-*/*.wandb"))
        kept[who] = {text: bool(found(tmp_path / who, text)) for text in (git("rev-parse", "HEAD"), "printed-mark")}
    assert not any(kept["ours"].values())
    assert all(kept["wandbs"].values())


OF_OTHERS = {
    "AWS": "AKIA" + "ABCDEFGH23456789",
    "OpenAI": "sk-proj-" + "a1B2" * 6,
    "GitHub": "ghp_" + "a1B2" * 9,
    "GitHub's new": "github_pat_" + "a1B2" * 9,
    "HF": "hf_" + "a1B2" * 8,
    "W&B": "0123456789" * 4,
}
REFUSED = {
    **{f"a value like one of {whose}": [f"logger.entity={value}"] for whose, value in OF_OTHERS.items()},
    "in a list": [f"logger.tags=[a,{OF_OTHERS['W&B']}]"],
    "in a mapping": [f"+model.dimensions={{x: {OF_OTHERS['HF']}}}"],
    "that Hydra cannot parse": [f"logger.tags=[{OF_OTHERS['HF']}"],
    "in a path": [f"run_dir=runs/{OF_OTHERS['GitHub']}/x"],
    "that is the environment's": [f"run_dir=runs/{WANDB}"],
    "brought in from the environment": ["logger.entity='${oc.env:MINE}'"],
    "a key": ["+hub_token=kept-from-print"],
    "a nested key": ["++logger.api_key=kept-from-print"],
    "a key of Hydra's": ["+hydra.job.env_set.HF_TOKEN=kept-from-print"],
    "a password": ["+trainer.password=kept-from-print"],
    "a word alone": [OF_OTHERS["HF"]],
    "a word in a key's place": [f"{OF_OTHERS['HF']}=1"],
    "a flag": [f"--config-dir={OF_OTHERS['HF']}"],
    "to be printed": ["--cfg", "job", f"logger.entity={OF_OTHERS['HF']}"],
    "a value in a file": ["--config-dir", "own", "experiment=value"],
    "a key in a file": ["--config-dir", "own", "experiment=key"],
    "a key in a file, to be printed": ["--config-dir", "own", "experiment=key", "--cfg", "job"],
}


@pytest.mark.parametrize("words", REFUSED.values(), ids=REFUSED)
def test_a_secret_is_refused_and_not_repeated(words, cli, tmp_path, monkeypatch, capfd):
    own = tmp_path / "own" / "experiment"
    own.mkdir(parents=True)
    (own / "value.yaml").write_text(f"# @package _global_\nlogger:\n  tags: [a, {OF_OTHERS['HF']}]\n")
    (own / "key.yaml").write_text("# @package _global_\nwandb_api_key: kept-from-print\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINE", OF_OTHERS["GitHub"])
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    before = sorted(tmp_path.rglob("*"))
    assert cli(*words) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines()
    for line in err.splitlines():
        assert line.startswith("error: ")
        assert "environment" in line, "what to do instead"
    for secret in (*OF_OTHERS.values(), *ENVIRONMENT.values(), "kept-from-print"):
        assert secret not in err
    assert sorted(tmp_path.rglob("*")) == before


def test_the_key_is_named(cli, capsys):
    assert cli(f"logger.entity={OF_OTHERS['AWS']}", "+hub_token=x", OF_OTHERS["HF"]) == 2
    starts = sorted(line.partition(": ")[2].partition(": ")[0] for line in capsys.readouterr().err.splitlines())
    assert starts == ["an argument", "hub_token", "logger.entity"]


@pytest.mark.parametrize(
    "word",
    [
        "samples.max_new_tokens=4", "model.tokenizer=bytes", "+model.dimensions.pad_token_id=0",
        f"run_dir=runs/{OF_OTHERS['W&B']}/x", f"model.name=mine/model@{OF_OTHERS['W&B']}", "data.path=secrets.jsonl",
        "logger.name=task-3-of-the-whole-night-12", "logger.name=hf_small",
    ],
)  # fmt: skip
def test_what_only_sounds_like_a_secret_is_none(word):
    assert not list(in_arguments([word]))


def test_no_key_of_the_shipped_configuration_is_named_like_a_secret(cli, capsys):
    keys = [key for file in CONF.rglob("*.yaml") for key in keys_of(OmegaConf.load(file))]
    assert len(keys) > 100
    assert not [key for key in keys if NAMES.search(key)]
    assert cli("--cfg", "all", "model=tiny") == 0
    assert kind_of(capsys.readouterr().out) is None
