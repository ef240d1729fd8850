"""A store as a file of another program: GGUF."""
