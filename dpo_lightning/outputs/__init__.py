"""What a person takes away from a run: adapter or weights, model card, report, comparison."""
