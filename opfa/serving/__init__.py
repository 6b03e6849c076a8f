"""Models behind HTTP: a server, archives for SageMaker."""
