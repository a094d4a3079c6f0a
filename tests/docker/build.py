"""Builds docker/Dockerfile without a container engine, and trains in the image: python -m tests.docker.build FOLDER.

buildah runs the Dockerfile's own lines in a chroot, on a base that debootstrap makes; it takes root, some 10 GB and
ten minutes or more. Two things differ from a build by an engine: the base is not the pinned one, though the same
Debian, and where pip finds a CPU build of torch, that one stands in for CUDA's, in a lock file that is otherwise the
same.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import ROOT
from tests.docker.test_container import CMD, ENTRYPOINT, section

IMAGE = "localhost/dpo_lightning"
STRANGER = 54321  # a uid that no file of the image knows
CANARY = "index-password-canary"
TINY = [
    "model=tiny", "callbacks=none", "samples.count=1", "samples.max_new_tokens=4", "trainer.accelerator=cpu",
    "trainer.precision=32-true", "trainer.max_steps=3", "data.max_pairs=40", "data.max_length=160",
]  # fmt: skip
ONLY_CUDAS = re.compile(r"(nvidia-|cuda-|triton==)")


def say(*words: object) -> str:
    """Run a command; return what it printed. Leaves with that where it fails."""
    began = time.monotonic()
    done = subprocess.run(
        [str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    print(f"{time.monotonic() - began:6.1f} s  {' '.join(str(word) for word in words)[:150]!r}", flush=True)
    if done.returncode:
        sys.exit(f"{done.stdout[-6000:]}\nexit code {done.returncode}")
    return done.stdout


class Builder:
    """buildah with its storage in `folder`, and what it is given there."""

    def __init__(self, folder: Path):
        self.folder, self.context = folder, folder / "context"
        self.wheels, self.pip_conf = folder / "wheels", folder / "pip.conf"

    def buildah(self, *words: object) -> str:
        """Run one of buildah's commands; return what it printed."""
        storage = ("--root", self.folder / "storage", "--runroot", self.folder / "running", "--storage-driver", "vfs")
        return say("buildah", *storage, *words)

    def make_base(self) -> None:
        """Make localhost/base, a Debian with nothing but what apt needs."""
        debian, base = self.folder / "debian", self.folder / "base"
        base.mkdir()
        say("debootstrap", "--variant=minbase", "bookworm", debian)
        say("tar", "--directory", debian, "--exclude=./dev/*", "--exclude=./proc/*", "-cf", base / "debian.tar", ".")
        (base / "Dockerfile").write_text("FROM scratch\nADD debian.tar /\n")
        self.buildah("build", "--isolation", "chroot", "--tag", "localhost/base", base)

    def make_context(self) -> None:
        """Copy what the image is made of, with a lock file for the torch at hand; fetch what the lock files name."""
        self.context.mkdir()
        for name in (".dockerignore", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, self.context)
        for name in ("docker", "conf", "launch", "dpo_lightning"):
            shutil.copytree(ROOT / name, self.context / name)
        (self.context / "dpo_lightning" / ".env").write_text(CANARY)  # what .dockerignore is for
        docker, pip = self.context / "docker", (sys.executable, "-m", "pip", "--disable-pip-version-check", "download")
        wanted = (docker / "requirements.lock").read_text()
        torch = re.search(r"^torch==\S+", wanted, re.M)
        assert torch
        say(*pip, "--quiet", "--no-deps", "--dest", self.wheels, torch[0])
        (file,) = self.wheels.glob("torch-*.whl")
        (docker / "here.lock").write_text(with_torch(wanted, file))
        fetch = (*pip, "--quiet", "--no-deps", "--require-hashes", "--no-build-isolation", "--dest", self.wheels)
        for name in ("build.lock", "here.lock"):
            say(*fetch, "--requirement", docker / name)
        self.pip_conf.write_text(f"# {CANARY}\n[global]\nno-index = true\nfind-links = /wheels\n")

    def build(self) -> None:
        """Run the Dockerfile."""
        arguments = ("--build-arg", "BASE=localhost/base", "--build-arg", "LOCK=docker/here.lock")
        given = ("--secret", f"id=pip,src={self.pip_conf}", "--volume", f"{self.wheels}:/wheels:ro")
        where = ("--file", self.context / "docker" / "Dockerfile", "--tag", IMAGE, self.context)
        self.buildah("build", "--isolation", "chroot", "--pull=never", *arguments, *given, *where)

    def look(self) -> None:
        """Check what the image tells of itself, and that it holds no secret and nothing that is closed."""
        told = self.buildah("inspect", "--type", "image", IMAGE)
        config = json.loads(told)["OCIv1"]["config"]
        assert (config["Entrypoint"], config["Cmd"], config["User"]) == (ENTRYPOINT, CMD, "10001:10001")
        assert CANARY not in told
        container = self.buildah("from", "--pull=never", IMAGE).strip()
        root = Path(self.buildah("mount", container).strip())
        holding = subprocess.run(["grep", "-rlI", CANARY, root], stdout=subprocess.PIPE, text=True, check=False)
        assert not holding.stdout, holding.stdout
        assert not [*root.glob("etc/pip.conf"), *root.glob("wheels/*"), *root.glob("src/*")]
        venv = root / "opt" / "venv"
        assert (venv / "lib/python3.11/site-packages/dpo_lightning/conf/config.yaml").is_file()
        closed = say(
            "find", venv, "!", "-type", "l", "(", "!", "-perm", "-o=r", "-o", "-type", "d", "!", "-perm", "-o=x", ")"
        )
        assert not closed, closed
        self.buildah("umount", container)
        self.buildah("rm", container)

    def run(self, cache: Path, *words: str) -> str:
        """Run a command in a new container as the stranger, whose home is closed; return what it printed."""
        runs = self.folder / "runs"
        container = self.buildah("from", "--pull=never", IMAGE).strip()
        mounts = ("--volume", f"{cache}:/cache", "--volume", f"{runs}:/work/runs")
        who = ("--user", f"{STRANGER}:{STRANGER}", "--env", "HOME=/root", "--env", "WANDB_MODE=offline")
        told = self.buildah("run", "--isolation", "chroot", *who, *mounts, container, "--", *words)
        root = Path(self.buildah("mount", container).strip())
        written = say("find", root, "-uid", STRANGER, "!", "-path", f"{root}/tmp/*").split()
        assert not written, f"written into the image: {written[:5]}"
        self.buildah("umount", container)
        self.buildah("rm", container)
        return told

    def train(self) -> None:
        """Train as Docker would with any uid, on one and on two ranks, and as Apptainer would."""
        open_, closed, runs = (self.folder / name for name in ("cache", "closed", "runs"))
        for place in (open_, closed, runs):
            place.mkdir()
            place.chmod(0o755 if place == closed else 0o1777)
        assert "key=value" in self.run(open_, *ENTRYPOINT, *CMD)
        self.run(open_, *ENTRYPOINT, *TINY, "run_dir=runs/docker")
        two = ["trainer.devices=2", "strategy=zero2", "logger=none", "data.batch_size=2", "run_dir=runs/two"]
        self.run(open_, *ENTRYPOINT, *TINY, *two)
        assert [*open_.glob("torch_extensions/**/*.so")], "DeepSpeed has compiled nothing"
        script = section("environment") + section("runscript")
        self.run(closed, "sh", "-c", script, "sh", *TINY, "logger=none", "run_dir=runs/apptainer")
        assert not [*closed.iterdir()]
        for name in ("docker", "two", "apptainer"):
            adapter = runs / name / "adapter" / "adapter_model.safetensors"
            assert adapter.stat().st_uid == STRANGER


def with_torch(lock: str, wheel: Path) -> str:
    """Return a lock file with the torch of a wheel; a CPU build needs nothing of CUDA's."""
    version = wheel.name.split("-")[1]
    if not version.endswith("+cpu"):
        return lock
    own = f"torch=={version} \\\n    --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n"
    blocks = re.split(r"^(?=\S)", lock, flags=re.M)
    return "".join(own if each.startswith("torch==") else each for each in blocks if not ONLY_CUDAS.match(each))


def main(folder: Path) -> None:
    """Build, look, train; FOLDER must not be there yet."""
    os.umask(0o022)
    folder.mkdir(parents=True)
    builder = Builder(folder)
    for step in (builder.make_base, builder.make_context, builder.build, builder.look, builder.train):
        step()
    print("the image is built, and trains")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
