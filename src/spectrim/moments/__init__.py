"""Calibration statistics: second moments of inputs and of output gradients."""
