"""The wheel: built from the sdist, installed elsewhere, and used from another folder."""

import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD = ("-m", "build", "--no-isolation", "--outdir")  # first the sdist, then the wheel from what the sdist holds
INSTALL = ("-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--no-index", "--target")


def python(*arguments: str | Path, cwd: Path = ROOT, path: Path = ROOT, cache: Path | None = None) -> str:
    environment = {**os.environ, "PYTHONPATH": str(path), "DPO_LIGHTNING_CACHE": str(cache)}
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    python(*BUILD, folder, ROOT)
    assert [file.suffixes[-2:] for file in folder.glob("*.gz")] == [[".tar", ".gz"]]
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    python(*INSTALL, target, wheel)
    return target


def test_wheel_holds_code_conf_and_data(wheel: Path) -> None:
    conf = {f"dpo_lightning/{file.relative_to(ROOT).as_posix()}" for file in ROOT.glob("conf/**/*.yaml")}
    package = ROOT / "dpo_lightning"
    code = {file.relative_to(ROOT).as_posix() for file in package.rglob("*.py")}
    shipped = {file.relative_to(ROOT).as_posix() for file in package.glob("data/shipped/*.jsonl")}
    assert len(conf) >= 35
    assert len(shipped) >= 2
    held = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert conf | code | shipped | {"dpo_lightning/launch/train.sbatch"} <= held
    assert not [name for name in held if not name.startswith("dpo_lightning/")]


def test_installed_elsewhere_it_composes_as_here(installed: Path, tmp_path: Path) -> None:
    composed = python("-m", "dpo_lightning", "--cfg", "job", cwd=tmp_path, path=installed)
    assert composed == python("-m", "dpo_lightning", "--cfg", "job")
    where = python("-c", "import dpo_lightning.config as c; print(c.CONF)", cwd=tmp_path, path=installed)
    assert Path(where.strip()) == installed / "dpo_lightning" / "conf"
    script = installed / "bin" / "dpo-lightning"
    assert python(script, "--cfg", "job", cwd=tmp_path, path=installed) == composed


def test_installed_elsewhere_it_writes_the_same_job(installed: Path, tmp_path: Path) -> None:
    words = ("submit", "model=tiny", "trainer.devices=2", "slurm.dry_run=true")
    jobs = [tmp_path / name / "job.sbatch" for name in ("there", "here")]
    for job, path in zip(jobs, (installed, ROOT), strict=True):
        python("-m", "dpo_lightning", *words, f"run_dir={job.parent}", cwd=tmp_path, path=path)
    there, here = (job.read_text().replace(str(job.parent), "") for job in jobs)
    assert there == here
    assert "srun" in here


def test_installed_elsewhere_it_trains(installed: Path, tmp_path: Path) -> None:
    given = ("model=tiny", "logger=none", "trainer.max_steps=2", "trainer.limit_val_batches=1", "samples.count=1")
    short = ("data.batch_size=2", "samples.max_new_tokens=4")
    run = tmp_path / "run"
    python(
        "-m", "dpo_lightning", *given, *short, f"run_dir={run}", cwd=tmp_path, path=installed, cache=tmp_path / "cache"
    )
    held = {file.name for file in (run / "adapter").iterdir()}
    assert held >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"}
    assert {file.name for file in run.iterdir()} >= {"config.yaml", "metrics.jsonl", "report.html"}
    assert {path.name for path in tmp_path.iterdir()} == {"run", "cache"}
