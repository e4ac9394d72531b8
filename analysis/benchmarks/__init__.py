"""How fast it is, beside Pyro and hand-written loops, and how the cost grows."""
