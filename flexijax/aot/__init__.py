"""Programs compiled for a GPU that this machine does not have, and what is read from them."""
