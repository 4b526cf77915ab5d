"""What Mooncake EP 0.3.14 asks of a machine and a model. No torch: the run process checks it before any rank exists."""

CUDA_WHEEL = "mooncake-transfer-engine-cuda13"
CPU_WHEEL = "mooncake-transfer-engine-non-cuda"
"""It has no EP. Both own the import name `mooncake`."""
HIDDEN_MULTIPLE = 128
EXPERTS_MULTIPLE = 2
"""Of a group's physical experts; each rank has an empty slot more where it takes that. Without it steps failed in the
kernels."""
