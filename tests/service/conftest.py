"""What tests of one edge share: a small training, its gradient by a plain loop, and how a child's frames are made."""

from dataclasses import dataclass

import numpy as np
import pytest

from control.config import RunConfig
from control.initial import initial_weights, node_config
from spheres.blocks import Block, halves
from spheres.config import NodeConfig
from spheres.numerics import add_sums, crc32c
from spheres.testing.synthetic import Synthetic
from spheres.v1 import common_pb2
from spheres.v1 import work_pb2 as pb
from spheres.worker import Computer, limit_threads


@dataclass
class Small:
    """4 microbatches, 3 chunks of 4 KiB, window 2: credit matters, and so does the order of the sums."""

    config: NodeConfig
    task: Synthetic
    flat: np.ndarray

    def gradient(self, block=None):
        """The canonical sum over a block of step 0, and its sums."""
        block = block or Block(0, self.config.microbatches)
        if block.width == 1:
            out = np.zeros(self.config.manifest.size, np.float32)
            views = self.config.manifest.views(self.flat, writeable=False)
            return out, Computer(self.config, self.task).gradient(views, 0, block.lo, out)
        (left, left_sums), (right, right_sums) = (self.gradient(half) for half in halves(block))
        return left + right, add_sums(left_sums, right_sums)

    def header(self, block, digest):
        _, sums = self.gradient(block)
        return pb.GradientHeader(
            block=pb.Block(lo=block.lo, hi=block.hi),
            weights_digest=digest,
            samples_count=sums.count,
            loss_sum=sums.loss,
            metrics=[common_pb2.MetricSum(name=name, value=value) for name, value in sums.metrics.items()],
        )

    def chunk(self, block, index):
        data = self.slice_of(self.gradient(block)[0], index)
        return pb.Chunk(
            block=pb.Block(lo=block.lo, hi=block.hi),
            index=index,
            offset_bytes=index * self.config.chunk_bytes,
            crc32c=crc32c(data),
            data=data,
        )

    def slice_of(self, flat, index):
        return flat.tobytes()[index * self.config.chunk_bytes : (index + 1) * self.config.chunk_bytes]


@pytest.fixture(scope="session")
def small():
    limit_threads()
    run = RunConfig(task="synthetic", microbatches=4, batch_size=22, chunk_bytes=4096, window_chunks=2, fan_out=4)
    task = Synthetic(parameters=2_500, samples=100)
    manifest, flat = initial_weights(task, run)
    config = node_config(task, run, manifest, run_id="r-small")
    assert config.chunk_count == 3
    return Small(config, task, flat)
