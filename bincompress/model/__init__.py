"""The decoder and what surrounds it: configuration, weights, cache, tokenizer, chat template, sampling."""
