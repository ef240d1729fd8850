"""Where a model comes from: a checkpoint folder or the Hub, and a text."""
