"""Decoder models, their weights and their tokenizers."""
