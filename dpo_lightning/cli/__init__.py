"""What the command line needs around a verb: clear errors, a guarded Hydra, a quiet process."""
