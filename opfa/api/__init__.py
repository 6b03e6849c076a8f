"""What `import opfa` gives: every command as a function."""
