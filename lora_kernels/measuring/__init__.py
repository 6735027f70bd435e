"""Measuring on the user's machine: what it is, and interleaved timing."""
