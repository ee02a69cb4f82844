"""Strategy presets."""
