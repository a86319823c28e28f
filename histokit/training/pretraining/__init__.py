"""Pre-training: autoencoders, diffusion models and encoders from many tiles, before any experiment; how `mini` was made."""
