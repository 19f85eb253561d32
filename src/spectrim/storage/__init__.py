"""Results on disk: the Hugging Face round trip, folders, cards, and reading headers."""
