"""How many devices a run has, and which strategy `auto` becomes on them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch

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


def memory_of_device(accelerator: str, on_this_node: int) -> int:
    """Return the bytes of memory that a device has for itself."""
    if on_cuda(accelerator):
        return min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // max(1, on_this_node)


def state_bytes(weights: int, trainable: int, copies: int, bytes_per_weight: int, devices: int) -> int:
    """Return the bytes that a device holds under ZeRO-2: its weights whole, its share of the training's states.

    For each trainable weight the states are a gradient, a float32 master copy and Adam's two moments, 16 bytes at most
    (ZeRO, https://arxiv.org/abs/1910.02054, section 3.1). `copies` is 2 where a frozen reference lies beside it.
    """
    return weights * copies * bytes_per_weight + 16 * trainable // devices


def choose_strategy(name: str, devices: int, memory: Callable[[], int], needed: Callable[[], int]) -> tuple[str, str]:
    """Return the strategy that `name` becomes, and why; both memory sizes, in bytes, are asked for if they matter."""
    if name != "auto":
        return name, ""
    if devices == 1:
        return "single", "one device"
    have, need = memory(), needed()
    sizes = f"{need / 1e9:.1f} GB of weights and states a device, of {have / 1e9:.1f} GB"
    return ("zero3" if need > USABLE * have else "zero2"), f"{devices} devices; ZeRO-2 needs {sizes}"
