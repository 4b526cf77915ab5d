"""The operations on the CPU, in plain torch."""
