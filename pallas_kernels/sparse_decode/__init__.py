"""Attention of one query token over chosen pages, or over a head's own slots."""
