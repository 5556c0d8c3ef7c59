"""Causal attention of a chunk of queries over a dense workspace."""
