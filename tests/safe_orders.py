"""Safety by trying every order, with the blocks as sets."""

import itertools
from collections.abc import Collection, Sequence


def can_all_end(blocks: int, holders: Sequence[tuple[Collection[int], int]]) -> bool:
    """Whether some order brings all to their end.

    blocks: that there are. holders: of each, the blocks that it holds and how many more it may
    need. Each takes what it needs, then gives back all that nobody else holds.
    """

    def free(left):
        return blocks - len(set().union(*(holders[at][0] for at in left)))

    everyone = range(len(holders))
    return free(everyone) >= 0 and any(
        all(holders[at][1] <= free(order[place:]) for place, at in enumerate(order))
        for order in itertools.permutations(everyone)
    )
