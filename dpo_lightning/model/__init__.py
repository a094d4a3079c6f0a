"""The policy, its adapter, the reference and the log-probabilities they give a batch."""
