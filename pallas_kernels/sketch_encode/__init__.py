"""Sketches of pages that have just filled up, from the keys where they lie."""
