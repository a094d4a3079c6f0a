"""sweep=beta_lr: Optuna searches without any account, one trial after the other, and all share one reference."""

import contextlib
import json
import sqlite3

import pytest
import yaml
from omegaconf import OmegaConf

from dpo_lightning import __main__ as program
from dpo_lightning.cluster.exits import RankLost, WrongNumbers
from dpo_lightning.config import run_dir_of
from dpo_lightning.types import UserError

WORDS = [
    "model=tiny", "logger=none", "callbacks=none", "samples.count=0", "trainer.precision=32-true",
    "data.max_length=448", "data.max_pairs=40", "data.batch_size=8", "trainer.max_steps=2",
    "trainer.num_sanity_val_steps=0",
]  # fmt: skip


@pytest.fixture
def cache(tmp_path):
    """A cache of the test's own."""
    return tmp_path / "cache"


def last(file):
    return [row for row in map(json.loads, file.read_text().splitlines()) if "val/loss" in row][-1]


def test_every_value_of_a_grid_is_judged_before_the_first_trial(cli, capsys, tmp_path):
    wrong = ["loss.beta=0.1,-2", "lora.r=8,0", "trainer.max_epochs=1"]
    assert cli("--multirun", *WORDS, *wrong, f"run_dir={tmp_path / 'grid'}") == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert told == ["error: loss.beta=-2: must be a number above 0", "error: lora.r=0: must be a whole number above 0"]
    assert not (tmp_path / "grid").exists()


@pytest.mark.parametrize("nothing", ["data.val_fraction=0", "trainer.limit_val_batches=0"])
def test_a_search_whose_metric_nothing_measures_is_refused(nothing, cli, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli("sweep=beta_lr", *WORDS, nothing) == 2 and not [*tmp_path.glob("runs/*/metrics.jsonl")]
    assert f"{nothing}: a search goes by val/rewards/accuracies" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "metric", "better"),
    [([], "val/rewards/accuracies", max),
     (["optimized_metric=val/loss", "hydra.sweeper.direction=minimize", "loss=dpo"], "val/loss", min)],
)  # fmt: skip
def test_optuna_is_given_the_metric_and_every_pair_is_computed_once(
    words, metric, better, cli, capfd, tmp_path, monkeypatch
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    words = ["hydra.sweeper.n_trials=2", "hydra.sweeper.sampler.seed=42", *words]
    assert cli("sweep=beta_lr", *words, *WORDS) == 0
    told = [line.split() for line in capfd.readouterr().out.splitlines() if line.startswith("reference: ")]
    computed = [int(line[1]) for line in told]
    assert computed[0] > 0 and computed[1:] == [0], "the first trial computes all that any needs"
    found = yaml.safe_load((tmp_path / "runs" / "optimization_results.yaml").read_text())
    runs = sorted((tmp_path / "runs").glob("*/metrics.jsonl"))
    assert len(runs) == 2
    values = [last(run)[metric] for run in runs]
    assert found["best_value"] == better(values)
    configs = [yaml.safe_load((run.parent / "config.yaml").read_text()) for run in runs]
    assert len({config["optim"]["lr"] for config in configs}) == 2
    for config in configs:
        assert 1e-5 <= config["optim"]["lr"] <= 1e-3 and 0.02 <= config["loss"]["beta"] <= 0.5
        assert config["loss"]["label_smoothing"] in (0.0, 0.1, 0.2) and config["reference"]["mode"] == "cached"
    best = configs[values.index(better(values))]
    assert found["best_params"]["optim.lr"] == best["optim"]["lr"]


def test_a_later_start_goes_on_with_the_search_and_repeats_no_trial(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        words = ["hydra.sweeper.n_trials=1", "hydra.sweeper.storage=sqlite:///beta_lr.db", "trainer.max_steps=1"]
        assert cli("sweep=beta_lr", *WORDS, *words) == 0
    with contextlib.closing(sqlite3.connect("beta_lr.db")) as storage:
        assert storage.execute("SELECT study_name FROM studies").fetchall() == [("beta_lr",)]
        assert storage.execute("SELECT number, state FROM trials").fetchall() == [(0, "COMPLETE"), (1, "COMPLETE")]
        rates = storage.execute("SELECT param_value FROM trial_params WHERE param_name = 'optim.lr'").fetchall()
    assert len(rates) == len({*rates}) == 2


def test_each_trial_has_a_folder_of_its_own_in_run_dir(cli, tmp_path, monkeypatch):
    begun = []

    def train(cfg, run_dir, resume, sweep):
        begun.append((run_dir, cfg.loss.beta, sweep))
        return 3

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dpo_lightning.train.train", train)
    cli("--multirun", "loss.beta=0.1,0.2", "run_dir=mine", *WORDS)
    assert begun == [(tmp_path / "mine" / "0", 0.1, True), (tmp_path / "mine" / "1", 0.2, True)]
    begun.clear()
    cli("sweep=beta_lr", "hydra.sweeper.n_trials=2", "run_dir=mine", *WORDS)
    assert [run_dir for run_dir, *_ in begun] == [tmp_path / "mine" / "0", tmp_path / "mine" / "1"]
    begun.clear()
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")  # whose trials are processes of their own
    cli("run_dir=mine", *WORDS)
    assert [(run_dir, sweep) for run_dir, _, sweep in begun] == [(tmp_path / "mine", True)]


def test_a_trial_on_a_strategy_of_several_devices_has_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DPO_LIGHTNING_RUN_DIR", raising=False)
    cfg = OmegaConf.create({"run_dir": None})
    first = run_dir_of(cfg, 0)
    monkeypatch.setenv("LOCAL_RANK", "0")  # as Lightning leaves it, of ddp with one device
    assert run_dir_of(cfg, 1) != first
    assert run_dir_of(cfg) == run_dir_of(cfg), "a rank's is that of the process that has started it"


def test_a_sweep_of_which_every_trial_diverges_says_so(cli, capfd, tmp_path, monkeypatch):
    def diverge(verb, cfg):
        raise WrongNumbers("nan")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(program, "run", diverge)
    assert cli("sweep=beta_lr", "hydra.sweeper.n_trials=2", *WORDS) == 3
    assert "error: each of the 2 trials has diverged" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("outcome", "code"),
    [((0, 0.5), None), ((143, None), 143), (WrongNumbers("nan"), None), (RankLost("gone"), 4), (UserError("no"), 2)],
)
def test_a_sweep_goes_on_after_a_trial_that_diverges_and_after_nothing_else(outcome, code, monkeypatch):
    def run(verb, cfg):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    codes = []
    monkeypatch.setattr(program, "run", run)
    if code is not None:
        with pytest.raises(SystemExit) as left:
            program.attempt("train", None, codes)  # type: ignore[arg-type]
        assert left.value.code == code
    else:
        reached = program.attempt("train", None, codes)  # type: ignore[arg-type]
        assert (reached, codes) == ((None, [3]) if isinstance(outcome, Exception) else (0.5, [0]))
