"""What is in a store, for people and programs to read."""
