"""What several methods share: codebooks, error compensation, coefficients."""
