"""What changes the weights of a generator: the loop, textual inversion, LoRA, a base from scratch."""
