"""Kernels that an examination built, kept until a run wants them: so the kernel builder does not build them again.

Owns bytes in memory, at most ``MAX_BYTES``; what is dropped is built again. Invariant: a kernel is named by all that
its bytes follow from, so a reproposed blueprint never gets the kernel of an older spec.
"""

from esper.services.urza.certification.sandbox_messages import (
    MAX_EXAMINED_BYTES,
    BuiltKernel,
    Examination,
    ExamineJob,
    KernelHeader,
    WantedKernel,
)
from esper.services.urza.lru_cache import LruCache

MAX_BYTES = 64 * 1024 * 1024


class ExaminedKernels:
    """Kernels by blueprint, spec, kind of layer and width. All of one process have the same kernel seed."""

    def __init__(self) -> None:
        self._kernels: LruCache[tuple[str, str, str, int], BuiltKernel] = LruCache(MAX_BYTES, MAX_EXAMINED_BYTES)

    def keep(self, job: ExamineJob, examination: Examination) -> None:
        """Keep the kernels of a blueprint that passed its examination."""
        spec = job.spec.model_dump_json()
        for kernel in examination.kernels:
            header = KernelHeader(num_parameters=kernel.num_parameters, size=len(kernel.data))
            key = (job.blueprint_id, spec, kernel.target, kernel.num_features)
            self._kernels.put(key, BuiltKernel(header, kernel.data), len(kernel.data))

    def take(self, wanted: WantedKernel) -> BuiltKernel | None:
        """Remove a kernel and return it; None where no examination built it."""
        return self._kernels.pop(
            (wanted.blueprint_id, wanted.spec.model_dump_json(), wanted.target, wanted.num_features)
        )
