"""Refinement as steps of a run: recipe in, trained layers and report entries out."""
