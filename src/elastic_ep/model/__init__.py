"""The model, its paged KV cache, its scheduler and its sampler."""
