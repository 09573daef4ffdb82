"""The lock of a study and of its trials."""

from metahpo.runs.lock import FileLock as FileLock
