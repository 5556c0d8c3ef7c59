"""Full pages in 4 or 8 bits an element, see `xla.py`."""
