"""The passes that carry out a recipe."""
