"""Whether results can be trusted: known truths, NUTS, calibration, new clusters."""
