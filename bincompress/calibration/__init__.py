"""What a model's linear layers read on a text."""
