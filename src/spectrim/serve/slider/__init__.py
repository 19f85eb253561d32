"""The compression slider: a local page that shows what every size of an elastic model writes."""
