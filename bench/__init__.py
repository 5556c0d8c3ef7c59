"""Measurements that a reader can repeat: `python -m bench.compare`, `python -m bench.report`."""
