"""Training steps of any loss: compiled, shared by processes, scheduled and checkpointed."""
