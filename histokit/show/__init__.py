"""What is only looked at: figures, panels, the report. No result depends on it, no key holds it."""
