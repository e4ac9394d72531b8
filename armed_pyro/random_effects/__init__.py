"""Random effects: the terms that a user writes, their columns, covariance and Pyro sites."""
