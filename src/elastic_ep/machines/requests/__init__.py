"""Where each request is and what became of it."""
