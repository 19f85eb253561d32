"""The last stages: every target in its stored form, and the folder."""
