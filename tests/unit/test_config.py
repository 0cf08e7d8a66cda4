from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from control.config import RunConfig, compare_identity, flat_paths, flatten, identity
from control.config_sources import PREFIX, allowed, default_text, help_text, load_config
from spheres.errors import ConfigError
from spheres.units import Every, format_duration, format_size, parse_duration, parse_size


def load(file: Path | None = None, environ: dict[str, str] | None = None, **flags: Any) -> RunConfig:
    return load_config(flags, environ or {}, file)[0]


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(
        'batch-size = 32\nlearning_rate = 0.5\nchunk_bytes = "64KiB"\n'
        '[optimizer]\nname = "adamw"\nbeta2 = 0.98\n'
        '[[optimizer.parameter_groups]]\npattern = "bias*"\nweight_decay = 0.0\n'
        "[task_options]\nhidden = 128\n"
    )
    return path


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("60s", 60),
        ("5m", 300),
        ("1h", 3600),
        ("1.5 s", 1.5),
        ("250ms", 0.25),
        ("2d", 172_800),
        ("7", 7),
        (7, 7),
        (0.5, 0.5),
    ],
)
def test_durations(text: object, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "5 weeks", "-3s", "1e3", float("nan"), -1, True, None, "5m30s"])
def test_texts_that_are_no_duration(text: object) -> None:
    with pytest.raises(ValueError, match="a duration is"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "size"), [("1MiB", 1 << 20), ("64 kib", 65_536), ("0.5KiB", 512), (4096, 4096), ("1MB", 10**6)]
)
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["1.3b", "1TiBs", "x", 1.5, True])
def test_texts_that_are_no_size(text: object) -> None:
    with pytest.raises(ValueError, match="a size is"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "every"),
    [
        ("100steps", Every(100, "steps")),
        ("1 step", Every(1, "steps")),
        ("2epochs", Every(2, "epochs")),
        ("1epoch", Every(1, "epochs")),
        ("5m", Every(300, "seconds")),
        ("0.5s", Every(0.5, "seconds")),
        ("10", Every(10, "steps")),
        (10, Every(10, "steps")),
    ],
)
def test_intervals(text: object, every: Every) -> None:
    assert Every.parse(text) == every
    assert Every.parse(str(every)) == every


@pytest.mark.parametrize("text", ["0steps", "-1steps", "1.5epochs", "steps", "5 moons", "", 2.5, True])
def test_texts_that_are_no_interval(text: object) -> None:
    with pytest.raises(ValueError, match="such as 100steps"):
        Every.parse(text)


@given(st.floats(min_value=0.001, max_value=1e7))
def test_a_printed_duration_reads_back_to_the_same_number(seconds: float) -> None:
    assert parse_duration(format_duration(seconds)) == seconds


@given(st.integers(min_value=0, max_value=1 << 40) | st.integers(0, 40).map(lambda power: 3 << power))
def test_a_printed_size_reads_back_to_the_same_number(size: int) -> None:
    assert parse_size(format_size(size)) == size


def test_sizes_are_printed_in_the_largest_unit_that_divides_them() -> None:
    sizes = [0, 100, 4096, 1 << 20, (1 << 20) + 1024, 3 << 30]
    assert [format_size(size) for size in sizes] == ["0", "100", "4KiB", "1MiB", "1025KiB", "3GiB"]


def test_when_an_interval_is_due() -> None:
    def due(text: str, seconds: float = 0.0) -> list[int]:
        every = Every.parse(text)
        return [step for step in range(1, 13) if every.due(step=step, steps_per_epoch=5, seconds=seconds)]

    assert due("4steps") == [4, 8, 12]
    assert due("1epochs") == [5, 10]
    assert due("2epochs") == [10]
    assert due("30s", 29.9) == []
    assert due("30s", 30.0) == list(range(1, 13))


# --- the model --------------------------------------------------------------------------------------------------------


def test_the_defaults() -> None:
    config = RunConfig()
    assert (config.task, config.spheres, config.fan_out, config.microbatches, config.batch_size) == (
        "digits",
        4,
        12,
        16,
        64,
    )
    assert (config.epochs, config.steps, config.keep, config.seed) == (30, None, 3, 0)
    assert config.listen == "127.0.0.1:0"
    assert config.orphan_timeout == 60
    assert config.window == 16


def test_it_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        RunConfig().batch_size = 3  # type: ignore[misc]


def test_one_of_the_totals() -> None:
    assert (load(steps=7).steps, load(steps=7).epochs) == (7, None)
    assert (load(epochs=7).epochs, load(epochs=7).steps) == (7, None)
    assert load(steps=7).total_steps(23) == 7
    assert load(epochs=7).total_steps(23) == 161


@pytest.mark.parametrize(
    ("flags", "window"),
    [
        ({}, 16),
        ({"chunk_bytes": 4096}, 4096),
        ({"window_bytes": 4096}, 2),
        ({"window_chunks": 1}, 1),
        ({"chunk_bytes": "64KiB", "window_chunks": 7}, 7),
    ],
)
def test_the_window_in_chunks(flags: dict[str, Any], window: int) -> None:
    assert load(**flags).window == window


def test_spheres_to_begin() -> None:
    assert load(spheres=6).spheres_to_begin == 6
    assert load(spheres=0).spheres_to_begin == 1
    assert load(spheres=6, min_spheres=2).spheres_to_begin == 2


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "127.8.0.1:70", "localhost:5000", "[::1]:0"])
def test_loopback_needs_no_leave(listen: str) -> None:
    assert load(listen=listen).listen == listen


@pytest.mark.parametrize("listen", ["0.0.0.0:5000", "[::]:0", "10.0.0.3:1", "node-3:5000"])
def test_beyond_loopback_only_with_insecure(listen: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"listen = {listen} (--listen): ") + ".*--insecure"):
        load(listen=listen)
    assert load(listen=listen, insecure=True).listen == listen


def test_json_there_and_back(toml: Path) -> None:
    config = load(
        toml, max_time="5m", log_every="3epochs", run_dir="out", checkpoint_every="none", init_from="w.safetensors"
    )
    assert RunConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json())["log_every"] == "3epochs"
    assert load_config({}, {}, None, flatten(config))[0] == config


@pytest.mark.parametrize("text", ["", "{", '{"batchsize": 3}', '{"batch_size": 0}', "[]"])
def test_a_bad_saved_configuration_is_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^saved configuration: [^\n]*$"):
        RunConfig.from_json(text)


# --- precedence -------------------------------------------------------------------------------------------------------


def test_flag_beats_environment_beats_file_beats_saved_beats_default(toml: Path) -> None:
    saved = flatten(load(batch_size=16, learning_rate=0.1, momentum=0.3, seed=1, fan_out=2))
    environ = {"ARMILLARY_BATCH_SIZE": "48", "ARMILLARY_SEED": "2", "UNRELATED": "x", "ARMILLARY_KEEP": ""}
    config, origins = load_config({"batch_size": 80, "optimizer": None, "task_options": []}, environ, toml, saved)
    assert (config.batch_size, config.seed, config.learning_rate, config.fan_out, config.keep) == (80, 2, 0.5, 2, 3)
    assert (config.optimizer.name, config.optimizer.beta2, config.optimizer.momentum) == ("adamw", 0.98, 0.3)
    assert config.task_options == {"hidden": "128"}
    assert {key: origins[key].source for key in ("batch_size", "seed", "learning_rate", "optimizer", "fan_out")} == {
        "batch_size": "flag", "seed": "environment", "learning_rate": "file", "optimizer": "file", "fan_out": "saved",
    }  # fmt: skip
    assert (origins["batch_size"].where, origins["batch_size"].text) == ("--batch-size", "80")
    assert (origins["seed"].where, origins["seed"].text) == ("ARMILLARY_SEED", "2")
    assert str(toml) in origins["beta2"].where
    assert load_config({}, {})[1]["momentum"].source == "default"


def test_every_key_has_an_origin_a_help_line_and_a_range() -> None:
    config, origins = load_config({}, {})
    assert list(origins) == list(flat_paths()) == list(flatten(config))
    for key in origins:
        assert help_text(key), key
        assert allowed(key), key


def test_a_default_as_it_is_shown_is_the_default() -> None:
    shown = {key: default_text(key) for key in flat_paths()}
    assert load_config({key: text for key, text in shown.items() if text}, {})[0] == RunConfig()
    some = [shown[key] for key in ("patience", "chunk_bytes", "eval_every", "clip_norm")]
    assert some == ["4s", "1MiB", "1epochs", ""]


def test_every_key_can_be_given_as_flag_and_as_variable() -> None:
    other = {
        "task": "a:b", "task_options": "x=1,y=two", "seed": "3", "init_from": "w", "epochs": "4", "max_time": "1h",
        "early_stopping": "2", "batch_size": "9", "microbatches": "3", "learning_rate": "0.7", "optimizer": "adam",
        "momentum": "0.1", "nesterov": "true", "beta1": "0.5", "beta2": "0.6", "epsilon": "1e-5", "weight_decay": "0.2",
        "parameter_groups": '[{"pattern": "b*", "frozen": true}]', "schedule": "step", "warmup_steps": "2",
        "decay_steps": "50", "step_size": "5", "gamma": "0.3", "floor": "0.2", "clip_norm": "2", "clip_value": "3",
        "eval_every": "none", "eval_microbatches": "2", "best_metric": "loss", "best_direction": "min", "spheres": "0",
        "min_spheres": "2", "fan_out": "1", "listen": "127.0.0.1:7", "insecure": "yes", "patience": "9s",
        "orphan_timeout": "0", "chunk_bytes": "4096", "window_bytes": "8KiB", "window_chunks": "3", "run_dir": "d",
        "checkpoint_every": "5steps", "checkpoint_url": "s3://b/x", "keep": "9",
            "keep_every": "100", "log_every": "1", "metrics_csv": "1",
        "tensorboard": "on", "on_callback_error": "raise", "wire": "inline", "wire_dtype": "bfloat16",
        "weights_wire_dtype": "bfloat16", "hosts_per_host": "1", "trace": "yes", "launcher": "kubernetes",
        "ray_address": "head:6379", "kubernetes_deployment": "spheres",
    }  # fmt: skip
    assert set(other) == set(flat_paths()) - {"steps", "on_nonfinite"}  # the first excludes epochs, the second is fixed
    by_flag = load_config(other, {})[0]
    by_variable = load_config({}, {PREFIX + key.upper(): text for key, text in other.items()})[0]
    assert by_flag == by_variable
    defaults, now = flatten(RunConfig()), flatten(by_flag)
    assert [key for key in other if now[key] == defaults[key]] == []


def test_a_total_of_a_higher_source_replaces_the_other_total_of_a_lower(toml: Path) -> None:
    toml.write_text("epochs = 5\n")
    assert (load(toml, steps=9).steps, load(toml, steps=9).epochs) == (9, None)
    assert load(toml, {"ARMILLARY_STEPS": "9"}).epochs is None
    assert load(toml, {"ARMILLARY_STEPS": "9"}, epochs=2).epochs == 2
    resumed, _ = load_config({"epochs": 60}, {}, None, flatten(load(steps=100)))
    assert (resumed.epochs, resumed.steps) == (60, None)


def test_none_takes_away_what_a_file_gave(toml: Path) -> None:
    toml.write_text("clip_norm = 1.0\ncheckpoint_every = '5m'\n")
    assert load(toml).clip_norm == 1.0
    config = load(toml, {"ARMILLARY_CHECKPOINT_EVERY": "none"}, clip_norm="none")
    assert (config.clip_norm, config.checkpoint_every) == (None, None)


@pytest.mark.parametrize("value", [["hidden=64", "name=a b"], "hidden=64,name=a b", {"hidden": 64, "name": "a b"}])
def test_task_options_in_all_their_forms(value: object) -> None:
    assert load(task_options=value).task_options == {"hidden": "64", "name": "a b"}


def test_task_options_of_the_environment_may_be_json() -> None:
    """Commas and lists in values cannot be said otherwise."""
    text = '{"layers": [64, 32], "note": "a,b=c", "big": 1000000, "rate": 1e-4, "bias": false}'
    assert load(environ={"ARMILLARY_TASK_OPTIONS": text}).task_options == {
        "layers": "[64, 32]", "note": "a,b=c", "big": "1000000", "rate": "0.0001", "bias": "false",
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"task_options = \{'a': 1\} .*: allowed: name=value"):
        load(environ={"ARMILLARY_TASK_OPTIONS": "{'a': 1}"})


def test_variables_of_commands_and_of_kubernetes_are_no_keys() -> None:
    environ = {
        "ARMILLARY_CONFIG": "x", "ARMILLARY_CONTROL": "h:1", "ARMILLARY_DATA": "folder",
        "ARMILLARY_CONTROL_SERVICE_HOST": "10.0.0.1",
        "ARMILLARY_CONTROL_PORT_5000_TCP_ADDR": "10.0.0.1", "ARMILLARY_CONTROL_SERVICE_PORT_GRPC": "5000",
        "ARMILLARY_CONTROL_PORT": "tcp://10.0.0.1:5000", "ARMILLARY_SERVICE_HOST": "10.0.0.1",
    }  # fmt: skip
    assert load(environ=environ) == RunConfig()


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"microbatches": 0}, "microbatches = 0 (--microbatches): allowed: a whole number from 1 to 4096"),
        ({"microbatches": 4097}, "microbatches = 4097 (--microbatches): allowed: a whole number from 1 to 4096"),
        ({"spheres": "2.5"}, "spheres = 2.5 (--spheres): allowed: a whole number from 0 to 10000"),
        ({"batch_size": True}, "batch_size = true (--batch-size): a number is needed"),
        ({"momentum": 1}, "momentum = 1 (--momentum): allowed: a number at least 0 and below 1"),
        ({"learning_rate": "nan"}, "learning_rate = nan (--learning-rate): allowed: a number at least 0"),
        ({"clip_norm": "x"}, "clip_norm = x (--clip-norm): allowed: a number above 0, or none"),
        ({"optimizer": "sdg"}, "optimizer = sdg (--optimizer): allowed: sgd, adam or adamw"),
        ({"insecure": "maybe"}, "insecure = maybe (--insecure): allowed: true or false"),
        (
            {"chunk_bytes": 5000},
            "(--chunk-bytes): allowed: a size such as 64KiB, 1MiB, from 4096 to 1048576 and a multiple of 64",
        ),
        ({"chunk_bytes": "2MiB"}, "chunk_bytes = 2MiB (--chunk-bytes): allowed"),
        ({"patience": 0}, "patience = 0 (--patience): allowed: a duration such as 30s, 5m, 1h, above 0"),
        ({"max_time": "soon"}, "max_time = soon (--max-time): a duration is"),
        ({"checkpoint_every": "5 moons"}, "checkpoint_every = 5 moons (--checkpoint-every): give a number above 0"),
        ({"eval_every": "5m"}, "eval_every = 5m (--eval-every): give a number of steps or epochs"),
        ({"listen": "localhost"}, "listen = localhost (--listen): an address is HOST:PORT"),
        ({"listen": "localhost:70000"}, "listen = localhost:70000 (--listen): an address is HOST:PORT"),
        ({"schedule": "step"}, "step_size = none (default): the step schedule needs it"),
        ({"warmup_steps": 5, "decay_steps": 5}, "decay_steps = 5 (--decay-steps): must be above warmup_steps"),
        ({"nesterov": True, "momentum": 0}, "nesterov = true (--nesterov): needs a momentum"),
        ({"epochs": 1, "steps": 2}, "steps = 2 (--steps): give either steps or epochs, not both"),
        ({"task_options": "hidden"}, "task_options = hidden (--task-options): allowed: name=value"),
        ({"parameter_groups": "["}, "parameter_groups = [ (--parameter-groups): allowed: tables"),
        ({"parameter_groups": [{"pattern": "b", "weight_decay": -1}]}, "0.weight_decay = -1: Input should be greater"),
        ({"parameter_groups": [{"pattern": "b", "lr": 1}]}, "0.lr = 1: Extra inputs are not permitted"),
        ({"batchsize": 3}, "unknown key batchsize (--batchsize): did you mean batch_size?"),
        ({"lr": 3}, "unknown key lr (--lr): did you mean learning_rate?"),
        ({"zzz": 3}, "unknown key zzz (--zzz): `control-cli config show` lists all keys"),
        ({"batch_size": 0, "fan_out": 0}, "(and 1 more)"),
    ],
)  # fmt: skip
def test_errors_name_key_value_source_and_what_is_allowed(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match="^[^\n]*" + re.escape(message)) as caught:
        load(**flags)
    assert "\n" not in str(caught.value)


def test_errors_name_the_variable() -> None:
    with pytest.raises(ConfigError, match=r"^batch_size = many \(ARMILLARY_BATCH_SIZE\): allowed: a whole number"):
        load(environ={"ARMILLARY_BATCH_SIZE": "many"})
    with pytest.raises(ConfigError, match=r"^unknown key fanout \(ARMILLARY_FANOUT\): did you mean fan_out\?"):
        load(environ={"ARMILLARY_FANOUT": "3"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("batch_size = 0", "batch_size = 0 ({}): allowed: a whole number"),
        ("batch_size = true", "batch_size = true ({}): a number is needed"),
        ("batch = 3", "unknown key batch ({}): did you mean batch_size?"),
        ("[optimizer]\nname = 'sdg'", "optimizer = sdg ({} [optimizer]): allowed: sgd, adam or adamw"),
        ("[optimizer]\nmomentun = 0.3", "unknown key momentun ({} [optimizer]): did you mean momentum?"),
        ("[optimizer]\nlearning_rate = 0.3", "learning_rate is no key of [optimizer] in {}"),
        ("momentum = 0.1\n[optimizer]\nmomentum = 0.3", "momentum is given twice in {} [optimizer]"),
        ("batch_size = ", "configuration file {}: no valid TOML"),
    ],
)
def test_errors_name_the_file(toml: Path, content: str, message: str) -> None:
    toml.write_text(content)
    with pytest.raises(ConfigError, match="^" + re.escape(message.format(toml))):
        load(toml)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: No such file"):
        load(tmp_path / "none.toml")


# --- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        ({"seed": 1}, "seed"),
        ({"batch_size": 32}, "batch_size"),
        ({"microbatches": 8}, "microbatches"),
        ({"task": "fashion-mnist"}, "task"),
        ({"task_options": "hidden=3"}, "task_options"),
        ({"optimizer": "adam"}, "optimizer"),
        ({"weight_decay": 0.1}, "weight_decay"),
        ({"parameter_groups": [{"pattern": "b*", "frozen": True}]}, "parameter_groups"),
        ({"learning_rate": 0.3}, "learning_rate"),
        ({"schedule": "cosine"}, "schedule"),
        ({"warmup_steps": 3}, "warmup_steps"),
        ({"clip_norm": 1.0}, "clip_norm"),
        ({"clip_value": 1.0}, "clip_value"),
    ],
)
def test_what_must_not_differ_on_resume(flags: dict[str, Any], key: str) -> None:
    saved = json.loads(json.dumps(identity(load())))
    with pytest.raises(ConfigError, match=f"^cannot resume: {key} is .* now and was .*; use "):
        compare_identity(saved, identity(load(**flags)))


def test_the_first_difference_is_told_with_both_values() -> None:
    with pytest.raises(ConfigError, match="batch_size is 32 now and was 64 when the checkpoint was saved; use 64"):
        compare_identity(identity(load()), identity(load(batch_size=32)))


def test_tree_wire_output_and_totals_may_differ_on_resume() -> None:
    changed = load(
        epochs=90, spheres=2, fan_out=2, chunk_bytes=4096, window_chunks=1, keep=9, run_dir="x", log_every=1,
        max_time=9, eval_every="none", checkpoint_every="5m", listen="0.0.0.0:1", insecure=True,
        patience=1, init_from="w",
    )  # fmt: skip
    compare_identity(json.loads(json.dumps(identity(load()))), identity(changed))


def test_a_key_younger_than_the_checkpoint_counts_as_its_default() -> None:
    saved = identity(load())
    del saved["nesterov"]
    compare_identity(saved, identity(load()))
    with pytest.raises(ConfigError, match="nesterov is true now and was false"):
        compare_identity(saved, identity(load(nesterov=True)))
    with pytest.raises(ConfigError, match="rounding is none now and was up"):
        compare_identity({**saved, "rounding": "up"}, identity(load()))


@pytest.mark.parametrize(
    ("flag", "value"),
    [("task_options", ["path=/data/caf\udce9"]), ("run_dir", "runs/caf\udce9"), ("init_from", "caf\udce9.safetensors")],
)
def test_a_file_name_that_is_no_utf_8_is_refused_where_it_would_have_to_be_sent(flag: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{flag} = .*: give text in UTF-8"):
        load(**{flag: value})
