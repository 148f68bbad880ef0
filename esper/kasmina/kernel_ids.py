"""The number that stands for a kernel in the arrays of state.

Owns the two-way table between int64 ids and SHA-256 digests. It holds no weights. An id is the
first 63 bits of the digest, so that it is the same number in every process and in every
checkpoint; two kernels that share them are never both in one table.
"""

import re

from esper.errors import KernelError

NO_KERNEL = -1
"""The id of a seed that holds none; no digest gives it."""

ID_BITS = 63
_DIGEST = re.compile("[0-9a-f]{64}")


def kernel_id_of(sha256: str) -> int:
    """The id of a digest of 64 lowercase hex digits, 0 or more and below 2**63.

    Raises:
        KernelError: it is no such digest.
    """
    if not _DIGEST.fullmatch(sha256):
        raise KernelError(f"{sha256[:80]!r} is not a SHA-256 of 64 lowercase hex digits")
    return int(sha256[:16], 16) >> (64 - ID_BITS)


class KernelTable:
    """The kernels that one model has met. Threads may share it: each of its steps is one dict operation."""

    def __init__(self) -> None:
        self._digests: dict[int, str] = {}

    def __getstate__(self) -> dict[str, dict[int, str]]:
        return {"_digests": self._digests.copy()}  # copied in one step: another thread may add while this one pickles

    def __len__(self) -> int:
        return len(self._digests)

    def add(self, sha256: str) -> int:
        """The id of a kernel, which the table knows from now on. Adding it again changes nothing.

        63 bits are few enough for somebody to search for two kernels that share them (2**32 tries
        find a pair), so the second one of a pair is refused, and a seed never shows another's kernel.

        Raises:
            KernelError: not a digest, or another kernel has the id.
        """
        kernel_id = kernel_id_of(sha256)
        known = self._digests.setdefault(kernel_id, sha256)
        if known != sha256:
            raise KernelError(
                f"kernel {sha256} shares its first {ID_BITS} bits with {known}: only one of them can grow"
            )
        return kernel_id

    def sha256_of(self, kernel_id: int) -> str | None:
        """The digest behind an id; None for ``NO_KERNEL`` and for what was never added."""
        return self._digests.get(kernel_id)
