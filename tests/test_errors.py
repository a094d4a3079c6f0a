"""Every mistake of a user's: exit code 2, a line each that names key or row and the remedy, within seconds."""

import functools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal import hydra as hydra_runner
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import DictConfig, OmegaConf

from dpo_lightning import __main__ as cli
from dpo_lightning.config import CHECKS, CONF, check
from dpo_lightning.outputs import verbs
from dpo_lightning.types import UserError

ALWAYS = ("model=tiny", "logger=none", "run_dir=TMP/run")
SECONDS = 5
LONG = "n" * 300  # no file system takes a name of so many bytes
ROW = {"prompt": "Why?", "chosen": "Because of this.", "rejected": "No."}
ROWS = json.dumps(ROW) + "\n" + json.dumps({**ROW, "prompt": "How?"}) + "\n"
FILES = {
    "good.jsonl": ROWS,
    "empty.jsonl": "",
    "blank.jsonl": "\n\n",
    "none.json": "[]",
    "no_chosen.jsonl": ROWS + json.dumps({"prompt": "Why?", "choosen": "So.", "rejected": "No."}) + "\n",
    "broken.jsonl": ROWS + '{"prompt": "Why?", "chosen"\n',
    "equal.jsonl": json.dumps({**ROW, "chosen": "No."}) + "\n",
    "rows.txt": ROWS,
    "old/metrics.jsonl": '{"step": 1, "train/loss": 0.69}\n',
    "own/loss/stranger.yaml": "_target_: os.system\ncommand: touch TMP/pwned\n",
    "own/callbacks/stranger.yaml": "x:\n  _target_: pathlib.Path.unlink\n  self: TMP/victim\n",
    "own/full.yaml": "seed: 1\nloss: {beta: 0.2}\n",
    "own/loss/mine.yaml": "_target_: my_package.loss\n_partial_: true\nbeta: 0.1\n",
    "own/loss/typo.yaml": "defaults: [dpo]\nlabel_smothing: 0.1\n",
    "own/loss/broken.yaml": "defaults: [dpo\n",
    "own/data/mine.yaml": "defaults: [base]\npath: TMP/good.jsonl\n",
    "own/experiment/in_list.yaml": "# @package _global_\ntrainer:\n  profiler:\n  - _target_: os.system\n",
    "own/experiment/made.yaml": "# @package _global_\nseed: '${oc.create:\"{_target_: os.system}\"}'\n",
    "own/experiment/hydra_callback.yaml": "# @package _global_\nhydra: {callbacks: {x: {_target_: os.system}}}\n",
    "own/experiment/hydra_sweeper.yaml": "# @package _global_\nhydra: {sweeper: {params: {x: {_target_: a.b}}}}\n",
    "own/experiment/hydra_logging.yaml": (
        "# @package _global_\nhydra: {hydra_logging: {root: {handlers: [x]}, handlers: {x: {(): os.system}}}}\n"
    ),
    "victim": "",
}

# name: the arguments, and what must be said
CASES: dict[str, tuple[list[str], list[str]]] = {
    "unknown key": (["learning_rat=1"], ["unknown key learning_rat", "--cfg job"]),
    "unknown key, the group forgotten": (["beta=1"], ["unknown key beta", "did you mean loss.beta?"]),
    "nested unknown key": (["loss.betta=0.2"], ["unknown key loss.betta", "did you mean loss.beta?"]),
    "key of another option": (["loss=hinge", "loss.label_smoothing=0.1"], ["loss.label_smoothing", "choose another"]),
    "added unknown key": (["+sed=1"], ["unknown key sed", "did you mean seed?"]),
    "added unknown nested key": (["+optim.learning=1"], ["unknown key optim.learning", "nothing reads it"]),
    "added unknown trainer key": (["+trainer.max_step=1"], ["trainer.max_step", "did you mean trainer.max_steps?"]),
    "added key that train.py sets": (["+trainer.logger=false"], ["unknown key trainer.logger", "nothing reads it"]),
    "added key in a section": (["+export.merged=true"], ["unknown key export.merged", "did you mean export.merge?"]),
    "added key that is there": (["+loss.beta=0.2"], ["+loss.beta", "leave the + out"]),
    "added callback that is none": (["+callbacks.x=5"], ["callbacks.x has no _target_", "callbacks="]),
    "key taken away": (["~loss.beta"], ["loss.beta is missing", "give it a value"]),
    "group taken away": (["~loss"], ["loss is missing", "give it a value"]),
    "target taken away": (["~loss._target_"], ["loss has no _target_", "loss="]),
    "section made a number": (["checkpoint=5"], ["checkpoint=5", "must be a mapping with every_n_steps"]),
    "unknown option": (["loss=dpoo"], ["loss=dpoo: no such option", "did you mean dpo?", "hinge, ipo"]),
    "unknown experiment": (["experiment=x"], ["experiment=x: no such option", "gemma_fashion_dpo"]),
    "null for a group": (["lora=null"], ["lora=null", "lora=none"]),
    "several wrong values": (
        ["loss.beta=-1", "optim.lr=0", "data.batch_size=1.5", "+export.x=1"],
        ["loss.beta=-1: must be", "optim.lr=0: must be", "data.batch_size=1.5: must be", "unknown key export.x"],
    ),
    "dangling interpolation": (["run_dir='${nope}'"], ["run_dir", "'nope' not found"]),
    "dangling interpolation in a list": (["optim.betas=[0.9,'${nope}']"], ["optim.betas", "'nope' not found"]),
    "override without a value": (["checkk", "seed=1"], ["checkk", "key=value"]),
    "override without a key": (["=3"], ["=3", "lora=none"]),
    "bracket not closed": (["loss.beta=[1"], ["loss.beta=[1", "key=value", "quotes"]),
    "sweep without --multirun": (["loss.beta=0.1,0.2"], ["loss.beta=0.1,0.2", "--multirun"]),
    "mandatory value missing": (["model=hf"], ["model.name is not set", "give model.name="]),
    "data file not named": (["data=jsonl"], ["data.path is not set", "give data.path=FILE"]),
    "data set not named": (["data=hub"], ["is not set", "data.name=HUB_ID"]),
    "data file absent": (["data=jsonl", "data.path=TMP/no.jsonl"], ["data.path=TMP/no.jsonl: no such file", "give a"]),
    "validation file absent": (["data.val_path=TMP/no.jsonl"], ["data.val_path=TMP/no.jsonl: no such file", "give a"]),
    "shipped data set absent": (["data.path=shipped:fasion"], ["data.path=shipped:fasion", "explainer, fashion"]),
    "folder as data file": (["data=jsonl", "data.path=TMP/own"], ["data.path=TMP/own: a folder", "give a"]),
    "number as data file": (["data=jsonl", "data.path=5"], ["data.path=5: must be text"]),
    "file of unknown kind": (["data=jsonl", "data.path=TMP/rows.txt"], ["data.path=TMP/rows.txt", "give one of"]),
    "validation file of unknown kind": (["data.val_path=TMP/rows.txt"], ["data.val_path=TMP/rows.txt: unknown kind"]),
    "empty file": (["data=jsonl", "data.path=TMP/empty.jsonl"], ["empty.jsonl: no usable pair", "give rows"]),
    "blank lines alone": (["data=jsonl", "data.path=TMP/blank.jsonl"], ["blank.jsonl: no usable pair", "give rows"]),
    "zero rows": (["data=jsonl", "data.path=TMP/none.json"], ["none.json: no usable pair", "give rows"]),
    "equal sides alone": (
        ["data=jsonl", "data.path=TMP/equal.jsonl"],
        ["equal.jsonl: no usable pair (1 ", "give rows"],
    ),
    "row without chosen": (
        ["data=jsonl", "data.path=TMP/no_chosen.jsonl"],
        ["no_chosen.jsonl line 3: no 'chosen'", "found keys: prompt, choosen, rejected", "rename 'choosen'"],
    ),
    "row without chosen in validation": (
        ["data.val_path=TMP/no_chosen.jsonl"],
        ["no_chosen.jsonl line 3: no 'chosen'"],
    ),
    "broken JSON": (["data=jsonl", "data.path=TMP/broken.jsonl"], ["broken.jsonl line 3: not JSON", "mend or remove"]),
    "path and name": (["data.name=a/b"], ["data.path=shipped:explainer and data.name=a/b", "give one of them"]),
    "size of pretrained weights": (
        ["model=gemma2b", "model.dimensions.hidden_size=64", "+model.dimensions={layer_norm_eps: 1}"],
        [
            "model.dimensions.hidden_size=64 has no effect on pretrained weights: give model.init=random",
            "layer_norm_eps",
        ],
    ),
    "hub's keys with a file": (
        ["data.subset=x", "data.split=train", "data.val_split=test"],
        [
            "data.subset=x has no effect with data.path=shipped:explainer: leave",
            "data.split=train",
            "data.val_split=test",
        ],
    ),
    "share beside a validation file": (
        ["data.val_path=TMP/good.jsonl", "data.val_fraction=0.3"],
        ["data.val_fraction=0.3 has no effect with data.val_path=TMP/good.jsonl: leave it out"],
    ),
    "share beside a validation split": (
        ["data=hh_rlhf", "data.val_fraction=0.3"],
        ["data.val_fraction=0.3 has no effect with data.val_split=test: give data.val_split=null, too, or leave"],
    ),
    "validation of nothing": (
        ["data.val_fraction=0", "trainer.val_check_interval=0.5", "trainer.limit_val_batches=2"],
        ["trainer.val_check_interval=0.5 has no effect with data.val_fraction=0: leave", "trainer.limit_val_batches=2"],
    ),
    "home in quotes": (["run_dir='~/x'"], ["run_dir=~/x: ~ is no folder's name here; write it out"]),
    "checkpoint absent": (["resume=TMP/no"], ["resume=TMP/no: no such checkpoint", "auto or never"]),
    "not a checkpoint": (["resume=TMP/own"], ["resume=TMP/own: not a whole checkpoint", "give a folder like"]),
    "run folder taken": (["run_dir=TMP/old"], ["run_dir=TMP/old: holds a run", "choose another folder"]),
    "run folder is a file": (["run_dir=TMP/victim/x"], ["run_dir=TMP/victim/x", "choose another"]),
    "no adapter to turn off": (["lora=none", "reference=adapter_off"], ["reference=adapter_off", "lora=r16"]),
    "nothing to offload": (
        ["reference.offload=true"],
        ["reference.offload=true: not with reference=auto", "frozen_copy"],
    ),
    "no adapter to merge": (["lora=none", "export.merge=true"], ["export.merge=true", "leave it out"]),
    "no end": (["trainer.max_epochs=-1"], ["trainer.max_epochs=-1", "set one"]),
    "no architecture": (["model.architecture=null"], ["model.architecture=", "for instance llama"]),
    "wheel missing": (["model=smollm2", "model.name=wheel:no_such/x.gguf"], ["model.name=wheel:", "pip install"]),
    "dotted wheel missing": (
        ["model=smollm2", "model.name=wheel:no_such.at_all/x.gguf"],
        ["model.name=", "is missing"],
    ),
    "names too long to be looked at": (
        [f"run_dir=TMP/{LONG}", f"data.path=TMP/{LONG}.jsonl", f"data.val_path={LONG}/a.csv"],
        [
            f"run_dir=TMP/{LONG}: cannot be looked at (File name too long); check the path",
            f"data.path=TMP/{LONG}.jsonl: cannot be looked at",
            f"data.val_path={LONG}/a.csv: cannot be looked at",
        ],
    ),
    "checkpoint's name too long": ([f"resume=TMP/{LONG}"], [f"resume=TMP/{LONG}: cannot be looked at (File name too"]),
    "target on the command line": (["loss._target_=os.system"], ["loss._target_=os.system", "trusted_targets"]),
    "stranger's loss": (["loss=stranger"], ["loss._target_=os.system", "add it to trusted_targets"]),
    "stranger's callback": (["callbacks=stranger"], ["callbacks.x._target_=pathlib.Path.unlink", "trusted_targets"]),
    "target in a list": (["experiment=in_list"], ["trainer.profiler.0._target_=os.system", "trusted_targets"]),
    "target made by a resolver": (["experiment=made"], ["seed", "_target_=os.system", "trusted_targets"]),
    "target under hydra": (["experiment=hydra_callback"], ["hydra.callbacks.x._target_=os.system", "trusted_targets"]),
    "target in hydra's sweeper": (["experiment=hydra_sweeper"], ["hydra.sweeper.params.x._target_", "trusted_targets"]),
    "code in hydra's logging": (["experiment=hydra_logging"], ["hydra.hydra_logging", "leave hydra.hydra_logging out"]),
    "typo in an own YAML": (["loss=typo"], ["loss.label_smothing", "did you mean loss.label_smoothing?"]),
    "option added to one that is chosen": (["+lora=none"], ["+lora: there is such a key already", "leave the + out"]),
    "own YAML broken": (["loss=broken"], ["loss/broken.yaml", "line"]),
}
# These run as a user runs them, too, and must say the same.
REAL = ["nested unknown key", "unknown option", "several wrong values", "row without chosen", "stranger's callback"]


class WentOnError(Exception):
    """The command line found nothing wrong and would load the model's packages now."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.replace("TMP", str(tmp_path)))
    monkeypatch.setenv("DPO_LIGHTNING_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path


Main = Callable[..., str]


@pytest.fixture
def main(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Main:
    """The command line in this process: main(*arguments) -> what it wrote to stderr, once it has left with 2."""

    def went_on(cfg: DictConfig) -> None:
        raise WentOnError

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["dpo_lightning", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 2
        written = capsys.readouterr()
        assert written.out == ""
        return written.err

    monkeypatch.setattr(cli, "prefer_cache", went_on)
    monkeypatch.setattr(hydra_runner, "ConfigLoaderImpl", ConfigLoaderImpl)  # restored afterwards: main changes it
    monkeypatch.setattr(hydra_runner.Hydra, "get_mode", lambda *_, **__: None)  # composes everything a second time
    for name in ("HYDRA_FULL_ERROR", "TOKENIZERS_PARALLELISM", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")
    return run


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["trainer.max_steps=3"], "trainer.max_steps: the configuration has no trainer;"),
        (
            ["seed=2"],
            "the configuration has no callbacks, data, logger, lora, model, optim, reference, strategy, trainer;",
        ),
    ],
)
def test_an_own_file_that_builds_on_nothing_is_told_what_it_lacks(
    words: list[str], line: str, folder: Path, main: Main
) -> None:
    told = main("--config-dir", f"{folder}/own", "--config-name", "full", *words)
    assert told == f"error: {line} give the file of --config-name `defaults: [config, _self_]`\n"


def arguments_of(name: str, folder: Path) -> list[str]:
    given = ["--config-dir", "TMP/own", *ALWAYS, *CASES[name][0]]
    return [argument.replace("TMP", str(folder)) for argument in given]


def assert_told(stderr: str, mentions: list[str], folder: Path) -> None:
    lines = stderr.splitlines()
    assert lines
    assert all(line.startswith("error: ") for line in lines), stderr
    for mention in mentions:
        assert mention.replace("TMP", str(folder)) in stderr
    left = {path.name for path in folder.iterdir()} - {"cache"}
    assert left == {*(name.partition("/")[0] for name in FILES), "cwd"}, "a run folder was made, or a file removed"
    assert not list((folder / "cwd").iterdir())


@pytest.mark.parametrize("name", CASES)
def test_mistake_is_told(name: str, folder: Path, main: Main) -> None:
    start = time.monotonic()
    stderr = main(*arguments_of(name, folder))
    assert_told(stderr, CASES[name][1], folder)
    assert time.monotonic() - start < SECONDS


@pytest.mark.parametrize("name", REAL)
def test_a_process_of_its_own_says_the_same_within_seconds(name: str, folder: Path, main: Main) -> None:
    start = time.monotonic()
    result = command_line(*arguments_of(name, folder))
    seconds = time.monotonic() - start
    assert (result.returncode, result.stdout) == (2, "")
    assert_told(result.stderr, CASES[name][1], folder)
    assert result.stderr == main(*arguments_of(name, folder))
    assert seconds < SECONDS


def command_line(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dpo_lightning", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_what_only_tokenized_rows_can_tell(folder: Path, main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told after torch and its kin are imported, before a model is loaded."""
    monkeypatch.setattr(cli, "prefer_cache", lambda cfg: None)
    one = folder / "good.jsonl"
    one.write_text(json.dumps(ROW))
    stderr = main("model=tiny", "logger=none", f"run_dir={folder}/run", "data=jsonl", f"data.path={one}")
    assert_told(stderr, ["one prompt alone cannot be split", "add rows, give data.val_path=FILE"], folder)


@pytest.mark.parametrize("verb", ["trane", "tests"])
def test_unknown_verb(verb: str, folder: Path, main: Main) -> None:
    assert_told(main(verb, "seed=1"), [f"unknown verb {verb}", "train, check, submit, export, report, compare"], folder)


@pytest.mark.parametrize("verb", ["report", "compare", "export"])
def test_verbs_on_finished_runs(verb: str, folder: Path, main: Main) -> None:
    merge = ["export.merge=true"] if verb == "export" else []
    assert_told(main(verb, *merge), ["run_dir", "give"], folder)
    assert_told(main(verb, "run_dir=5", "+x=1"), ["run_dir=5: must be text", "unknown key x"], folder)
    lines = main(verb, *merge, f"run_dir={folder}/own", "seed=7").splitlines()
    assert lines[0].startswith(f"warning: seed=7 has no effect: {verb} reads run_dir")
    assert_told("\n".join(lines[1:]), [f"run_dir={folder}/own: no metrics.jsonl", "give"], folder)
    assert_told(main(verb, *merge, f"run_dir={LONG}"), [f"run_dir={LONG}: cannot be looked at (File name too"], folder)


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Path]:
    """A folder that this account may not look into; the superuser, whom nothing stops, is another one meanwhile."""
    folder, root = tmp_path / "closed", os.geteuid() == 0
    folder.mkdir(mode=0)
    if root:
        os.seteuid(65534)
    yield folder
    if root:
        os.seteuid(0)
    folder.chmod(0o700)


def test_a_closed_folder_is_told_by_each_key_that_leads_there(closed: Path) -> None:
    cfg = composed("model=tiny", f"run_dir={closed}/x", f"data.path={closed}/x.jsonl", f"data.val_path={closed}/y.csv")
    with pytest.raises(UserError) as refused:
        check(cfg)
    why = "cannot be looked at (Permission denied); check the path, or choose another"
    assert sorted(str(refused.value).splitlines()) == [
        f"data.path={closed}/x.jsonl: {why}", f"data.val_path={closed}/y.csv: {why}", f"run_dir={closed}/x: {why}",
    ]  # fmt: skip
    with pytest.raises(UserError, match=rf"^run_dir={closed}/x: cannot be looked at \(Permission denied\)"):
        verbs.run_folder({"run_dir": f"{closed}/x"})


@pytest.mark.parametrize("name", ["plots", "report.html"])
def test_a_report_that_cannot_be_written_is_told(name: str, folder: Path, main: Main) -> None:
    place = folder / "old" / name
    if name == "plots":  # a file where a folder is made, a folder where a file is written
        place.touch()
    else:
        place.mkdir()
    (line,) = main("report", f"run_dir={folder}/old").splitlines()
    assert line.startswith(f"error: run_dir={folder}/old: the report cannot be written ([Errno "), line
    assert str(place) in line and "; free space, or copy the run to a folder that may be written" in line


@pytest.mark.parametrize(
    ("adapter", "config"),
    [("{", "  precision: bf16-true"), ("{}", "  precision: bf16-true"), ('{"base_model_name_or_path": "a"}', "train"),
     ('{"base_model_name_or_path": "a"}', None)],
    ids=["cut adapter", "adapter without base", "cut config", "no config"],
)  # fmt: skip
def test_a_merge_that_cannot_know_base_or_dtype_is_refused(
    adapter: str, config: str | None, folder: Path, main: Main
) -> None:
    (folder / "old" / "adapter").mkdir()
    (folder / "old" / "adapter" / "adapter_config.json").write_text(adapter)
    if config is not None:
        (folder / "old" / "config.yaml").write_text(config)
    stderr = main("export", f"run_dir={folder}/old", "export.merge=true")
    assert_told(stderr, [f"run_dir={folder}/old: adapter_config.json or config.yaml is not whole ("], folder)


@pytest.mark.parametrize("verb", ["report", "compare"])
@pytest.mark.parametrize(
    ("line", "why"),
    [("{bad", "not a line of JSON"), ("[1]", "not a row with a step"), ('{"val/loss": 1}', "not a row with a step")],
)
def test_a_bad_line_among_the_metrics_is_named(line: str, why: str, verb: str, folder: Path, main: Main) -> None:
    file = folder / "old" / "metrics.jsonl"
    file.write_text(f'{{"step": 0, "val/loss": 1}}\n{line}\n{{"step": 1, "val/loss": 1}}\n{{"step": 2, "val')
    assert main(verb, f"run_dir={folder}/old") == f"error: {file}, line 2: {why}; remove it\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["loss=mine", "trusted_targets=[my_package.loss]"],
        ["data=mine"],
        ["experiment=in_list", "trusted_targets=[os.system]"],
        ["experiment=hydra_callback", "trusted_targets=[builtins.dict]", "hydra.callbacks.x._target_=builtins.dict"],
        ["~callbacks.progress"],
        ["+trainer.max_time='00:01:00:00'"],
        ["+trainer.max_time={hours: 1}", "+trainer.benchmark=true"],
    ],
    ids=" ".join,
)
@pytest.mark.filterwarnings("ignore:Callback dict.on_:UserWarning")
def test_what_is_right_goes_on(arguments: list[str], folder: Path, main: Main) -> None:
    given = [argument.replace("TMP", str(folder)) for argument in (*ALWAYS, "--config-dir", "TMP/own", *arguments)]
    with pytest.raises(WentOnError):
        main(*given)


# A value, or several, that the rule of each key refuses.
BAD: dict[str, list[object]] = {
    "seed": [-1, 2**32, 1.0, None, True],
    "run_dir": ["", 5],
    "resume": [None, " "],
    "resume_allow": [None, "loss", [5]],
    "checkpoint.every_n_steps": [0, "auto"],
    "checkpoint.keep_last": [0, 1.5],
    "skip_spikes": [0, -1, "six"],
    "cluster.hang_seconds": [0, 1e-9, 0.9, "long"],
    "cluster.slow_factor": [1, None],
    "cluster.max_restarts": [-1, 1.5],
    "optimized_metric": ["loss", None],
    "slurm.partition": ["a b", "gpu\n#SBATCH --exclusive"],
    "slurm.account": ["", "x;y"],
    "slurm.qos": ["$(id)"],
    "slurm.time": ["4h", "04:00:00 --exclusive"],
    "slurm.gpus_per_node": ["all", "a100:"],
    "slurm.cpus_per_task": [0, "all"],
    "slurm.mem": ["lots", "256 G"],
    "slurm.constraint": ["a b"],
    "slurm.container": ["image name", "a;b"],
    "slurm.extra": ["--exclusive", [5], ["--comment=a\nb"]],
    "slurm.dry_run": ["yes", None],
    "export.merge": ["yes", 1, None],
    "export.hub_id": [5],
    "samples.count": [-1, None],
    "samples.max_new_tokens": [0],
    "trusted_targets": [None, "os.system", [5]],
    "model.name": [None, 5],
    "model.base_model": [""],
    "model.note": [5],
    "model.init": ["scratch", None],
    "model.architecture": [5],
    "model.dimensions": [None, 5],
    "model.tokenizer": [""],
    "model.gradient_checkpointing": ["on"],
    "data.path": [5, ""],
    "data.val_path": [[1]],
    "data.name": [5],
    "data.subset": [""],
    "data.split": [None],
    "data.val_split": [5],
    "data.max_pairs": [0],
    "data.max_length": [7, None],
    "data.val_fraction": [1, -0.1, "none"],
    "data.template": ["chatml"],
    "data.layout": ["packed"],
    "data.batch_size": [0, 1.5, "auto"],
    "data.shuffle": [1],
    "lora.r": [0, "16"],
    "lora.lora_alpha": [0],
    "lora.lora_dropout": [1, -0.1],
    "lora.target_modules": [None, [], [5]],
    "reference.mode": ["off", None],
    "reference.offload": ["cpu", None],
    "loss.beta": [0, -0.1, "0.1", float("nan"), float("inf"), True],
    "loss.label_smoothing": [0.5, -0.1],
    "loss.sft_weight": [-1, None],
    "optim.lr": [0, "fast", None],
    "optim.betas": [[0.9], [0.9, 1], 0.9],
    "optim.eps": [0],
    "optim.weight_decay": [-0.1, None],
    "optim.schedule": ["step"],
    "optim.warmup_fraction": [1],
    "trainer.accelerator": ["tpu9"],
    "trainer.devices": [0, -2, "many", [], [0.5], None],
    "trainer.num_nodes": [0],
    "trainer.precision": ["fp8", 32],
    "trainer.max_epochs": [0, 1.5],
    "trainer.max_steps": [0, -2, None],
    "trainer.accumulate_grad_batches": [0],
    "trainer.gradient_clip_val": [-1],
    "trainer.log_every_n_steps": [0],
    "trainer.limit_train_batches": [0, 0.0, -1, 1.5],
    "trainer.limit_val_batches": [-1, None],
    "trainer.val_check_interval": [0, 0.0, 1.5],
    "trainer.num_sanity_val_steps": [-2],
    "trainer.deterministic": ["yes"],
    "trainer.max_time": [1, "00:01", "soon"],
    "trainer.benchmark": [3],
    "trainer.detect_anomaly": ["yes", None],
    "trainer.inference_mode": [1],
    "strategy.name": [None],
    "logger.project": [""],
    "logger.entity": [5],
    "logger.name": [""],
    "logger.tags": ["a", [5]],
}
# Options to choose for keys that the default configuration does not have.
NEEDS: dict[str, tuple[str, ...]] = {"loss.sft_weight": ("loss=rpo",)} | {
    f"trainer.{key}": (f"+trainer.{key}=null",) for key in ("max_time", "benchmark", "detect_anomaly", "inference_mode")
}


@functools.cache
def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides))


@pytest.mark.parametrize("key", CHECKS)
def test_bad_value_is_refused(key: str) -> None:
    for value in BAD[key]:
        cfg = composed(*NEEDS.get(key, ())).copy()
        OmegaConf.update(cfg, key, value, merge=False)
        with pytest.raises(UserError) as refused:
            check(cfg)
        lines = str(refused.value).splitlines()
        assert any(line.startswith(f"{key}=") and ": must be " in line for line in lines), lines


def test_help_and_version(cli, capsys) -> None:
    assert cli("--version") == 0
    assert re.fullmatch(r"dpo_lightning \d+\.\d+\.\d+\n", capsys.readouterr().out)
    assert cli("--help") == 0
    assert "export   run_dir=RUN export.merge=true" in capsys.readouterr().out


def test_ctrl_c_before_the_training_is_no_traceback(cli, capsys, monkeypatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dpo_lightning.__main__.check", interrupted)
    assert cli("model=tiny") == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("error", "line"), [(OSError(), "OSError"), (ValueError("so and so"), "so and so")])
def test_what_hydra_raises_is_told_even_without_a_text(
    error: Exception, line: str, main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hydra_runner.Hydra, "run", raiser(error))
    assert main(*ALWAYS) == f"error: {line}\n"


def test_a_failed_assertion_is_no_mistake_of_the_users(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hydra_runner.Hydra, "run", raiser(AssertionError()))
    with pytest.raises(AssertionError):
        main(*ALWAYS)


def raiser(error: Exception) -> Callable[..., None]:
    """Return a function that raises the error."""

    def raise_(*_: object, **__: object) -> None:
        raise error

    return raise_
