"""The survey: spectra and scores once, ranks for any size from it."""
