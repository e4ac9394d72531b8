"""`MixedEffects`: the joint density, its predictor, its derivatives and its units."""
