"""Triton helpers that several operations share. Importing this package imports no Triton."""
