"""The door to transformers: encoders loaded, checked and saved."""
