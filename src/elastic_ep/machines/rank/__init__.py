"""What a rank decides by itself."""
