"""Sizes of the pieces that loops work on."""


def largest_divisor(size: int, limit: int) -> int:
    """The greatest divisor of `size` that is at most `limit`; both at least 1.

    1280, 512 -> 320
    """
    return next(piece for piece in range(min(size, limit), 0, -1) if size % piece == 0)
