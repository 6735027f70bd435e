"""The harness behind `python -m lora_kernels bench` and `tune`; nothing else imports it.

memory.py     bytes saved for backward, peak memory of a step
providers.py  who competes, in the op and in the training step
op.py         one lora_linear call, forward and backward
step.py       one training step of a Llama
layer.py      one training step of a decoder layer in plain torch
case.py       what is measured: sizes and dtypes of each kind of benchmark
rows.py       everything that is measured of one case
kernel.py     forward calls alone: decoding, and the GEMMs with a tail
routed.py     one layer with many adapters in one batch; routed_providers.py who competes
replay.py     several calls as one, by the replay of a CUDA graph
cells.py      which calls are measured on a GPU: the core and the grid
grid.py       the grid, resumable
tune.py       what auto may take on this GPU, and the tiles
gpu_check.py  make gpu-check: sections, processes, time limits
gpu_units.py  what each section does
gpu_report.py its report
report.py     JSON lines, and the tables and plots made from them
cli.py        the command line
"""
