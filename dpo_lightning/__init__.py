"""Distributed Direct Preference Optimization on Lightning, Hydra, DeepSpeed and PEFT."""

__version__ = "0.1.0"
