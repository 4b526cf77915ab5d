"""Text that follows a grammar: what a client may ask for, checked, and which tokens may come next. No torch, no IO."""
