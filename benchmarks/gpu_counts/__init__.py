"""Launches and bytes of every path that ``auto`` takes on a GPU, counted without one."""
