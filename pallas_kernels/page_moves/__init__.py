"""Pages between the device tier and the host tier. Staged moves are in `flexijax.cache.tiers`."""
