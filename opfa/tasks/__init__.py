"""Tasks as data: kinds, examples, features, metrics."""
