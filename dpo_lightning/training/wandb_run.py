"""A run on Weights & Biases that can neither stop a training nor hold it up. wandb is imported here alone."""

from __future__ import annotations

import logging
import os
import queue
import shlex
from argparse import Namespace
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import psutil
from lightning.pytorch.loggers import Logger

from dpo_lightning.checkpoints.folder import run_id

log = logging.getLogger(__name__)

STEP = "trainer/global_step"  # Lightning's name of the x-axis
BEGIN_S = 30.0  # a server that takes longer to open a run is down; the training does not wait for it meanwhile
UPLOAD_S = 4.0  # at the end, for what is not uploaded yet
LAST_S = 10.0  # after that, to write it to the disk instead; a busy machine takes seconds to start W&B's process
BEHIND = 10_000  # rows that W&B may lag behind
AGAIN = 1_000  # rows that are logged a second time where W&B's process is lost, with what it had not written
Row = dict[str, Any]  # what run.log takes; a list of mappings becomes a table


def wandb_logger(
    run_dir: Path, config: dict[str, Any], *, project: str | None, entity: str | None, name: str | None,
    tags: Sequence[str],
) -> Sequence[WandbRun]:  # fmt: skip
    """Log to Weights & Biases, or, where it cannot be reached, into files that `wandb sync` uploads later.

    $WANDB_MODE=offline or disabled, $WANDB_DIR, the variables of a sweep and those of what is not given do what they
    do for W&B itself.
    """
    mode = os.environ.get("WANDB_MODE", "online")
    if mode == "disabled":
        return []
    options: dict[str, Any] = {"config": config, "tags": list(tags)}
    if "WANDB_SWEEP_ID" not in os.environ:  # else W&B itself names project and run
        project = project or os.environ.get("WANDB_PROJECT") or "dpo_lightning"
        name = name or os.environ.get("WANDB_NAME") or run_dir.name
        options |= {"project": project, "entity": entity, "name": name, "id": run_id(run_dir)}
    return [WandbRun(folder_for(run_dir), mode in ("offline", "dryrun"), **options)]


def folder_for(run_dir: Path) -> Path:
    """Return $WANDB_DIR where it can be written, else the run's folder; W&B itself would fall back to /tmp."""
    if not (given := os.environ.get("WANDB_DIR")):
        return run_dir
    with suppress(OSError):
        Path(given).mkdir(parents=True, exist_ok=True)
    if os.access(given, os.W_OK | os.X_OK):
        return Path(given)
    log.warning("warning: WANDB_DIR=%s cannot be written: W&B's files go to %s", given, run_dir / "wandb")
    return run_dir


class WandbRun(Logger):
    """Hands rows on to a thread that begins the W&B run, logs to it and ends it.

    Whatever goes wrong in there, a server that is down, slow or hangs, a wrong key, W&B's own process killed: the run
    goes on offline under the same id, and the log has the command that uploads it later.

    Args:
        folder: wandb/ is made in it.
        offline: ask no server.
        options: of wandb.init: project, entity, name, id, tags, config.

    """

    def __init__(self, folder: Path, offline: bool, **options: Any):
        super().__init__()
        os.environ.setdefault("WANDB_SHOW_INFO", "false")  # warnings and errors stay; and it asks for no key
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its reports about itself wait for a server at exit
        os.environ.setdefault("WANDB_CONSOLE", "off")  # it would replace sys.stdout, from another thread
        import wandb  # noqa: F401  here, and not in the thread while the main one imports others

        self._folder, self._options = folder, options
        self._inbox: queue.Queue[Row | None] = queue.Queue()
        self._again: deque[Row] = deque(maxlen=AGAIN)
        self._dropped = self._exit_code = 0
        self._ending = self._given_up = False
        self._online, self._phase = not offline, Lock()
        self._thread = Thread(target=self._work, name="W&B", daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        """Return what Lightning calls it."""
        return "wandb"

    @property
    def version(self) -> str:
        """Return the run's id, or nothing where W&B makes one."""
        return self._options.get("id") or ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run begins with its config."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Hand on a row."""
        self._hand_on({**metrics, STEP: step})

    def log_table(self, name: str, rows: Sequence[Mapping[str, str]], step: int) -> None:
        """Hand on a table; all rows have the same keys, its columns."""
        self._hand_on({name: [dict(row) for row in rows], STEP: step})

    def _hand_on(self, row: Row) -> None:
        if self._inbox.qsize() < BEHIND:
            self._inbox.put(row)
        else:
            self._dropped += 1

    def close(self, exit_code: int) -> None:
        """End the run; wait for W&B some seconds and no more."""
        self._exit_code = exit_code
        self._inbox.put(None)
        self._thread.join(UPLOAD_S + 2)
        if self._thread.is_alive():
            self._give_up_the_server()
            self._thread.join(LAST_S)
        if self._thread.is_alive():
            kill_service()
            log.warning("warning: W&B does not end; what it lacks is in metrics.jsonl")
        elif self._dropped:
            log.warning("warning: W&B lacks %d rows that it was too slow for; metrics.jsonl has them", self._dropped)

    def _give_up_the_server(self) -> None:
        """Kill W&B's process where the thread waits for it online; it goes on offline, with one that waits for none."""
        with self._phase:
            if self._online:
                self._given_up = True
                kill_service()

    def _work(self) -> None:
        """Be the thread: log online, or, after whatever goes wrong there, offline."""
        why = "WANDB_MODE=offline"
        if self._online:
            try:
                self._log_all(self._begin("online"))
                return
            except (Exception, SystemExit) as error:  # nothing that W&B raises is a reason to end a training
                with self._phase:
                    self._online = False
                why = "it does not answer in time" if self._given_up else _told(error)
                _leave(kill=True)
        try:
            run = self._begin("offline")
            log.warning("W&B is offline: %s; to upload the run later: %s", why, self._sync(run))
            self._log_all(run)
        except (Exception, SystemExit) as error:
            log.warning("warning: W&B has failed: %s. What it lacks is in metrics.jsonl", _told(error))
            _leave(kill=True)

    def _begin(self, mode: Any) -> Any:
        import wandb

        settings = wandb.Settings(silent=True, finish_timeout=UPLOAD_S, finish_timeout_raises=True)
        if mode == "online":
            settings.init_timeout = BEGIN_S
        run = wandb.init(mode=mode, dir=str(self._folder), resume="allow", settings=settings, **self._options)
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP, step_sync=True)
        return run

    def _log_all(self, run: Any) -> None:
        """Log until the end, first what a lost process may not have written, then what comes in; end the run."""
        for row in [*self._again]:
            run.log(_with_tables(row))
        while (row := self._next()) is not None:
            run.log(_with_tables(row))
        sync = self._sync(run)
        try:
            run.finish(exit_code=self._exit_code)
        except TimeoutError:
            log.warning("warning: W&B has not all of the run; to upload the rest: %s", sync)
        _leave()

    def _next(self) -> Row | None:
        """Wait for the next row and return it, or None at the end, however often it is asked for."""
        if self._ending:
            return None
        row = self._inbox.get()
        self._ending = row is None
        if row is not None:
            self._again.append(row)
        return row

    @staticmethod
    def _sync(run: Any) -> str:
        """Return the command that uploads a run's files, and those that its earlier starts have left."""
        folder = Path(run.dir).parent
        files = folder.parent.glob(f"offline-run-*-{run.id}*/*.wandb")
        left = sorted(str(file.parent) for file in files if not file.with_suffix(".wandb.synced").exists())
        own = [] if folder.name.startswith("offline-") else ["--include-online", str(folder)]
        return shlex.join(["wandb", "sync", *left, *own])


def _with_tables(row: Row) -> Row:
    import wandb

    def table(rows: list[dict[str, str]]) -> Any:
        return wandb.Table(columns=[*rows[0]], data=[[*one.values()] for one in rows])

    return {key: table(value) if isinstance(value, list) else value for key, value in row.items()}


def _leave(kill: bool = False) -> None:
    """End W&B's own process and forget it, or the next run of this one would talk to it."""
    import wandb

    if kill:
        kill_service()
    try:
        wandb.teardown()
    except (Exception, SystemExit) as error:  # of a process that is gone
        log.debug("W&B's process: %s", error)


def kill_service() -> None:
    """Kill W&B's own process, so that a call which waits for it fails. One that another program started stays."""
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if child.name() == "wandb-core":
                child.kill()
                child.wait(1)


def _told(error: BaseException) -> str:
    """Return what kind of error it is and its text, in one line and not too long."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(": .")
