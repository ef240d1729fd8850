"""What a packed tensor is, and how it becomes weights again."""
