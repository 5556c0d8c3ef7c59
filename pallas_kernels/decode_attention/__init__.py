"""A decode step's attention of one layer: a new token into each store, then over all of it."""
