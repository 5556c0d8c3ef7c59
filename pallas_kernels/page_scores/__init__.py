"""Upper bounds of q.k over pages, from the min and max of their keys."""
