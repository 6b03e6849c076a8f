"""Sub-networks by several aims."""
