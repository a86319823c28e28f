"""Runs a recipe: jobs, processes, forecasts; looks after the machine and the study."""
