"""The image is built from docker/Dockerfile and trains, without a container engine. `make soak` alone does it."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

ASKED = bool(os.environ.get("DPO_LIGHTNING_IMAGE"))
MISSING = [name for name in ("buildah", "debootstrap") if shutil.which(name) is None]


@pytest.mark.timeout(5400)
@pytest.mark.skipif(not ASKED, reason="some ten minutes and 10 GB: `make soak` does it")
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
@pytest.mark.skipif(os.geteuid() != 0, reason="a chroot is made by root")
def test_the_image_is_built_and_trains_as_any_user() -> None:
    folder = Path(tempfile.mkdtemp(prefix="dpo_lightning-image-"))
    try:
        command = [sys.executable, "-m", "tests.docker.build", str(folder / "work")]
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        assert done.returncode == 0, done.stdout
        assert done.stdout.endswith("the image is built, and trains\n")
    finally:  # what is still mounted there is someone else's, and must not be deleted
        assert str(folder) not in Path("/proc/self/mounts").read_text()
        subprocess.run(["rm", "-rf", "--one-file-system", str(folder)], check=True)
