"""From predictions to a verdict, and what this data can show at all."""
