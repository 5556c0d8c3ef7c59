"""Measuring on text which KV heads of a model are stable."""
