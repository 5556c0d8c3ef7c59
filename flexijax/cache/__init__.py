"""The two-tier cache: arrays in both memories, blocks, moves, reranks."""
