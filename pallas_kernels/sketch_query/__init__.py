"""Queries made ready for products with key codes: rotated and rounded as `sketches` says."""
