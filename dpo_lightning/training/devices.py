"""How many devices a run has, and which strategy `auto` becomes on them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch

from dpo_lightning.training.precision import frozen_dtype
from dpo_lightning.types import UserError

USABLE = 0.7  # of a device's memory for weights and their states; activations need the rest


def count_devices(accelerator: str, devices: int | str | Sequence[int], nodes: int) -> int:
    """Return the devices of all nodes that Lightning will use."""
    if isinstance(devices, str) and devices not in ("auto", "-1"):
        devices = [int(part) for part in devices.split(",") if part] if "," in devices else int(devices)
    if isinstance(devices, int) and devices > 0:
        return devices * nodes
    if not isinstance(devices, int | str):
        return len(devices) * nodes
    return (max(1, torch.cuda.device_count()) if on_cuda(accelerator) else 1) * nodes


def on_cuda(accelerator: str) -> bool:
    """Return whether Lightning will train on GPUs of this machine."""
    return accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def resolve_accelerator(accelerator: str) -> str:
    """Return Lightning's value: auto is GPUs where there are any, else the CPU, never what else it knows."""
    if accelerator != "auto":
        return accelerator
    return "cuda" if on_cuda(accelerator) else "cpu"


def resolve_deterministic(deterministic: bool | str, accelerator: str) -> bool | str:
    """Return Lightning's value: auto is warn on GPUs, whose kernels repeat their bits only if asked, else False."""
    if deterministic != "auto":
        return deterministic
    return "warn" if on_cuda(accelerator) else False


def memory_of_device(accelerator: str, on_this_node: int) -> int:
    """Return the bytes of memory that a device has for itself; 0 where that is not known, as on a login node.

    Of unlike GPUs it is the largest one's: a small one for the screen alone must not keep a run from starting.
    """
    if on_cuda(accelerator):
        return max(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    if accelerator != "cpu":
        return 0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // max(1, on_this_node)


def state_bytes(strategy: str, precision: str, weights: int, trainable: int, copies: int, devices: int) -> int:
    """Return the bytes that a device holds at least: weights and the training's states, without activations.

    For each trainable weight the states are a gradient and Adam's two moments, 12 bytes in float32 (ZeRO,
    https://arxiv.org/abs/1910.02054, section 3.1; a master copy may come on top). ZeRO-1 shards the moments, ZeRO-2
    the gradients too, which in ZeRO-1 have the weights' dtype, and ZeRO-3 the weights. `copies` is 2 where a frozen
    reference lies beside the policy.
    """
    zero, itemsize = strategy.startswith("zero"), frozen_dtype(precision).itemsize
    trained = itemsize if zero or precision == "bf16-true" else 4  # what trains stays float32 under autocast
    whole = (weights * copies - trainable) * itemsize + trainable * trained
    if strategy == "zero1":
        return whole + trainable * itemsize + trainable * 8 // devices
    states = trainable * (6 if precision == "bf16-true" and not zero else 12)
    return whole // (devices if strategy.startswith("zero3") else 1) + states // (devices if zero else 1)


def choose_strategy(name: str, devices: int, have: int, needed: Callable[[str], int]) -> tuple[str, str]:
    """Return the strategy that `name` becomes, and why.

    Args:
        name: as given; auto is the one that is chosen for.
        devices: of all nodes.
        have: bytes of memory of a device; 0 where that is not known.
        needed: strategy -> bytes that a device holds at least.

    Raises UserError where not even weights and states fit.

    """
    reason = ""
    if name == "auto" and devices == 1:
        name, reason = "single", "one device"
    elif name == "auto":
        name, need = "zero2", needed("zero2")
        reason = f"{devices} devices; ZeRO-2 needs {_gb(need)} of weights and states a device"
        if have:
            reason += f", of {_gb(have)}"
            name = "zero3" if need > USABLE * have else name
    if have and name != "zero3_offload" and (need := needed(name)) > have:  # what is offloaded is another memory's
        raise UserError(
            f"strategy={name}: weights and states of the training take at least {_gb(need)} a device, which has "
            f"{_gb(have)}; use strategy=zero3 on more devices or zero3_offload, lora=r16, or a smaller model"
        )
    return name, reason


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
