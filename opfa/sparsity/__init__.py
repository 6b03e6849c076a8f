"""What a zero is, and how it is held."""
