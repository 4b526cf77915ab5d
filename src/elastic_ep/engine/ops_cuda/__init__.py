"""The engine on a GPU: the kernels of model/kernels/, decode steps in CUDA graphs, one wait for the device a step."""
