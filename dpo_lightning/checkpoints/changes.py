"""Which changes of the configuration a resumed run may have. Imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from dpo_lightning.types import UserError

# Keys and groups of the configuration that a resumed run may change, as they do not change what is learned from a pair.
MAY_CHANGE = (
    # where the run lies, what it shows and leaves, and this very question
    "run_dir", "resume", "resume_allow", "logger", "callbacks", "checkpoint", "cluster", "export", "samples", "slurm",
    "optimized_metric", "trusted_targets",
    # where the same numbers are computed
    "strategy", "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.deterministic",
    "reference", "model.gradient_checkpointing",
    # how a step's pairs are split; that their number stays is checked by itself
    "data.batch_size", "trainer.accumulate_grad_batches",
    # when the run ends: more steps are a reason to resume, and the schedule of the learning rate follows
    "trainer.max_steps", "trainer.max_epochs", "trainer.min_steps", "trainer.min_epochs", "trainer.max_time",
    # what is measured on the way; validation draws no random numbers that the training uses
    "trainer.log_every_n_steps", "trainer.limit_val_batches", "trainer.val_check_interval",
    "trainer.check_val_every_n_epoch", "trainer.num_sanity_val_steps", "trainer.inference_mode",
    "trainer.profiler", "trainer.detect_anomaly",
    # what the model card says
    "model.base_model", "model.note",
)  # fmt: skip

# Keys and groups that say which weights train, and of what shape: the state of one choice does not fit another.
NEVER = ("lora", "model")
# Of those, where both sides have them. A model may have been moved.
FITS = ("lora.lora_alpha", "lora.lora_dropout", "model.name", "model.tokenizer")


def compare_config(then: Mapping[str, Any], now: Mapping[str, Any], allow: Sequence[str]) -> None:
    """Refuse to go on with a configuration that trains otherwise than the checkpoint's did.

    Args:
        then: the resolved configuration of the checkpoint, as plain values.
        now: that of this start.
        allow: keys that may differ, and groups whose keys may; no key of NEVER is let through.

    Raises UserError with a line for each key that differs and may not; a key that one side lacks differs.

    """
    differs = {key: values for key, values in changed(then, now).items() if not _among(key, MAY_CHANGE)}
    remedies = {
        key: "resume_allow does not help, as the checkpoint's weights fit no others; "
        "give the old value, or begin another run: resume=never with another run_dir"
        if _fits_no_other(key, values)
        else f"give the old value, or resume_allow=[{key}] to change it on purpose"
        for key, values in differs.items()
        if _fits_no_other(key, values) or not _among(key, allow)
    }
    if remedies:
        raise UserError("\n".join(
            f"{key}: {differs[key][0]} in the checkpoint, {differs[key][1]} now; {remedy}"
            for key, remedy in remedies.items()
        ))  # fmt: skip


def _fits_no_other(key: str, values: tuple[str, str]) -> bool:
    return _among(key, NEVER) and (key not in FITS or "absent" in values)


def changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return the keys whose values differ, each with the JSON of the old and the new value, or "absent".

    >>> changed({"loss": {"beta": 0.1}, "seed": 1}, {"loss": {"beta": 0.2}, "seed": 1})
    {'loss.beta': ('0.1', '0.2')}
    """
    old, new = dict(_leaves(then)), dict(_leaves(now))
    both = {key: (old.get(key, "absent"), new.get(key, "absent")) for key in {**old, **new}}
    return {key: values for key, values in both.items() if values[0] != values[1]}


def _leaves(node: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield dotted name and JSON of every value: as text 1 and 1.0 differ, as they do in limit_train_batches."""
    if not isinstance(node, Mapping):
        yield name, json.dumps(node)
        return
    for key, value in node.items():
        yield from _leaves(value, f"{name}.{key}" if name else str(key))


def _among(key: str, names: Collection[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)
