"""Put sequences of unequal length together into bins of one size.

Best-fit decreasing (Johnson, 1973): the longest first, each into the fullest bin that still has
room for it. Never more than 11/9 of the fewest bins possible, and in practice nearly all slots full
(Ding et al., 2024, arXiv:2404.10830).
"""

from bisect import bisect_left, insort

import numpy as np
from numpy.typing import NDArray


def pack(lengths: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """Which sequences share a bin: numbers of the sequences of each, longest first.

    Args:
        lengths: (N,) tokens of each sequence, none above `size`.
        size: tokens that a bin holds.

    Returns:
        The bins, the fullest kinds first; the same for the same lengths.
    """
    order = np.argsort(-lengths, kind="stable")
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # ascending, each once
    for number, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        place = bisect_left(rooms, length)
        if place == len(rooms):
            chosen, room = len(bins), size
            bins.append([])
        else:
            room = rooms[place]
            chosen = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        bins[chosen].append(number)
        left = room - length
        if left > 0:
            if left not in with_room:
                with_room[left] = []
                insort(rooms, left)
            with_room[left].append(chosen)
    return [np.array(numbers, dtype=np.int64) for numbers in bins]
