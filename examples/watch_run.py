"""A run looked at from outside, as in a notebook: each part below is a cell. It needs a run: control-cli start.

Run it where that was started: python examples/watch_run.py; or name one with ARMILLARY_CONTROL=HOST:PORT.
"""

# %% the latest run below runs/
import numpy as np

from control import SyncClient
from control.client import state_name

client = SyncClient()
run = client.status()
print(f"{run.run_id} is {state_name(run)} at step {run.step} of {run.total_steps}")

# %% hold it, and look at the weights
client.pause()
weights = client.weights()
for name, array in weights.items():
    print(f"{name:16} {array.shape!s:10} norm {np.linalg.norm(array):.3f}")
print(f"weights of version {weights.version}, sha256 {weights.sha256}")

# %% who computes
for sphere in client.spheres():
    print(sphere.sphere_id, sphere.state, f"{sphere.report.samples_count:,} samples")

# %% go on, and watch it to its end
client.resume()
losses = []
for event in client.watch():
    if event.name == "step":
        losses.append(event.record["loss"])
    else:
        print(f"{event.time:%H:%M:%S} {event.name}", event.record.get("metrics", event.record.get("state", "")))
print(f"{len(losses)} steps were seen; the last loss was {losses[-1]:.4f}")
client.close()
