"""The compared trainings: which tiles, how they are trained, what they predicted."""
