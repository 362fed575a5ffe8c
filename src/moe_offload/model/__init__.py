"""The transformers model around the experts: loading, attention, generation, tokenization."""
