"""Which synthetic tiles are worth training on: scores, cuts, a person's eye, what may leave the house."""
