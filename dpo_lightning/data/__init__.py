"""Rows -> pairs -> token ids -> batches."""
