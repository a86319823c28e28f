"""Files, tables, locks, threads, the machine; knows nothing of tiles, runs or models."""
