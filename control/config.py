"""The configuration of a run: its keys, their ranges and defaults, and which of them a resumed run may not change.

Where values come from (flags, environment, file) is in ``control.config_sources``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    field_validator,
    model_validator,
)

from spheres.errors import ConfigError
from spheres.exposure import is_address, is_loopback
from spheres.units import Every, parse_duration, parse_size
from spheres.words import is_encodable

__all__ = [
    "OptimizerConfig",
    "ParameterGroup",
    "RunConfig",
    "ScheduleConfig",
    "compare_identity",
    "flatten",
    "identity",
]

#: seconds, from a number or a text with its unit
Duration = Annotated[float, BeforeValidator(parse_duration)]
#: bytes, from a whole number or a text with its unit
Size = Annotated[int, BeforeValidator(parse_size)]
Interval = Annotated[
    Every,
    # an interval from JSON or TOML is a text, and so is its JSON
    BeforeValidator(Every.parse),
    PlainSerializer(str, return_type=str),
]


class _Model(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        arbitrary_types_allowed=True,
        use_attribute_docstrings=True,
        # --help asks for names and ranges only, and must not wait for validators
        defer_build=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _no_booleans_as_numbers(cls, data: Any) -> Any:
        # ``batch_size = true`` would be read as 1
        for key, value in data.items() if isinstance(data, dict) else ():
            field = cls.model_fields.get(key)
            if isinstance(value, bool) and field is not None and field.annotation in (int, float, int | None):
                raise ValueError(f"{key}: a number is needed, not {str(value).lower()}")
        return data


class ParameterGroup(_Model):
    """Settings for the tensors whose name fits ``pattern``; the first group that fits a tensor counts."""

    pattern: str = Field(min_length=1)
    """shell pattern on tensor names, such as ``bias*`` or ``encoder.*``"""
    learning_rate_scale: float = Field(1.0, ge=0)
    """factor on the learning rate"""
    weight_decay: float | None = Field(None, ge=0)
    """decay of this group; none: that of the optimizer"""
    frozen: bool = False
    """leave the tensors as they are, to the bit"""


class OptimizerConfig(_Model):
    """Which optimizer, and its constants. Keys that the chosen one has no use for are ignored."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    """optimizer"""
    momentum: float = Field(0.9, ge=0, lt=1)
    """of sgd; 0 for none"""
    nesterov: bool = False
    """Nesterov momentum, of sgd"""
    beta1: float = Field(0.9, ge=0, lt=1)
    """decay of the first moment, of adam and adamw"""
    beta2: float = Field(0.999, ge=0, lt=1)
    """decay of the second moment, of adam and adamw"""
    epsilon: float = Field(1e-8, ge=1e-30)
    """added to the root of the second moment, of adam and adamw"""
    weight_decay: float = Field(0.0, ge=0)
    """an L2 term of the gradient for sgd and adam, decoupled for adamw"""
    parameter_groups: tuple[ParameterGroup, ...] = ()
    """settings by pattern of tensor names"""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and self.name == "sgd" and not self.momentum:
            raise ValueError("nesterov: needs a momentum above 0")
        return self


class ScheduleConfig(_Model):
    """The learning rate over the steps, as a factor on ``learning_rate``; ``control.schedules`` has the formulas."""

    kind: Literal["constant", "cosine", "linear", "step"] = "constant"
    """learning rate schedule after the warm-up"""
    warmup_steps: int = Field(0, ge=0)
    """steps of linear warm-up"""
    decay_steps: int | None = Field(None, ge=1)
    """step, from the start of the run, at which cosine and linear end; none: the run's last step"""
    step_size: int | None = Field(None, ge=1)
    """steps between two drops, of step"""
    gamma: float = Field(0.1, gt=0, le=1)
    """factor of each drop, of step"""
    floor: float = Field(0.0, ge=0, le=1)
    """lowest rate of a decay, as a part of learning_rate"""

    @model_validator(mode="after")
    def _step_needs_size(self) -> Self:
        if self.kind == "step" and self.step_size is None:
            raise ValueError("step_size: the step schedule needs it, as a number of steps between two drops")
        if self.decay_steps is not None and self.decay_steps <= self.warmup_steps:
            raise ValueError(f"decay_steps: must be above warmup_steps, which is {self.warmup_steps}")
        return self


class RunConfig(_Model):
    """A whole run. Frozen; a changed copy comes from ``load_config`` or ``RunConfig(**...)``, which check it."""

    # what is trained
    task: str = Field("digits", min_length=1)
    """task: a built-in name or module:attribute"""
    task_options: dict[str, str] = Field(default_factory=dict)
    """options given to the task, as name=value"""
    seed: int = Field(0, ge=0, lt=1 << 63)
    """seed of initial weights, order of samples and the tasks' randomness"""
    init_from: Path | None = None
    """safetensors file with the initial weights; none: the task's own"""

    # how long
    epochs: int | None = Field(None, ge=1)
    """passes over the data in total; 30 where no steps are given either"""
    steps: int | None = Field(None, ge=1)
    """optimizer updates in total"""
    max_time: Duration | None = Field(None, gt=0)
    """stop, with a checkpoint, after this time"""
    early_stopping: int | None = Field(None, ge=1)
    """stop after so many evaluations without a better best_metric"""

    # the arithmetic of a step
    batch_size: int = Field(64, ge=1, lt=1 << 31)
    """samples of a step, over all spheres"""
    microbatches: int = Field(16, ge=1, le=4096)
    """fixed parts that a step's samples are cut into, whatever the number of spheres"""
    learning_rate: float = Field(0.1, ge=0)
    """base learning rate, on the mean gradient"""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    clip_norm: float | None = Field(None, gt=0)
    """highest global norm of the mean gradient"""
    clip_value: float | None = Field(None, gt=0)
    """highest magnitude of an element of the mean gradient, after clip_norm"""
    on_nonfinite: Literal["halt", "skip-microbatch", "skip-step"] = "halt"
    """what a gradient or loss that is not finite does: end the run, leave out its microbatch, or skip the step"""

    # evaluation
    eval_every: Interval | None = Every(1, "epochs")
    """evaluate every so many steps or epochs; none: at the end only"""
    eval_microbatches: int = Field(16, ge=1, le=4096)
    """parts that the test split is cut into"""
    best_metric: str = Field("accuracy", min_length=1)
    """metric (or loss) that says which checkpoint is the best"""
    best_direction: Literal["max", "min"] = "max"
    """whether a higher or a lower best_metric is better"""

    # the tree
    spheres: int = Field(4, ge=0, le=10_000)
    """spheres to start; 0 waits for spheres started elsewhere"""
    min_spheres: int | None = Field(None, ge=1)
    """spheres to wait for before the first step; none: those to start, at least 1"""
    launcher: Literal["local", "ray", "kubernetes"] = "local"
    """what starts spheres: processes here (local), a Ray cluster (needs the extra ray), or a Kubernetes Deployment"""
    ray_address: str = "auto"
    """head of the cluster for launcher ray, as HOST:PORT; auto: that which this machine belongs to"""
    kubernetes_deployment: str | None = Field(None, min_length=1)
    """Deployment of spheres for launcher kubernetes, in control's own namespace"""
    fan_out: int = Field(12, ge=1, le=1024)
    """most children of a node"""
    listen: str = "127.0.0.1:0"
    """address of control, as HOST:PORT; port 0 for any free one"""
    insecure: bool = False
    """allow an address beyond loopback, without certificates"""
    patience: Duration = Field(4.0, gt=0)
    """how long a silent sphere without progress counts as alive"""
    orphan_timeout: Duration = Field(60.0, ge=0)
    """how long spheres wait for a control that is gone"""
    chunk_bytes: Size = Field(1 << 20, ge=4096, le=1 << 20, multiple_of=64)
    """bytes of one chunk of weights or gradients"""
    window_bytes: Size = Field(16 << 20, ge=4096)
    """bytes of gradients in flight on one edge"""
    window_chunks: int | None = Field(None, ge=1)
    """the same in chunks; none: from window_bytes, at least 2"""
    wire: Literal["auto", "inline", "shm"] = "auto"
    """how payload travels: in messages (inline), in memory shared on one host (shm), or shm where it can be (auto)"""
    wire_dtype: Literal["float32", "bfloat16"] = "float32"
    """type that gradients are rounded to for the wire"""
    weights_wire_dtype: Literal["float32", "bfloat16"] = "float32"
    """type that weights are rounded to for the wire; control keeps float32"""
    hosts_per_host: int | None = Field(None, ge=1)
    """most other hosts that hang on one host; 1 makes a chain of hosts; none: as fan_out allows"""

    # what is kept and said
    run_dir: Path | None = None
    """directory of the run; none: a new one below runs/"""
    checkpoint_every: Interval | None = Every(30, "seconds")
    """save every so many steps, epochs or minutes; one is always saved at the end"""
    checkpoint_url: str | None = Field(None, min_length=1)
    """save below this fsspec URL, such as s3://bucket/prefix (needs the extra fsspec); none: in the run directory"""
    keep: int = Field(3, ge=1)
    """newest checkpoints to keep, besides the best"""
    keep_every: int | None = Field(None, ge=1)
    """keep for good what was saved at multiples of so many steps"""
    log_every: Interval | None = None
    """print progress every so many steps, epochs or seconds; none: as often as one can read"""
    metrics_csv: bool = False
    """write metrics.csv to the run directory"""
    tensorboard: bool = False
    """write TensorBoard events to the run directory (needs the extra tensorboard)"""
    trace: bool = False
    """write trace.json to the run directory: what every node did when, for ui.perfetto.dev"""
    on_callback_error: Literal["log", "raise"] = "log"
    """whether an exception in a callback is logged or stops the run"""

    @model_validator(mode="before")
    @classmethod
    def _one_total(cls, data: Any) -> Any:
        if isinstance(data, dict):
            given = [key for key in ("epochs", "steps") if data.get(key) is not None]
            if len(given) == 2:
                raise ValueError("steps: give either steps or epochs, not both")
            if not given:
                data = {**data, "epochs": 30}
        return data

    @field_validator("eval_every")
    @classmethod
    def _not_by_time(cls, value: Every | None) -> Every | None:
        # by the clock, early stopping would end two equal runs at different steps
        if value is not None and value.unit == "seconds":
            raise ValueError("give a number of steps or epochs, such as 100steps or 1epochs")
        return value

    @field_validator("task_options", "init_from", "run_dir")
    @classmethod
    def _can_be_sent(cls, value: Any) -> Any:
        # a file name that is no UTF-8 fits neither into a message nor into JSON
        words = [*value, *value.values()] if isinstance(value, dict) else [str(value)]
        if not all(map(is_encodable, words)):
            raise ValueError("give text in UTF-8; a file of another name can have a link to it")
        return value

    @field_validator("checkpoint_url")
    @classmethod
    def _url(cls, value: str | None) -> str | None:
        kind, found, place = (value or "").partition("://")
        if value is not None and not (kind and found and place):
            raise ValueError("give a URL such as s3://bucket/prefix; for a directory, --run-dir")
        return value

    @model_validator(mode="after")
    def _loopback_unless_insecure(self) -> Self:
        if not is_address(self.listen):
            raise ValueError("listen: an address is HOST:PORT with a port from 0 to 65535, such as 127.0.0.1:0")
        if not self.insecure and not is_loopback(self.listen.rpartition(":")[0]):
            raise ValueError("listen: an address beyond loopback needs insecure (--insecure); nothing is encrypted")
        return self

    @field_validator("ray_address")
    @classmethod
    def _cluster_that_is_there(cls, value: str) -> str:
        if value != "auto" and ("/" in value or not is_address(value)):
            raise ValueError(
                "give the head of a cluster as HOST:PORT, or auto; none is started here: that is `ray start --head`"
            )
        return value

    @model_validator(mode="after")
    def _kubernetes_needs_a_deployment(self) -> Self:
        if self.launcher == "kubernetes" and self.kubernetes_deployment is None:
            raise ValueError("kubernetes_deployment: the launcher kubernetes needs the name of a Deployment of spheres")
        return self

    @property
    def spheres_to_begin(self) -> int:
        """Spheres that must be there before the first step."""
        return max(1, self.spheres) if self.min_spheres is None else self.min_spheres

    @property
    def window(self) -> int:
        """Chunks of credit on one edge."""
        return self.window_chunks or max(2, self.window_bytes // self.chunk_bytes)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the step at which the run is complete."""
        return self.steps if self.steps is not None else (self.epochs or 0) * steps_per_epoch

    def to_json(self) -> str:
        """Return the whole configuration as JSON, for checkpoints and the run directory."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read what ``to_json`` wrote. Raises ConfigError in one line."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"])) or "text"
            raise ConfigError(f"saved configuration: {key}: {first['msg']}") from error


#: sub-model -> the flat key of its choice; its other fields keep their names
SUB_MODELS: dict[str, tuple[type[_Model], str]] = {
    "optimizer": (OptimizerConfig, "name"),
    "schedule": (ScheduleConfig, "kind"),
}


def flat_paths() -> dict[str, tuple[str, ...]]:
    """Return flat key -> path into RunConfig: ``momentum`` is ``("optimizer", "momentum")``."""
    paths: dict[str, tuple[str, ...]] = {}
    for name in RunConfig.model_fields:
        if name not in SUB_MODELS:
            paths[name] = (name,)
            continue
        model, choice = SUB_MODELS[name]
        for field in model.model_fields:
            paths[name if field == choice else field] = (name, field)
    return paths


def flatten(config: RunConfig) -> dict[str, Any]:
    """Return flat key -> value as in JSON: the names of flags and environment variables."""
    tree = config.model_dump(mode="json")
    flat: dict[str, Any] = {}
    for key, path in flat_paths().items():
        value: Any = tree
        for part in path:
            value = value[part]
        flat[key] = value
    return flat


#: what the bits of the weights follow from, besides the totals; all else may differ on --resume
_IDENTITY = (
    "task", "task_options", "seed", "batch_size", "microbatches", "learning_rate", "clip_norm", "clip_value",
    "on_nonfinite", "wire_dtype", "weights_wire_dtype",
)  # fmt: skip


def identity(config: RunConfig) -> dict[str, Any]:
    """Return the keys that must not differ on --resume, as JSON values: task, seed, and the arithmetic of a step.

    Free are the totals (``steps`` and ``epochs`` may grow), tree, wire, output, evaluation, and ``init_from``, which
    a restored run does not read.
    """
    flat, paths = flatten(config), flat_paths()
    return {key: flat[key] for key in flat if key in _IDENTITY or paths[key][0] in SUB_MODELS}


def compare_identity(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ConfigError that names the first key of two identities that differs, with both values.

    A key that ``saved`` lacks, since it was saved before that key existed, counts as its default.
    """
    defaults = identity(RunConfig())
    for key in [*now, *(key for key in saved if key not in now)]:
        old, new = saved.get(key, defaults.get(key)), now.get(key, defaults.get(key))
        if key == "on_nonfinite" and old == "halt":
            continue  # a run that halts has committed no step with such a gradient: what it does again is the same
        if old != new:
            raise ConfigError(
                f"cannot resume: {key} is {_shown(new)} now and was {_shown(old)} when the checkpoint was saved; "
                f"use {_shown(old)}, or start a new run"
            )


def _shown(value: object) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
