"""Where a run stands, saved and restored: the place in the data, and what each rank holds of its own.

Lightning counts micro-batches, which another number of ranks changes; the place is kept in pairs, and Lightning's
counters are written anew from it. It saves no random numbers at all.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from dpo_lightning.cluster.ranks import gather_texts
from dpo_lightning.training.meter import PairMeans

COUNTS = ("ready", "started", "processed", "completed")


def place(checkpoint: dict[str, Any], data: Mapping[str, int], accumulate: int) -> None:
    """Set the loop counters of a Lightning checkpoint to where `data` says that the run stands.

    Args:
        checkpoint: what Lightning is about to restore.
        data: epoch, pairs of it that are done, pairs of a step, pairs of an epoch; see `PreferenceData.state_dict`.
        accumulate: micro-batches of a step in the run that goes on.

    """
    fit = checkpoint["loops"]["fit_loop"]
    epoch, batches = data["epoch"], data["pairs"] // data["step_pairs"] * accumulate
    begun = epoch + (batches > 0)
    epochs = dict(zip(COUNTS, (begun, begun, epoch, epoch), strict=True))
    fit["epoch_progress"] |= {"total": epochs, "current": dict(epochs)}
    whole = -(-data["of"] // data["step_pairs"]) * accumulate
    fit["epoch_loop.batch_progress"] |= {
        "total": dict.fromkeys(COUNTS, epoch * whole + batches),
        "current": dict.fromkeys(COUNTS, batches),
        "is_last_batch": False,
    }
    for counts in ("total", "current"):  # a checkpoint may have been saved at a validation's end
        fit["epoch_loop.val_loop.batch_progress"][counts] = dict.fromkeys(COUNTS, 0)


def save_own(meter: PairMeans, device: torch.device) -> list[str]:
    """Return what each rank holds of its own, as JSON: random states, and sums since the last logged step.

    Collective.
    """
    kind, keys, *rest = np.random.get_state()
    own: dict[str, Any] = {
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "names": meter.names,
        "sums": meter.state().tolist(),
    }
    if device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(device).tolist()
    return gather_texts(json.dumps(own), device)


def restore_own(texts: list[str], meter: PairMeans, rank: int, device: torch.device) -> None:
    """Go on with what `save_own` returned; ranks that were not there begin with the state of another.

    The sums of ranks that are no longer there are lost to the next logged mean, to nothing else.
    """
    own = json.loads(texts[rank % len(texts)])
    torch.set_rng_state(torch.tensor(own["torch"], dtype=torch.uint8))
    version, state, gauss = own["python"]
    random.setstate((version, tuple(state), gauss))
    np.random.set_state(tuple(own["numpy"]))
    if "cuda" in own and device.type == "cuda":
        torch.cuda.set_rng_state(torch.tensor(own["cuda"], dtype=torch.uint8), device)
    if rank < len(texts):
        meter.load(own["names"], torch.tensor(own["sums"], dtype=torch.float64, device=device))
