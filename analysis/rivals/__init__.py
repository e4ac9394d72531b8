"""Models that ARMED is compared with, and the machinery that compares them."""
