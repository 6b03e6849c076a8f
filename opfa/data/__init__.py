"""Rows of files, and their order."""
