"""What benches share, and the processes that they start. The commands are one folder up."""
