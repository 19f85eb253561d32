"""Compressed linear layers, what each looks like on disk, and swapping them in and out."""
