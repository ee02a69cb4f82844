"""Removal of whole blocks: stacks are found, candidates judged, and blocks removed from a live model."""
