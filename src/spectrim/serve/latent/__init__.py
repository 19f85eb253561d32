"""A key-value cache that holds what compressed projections pass on instead of whole heads."""
