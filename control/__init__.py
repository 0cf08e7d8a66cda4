"""The application on top of ``spheres``: a run with optimizer, journal, checkpoints, and the commands around it."""

import os

# Control starts processes while gRPC runs; they exec at once, so gRPC's own handling of forks only makes noise.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
