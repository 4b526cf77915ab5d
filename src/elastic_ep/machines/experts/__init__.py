"""Where each expert lies: placement, repair, planner."""
