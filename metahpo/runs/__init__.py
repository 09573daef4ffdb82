"""A run's folder: its lock, its files, and what its numbers depend on. Nothing here loads torch."""
