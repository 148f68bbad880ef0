"""AccessPatterns: which kernels a model asks for, and which one after which.

Learns from lookups alone. Not thread-safe: the cache calls it under its lock. Plain data in
and out, so that one run's lookups can be the next run's predictions. Invariant: it remembers
at most ``MAX_KERNELS_REMEMBERED`` kernels, and of each at most ``MAX_SUCCESSORS``.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from esper.errors import ContractError

MAX_KERNELS_REMEMBERED = 1024
MAX_SUCCESSORS = 8
UNKNOWN_SIZE = -1
MAX_COUNT = 64  # counts are halved here: what was true long ago must not outvote what is true now
MIN_SHARE = 0.5  # a successor is predicted when it came next at least this often
FORMAT = "esper-kernel-patterns-1"


@dataclass(slots=True)
class _Habit:
    size_bytes: int = UNKNOWN_SIZE
    uses: int = 0
    followed_by: dict[str, int] = field(default_factory=dict)


class AccessPatterns:
    """Counts of lookups and of what was looked up next; a kernel asked for again and again counts once."""

    def __init__(self) -> None:
        self._habits: OrderedDict[str, _Habit] = OrderedDict()  # the longest unused first
        self._last: str | None = None

    def learn(self, key: str) -> None:
        """``key`` was looked up."""
        if key == self._last:
            return
        habit = self._habits.get(key)
        if habit is None:
            habit = self._habits[key] = _Habit()
        else:
            self._habits.move_to_end(key)
        habit.uses += 1
        before = self._habits.get(self._last) if self._last is not None else None
        self._last = key
        if before is not None:
            _count(before.followed_by, key)
        if habit.uses >= MAX_COUNT:
            for other in self._habits.values():
                other.uses = -(-other.uses // 2)
        if len(self._habits) > MAX_KERNELS_REMEMBERED:
            self._habits.popitem(last=False)

    def note_size(self, key: str, size_bytes: int) -> None:
        """What fetching ``key`` brings in, in bytes."""
        if key in self._habits:
            self._habits[key].size_bytes = size_bytes

    def predictions(self, after: str | None) -> list[tuple[str, int]]:
        """(kernel, its bytes or ``UNKNOWN_SIZE``) worth having, the likeliest first.

        After a kernel: what came next at least half the time. After None, at the start of a run:
        all that runs before asked for.
        """
        if after is None:
            found = sorted(self._habits, key=lambda k: -self._habits[k].uses)
        else:
            followed_by = self._habits[after].followed_by if after in self._habits else {}
            least = MIN_SHARE * sum(followed_by.values())
            found = [k for k, n in sorted(followed_by.items(), key=lambda f: -f[1]) if n >= least]
        return [(k, self._habits[k].size_bytes) for k in found if k in self._habits]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        habits = {k: [h.size_bytes, h.uses, h.followed_by] for k, h in self._habits.items()}
        return {"format": FORMAT, "kernels": habits}

    def load_dict(self, saved: Mapping[str, Any]) -> None:
        """The inverse of ``to_dict``.

        Raises:
            ContractError: it is not what ``to_dict`` gives; nothing changed.
        """
        try:
            if saved["format"] != FORMAT:
                raise ValueError(f"format {saved['format']!r}")
            habits = OrderedDict(
                (str(k), _Habit(int(size), int(uses), {str(f): int(n) for f, n in followed_by.items()}))
                for k, (size, uses, followed_by) in list(saved["kernels"].items())[-MAX_KERNELS_REMEMBERED:]
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ContractError(f"these are no kernel access patterns: {error!r}") from error
        self._habits, self._last = habits, None


def _count(followed_by: dict[str, int], key: str) -> None:
    followed_by[key] = followed_by.get(key, 0) + 1
    if followed_by[key] >= MAX_COUNT:
        for other in followed_by:
            followed_by[other] = -(-followed_by[other] // 2)
    if len(followed_by) > MAX_SUCCESSORS:
        others = [k for k in followed_by if k != key]
        del followed_by[min(others, key=followed_by.__getitem__)]
