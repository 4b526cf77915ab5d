"""What Mooncake EP 0.3.14 asks of a machine and a model. No torch: the run process checks it before any rank exists."""

CUDA_WHEEL = "mooncake-transfer-engine-cuda13"
CPU_WHEEL = "mooncake-transfer-engine-non-cuda"
"""It has no EP. Both own the import name `mooncake`."""
HIDDEN_MULTIPLE = 128
EXPERTS_MULTIPLE = 2
"""Of a group's physical experts. HAZARD: with an odd number of them the kernels end with a misaligned address."""
