"""The harness behind `python -m lora_kernels bench` and `tune`; nothing else imports it.

memory.py     bytes saved for backward, peak memory of a step
providers.py  who competes, in the op and in the training step
op.py         one lora_linear call, forward and backward
step.py       one training step of a Llama
layer.py      one training step of a decoder layer in plain torch
case.py       everything that is measured of one case
cells.py      which calls are measured on a GPU: the core and the grid
grid.py       the grid, resumable
tune.py       what auto may take on this GPU, and the tiles
gpu_check.py  make gpu-check: sections, processes, time limits
gpu_units.py  what each section does
gpu_report.py its report
report.py     JSON lines, and the tables and plots made from them
cli.py        the command line
"""
