"""A rank process: control loop, forward thread, slot worker."""
