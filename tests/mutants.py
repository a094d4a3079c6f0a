"""Known bugs, put back one at a time into a copy of the checkout, each for a test to find: python -m tests.mutants.

A mutant that lives means that the suite does not see what it says it sees. `make soak` runs all of them.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tests.ranks import ROOT


class Mutant(NamedTuple):
    bug: str
    file: str
    good: str
    bad: str
    killed_by: str


EXACT = "tests/checkpoints/test_exact.py::test_a_run_stopped_at_any_step_goes_on_to_the_same_bits[lora-3]"
SIGNALS = "tests/cluster/test_signals.py"
MUTANTS = [
    Mutant(
        "a resumed run draws other random numbers", "training/position.py",
        'torch.set_rng_state(torch.tensor(own["torch"], dtype=torch.uint8))', "pass", EXACT,
    ),
    Mutant(
        "a resumed run begins its epoch again", "training/position.py",
        '"current": dict.fromkeys(COUNTS, batches),', '"current": dict.fromkeys(COUNTS, 0),', EXACT,
    ),
    Mutant(
        "a checkpoint is renamed before its folder is on the disk", "checkpoints/writer.py",
        "    disk.fsync_dir(scratch)\n", "", "tests/checkpoints/test_writer.py",
    ),
    Mutant(
        "a file's bytes are not forced to the disk", "checkpoints/writer.py",
        "        disk.fsync(stream)\n", "", "tests/checkpoints/test_writer.py",
    ),
    Mutant(
        "old checkpoints are deleted before the newest has been verified", "checkpoints/retention.py",
        "or not folders or not is_whole(folders[0])", "or not folders", "tests/checkpoints/test_retention.py",
    ),
    Mutant(
        "broken checkpoints count", "checkpoints/retention.py",
        "islice(filter(is_whole, folders), keep_last)", "islice(folders, keep_last)",
        "tests/checkpoints/test_retention.py",
    ),
    Mutant(
        "a flipped bit is not seen", "checkpoints/folder.py",
        "if digest(file) != sha256:", "if False:", "tests/checkpoints/test_resume.py",
    ),
    Mutant(
        "a checkpoint may run code", "checkpoints/saver.py",
        'map_location="cpu", weights_only=True', 'map_location="cpu", weights_only=False',
        "tests/checkpoints/test_exact.py::test_a_checkpoint_that_would_run_code_is_refused",
    ),
    Mutant(
        "a job that was preempted ends with 0", "cluster/interrupt.py",
        "return 128 + self.signal if", "return 0 if", SIGNALS,
    ),
    Mutant(
        "only the first rank's signal counts", "cluster/interrupt.py",
        "self.words.highest(self.signal or 0)",
        "self.words.highest((self.signal or 0) if trainer.is_global_zero else 0)", SIGNALS,
    ),
    Mutant(
        "Lightning's own signal handlers stay", "cluster/interrupt.py",
        "            signal.signal(number, self._request)\n", "            pass\n", SIGNALS,
    ),
    Mutant(
        "a validation that a signal has left out is forgotten", "cluster/interrupt.py",
        'self._left_out = state_dict["validation_left_out"]', "pass", SIGNALS,
    ),
    Mutant(
        "a loss that is not a number is trained on", "training/finite.py",
        "        if any_bad:\n", "        if False:\n", "tests/training/test_finite.py",
    ),
    Mutant(
        "spikes are judged anew after a resume", "training/spikes.py",
        'self._seen.extend(tuple(step) for step in state["seen"])', "pass", "tests/training/test_spikes.py",
    ),
    Mutant(
        "ranks that differ are not refused", "cluster/agreement.py",
        "if first != other:", "if False:",
        "tests/training/test_strategies.py::test_ranks_with_other_folders_or_checkpoints_are_refused",
    ),
    Mutant(
        "a crash loop goes on for ever", "checkpoints/starts.py",
        "if most is None or len(same) <= most:", "if True:", "tests/cluster/test_starts.py",
    ),
    Mutant(
        "a step's loss is not a mean over the pairs of all ranks", "training/module.py",
        "trainer.accumulate_grad_batches * trainer.world_size /", "trainer.accumulate_grad_batches /",
        "tests/cluster/test_launch.py::test_two_nodes_of_one_device_equal_one_process",
    ),
    Mutant(
        "a cached reference is taken for another model's", "training/reference_cache.py",
        '"weights": self.digest(), ', "",
        "tests/training/test_reference_cache.py::test_only_what_changes_the_numbers_is_in_the_key",
    ),
    Mutant(
        "two writers of the reference cache write over each other", "cache.py",
        "fcntl.flock(descriptor, fcntl.LOCK_EX)", "fcntl.flock(descriptor, fcntl.LOCK_SH)",
        "tests/data/test_reference_store.py",
    ),
    Mutant(
        "attention sinks are left out of the shared prefix", "model/attention.py",
        "isinstance(given, Tensor) and name not in KNOWN", "False", "tests/model/test_layout.py",
    ),
    Mutant(
        "an adapter on the head is merged into the embedding, too", "outputs/export.py",
        "inner[0].weight is inner[1].weight", "False", "tests/test_export.py",
    ),
]  # fmt: skip


def survives(mutant: Mutant, copy: Path) -> bool:
    """Return whether the named test passes with the bug in it."""
    file = copy / "dpo_lightning" / mutant.file
    whole = file.read_text()
    file.write_text(whole.replace(mutant.good, mutant.bad))
    env = {**os.environ, "PYTHONPATH": str(copy)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", mutant.killed_by]
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, check=False)
    file.write_text(whole)
    if done.returncode not in (0, 1):  # not a test that failed: none was found, or pytest itself did
        raise RuntimeError(f"{mutant.bug}: {done.stdout}{done.stderr}")
    return done.returncode == 0


def main() -> int:
    """Print a table of the mutants; return how many live."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
    alive = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in listed.stdout.decode().splitlines():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
        for mutant in MUTANTS:
            lives = survives(mutant, copy)
            alive += lives
            print(f"{'LIVES ' if lives else 'killed'}  {mutant.bug}: {mutant.killed_by}", flush=True)
    return alive


if __name__ == "__main__":
    sys.exit(main())
