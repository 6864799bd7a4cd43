"""What a stored value is, and what an operation does to it."""
