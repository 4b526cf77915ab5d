"""The control plane: processes, sockets, threads."""
