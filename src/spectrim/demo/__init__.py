"""The bundled model, its calibration text and its held-out text; nothing here needs a network."""
