"""dpo_lightning and TRL side by side: `make bench`, or `python -m benchmarks [workload ...]`."""
