"""What a fitted network uses: features, layers, images."""
