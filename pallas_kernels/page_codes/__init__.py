"""Pages in 4 or 8 bits an element: the oracle of `pallas_kernels/codes.py`."""
