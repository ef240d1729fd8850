"""What a model is worth on tasks: how likely it finds given answers, and what it writes."""
