"""Measurements that a reader can repeat: `python -m bench.decode`, `python -m bench.agreement`."""
