"""Which keys and targets a configuration may hold: those of the shipped YAML. Plain mappings and lists alone."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

# What Lightning's Trainer takes beside the keys of conf/trainer/ and what train.py gives it: +trainer.KEY=...
TRAINER_KEYS = {
    "benchmark", "check_val_every_n_epoch", "detect_anomaly", "inference_mode", "max_time",
    "min_epochs", "min_steps", "profiler",
}  # fmt: skip


def wrong_keys(
    cfg: Mapping[str, Any], root: Mapping[str, Any], groups: set[str], shipped: Mapping[str, list[set[str]]]
) -> Iterator[str]:
    """Tell of keys that nothing reads, and of keys that were taken away.

    Args:
        cfg: the composed configuration.
        root: conf/config.yaml.
        groups: the folders of conf/ whose option stands under the folder's name.
        shipped: for each _target_ of conf/ the keys of every file that names it.

    """
    yield from _compared("", cfg, [{*root} - {"defaults", "hydra"} | groups])
    for section, keys in root.items():
        if isinstance(keys, dict) and section != "hydra":
            yield from _compared(section, cfg.get(section), [{*keys}])
    for name, node in targets_of(cfg):
        yield from _compared(name, node, shipped.get(node["_target_"], []))
    callbacks = cfg.get("callbacks", {})
    if not isinstance(callbacks, dict):
        yield f"callbacks={callbacks}: must be a mapping of names to callbacks"
        return
    built = {group: cfg[group] for group in sorted({*cfg} & groups - {"callbacks"})}
    for name, node in {**built, **_prefixed("callbacks", callbacks)}.items():
        if not isinstance(node, dict) or "_target_" not in node:
            yield f"{name} has no _target_: give one of the options of {name.partition('.')[0]}="


def _compared(name: str, node: Any, versions: list[set[str]]) -> Iterator[str]:
    """Compare the keys of `node` with those it may have and must have: in some version, and in every version."""
    if not versions:
        return
    if not isinstance(node, dict):
        yield f"{name}={node}: must be a mapping with {', '.join(sorted(set.union(*versions)))}"
        return
    given, allowed, needed = (_prefixed(name, k) for k in (node, set.union(*versions), set.intersection(*versions)))
    yield from (f"unknown key {key}: nothing reads it{nearest(key, allowed)}" for key in given if key not in allowed)
    yield from (f"{key} is missing: give it a value, do not take it away" for key in needed if key not in given)


def _prefixed(name: str, keys: Any) -> dict[str, Any]:
    """Return `keys`, a mapping or a set in order, under their full dotted names."""
    keys = keys if isinstance(keys, dict) else dict.fromkeys(sorted(keys))
    return {f"{name}.{key}" if name else str(key): value for key, value in keys.items()}


def targets_of(node: Any, name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield dotted name and content of every mapping with a _target_: Hydra instantiates those in lists, too."""
    if isinstance(node, dict) and "_target_" in node:
        yield name, node
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from targets_of(value, f"{name}.{key}" if name else str(key))


def untrusted(node: Any, trusted: Collection[str], name: str = "") -> Iterator[str]:
    """Tell of targets that are not trusted: instantiating what a stranger's file names would run it."""
    for place, mapping in targets_of(node, name):
        target = mapping["_target_"]
        if target not in trusted:
            yield f"{place}._target_={target}: not one of this package's own; add it to trusted_targets if you trust it"


def nearest(word: str, words: Collection[str]) -> str:
    """Return '; did you mean X?', or nothing where no word is like it.

    Dotted words are compared by their last part first: loss.betta is near loss.beta, and beta is, too.
    """
    last = {known: known.rpartition(".")[2] for known in words}
    alike = difflib.get_close_matches(word.rpartition(".")[2], {*last.values()}, n=3, cutoff=0.6)
    close = difflib.get_close_matches(word, [known for known in words if last[known] in alike], n=1, cutoff=0)
    return f"; did you mean {close[0]}?" if close else ""
