"""Files on disk: written whole or not at all, sealed, checked before they are read."""
