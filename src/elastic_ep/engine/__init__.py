"""A rank's steps: scheduler, pages, sampler, and one forward pass over the operations of a device."""
