"""From a finished store to text and figures."""
