"""Draw the items of one split from a generator of numbered items."""

from __future__ import annotations

from collections.abc import Callable

from persea.tasks.task import Split, TaskItem, assign_split

# Item seeds are number * stride + seed: sets of different seeds do not overlap.
ITEM_SEED_STRIDE = 1_000_003
TRIES_PER_ITEM, EXTRA_TRIES = 60, 1000  # so that the search ends when a task has fewer than n items


def draw_items(
    make_item: Callable[[int], tuple[str, TaskItem]],
    split: Split,
    n: int,
    seed: int,
    split_key: Callable[[str], str] = str,
) -> tuple[TaskItem, ...]:
    """Draw at most n different items of a split.

    Args:
        make_item: Item seed -> (key, item). Two items with one key are the same question.
        split: The split to draw from.
        n: How many items to draw.
        seed: Decides which items are drawn, and their order.
        split_key: Item key -> the text whose hash assigns the split; the key itself by default.

    Returns:
        n items, or all that were found in 60 n + 1000 tries.
    """
    items: dict[str, TaskItem] = {}
    for number in range(TRIES_PER_ITEM * n + EXTRA_TRIES):
        if len(items) == n:
            break
        key, item = make_item(number * ITEM_SEED_STRIDE + seed)
        if assign_split(split_key(key)) is split:
            items.setdefault(key, item)
    return tuple(items.values())
