"""The whole method on a small model."""
