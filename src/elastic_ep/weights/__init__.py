"""A model's bytes: from a checkpoint, from peers, and where they lie."""
