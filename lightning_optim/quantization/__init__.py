"""Fake-quantized layers, how they are prepared, and how their ranges are found."""
