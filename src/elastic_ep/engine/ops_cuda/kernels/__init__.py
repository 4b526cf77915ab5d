"""Triton kernels of the forward pass, for NVIDIA GPUs. One idea a file.

All take bfloat16 or float32 and accumulate in float32. All may be captured in a CUDA graph: nothing is read back, every
allocation follows from shapes, and what changes between steps (tables, masks, counts, lengths) is read from device
memory. Call each once with the shapes to come before capturing it: the first call compiles, for alignment and for
sizes that are 1 or divisible by 16 apart.

A row's bits depend neither on the other rows nor on where the row lies: what a reduction runs over is cut into blocks
of a fixed size, whatever the batch. `expert_ffn.py` and `paged_attention.py` say how.
"""
