"""The state plane: weights from peers."""
