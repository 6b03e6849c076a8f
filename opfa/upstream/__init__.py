"""Pre-training: corpora, teachers, sparse students."""
