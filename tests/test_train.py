"""The command as a user runs it, from rows to an exported folder that other libraries load."""

import dataclasses
import gc
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dpo_lightning.cli.process import importing
from dpo_lightning.outputs import results, samples, verbs
from dpo_lightning.outputs.card import Card
from dpo_lightning.training.precision import frozen_dtype

TINY = ["model=tiny", "logger=none", "callbacks=none", "trainer.precision=32-true", "samples.count=0"]


def quick_start(folder):
    """Run the python block of a model card as printed; return what it prints."""
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[0]
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_leaves_what_it_promises(cli, metrics, tmp_path):
    run = tmp_path / "run"
    assert cli("model=tiny", "logger=csv", f"run_dir={run}", "trainer.max_steps=6", "samples.count=3", report=True) == 0
    rows = metrics(run)
    assert rows[0]["step"] == 0 and rows[0]["val/rewards/accuracies"] == 0.5
    assert rows[0]["val/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert [r["step"] for r in rows if "train/loss" in r] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["step"] == 6 and rows[-1]["val/loss"] < rows[0]["val/loss"]
    names = ("chosen", "rejected", "accuracies", "margins")
    assert {f"train/rewards/{n}" for n in names} | {"perf/pairs_per_second", "train/grad_norm"} <= rows[1].keys()
    assert rows[1]["perf/padding_fraction"] == 0 and 0 < rows[1]["perf/mfu"] < 1
    assert (run / "report.html").read_text().count("<img") == len(list((run / "plots").glob("*.png"))) >= 6
    samples = json.loads((run / "samples.json").read_text())
    assert len(samples) == 3 and all({"prompt", "reference", "policy"} == s.keys() for s in samples)
    assert (run / "csv" / "version_0" / "metrics.csv").exists() and "precision: " in (run / "config.yaml").read_text()
    assert "auto" not in re.findall(r"precision: (\S+)", (run / "config.yaml").read_text())
    files = {f.name for f in (run / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"} <= files
    assert not [f for f in files if f.endswith((".bin", ".pt"))]
    assert any(
        v.abs().max() > 0 for k, v in load_file(run / "adapter" / "adapter_model.safetensors").items() if "lora_B" in k
    )
    card = (run / "adapter" / "README.md").read_text()
    seen = "on 48 of the 153 preference pairs of `shipped:explainer`"
    for text in ("base_model:", "- dpo\n- lora\n- transformers\n- peft", "rafailov2023direct", seen):
        assert text in card
    quick_start(run / "adapter")
    run = run.rename(tmp_path / "moved")  # its adapter's card names the old place
    assert cli("export", f"run_dir={run}", "export.merge=true") == 0
    assert (run / "model" / "README.md").read_text().count(f'.from_pretrained("{run / "model"}")\n') == 2
    quick_start(run / "model")
    (precision,) = re.findall(r"precision: (\S+)", (run / "config.yaml").read_text())
    merged = load_file(run / "model" / "model.safetensors")
    assert {weight.dtype for weight in merged.values()} == {frozen_dtype(precision)}
    assert cli("report", f"run_dir={run}") == 0
    assert cli("compare", f"run_dir='{run},{run}'") == 0


def test_what_is_damaged_or_left_empty_hinders_no_report(tmp_path, capsys, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "val/loss": 0.7}\n')
    assert verbs.compare({"run_dir": f"{tmp_path}, "}) == 0
    samples.save([{"prompt": "Why?", "reference": "No.", "policy": "So."}], tmp_path)
    assert verbs.report({"run_dir": tmp_path}) == 0
    assert "<td>So.</td>" in (tmp_path / "report.html").read_text()
    for text in ('[{"prompt": "Wh', '[{"prompt": "Why?"}]', "5"):
        (tmp_path / "samples.json").write_text(text)
        assert verbs.report({"run_dir": tmp_path}) == 0
        assert f"warning: {tmp_path / 'samples.json'} is not whole (" in capsys.readouterr().err
        assert "Answers" not in (tmp_path / "report.html").read_text()
    monkeypatch.setattr(Path, "replace", lambda *_: None)  # killed before that
    samples.save([], tmp_path)
    assert (tmp_path / "samples.json").read_text() == "5"


def test_a_validation_that_lacks_a_metric_is_shown_without_it(cli, tmp_path, capsys):
    first, last = {"step": 0, "val/loss": 0.7}, {"step": 6, "val/loss": 0.5, "val/rewards/margins": 0.25}
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(first)}\n{json.dumps(last)}\n")
    assert cli("report", f"run_dir={tmp_path}") == 0
    rows = [re.findall("<td>(.*?)</td>", row) for row in (tmp_path / "report.html").read_text().split("<tr>")[2:]]
    assert rows == [["loss", "0.7000", "0.5000"], ["reward margin", "-", "0.2500"]]
    capsys.readouterr()
    results.show_gain(tmp_path)
    shown = [line.split() for line in capsys.readouterr().out.replace("│", " ").splitlines()]
    assert ["loss", "0.7000", "0.5000"] in shown and ["reward", "margin", "-", "0.2500"] in shown
    assert not [line for line in shown if "accuracy" in line]
    nothing: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(Card))
    card = Card(**{**nothing, "validations": [first, last]})._result().splitlines()
    assert card[2:] == ["| loss | 0.7000 | 0.5000 |", "| reward margin | - | 0.2500 |"]
    alone = Card(**{**nothing, "validations": [last]})._result().splitlines()
    assert alone == ["| held-out pairs | step 6 |", "| --- | --- |", "| loss | 0.5000 |", "| reward margin | 0.2500 |"]


@pytest.mark.parametrize(("experiment", "folder"), [("gemma_fashion_dpo", "adapter"), ("llama_explainer_dpo", "model")])
def test_the_two_published_models_at_reduced_size(experiment, folder, cli, tmp_path):
    from transformers import pipeline

    run = tmp_path / experiment
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1}
    dimensions = [f"model.dimensions.{key}={value}" for key, value in {**small, **heads}.items()]
    words = [f"experiment={experiment}", "model.init=random", *dimensions, "trainer.max_steps=2"]
    assert cli(*words, "logger=none", "callbacks=none", "samples.count=1", f"run_dir={run}") == 0
    assert not (run / ({"adapter", "model"} - {folder}).pop()).exists()
    generate = pipeline("text-generation", model=str(run / folder))
    out = generate([{"role": "user", "content": "What to wear?"}], max_new_tokens=4, do_sample=False)
    assert out[0]["generated_text"][-1]["role"] == "assistant"


def test_full_fine_tuning_exports_the_trained_weights(cli, tmp_path):
    from transformers import AutoModelForCausalLM

    run = tmp_path / "full"
    assert cli(*TINY, "lora=none", "optim.lr=1e-3", "trainer.max_steps=2", f"run_dir={run}") == 0
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert model.config.use_cache and model.config._attn_implementation == "sdpa"
    assert "dpo" not in (run / "model" / "config.json").read_text()
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_exported_and_reloaded_gives_the_logged_logps(cli, metrics, tmp_path, cache, monkeypatch):
    """The adapter on disk, scored by the validation before a further step, equals the trained policy."""
    run, again = tmp_path / "one", tmp_path / "merged"
    assert cli(*TINY, "trainer.max_steps=3", "export.merge=true", f"run_dir={run}") == 0
    model = ["model=hf", f"model.name={run / 'model'}"]
    assert cli(*model, *TINY[1:], "trainer.max_steps=1", f"run_dir={again}") == 0
    trained, reloaded = metrics(run)[-1], metrics(again)[0]
    for side in ("chosen", "rejected"):
        assert reloaded[f"val/logps/{side}"] == pytest.approx(trained[f"val/logps/{side}"], rel=1e-5)


RESUMABLE = [
    *TINY, "trainer.max_epochs=2", "data.max_pairs=60", "data.batch_size=4", "trainer.accumulate_grad_batches=2",
    "lora.lora_dropout=0.1", "checkpoint.every_n_steps=4", "checkpoint.keep_last=null",
]  # fmt: skip


def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(cli, metrics, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert cli(*RESUMABLE, f"run_dir={whole}") == 0
    (resumed / "checkpoints").mkdir(parents=True)
    (whole / "checkpoints" / "step-00000004").rename(resumed / "checkpoints" / "step-00000004")
    # as a killed run leaves it: two steps further than its last checkpoint
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (resumed / "metrics.jsonl").write_text("".join(lines[:7]))
    assert cli(*RESUMABLE, f"run_dir={resumed}") == 0

    def deterministic(run):
        return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in metrics(run)]

    assert deterministic(resumed) == deterministic(whole)
    files = [run / "adapter" / "adapter_model.safetensors" for run in (whole, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_checkpoint_that_is_not_whole_is_passed_over(cli, tmp_path, capsys):
    run = tmp_path / "run"
    assert cli(*RESUMABLE, "trainer.max_steps=8", f"run_dir={run}") == 0
    state = run / "checkpoints" / "step-00000008" / "state.ckpt"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    assert cli(*RESUMABLE, "trainer.max_steps=9", f"run_dir={run}") == 0
    assert "skipping" in capsys.readouterr().out


def wait_for_a_step(run):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (
        not (run / "metrics.jsonl").exists() or "train/loss" not in (run / "metrics.jsonl").read_text()
    ):
        time.sleep(0.2)


# A locale that knows no letter beyond English: neither the bar's nor the answers' may end the run.
ASCII = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(("number", "code", "locale"), [(signal.SIGINT, 130, {}), (signal.SIGTERM, 143, ASCII)])
def test_a_signal_saves_and_exports_what_there_is(number, code, locale, tmp_path, cache):
    run = tmp_path / "run"
    words = [*TINY, "trainer.max_epochs=1000", f"run_dir={run}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dpo_lightning", *words], text=True,
        env={**os.environ, **locale, "DPO_LIGHTNING_CACHE": str(cache)}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    wait_for_a_step(run)
    process.send_signal(number)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == code, out
    assert "Traceback" not in out
    assert (run / "adapter" / "adapter_model.safetensors").exists()
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert {f.name for f in checkpoint.iterdir()} == {"state.ckpt", "config.json", "manifest.json"}


def started(words, cache, **options):
    """Start a run as a user does; what it tells goes into a pipe."""
    return subprocess.Popen(
        [sys.executable, "-m", "dpo_lightning", *words], env={**os.environ, "DPO_LIGHTNING_CACHE": str(cache)},
        stderr=subprocess.STDOUT, **options,
    )  # fmt: skip


def test_a_reader_that_has_read_enough_ends_no_run(tmp_path, cache, metrics):
    run = tmp_path / "run"
    words = ["model=tiny", "logger=none", "samples.count=1", "trainer.max_steps=2", f"run_dir={run}"]
    process = started(words, cache, stdout=subprocess.PIPE)  # as in `| head -1`
    assert process.stdout and process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=240) == 0
    assert (run / "adapter" / "adapter_model.safetensors").exists()
    assert [row["step"] for row in metrics(run) if "train/loss" in row] == [1, 2]


def test_a_log_on_a_full_disk_ends_no_run(tmp_path, cache):
    words = ["model=tiny", "logger=none", "samples.count=0", "trainer.max_steps=1", f"run_dir={tmp_path / 'run'}"]
    with open("/dev/full", "w") as log:
        assert started(words, cache, stdout=log).wait(timeout=240) == 0
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


def test_ctrl_c_saves_and_exports_though_it_has_ended_the_tee_that_reads(tmp_path, cache):
    run = tmp_path / "run"
    words = ["model=tiny", "logger=none", "samples.count=0", "trainer.max_epochs=1000", f"run_dir={run}"]
    heeds = ["env", "--default-signal=INT"]  # which a suite in the background ignores
    tee = subprocess.Popen([*heeds, "tee", str(tmp_path / "log")], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    process = started(words, cache, stdout=tee.stdin)
    assert tee.stdin
    tee.stdin.close()
    wait_for_a_step(run)
    for each in (tee, process):  # as a terminal signals all of a pipeline
        each.send_signal(signal.SIGINT)
    assert (tee.wait(), process.wait(timeout=240)) == (-signal.SIGINT, 130)
    assert (run / "adapter" / "adapter_model.safetensors").exists()
    assert len([*(run / "checkpoints").iterdir()]) == 1
    assert "run folder" in (tmp_path / "log").read_text()


def test_wandb_is_offline_without_a_key_and_never_stops_a_run(cli, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    run = tmp_path / "run"
    assert cli(*TINY, "logger=wandb", "trainer.max_steps=1", f"run_dir={run}") == 0
    assert list(run.glob("wandb/offline-run-*/*.wandb"))

    def broken(*args, **kwargs):
        raise RuntimeError("no service")

    monkeypatch.setattr("wandb.init", broken)
    other = tmp_path / "other"
    assert cli(*TINY, "logger=wandb", "trainer.max_steps=1", f"run_dir={other}") == 0
    assert (other / "adapter").is_dir()


def test_check_loads_no_model_and_leaves_nothing(cli, tmp_path, monkeypatch, capsys):
    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("dpo_lightning.model.source.AutoModelForCausalLM.from_pretrained", load)
    monkeypatch.chdir(tmp_path)
    assert cli("check", "model=tiny", "data=fashion") == 0
    assert "shipped:fashion" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_what_the_trainer_refuses_leaves_no_folder(cli, tmp_path, capsys):
    run = tmp_path / "run"
    assert cli(*TINY, "trainer.accelerator=gpu", f"run_dir={run}") == 2
    assert "error: trainer: No supported gpu backend found" in capsys.readouterr().err
    assert not run.exists()


def test_validation_prompts_that_are_trained_on_are_counted(cli, tmp_path, capsys):
    assert cli("check", "model=tiny", "data.val_path=shipped:explainer") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "180 training pairs, 180 held out" in out
    assert "180 validation pairs have a prompt that is trained on" in out


def test_a_validation_file_is_taken_whole_and_counted(cli, tmp_path, capsys):
    row = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    rows = [*({**row, "prompt": f"Why {n}?", "chosen": "So. " * 10 * n} for n in (1, 2, 3)), {**row, "chosen": " "}]
    file = tmp_path / "val.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    words = ["data.max_pairs=2", "data.max_length=100", f"data.val_path={file}"]
    assert cli("check", "model=tiny", *words) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "2 training pairs, 3 held out" in out
    assert "val.jsonl: 3 pairs; 1 of 4 rows left out: 1 empty completion" in out
    assert out.count("tokens on average; longest sequence 100, ") == 2
    assert "longest sequence 100, 2 pairs cut to data.max_length=100" in out


@pytest.mark.parametrize("reference", ["cached", "adapter_off"])
def test_without_held_out_pairs_all_are_trained_on(reference, cli, metrics, tmp_path, capsys):
    row = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    file, run = tmp_path / "one.jsonl", tmp_path / "run"
    file.write_text(json.dumps(row))
    words = ["data.val_fraction=0", f"data.path={file}", f"reference={reference}", "samples.count=1"]
    given = [word for word in TINY if not word.startswith("samples")]
    assert cli(*given, *words, "trainer.max_epochs=2", f"run_dir={run}", report=True) == 0
    assert "1 training pairs, 0 held out" in " ".join(capsys.readouterr().out.split())
    rows = metrics(run)
    assert [row["step"] for row in rows] == [1, 2] and not any("val/loss" in row for row in rows)
    assert json.loads((run / "samples.json").read_text())[0]["prompt"] == "Why?"
    assert "No validation was run." in (run / "adapter" / "README.md").read_text()
    assert (run / "report.html").is_file()


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_every_accepted_precision_trains(precision, cli, metrics, tmp_path):
    words = [word for word in TINY if not word.startswith("trainer.precision")]
    assert cli(*words, f"trainer.precision={precision}", "trainer.max_steps=2", f"run_dir={tmp_path}") == 0
    assert metrics(tmp_path)[1]["train/loss"] == pytest.approx(math.log(2), abs=5e-3)


def test_text_that_looks_like_markup_is_shown_as_it_is(capsys):
    from dpo_lightning.outputs.samples import show

    show([{"prompt": "[/INST]", "reference": "[bold]a[/b]", "policy": "[red]"}])
    out = capsys.readouterr().out
    assert "[/INST]" in out and "[bold]a[/b]" in out and "[red]" in out


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_a_failure_in_the_answers_does_not_lose_the_training(kind, merge, cli, tmp_path, monkeypatch, capsys):
    run, made = tmp_path / "run", []
    folder = run / ("model" if merge else "adapter")

    def fail(*args):
        made.append(folder.exists())
        raise kind("no\nmemory")

    monkeypatch.setattr("dpo_lightning.outputs.samples.generate", fail)
    words = [f"export.merge={str(merge).lower()}", "samples.count=1", "trainer.max_steps=1"]
    assert cli(*TINY, *words, f"run_dir={run}") == 0
    assert list(folder.glob("*.safetensors")) and made == [not merge]  # what can come first comes first
    told = capsys.readouterr()
    if kind is KeyboardInterrupt:
        assert "the answers are skipped" in told.out
    else:
        assert "warning: the run ends without answers to prompts: OutOfMemoryError: no memory" in told.err
    assert json.loads((run / "starts.jsonl").read_text().splitlines()[-1])["end"] == 0


def test_neither_table_nor_card_nor_report_is_worth_the_training(cli, tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results, "validations", fail)
    monkeypatch.setattr("dpo_lightning.outputs.report.plot", fail)
    run = tmp_path / "run"
    assert cli(*TINY, "trainer.max_steps=1", f"run_dir={run}", report=True) == 0
    assert "What was measured cannot be read." in (run / "adapter" / "README.md").read_text()
    told = capsys.readouterr()
    missing = ("its result in the model card", "a table of what was gained", "a report")
    warnings = [
        f"warning: the run ends without {what}: OSError: [Errno 28] No space left on device" for what in missing
    ]
    assert [line for line in told.err.splitlines() if line.startswith("warning: the run")] == warnings
    assert f"adapter: {run / 'adapter'}" in told.out and "report: " not in told.out
    assert f"metrics: {run / 'metrics.jsonl'}" in told.out


@pytest.mark.parametrize(
    ("words", "first_loss"),
    [
        (["loss=sigmoid", "reference=frozen_copy"], math.log(2)),
        (["loss=robust"], math.log(2)),
        (["loss=ipo", "loss.beta=0.2"], 1 / 0.4**2),
        (["loss=hinge"], 1.0),
        (["loss=sigmoid_norm"], math.log(2)),
        (["loss=rpo", "loss.sft_weight=0"], math.log(2)),
        (["loss=apo_zero"], 1.0),
        (["loss=apo_down"], 1.0),
    ],
)
def test_the_loss_and_reference_that_are_named_are_the_ones_that_run(words, first_loss, cli, metrics, tmp_path, capsys):
    assert cli(*TINY, *words, "trainer.max_steps=1", f"run_dir={tmp_path}") == 0
    assert metrics(tmp_path)[1]["train/loss"] == pytest.approx(first_loss, abs=1e-5)
    reference = "frozen_copy" if "reference=frozen_copy" in words else "adapter_off"
    assert re.search(rf"reference +{reference}", capsys.readouterr().out)


def test_resume_takes_a_path_and_never_starts_anew(cli, metrics, tmp_path, capsys):
    run, branch = tmp_path / "run", tmp_path / "branch"
    assert cli(*RESUMABLE, "trainer.max_steps=5", f"run_dir={run}") == 0
    state = run / "checkpoints" / "step-00000004"
    assert cli(*RESUMABLE, f"resume={state}", "trainer.max_steps=6", f"run_dir={branch}") == 0
    assert "resumed from step 4" in " ".join(capsys.readouterr().out.split())
    assert [row["step"] for row in metrics(branch) if "train/loss" in row] == [5, 6]
    assert cli(*RESUMABLE, "resume=never", f"run_dir={run}") == 2
    assert "holds a run" in capsys.readouterr().err


def test_a_run_that_is_past_max_steps_says_that_nothing_is_trained(cli, metrics, tmp_path, capsys):
    for steps in (3, 5):
        assert cli(*RESUMABLE, f"trainer.max_steps={steps}", f"run_dir={tmp_path}") == 0
        assert "nothing is left to train" not in capsys.readouterr().out
    validated = [row["step"] for row in metrics(tmp_path) if "val/loss" in row]
    for steps in (5, 2):
        assert cli(*RESUMABLE, f"trainer.max_steps={steps}", f"run_dir={tmp_path}") == 0
        line = f"nothing is left to train: the checkpoint is of step 5, trainer.max_steps={steps}"
        assert line in capsys.readouterr().out.splitlines()
    assert [row["step"] for row in metrics(tmp_path) if "train/loss" in row] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in metrics(tmp_path) if "val/loss" in row] == validated, "nor is it validated again"


def test_a_run_that_is_past_max_epochs_says_that_nothing_is_trained(cli, metrics, tmp_path, capsys):
    assert cli(*RESUMABLE, f"run_dir={tmp_path}") == 0
    assert "nothing is left to train" not in capsys.readouterr().out
    adapter = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    for epochs in (2, 1):
        assert cli(*RESUMABLE, f"trainer.max_epochs={epochs}", f"run_dir={tmp_path}") == 0
        line = f"nothing is left to train: the checkpoint is of epoch 2, trainer.max_epochs={epochs}"
        assert line in capsys.readouterr().out.splitlines()
    assert [row["step"] for row in metrics(tmp_path) if "train/loss" in row] == [*range(1, 15)]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


def test_a_run_stopped_before_its_first_step_can_be_started_again(cli, metrics, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 0, "val/loss": 0.69}\n')
    assert cli(*TINY, "trainer.max_steps=1", f"run_dir={run}") == 0
    assert [row["step"] for row in metrics(run)] == [0, 1, 1]


def test_the_last_steps_are_logged_and_validated_whatever_the_intervals(cli, metrics, tmp_path):
    words = ["trainer.log_every_n_steps=2", "trainer.num_sanity_val_steps=0", "trainer.max_steps=3"]
    assert cli(*TINY, *words, f"run_dir={tmp_path}") == 0
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows if "train/loss" in row] == [2, 3]
    assert [row["step"] for row in rows if "val/loss" in row] == [3]


def test_an_epoch_that_ends_within_a_logging_interval_is_logged_after_its_validation(cli, metrics, tmp_path):
    words = ["trainer.log_every_n_steps=4", "data.max_pairs=24", "data.batch_size=4", "data.layout=padded"]
    assert cli(*TINY, *words, f"run_dir={tmp_path}") == 0
    logged = [row for row in metrics(tmp_path) if "train/loss" in row]
    assert [row["step"] for row in logged] == [4, 5]
    for row in logged:
        assert (
            1 < row["perf/pairs_per_second"] < 1e5 and 0 < row["perf/mfu"] < 1 and 0 < row["perf/padding_fraction"] < 1
        )


def test_the_card_tells_what_was_done(cli, tmp_path):
    words = ["export.hub_id=somebody/plain-talker", "data.batch_size=4", "trainer.accumulate_grad_batches=2"]
    assert cli(*TINY, *words, "data.template=plain", "trainer.max_steps=2", f"run_dir={tmp_path}") == 0
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "# plain-talker" in card and 'from_pretrained("somebody/plain-talker")' in card
    assert "| pairs per step | 8 |" in card and "| steps | 2 |" in card
    assert "apply_chat_template" not in card and "huggingface.co/tiny" not in card


def test_messages_are_a_chat_whatever_the_template_of_text(cli, tmp_path, capsys):
    rows = [{"prompt": [{"role": "user", "content": f"Q{i}"}], "chosen": "yes", "rejected": "no"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["data=jsonl", f"data.path={tmp_path / 'rows.jsonl'}", "data.template=plain"]
    assert cli("check", "model=tiny", *words) == 0
    assert "held out, chat template" in " ".join(capsys.readouterr().out.split())


def test_the_search_for_garbage_rests_while_the_training_is_imported_and_no_longer(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    frozen = gc.get_freeze_count()
    try:
        with pytest.raises(ImportError), importing():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() and gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()
