"""spectrim: make large language models smaller by low-rank (SVD) compression."""

__version__ = "0.1.0"
