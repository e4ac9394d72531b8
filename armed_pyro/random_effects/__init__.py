"""What a user writes as random effects, their columns, their covariance, their Pyro sites."""
