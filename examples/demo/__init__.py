"""The parts of `examples/finetune_demo.py`, in the order in which they run.

settings, base, texts, train, adapters, generate, step_cost, report; `run` puts them together.
"""
