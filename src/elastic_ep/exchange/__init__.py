"""The data plane: hidden states to experts and back, every MoE layer."""
