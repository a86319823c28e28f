"""The parts of a latent diffusion model, what is loaded on top of it, and the walk through noise."""
