"""Measuring on the user's machine: what it is, interleaved timing, and tuning by it."""
