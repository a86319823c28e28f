"""Networks that look at tiles: encoders, their cached features, classifiers."""
