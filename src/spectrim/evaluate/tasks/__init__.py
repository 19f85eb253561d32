"""A small offline task set: minimal pairs of English sentences, made from our own templates."""
