"""AccessPatterns: which kernels a model asks for, and which one after which.

Learns from lookups alone, in constant time. What comes next is kept as the vote of Boyer and
Moore ("MJRTY: a fast majority vote algorithm", 1981): one candidate a kernel, voted for when it
came next and against when another did; no list of successors to keep or to search.

Not thread-safe: the cache calls it under its lock. Plain data in and out, so that one run's
lookups can be the next run's predictions. Invariant: it remembers at most
``MAX_KERNELS_REMEMBERED`` kernels, those looked up last.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from esper.errors import ContractError

MAX_KERNELS_REMEMBERED = 1024
MAX_VOTES = 8  # so that a new habit outvotes an old one in as many lookups
MIN_VOTES = 2  # once may be chance
UNKNOWN_SIZE = -1
FORMAT = "esper-kernel-patterns-1"


class _Habit:
    __slots__ = ("following", "size_bytes", "votes")

    def __init__(self, size_bytes: int = UNKNOWN_SIZE, following: str = "", votes: int = 0) -> None:
        self.size_bytes = size_bytes
        self.following = following
        self.votes = votes


class AccessPatterns:
    """What was looked up, and what was looked up next; a kernel asked for again and again counts once."""

    def __init__(self) -> None:
        self._habits: OrderedDict[str, _Habit] = OrderedDict()  # the longest unused first
        self._last: str | None = None
        self._last_habit = _Habit()

    def learn(self, key: str) -> None:
        """``key`` was looked up."""
        if key == self._last:
            return
        before = self._last_habit
        if before.following == key:
            if before.votes < MAX_VOTES:
                before.votes += 1
        elif before.votes:
            before.votes -= 1
        else:
            before.following, before.votes = key, 1
        habit = self._habits.get(key)
        if habit is not None:
            self._habits.move_to_end(key)
        else:
            habit = self._habits[key] = _Habit()
            if len(self._habits) > MAX_KERNELS_REMEMBERED:
                self._habits.popitem(last=False)
        self._last, self._last_habit = key, habit

    def note_size(self, key: str, size_bytes: int) -> None:
        """What fetching ``key`` brings in, in bytes."""
        if key in self._habits:
            self._habits[key].size_bytes = size_bytes

    def predictions(self, after: str | None) -> list[tuple[str, int]]:
        """(kernel, its bytes or ``UNKNOWN_SIZE``) worth having, the likeliest first.

        After a kernel: what came next as a rule. After None, at the start of a run: all that runs
        before asked for, the latest first.
        """
        if after is None:
            return [(key, habit.size_bytes) for key, habit in reversed(self._habits.items())]
        habit = self._habits.get(after)
        if habit is None or habit.votes < MIN_VOTES or habit.following not in self._habits:
            return []
        return [(habit.following, self._habits[habit.following].size_bytes)]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        access_history = {key: [h.size_bytes, h.following, h.votes] for key, h in self._habits.items()}
        return {"format": FORMAT, "kernels": access_history}

    def load_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what ``to_dict`` gave; what is known here already stays as it is.

        Raises:
            ContractError: it is not what ``to_dict`` gives; nothing changed.
        """
        try:
            if saved["format"] != FORMAT:
                raise ValueError(f"format {saved['format']!r}")
            access_history = OrderedDict(
                (str(key), _Habit(int(size_bytes), str(following), int(votes)))
                for key, (size_bytes, following, votes) in list(saved["kernels"].items())[-MAX_KERNELS_REMEMBERED:]
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ContractError(f"these are no kernel access patterns: {error!r}") from error
        for key in self._habits:
            access_history.pop(key, None)  # so that the update puts it last
        access_history.update(self._habits)
        while len(access_history) > MAX_KERNELS_REMEMBERED:
            access_history.popitem(last=False)
        self._habits = access_history
