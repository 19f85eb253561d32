"""The flow `learned`, and models of any size."""
