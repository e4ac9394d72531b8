"""Training steps of any loss: taken, compiled, shared, scheduled and checkpointed."""
