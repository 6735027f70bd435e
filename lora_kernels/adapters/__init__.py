"""The adapter as a value, and the initial values of its factors."""
