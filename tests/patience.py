"""How long a test waits before it says that something hangs: no busy machine is so slow, and no test may fail because one is."""

HANGS = 900  # seconds
