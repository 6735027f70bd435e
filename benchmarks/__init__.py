"""Measurements, from the tree's root: `python -m benchmarks` lists them.

driver.py      one driver for every benchmark: options, repetitions, rows
report.py      JSON lines, and the tables made from them
provenance.py  where a row comes from; ceilings.py how fast the machine is at its best
memory.py      bytes saved for backward, peak memory of a step
preparing.py   who can be timed, and why the others cannot
naive.py       LoRA as one writes it

op.py          one lora_linear call, forward and backward; op_providers.py who competes
step.py        one training step of a Llama; step_providers.py
routed.py      one layer with many adapters in one batch; routed_providers.py
infer.py       a whole model at inference; infer_providers.py, infer_serving.py, infer_report.py
layer.py       one training step of a decoder layer in plain torch
kernel.py      forward calls alone: decoding, and the GEMMs with a tail
gpu.py         the cells of a GPU in order of worth; cells.py which
readme.py      the pages' tables from the results; plot.py their plot

gpu_counts/    launches and bytes on a GPU, counted without one
same_bits.py, eager_overhead.py, house.py, residents.py: two trees, or one, by script
"""
