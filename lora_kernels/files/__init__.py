"""Adapter files: PEFT's directories read and written. Operations do not know this package."""
