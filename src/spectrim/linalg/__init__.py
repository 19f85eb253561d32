"""Pure tensor algebra: positive semi-definite matrices, truncation, least squares, pivoting.

Tensors in, tensors out; fp64 inside; no inverse anywhere. Import from the files of this room.
"""

__all__: list[str] = []
