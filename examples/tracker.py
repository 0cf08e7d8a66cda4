"""Your own tracker in five lines: an object with methods named on_<event>, here one that writes to a file.

Where it prints, call the client of your tracking service. Run it: python examples/tracker.py
"""

from __future__ import annotations

from control.training import train


class Tracker:
    def on_train_start(self, event, run):
        self.file = (run.run_dir / "tracker.txt").open("a", buffering=1)

    def on_batch_end(self, event, run):
        print("step", event.step, "loss", event.record["loss"], file=self.file)

    def on_evaluation(self, event, run):
        print("step", event.step, "evaluation", event.record["metrics"], file=self.file)


if __name__ == "__main__":
    summary = train("digits", spheres=2, epochs=2, callbacks=[Tracker()])
    print(f"what the tracker wrote: {summary.run_dir}/tracker.txt")
