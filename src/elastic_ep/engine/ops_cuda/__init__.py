"""The engine on a GPU: the kernels of kernels/, decode steps in CUDA graphs, one wait for the device a step."""
