"""How many data connections to keep ready: one pure function, and its numbers."""

SHRINK_BELOW = 0.2  # share of the capacity created in an interval under which the pool shrinks,
GROW_ABOVE = 0.8  # and over which it grows
SHRINK_BY = 0.8
GROW_BY = 2


def next_capacity(capacity: int, created: int, found_empty: bool, lowest: int, highest: int) -> int:
    """The capacity after an interval in which `created` connections were made.

    Over 80 % of the capacity, or a session that found the pool empty: double. Under 20 %: a fifth less. Always between
    `lowest` and `highest`.
    """
    if found_empty or created > GROW_ABOVE * capacity:
        capacity *= GROW_BY
    elif created < SHRINK_BELOW * capacity:
        capacity = int(capacity * SHRINK_BY)
    return max(lowest, min(highest, capacity))
