"""What processes tell each other, and the sockets that carry it."""
