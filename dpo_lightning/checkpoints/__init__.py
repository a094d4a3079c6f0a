"""Checkpoints: written aside and published by one rename, verified before they are read, deleted with care."""
