"""opfa inside other people's loops and loaders."""
