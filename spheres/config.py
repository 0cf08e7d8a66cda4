"""What a node must know of its run: one frozen dataclass, and its form on the wire."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from spheres.errors import DecodeError, GradientError
from spheres.sampling import Sampler
from spheres.tensors import Manifest, TensorSpec
from spheres.v1 import common_pb2, control_pb2

__all__ = ["MAX_MESSAGE_BYTES", "PROTOCOL_VERSION", "NodeConfig", "manifest_from_proto", "manifest_to_proto"]

#: raised when nodes of today and tomorrow could not work in one tree
PROTOCOL_VERSION = 1

#: no message on the wire is larger, 1.1 MiB: a chunk of at most 1 MiB and what goes around it
MAX_MESSAGE_BYTES = 1_153_433

#: Bytes of all metrics of some sums, and of each besides its name. In steps of very many microbatches it is less: they
#: share a message with a chunk and who computed what, which is up to 24 bytes for each microbatch.
_MOST_METRICS, _METRIC_BYTES = 32_768, 16

#: sums that wait in the shared memory of one node for its parent, per block
_SHARED_WINDOW_BYTES = 64 << 20


@dataclass(frozen=True)
class NodeConfig:
    """The run as a node sees it, control included."""

    #: the run
    run_id: str
    #: layout of the model
    manifest: Manifest
    #: built-in name or module:attribute
    task: str = ""
    #: options of the task
    task_options: Mapping[str, str] = field(default_factory=dict)
    #: seed of shuffle and task randomness
    seed: int = 0
    #: samples per step over all spheres
    batch_size: int = 64
    #: M, microbatches per step
    microbatches: int = 16
    #: slices of the test split per evaluation
    evaluation_microbatches: int = 16
    #: samples of the train split
    train_size: int = 0
    #: samples of the test split
    test_size: int = 0
    #: bytes per chunk, a multiple of 64
    chunk_bytes: int = 1 << 20
    #: W, chunks that may be in flight beyond the frontier (N6)
    window: int = 4
    #: control's fingerprint of the task
    task_fingerprint: str = ""
    #: control's fingerprint of the data
    data_fingerprint: str = ""
    #: seconds between heartbeats
    heartbeat_seconds: float = 1.0
    #: seconds without any progress after which a peer counts as stuck
    patience_seconds: float = 5.0
    #: most children of one node
    fan_out: int = 12
    #: a microbatch that is not finite is left out and told of; else it is a failure of the task (N16)
    skips_nonfinite: bool = False
    #: "auto", "inline" or "shm"
    wire: str = "auto"
    #: what gradients are rounded to at every canonical node, "float32" or "bfloat16" (N21)
    gradient_dtype: str = "float32"
    #: what weights are rounded to before spheres see them, "float32" or "bfloat16" (N21)
    weights_dtype: str = "float32"
    #: whether this node records what it does
    trace: bool = False

    @cached_property
    def chunk_elements(self) -> int:
        """Elements of a chunk: no more than ``chunk_bytes`` hold in the wider of the two types on the wire (N2)."""
        return self.chunk_bytes // (2 if self.gradient_dtype == self.weights_dtype == "bfloat16" else 4)

    def elements(self, first: int, last: int) -> int:
        """Return the elements of chunks ``first`` to ``last``; the last one of all may be short (N2)."""
        return min((last + 1) * self.chunk_elements, self.manifest.size) - first * self.chunk_elements

    @cached_property
    def shared_window(self) -> int:
        """W of an edge whose payload lies in shared memory: what waits there is nobody's copy."""
        return max(self.window, min(self.chunk_count, _SHARED_WINDOW_BYTES // self.chunk_bytes))

    @cached_property
    def chunk_count(self) -> int:
        return self.manifest.chunk_count(self.chunk_elements)

    @cached_property
    def sampler(self) -> Sampler:
        return Sampler(seed=self.seed, size=self.train_size, batch_size=self.batch_size, microbatches=self.microbatches)

    def check_metrics(self, names: Collection[str], whose: str) -> None:
        """Raise GradientError where metrics of these names take more room than a message has for those of a step."""
        most = min(_MOST_METRICS, MAX_MESSAGE_BYTES - self.chunk_bytes - 24 * self.microbatches - 2_048)
        size = sum(len(name.encode()) + _METRIC_BYTES for name in names)
        if size > most:
            raise GradientError(
                f"{whose} {len(names):,} metrics, {size:,} bytes of names and values; a message has room for "
                f"{most:,}: give fewer metrics, the same ones for every microbatch, or shorter names"
            )

    def to_proto(self) -> control_pb2.SphereConfiguration:
        message = control_pb2.SphereConfiguration(
            run_id=self.run_id,
            task=self.task,
            task_options=dict(self.task_options),
            seed=self.seed,
            batch_size=self.batch_size,
            microbatches_count=self.microbatches,
            evaluation_microbatches_count=self.evaluation_microbatches,
            train_size=self.train_size,
            test_size=self.test_size,
            manifest=manifest_to_proto(self.manifest),
            chunk_bytes=self.chunk_bytes,
            window_chunks=self.window,
            task_fingerprint=self.task_fingerprint,
            data_fingerprint=self.data_fingerprint,
            fan_out=self.fan_out,
            skips_nonfinite=self.skips_nonfinite,
            gradient_dtype=_DTYPES[self.gradient_dtype],
            weights_dtype=_DTYPES[self.weights_dtype],
            wire=_WIRES[self.wire],
            trace=self.trace,
        )
        message.heartbeat_interval.FromNanoseconds(round(self.heartbeat_seconds * 1e9))
        message.patience.FromNanoseconds(round(self.patience_seconds * 1e9))
        return message

    @classmethod
    def from_proto(cls, message: control_pb2.SphereConfiguration) -> NodeConfig:
        return cls(
            run_id=message.run_id,
            manifest=manifest_from_proto(message.manifest),
            task=message.task,
            task_options=dict(message.task_options),
            seed=message.seed,
            batch_size=message.batch_size,
            microbatches=message.microbatches_count,
            evaluation_microbatches=message.evaluation_microbatches_count,
            train_size=message.train_size,
            test_size=message.test_size,
            chunk_bytes=message.chunk_bytes,
            window=message.window_chunks,
            task_fingerprint=message.task_fingerprint,
            data_fingerprint=message.data_fingerprint,
            heartbeat_seconds=message.heartbeat_interval.ToNanoseconds() / 1e9,
            patience_seconds=message.patience.ToNanoseconds() / 1e9,
            fan_out=message.fan_out,
            skips_nonfinite=message.skips_nonfinite,
            wire=_named(_WIRES, message.wire, "auto", "wire"),
            gradient_dtype=_named(_DTYPES, message.gradient_dtype, "float32", "type on the wire"),
            weights_dtype=_named(_DTYPES, message.weights_dtype, "float32", "type on the wire"),
            trace=message.trace,
        )


_WIRES = {"auto": control_pb2.WIRE_AUTO, "inline": control_pb2.WIRE_INLINE, "shm": control_pb2.WIRE_SHM}
_DTYPES = {"float32": control_pb2.WIRE_DTYPE_FLOAT32, "bfloat16": control_pb2.WIRE_DTYPE_BFLOAT16}


def _named(names: Mapping[str, int], number: int, default: str, what: str) -> str:
    """Return the name of an enum's number. Raises DecodeError for one that is not known here."""
    if number == 0:
        return default
    for name, value in names.items():
        if value == number:
            return name
    raise DecodeError(f"{what} {number} is not known here; install the same release on both")


def manifest_to_proto(manifest: Manifest) -> common_pb2.Manifest:
    """Return the manifest's message."""
    tensors = [common_pb2.Tensor(name=s.name, shape=s.shape, offset=s.offset, dtype=s.dtype) for s in manifest.tensors]
    return common_pb2.Manifest(tensors=tensors, digest=manifest.digest)


def manifest_from_proto(message: common_pb2.Manifest) -> Manifest:
    """Return the manifest. Raises DecodeError where its digest does not fit what it says."""
    manifest = Manifest(tuple(TensorSpec(t.name, tuple(t.shape), t.offset, t.dtype) for t in message.tensors))
    if not manifest.tensors or manifest.digest != message.digest:
        raise DecodeError("the manifest does not fit its digest")
    return manifest
