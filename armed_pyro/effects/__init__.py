"""What a fit says of its variables: predictions, comparisons, slopes, means, hypotheses."""
