"""What both kinds of training share: engine, resume points, run directories."""
