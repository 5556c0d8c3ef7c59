"""Which pages of each head are attended: ranks from scores, what is always kept, the best."""
