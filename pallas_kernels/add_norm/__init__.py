"""A residual sum and its RMS norm, the sum taken over the parts that a matrix product comes in."""
