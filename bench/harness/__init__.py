"""Tasks and an adapter for lm-evaluation-harness."""
