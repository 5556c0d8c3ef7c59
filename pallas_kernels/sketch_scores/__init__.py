"""Page scores from key sketches: every key element in 1, 2 or 4 bits."""
