"""Losses and metrics: pure functions on tensors."""
