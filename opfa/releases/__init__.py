"""A finished run for others: rounded, verified, with a card."""
