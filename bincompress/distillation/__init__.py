"""Training a store's coefficients against the unquantized model. PyTorch is imported here only."""
