"""`MixedEffects`: the joint density, its predictor and its units."""
