"""Experts that a model keeps in one 3-D parameter, as one linear layer per expert and matrix.

The model's own code goes on routing, gating and adding up: where it multiplies tokens by a slice of
the parameter, the expert's linear layer is called instead (`stack.py`). How a parameter is used is
found out by watching one window (`watching.py`), never by the name of a class.
"""
