"""Ranks, signals and faults: what several processes on machines that fail need to act as one."""
