"""What several test files share: the command line run in this process, and a cache that the whole session fills."""

import gc
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

# Files of minutes, longest first: begun last, one of them would leave the other of two processes without work.
LONG = (
    "test_strategies.py", "test_golden.py", "test_lost_ranks.py", "test_slurm.py", "test_reference_cache.py",
    "test_train.py", "test_kill_loop.py", "test_launch.py", "test_signals.py",
)  # fmt: skip

os.environ["OMP_NUM_THREADS"] = "1"  # two processes share the machine's cores; read when torch is imported
os.environ["WANDB_MODE"] = "offline"
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long files."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    gc.collect()
    gc.freeze()  # what the test files have imported is looked through for garbage no more


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of this test session; the real small model is converted into it once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cli(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run `python -m dpo_lightning WORDS` in this process; return its exit code.

    The report, half of a short run's time, is drawn where a test says report=True. The peak is measured briefly.
    """
    from hydra.core.global_hydra import GlobalHydra

    from dpo_lightning import finish
    from dpo_lightning.__main__ import main
    from dpo_lightning.model import flops

    draw = finish.write_report

    def run(*words: str, report: bool = False) -> int:
        monkeypatch.setattr(finish, "write_report", draw if report else lambda run_dir: run_dir / "report.html")
        monkeypatch.setattr(flops, "PEAK_SECONDS", 0.0)
        monkeypatch.setenv("DPO_LIGHTNING_CACHE", str(cache))
        monkeypatch.delenv("DPO_LIGHTNING_RUN_DIR", raising=False)
        monkeypatch.setattr(sys, "argv", ["dpo_lightning", *words])
        GlobalHydra.instance().clear()
        with warnings.catch_warnings(), pytest.raises(SystemExit) as exit_:
            main()
        return int(exit_.value.code or 0)

    return run


@pytest.fixture
def metrics() -> Callable[[Path], list[dict[str, float]]]:
    """Read a run's metrics.jsonl."""
    return lambda run_dir: [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
