"""What every machine heard and said, in files that replay reads."""
