"""What a decoder is: its blocks, targets and groups, and how to run it block by block.

Nothing is imported here, so that the plain records of `anatomy` stay cheap to load.
"""

__all__: list[str] = []
