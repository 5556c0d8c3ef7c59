"""The scheduler step of a rerank: which pages come into which slots, and what is counted."""
