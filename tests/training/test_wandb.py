"""W&B: what a run sends and leaves, and that no fault of its server, its process or its folder costs a training."""

import json
import os
import re
import shlex
import signal
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psutil
import pytest

from dpo_lightning.training import wandb_run
from dpo_lightning.training.wandb_run import STEP, folder_for, wandb_logger

ID, KEY, NOBODY = "5f0e2c1a", "0123456789" * 4, "http://127.0.0.1:9"
CONFIG = {"seed": 1, "loss": {"_target_": "dpo", "beta": 0.1}}
ANSWERS = [{"prompt": "Why?", "reference": "No.", "policy": "Since it is so."}]
START_S = 5  # what W&B may cost a training: at its start, and at its end on a machine that is busy
END_S = wandb_run.UPLOAD_S + 2 + wandb_run.LAST_S + 1
BEGUN = []  # runs that no test has closed yet


class Server(ThreadingHTTPServer):
    """As much of W&B's server as one run needs. `mood`: ok, 401, 500, or hang."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.mood, self.over = "ok", threading.Event()
        self.ids, self.rows = [], {}  # the ids of the runs that were opened; by line of the history

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args):
        pass

    def do_PUT(self):
        self.answer({})

    do_GET = do_PUT

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        if self.server.mood == "hang":
            self.server.over.wait()
        elif self.server.mood != "ok":
            self.answer({"errors": [{"message": "no"}]}, int(self.server.mood))
        elif self.path.endswith("/file_stream"):
            history = body.get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
            for line, row in enumerate(history["content"], history["offset"]):
                self.server.rows[line] = json.loads(row)
            self.answer({})
        elif data := self.data(body.get("query", ""), body.get("variables") or {}):
            self.answer({"data": data})
        else:
            self.answer({"data": None, "errors": [{"message": "not this server"}]})

    def data(self, query, given):
        owner = {"id": "1", "name": "me"}
        project = {"id": "2", "name": "p", "entity": owner}
        if "upsertBucket" in query:
            self.server.ids.append(given["name"])
            bucket = {"id": "3", "name": given["name"], "displayName": "run", "project": project, "historyLineCount": 0}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "query RunResumeStatus" in query:
            seen = given["name"] in self.server.ids
            tail = [json.dumps(row) for row in [*self.server.rows.values()][-1:]]
            bucket = {
                "id": "3", "name": given["name"], "summaryMetrics": "{}", "displayName": "run", "logLineCount": 0,
                "historyLineCount": len(self.server.rows), "eventsLineCount": 0, "eventsTail": "[]", "config": "{}",
                "historyTail": json.dumps(tail), "tags": [], "notes": "", "wandbConfig": '{"t": 1}',
            }  # fmt: skip
            return {"model": {**project, "bucket": bucket if seen else None}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.server.url}/put/{name}"} for name in given["files"]]
            return {"createRunFiles": {"runID": "3", "uploadHeaders": [], "files": files}}
        if "query Viewer" in query:
            return {"viewer": {"id": "1", "entity": "me", "username": "me", "email": "", "flags": "{}"}}
        return {}

    def answer(self, content, code=200):
        text = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def server():
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run's folder, in an environment where W&B finds a key and nothing else."""
    folder = tmp_path / "a run"
    folder.mkdir()
    (folder / "run_id").write_text(ID)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    for name in ("CONFIG_DIR", "CACHE_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / name))
    monkeypatch.setenv("NETRC", str(tmp_path / "no netrc"))
    monkeypatch.setenv("WANDB_SHOW_INFO", "false")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    monkeypatch.setenv("WANDB_BASE_URL", NOBODY)
    started = []

    class Noted(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    yield folder
    for logger in BEGUN:  # where a test has failed: its run would be the next test's, too
        logger.close(1)
    BEGUN.clear()
    for process in started:
        process.wait(10)  # W&B's process does not outlive its run


def begin(run, url=NOBODY):
    """Begin W&B's run as a training does; return it once it is known that this takes no time."""
    os.environ["WANDB_BASE_URL"] = url  # the fixture sets it back
    began = time.monotonic()
    (logger,) = wandb_logger(run, CONFIG, project="p", entity=None, name=None, tags=["t"])
    assert time.monotonic() - began < START_S
    BEGUN.append(logger)
    return logger


def log(logger, *steps):
    began = time.monotonic()
    for step in steps:
        logger.log_metrics({"train/loss": 0.5 + step, "perf/pairs_per_second": 2.0}, step)
    assert time.monotonic() - began < 0.5


def close(logger):
    began = time.monotonic()
    logger.close(0)
    BEGUN.remove(logger)
    assert time.monotonic() - began < END_S


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition()


def told(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("dpo_lightning")]


def command(caplog):
    """Return the words of the last command that the log names to catch up with."""
    return shlex.split(re.findall(r"wandb sync .*", told(caplog)[-1])[0])


def records(folder):
    """Yield what lies in a run's .wandb file: blocks of 32 KiB, records of whole or split protobuf messages."""
    from wandb.proto import wandb_internal_pb2

    protocol: Any = wandb_internal_pb2
    (file,) = folder.glob("*.wandb")
    data, at, message = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        message += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield protocol.Record.FromString(message)
            message = b""


def stored(folder):
    """Return config and rows of a run's .wandb file, and its id."""
    config, rows, ids = {}, [], set()
    for record in records(folder):
        if record.WhichOneof("record_type") == "run":
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            ids.add(record.run.run_id)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    (name,) = ids
    return config, rows, name


def offline(run):
    return sorted(run.glob("wandb/offline-run-*"))


REASONS = {
    "refused": "connection refused", "401": "error 401", "500": "deadline exceeded", "hang": "does not answer",
    "no key": "No API key configured", "half a key": "WANDB_API_KEY invalid: API key must have 40+ characters",
}  # fmt: skip


@pytest.mark.parametrize("fault", REASONS)
def test_a_server_that_is_not_to_be_had_costs_the_live_view_alone(fault, run, server, caplog, monkeypatch):
    if fault != "hang":  # there the end of the training comes before W&B gives up
        monkeypatch.setattr(wandb_run, "BEGIN_S", 2.0)
    server.mood = fault if fault in ("401", "500", "hang") else "ok"
    if "key" in fault:
        monkeypatch.setenv("WANDB_API_KEY", "" if fault == "no key" else "abc")
    logger = begin(run, NOBODY if fault == "refused" else server.url)
    log(logger, 1, 2, 3)
    logger.log_table("samples", ANSWERS, 3)
    close(logger)
    (folder,) = offline(run)
    config, rows, name = stored(folder)
    assert (config["seed"], config["loss"]["beta"], name) == (1, 0.1, ID)
    assert [(row[STEP], row["train/loss"]) for row in rows if "train/loss" in row] == [(1, 1.5), (2, 2.5), (3, 3.5)]
    (path,) = [row["samples/path"] for row in rows if "samples/path" in row]
    table = json.loads((folder / "files" / path).read_text())
    assert table == {"columns": ["prompt", "reference", "policy"], "data": [[*ANSWERS[0].values()]]}
    (line,) = told(caplog)
    assert line.startswith("W&B is offline: ") and REASONS[fault] in line and KEY not in line
    assert command(caplog) == ["wandb", "sync", str(folder)]


def test_the_command_that_the_log_names_catches_up(run, server, caplog, monkeypatch):
    """Two starts of a run without a server, then W&B's own command with one."""
    monkeypatch.setattr(wandb_run, "BEGIN_S", 1.0)
    for steps in ((1, 2), (3, 4)):
        logger = begin(run)
        log(logger, *steps)
        close(logger)
    words = command(caplog)
    assert words == ["wandb", "sync", *map(str, offline(run))] and len(words) == 4
    environment = {**os.environ, "WANDB_BASE_URL": server.url}
    done = subprocess.run(
        [sys.executable, "-m", *words], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert {*server.ids} == {ID}
    assert {row[STEP] for row in server.rows.values()} == {1, 2, 3, 4}, done.stderr


def test_a_run_that_is_started_again_goes_on_in_the_same_one(run, server, caplog):
    for steps in ((1, 2), (3,)):
        logger = begin(run, server.url)
        log(logger, *steps)
        wait_for(lambda: server.ids)
        close(logger)
    assert {*server.ids} == {ID} and told(caplog) == []
    assert [row[STEP] for _, row in sorted(server.rows.items()) if "train/loss" in row] == [1, 2, 3]
    assert not offline(run)


@pytest.mark.filterwarnings("ignore:Exception in thread NetStatThr")  # W&B's own, whose process is gone
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_of_wandb_that_is_killed_or_hangs_is_done_without(number, run, server, caplog):
    logger = begin(run, server.url)
    log(logger, 1, 2)
    wait_for(lambda: server.ids and logger._inbox.empty())
    (process,) = (child for child in psutil.Process().children() if child.name() == "wandb-core")
    process.send_signal(number)
    log(logger, *range(3, 2000))
    close(logger)
    (folder,) = offline(run)
    _, rows, name = stored(folder)
    assert name == ID and {row[STEP] for row in rows} >= {*range(1500, 2000)}
    assert command(caplog) == ["wandb", "sync", str(folder)]


def test_a_server_that_hangs_in_mid_run_does_not_hold_up_the_end(run, server, caplog):
    logger = begin(run, server.url)
    log(logger, 1)
    wait_for(lambda: server.ids and logger._inbox.empty())
    server.mood = "hang"
    log(logger, *range(2, 100))
    close(logger)
    (folder,) = [path for path in run.glob("wandb/run-*") if path.is_dir()]
    assert {row[STEP] for row in stored(folder)[1]} == {*range(1, 100)}
    assert "W&B has not all of the run" in told(caplog)[-1]
    assert command(caplog) == ["wandb", "sync", "--include-online", str(folder)]


def test_a_folder_that_cannot_be_written_is_not_taken(run, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "scratch"))
    assert folder_for(run) == tmp_path / "scratch"
    monkeypatch.setenv("WANDB_DIR", "/proc/scratch")  # read-only for root, too
    assert folder_for(run) == run
    assert "WANDB_DIR=/proc/scratch cannot be written" in told(caplog)[-1]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_logger(run, CONFIG, project="p", entity=None, name=None, tags=[]) == []


def test_a_training_sends_config_metrics_and_answers_and_goes_on_under_its_id(run, cli, metrics, monkeypatch):
    """With no server, twice: the second start resumes the first."""
    monkeypatch.setattr(wandb_run, "BEGIN_S", 1.0)
    run = run.parent / "training"
    words = [
        "model=tiny", "logger=wandb", "callbacks=none", "trainer.precision=32-true", "samples.max_new_tokens=4",
        "data.max_pairs=24", "data.batch_size=4", f"run_dir={run}",
    ]  # fmt: skip
    assert cli(*words, "trainer.max_steps=2", "samples.count=1") == 0
    assert cli(*words, "trainer.max_steps=3", "samples.count=0") == 0
    assert [row["step"] for row in metrics(run) if "train/loss" in row] == [1, 2, 3]
    first, second = (stored(folder) for folder in offline(run))
    config, rows, name = first
    assert config["loss"]["beta"] == 0.1 and config["lora"]["r"] == 16 and config["optim"]["lr"] > 0
    assert name == second[2] == (run / "run_id").read_text()
    logged = {key: value for row in rows for key, value in row.items()}
    names = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen")
    assert {f"{part}/{name}" for name in names for part in ("train", "val")} <= {*logged}
    assert {"perf/pairs_per_second", "perf/tokens_per_second", "train/lr", "samples/path"} <= {*logged}
    assert [row[STEP] for row in rows if "train/loss" in row] == [1, 2]
    assert [row[STEP] for row in second[1] if "train/loss" in row] == [3]


@pytest.mark.parametrize(
    ("given", "variables", "expected"),
    [
        ({"project": "p", "name": "n"}, {"WANDB_PROJECT": "theirs", "WANDB_NAME": "theirs"}, ("p", "n")),
        ({"project": None, "name": None}, {"WANDB_PROJECT": "theirs", "WANDB_NAME": "mine"}, ("theirs", "mine")),
        ({"project": None, "name": None}, {"WANDB_PROJECT": ""}, ("dpo_lightning", "a run")),
    ],
    ids=["keys", "variables", "neither"],
)
def test_project_and_name_are_the_keys_else_the_variables(given, variables, expected, run, monkeypatch):
    monkeypatch.setattr(wandb_run, "WandbRun", lambda folder, offline, **options: options)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    options: Any = wandb_logger(run, CONFIG, entity=None, tags=[], **given)[0]
    assert (options["project"], options["name"]) == expected
