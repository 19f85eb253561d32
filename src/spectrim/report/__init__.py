"""Figures that can be read in black and white, tables, and one self-contained HTML page."""
