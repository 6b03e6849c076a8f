"""Fine-tuning with the zeros held."""
