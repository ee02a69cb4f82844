"""Whatever the constructors are given: they take what is right, and say in one sentence of ours what is not.

For each argument there is an oracle of what may be accepted, written by hand. Junk that is accepted and that the oracle
does not know is a silent acceptance; an error that the package did not raise itself is a traceback that is not ours.
"""

import math
import re
import traceback
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

import lightning_optim
from lightning_optim import (
    ChannelPruning,
    DistillationModule,
    PerformanceScore,
    QuantizationAwareTraining,
    Ramp,
    Recipe,
    ReportCallback,
    WeightPruning,
)
from lightning_optim.functional.criteria import CRITERIA
from lightning_optim.functional.losses import LOSSES
from lightning_optim.functional.schedules import SCHEDULES
from lightning_optim.recipe import recipe_names
from lightning_optim.strategies import OptimDDP, OptimFSDP2, recommend

PACKAGE = Path(lightning_optim.__file__).parent

NAMES = [
    "",
    "magnitude",
    "cubic",
    "global",
    "layer",
    "weight",
    "2:4",
    "4:2",
    "1x4",
    "hold",
    "kd",
    "val_acc",
    "baseline",
]
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 200),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, 0.5, 1.0, 0.999, 80.0, *NAMES]),
    st.text(max_size=5),
)
junk = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["a", "net.0", "size", "latency", "macs"]), inner, max_size=2),
    ),
    max_leaves=4,
)


def is_number(value, low, high, *, open_high=False):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        return False
    return low <= value < high if open_high else low <= value <= high


def is_moment(value):
    return (type(value) is int and value >= 0) or (type(value) is float and 0 <= value <= 1)


def is_count(low):
    return lambda value: type(value) is int and value >= low


def is_count_or_none(low):
    return lambda value: value is None or (type(value) is int and value >= low)


def one_of(*names):
    return lambda value: isinstance(value, str) and value in names


def is_bool(value):
    return isinstance(value, bool)


def is_name(value):
    return value is None or (isinstance(value, str) and value != "")


def is_pattern(value):
    if not isinstance(value, str) or not value.startswith("re:"):
        return isinstance(value, str) and value != ""
    try:
        re.compile(value[3:])
    except re.error:
        return False
    return True


def is_patterns(value):
    return value is None or (isinstance(value, list) and all(map(is_pattern, value)))


def is_fraction_or_none(value):
    return value is None or is_number(value, 0, 1)


def is_mapping_of(test):
    return lambda value: (
        isinstance(value, dict) and bool(value) and all(isinstance(k, str) and test(v) for k, v in value.items())
    )


def is_sparsity(value):
    return is_number(value, 0, 1, open_high=True)


def is_granularity(value):
    if not isinstance(value, str):
        return False
    if value in ("weight", "row", "column"):
        return True
    found = re.fullmatch(r"(\d+)([:x])(\d+)", value)
    return bool(found) and (found[2] == "x" or 0 < int(found[1]) < int(found[3]))


def is_ratio(value):
    return is_number(value, 0, 1, open_high=True)


def is_schedule(value):
    if isinstance(value, str):
        return value in SCHEDULES
    if not isinstance(value, dict) or len(value) != 1:
        return False
    ((name, arguments),) = value.items()
    if name != "multi_step":
        return name in SCHEDULES and arguments == {}
    thirds = [1 / 3, 2 / 3, 1.0]
    milestones, values = arguments.get("milestones", thirds), arguments.get("values", thirds)
    return (
        set(arguments) <= {"milestones", "values"}
        and len(milestones) == len(values) > 0
        and all(is_number(x, 0, 1) for x in (*milestones, *values))
        and milestones[0] > 0
        and milestones == sorted(set(milestones))
        and values == sorted(values)
        and values[-1] == 1
    )


WINDOW = {"start": is_moment, "end": is_moment}
SELECTION = {"module": is_name, "include": is_patterns, "exclude": is_patterns}
TERMS = ("size", "train_time", "inference_time", "accuracy")
CONSTRUCTORS = {
    WeightPruning: {
        "sparsity": lambda v: v is None or v == "hold" or is_sparsity(v) or is_mapping_of(is_sparsity)(v),
        "granularity": is_granularity,
        "criterion": lambda v: v in CRITERIA,
        "scope": one_of("global", "layer"),
        "schedule": is_schedule,
        "every_n_steps": is_count(1),
        **WINDOW,
        **SELECTION,
    },
    ChannelPruning: {
        "pruning_ratio": lambda v: is_ratio(v) or is_mapping_of(is_ratio)(v),
        "target": lambda v: (
            v is None
            or (is_mapping_of(lambda f: is_number(f, 0, 1))(v) and set(v) <= {"latency", "macs", "parameters"})
        ),
        "strict": is_bool,
        "criterion": lambda v: v in CRITERIA,
        "scope": one_of("global", "layer"),
        "schedule": is_schedule,
        "events": is_count(1),
        "round_to": is_count_or_none(1),
        "optimizer_state": one_of("slice", "reset"),
        "recalibrate_batches": is_count(0),
        "warmup_steps": is_count(0),
        "reduction": one_of("mean", "sum", "max"),
        "check": is_bool,
        **WINDOW,
        **SELECTION,
    },
    QuantizationAwareTraining: {
        "weight_bits": lambda v: type(v) is int and 2 <= v <= 8,
        "activation_bits": lambda v: v is None or (type(v) is int and 2 <= v <= 8),
        "activation_ranges": one_of("static", "symmetric", "dynamic"),
        "start": is_moment,
        "freeze": is_moment,
        "observe_steps": is_count_or_none(1),
        "observer": one_of("moving_average", "minmax", "histogram", "percentile"),
        "weight_granularity": lambda v: (
            isinstance(v, str) and bool(re.fullmatch(r"per_channel|per_tensor|per_group:[1-9]\d*", v))
        ),
        "bits": lambda v: (
            v is None
            or (
                isinstance(v, dict) and all(isinstance(k, str) and type(b) is int and 2 <= b <= 8 for k, b in v.items())
            )
        ),
        **SELECTION,
    },
    PerformanceScore: {
        "accuracy": lambda v: isinstance(v, str) and v != "",
        "mode": one_of("max", "loss"),
        "weights": lambda v: (
            v is None
            or (
                isinstance(v, dict)
                and set(v) <= set(TERMS)
                and all(is_number(w, 0, 1e308) for w in v.values())
                and any(v.values())
            )
        ),
        "reference": lambda v: v in ("baseline", "raw") or isinstance(v, dict),
        "size": one_of("parameters", "nonzero", "bits"),
        "max_drop": is_fraction_or_none,
        "min_accuracy": is_fraction_or_none,
        "until_reached": one_of("infeasible", "score"),
        "batch_size": is_count(1),
        "every_n_epochs": is_count(1),
    },
    ReportCallback: {"dirpath": lambda v: isinstance(v, str) and v != "", "title": is_name, "log": is_bool},
    Ramp: {
        "initial": lambda v: is_number(v, -math.inf, math.inf),
        "final": lambda v: is_number(v, -math.inf, math.inf),
        "schedule": is_schedule,
        **WINDOW,
    },
    OptimDDP: {"timeout_s": lambda v: is_number(v, 0, math.inf)},
    OptimFSDP2: {
        "timeout_s": lambda v: is_number(v, 0, math.inf),
        "checkpoint": one_of("full", "sharded", "auto"),
        "reshard": is_bool,
    },
}
REQUIRED = {ReportCallback: {"dirpath": "x"}, Ramp: {"initial": 0.0, "final": 1.0}}


def distil(**words):
    return DistillationModule(nn.Linear(2, 2), **{"optimizer": None, **words})


FUNCTIONS = {
    distil: {
        "loss": lambda v: v is None or (isinstance(v, str) and v in LOSSES),
        "alpha": lambda v: is_number(v, 0, 1),
        "temperature": lambda v: v is None or is_number(v, 1e-6, 1e6),
        "chunk_size": lambda v: v is None or v == "auto" or (type(v) is int and v >= 1),
        "logits_from": lambda v: v == "",
        "features": lambda v: isinstance(v, (list, dict, str)) and not v,
        "cache": lambda v: v is None or (isinstance(v, str) and v != ""),
        "cache_top_k": lambda v: v is None,  # without a cache
        "teacher_classes": lambda v: v is None or (isinstance(v, list) and all(type(c) is int and c >= 0 for c in v)),
    },
    lambda **words: recommend(1000, **{"devices": 2, "batch_size": 1, "memory_gb": 1.0, **words}): {
        "devices": is_count(1),
        "batch_size": is_count(1),
        "nodes": is_count(1),
        "memory_gb": lambda v: is_number(v, 0, math.inf) and v > 0,
        "bandwidth": lambda v: v is None or (is_number(v, 0, math.inf) and v > 0),
        "reached": lambda v: is_number(v, 0, 1) and v > 0,
        "precision": one_of("32-true", "bf16-mixed", "16-mixed", "bf16-true"),
        "tokens_per_sample": is_count_or_none(1),
        "step_seconds": lambda v: v is None or (is_number(v, 0, math.inf) and v > 0),
        "mfu": lambda v: is_number(v, 0, 1) and v > 0,
    },
}
CASES = [
    (call, name, test)
    for table in (CONSTRUCTORS, FUNCTIONS)
    for call, names in table.items()
    for name, test in names.items()
]


def is_ours(error):
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return Path(frame.filename).is_relative_to(PACKAGE)


def outcome(call):
    """Return the refusal, or None where it was accepted."""
    try:
        call()
    except (ValueError, TypeError, MisconfigurationException) as error:
        return error
    return None


def check(call, value, is_right, words):
    refused = outcome(call)
    if refused is None:
        assert is_right(value), f"{words}: silently accepted"
    else:
        assert is_ours(refused), f"{words}: {type(refused).__name__} of another library: {refused}"
        assert len(str(refused)) > 20, f"{words}: {refused}"


@pytest.mark.parametrize(
    ("call", "name", "is_right"),
    CASES,
    ids=lambda v: getattr(v, "__name__", v) if not callable(v) or isinstance(v, type) else "",
)
@given(value=junk)
def test_an_argument_is_taken_or_refused_in_a_sentence(call, name, is_right, value):
    words = {**REQUIRED.get(call, {}), name: value}
    check(lambda: call(**words), value, is_right, f"{name}={value!r}")


pattern_texts = st.one_of(
    junk, st.text(max_size=5).map("re:{}".format), st.sampled_from(["re:a|b", "re:(", "re:[a-z]*"])
)


@pytest.mark.parametrize("call", [WeightPruning, ChannelPruning, QuantizationAwareTraining])
@given(patterns=st.lists(pattern_texts, max_size=2))
def test_patterns_are_taken_or_refused_in_a_sentence(call, patterns):
    check(lambda: call(include=patterns), patterns, is_patterns, f"include={patterns!r}")


@given(pattern=pattern_texts.filter(lambda value: not isinstance(value, (list, dict))))
def test_keys_of_a_dict_are_taken_or_refused_in_a_sentence(pattern):
    check(lambda: WeightPruning({pattern: 0.5}), pattern, is_pattern, f"sparsity={{{pattern!r}: 0.5}}")
    check(lambda: ChannelPruning({pattern: 0.5}), pattern, is_pattern, f"pruning_ratio={{{pattern!r}: 0.5}}")
    check(lambda: QuantizationAwareTraining(bits={pattern: 4}), pattern, is_pattern, f"bits={{{pattern!r}: 4}}")


moments = st.one_of(junk, st.lists(st.sampled_from([0, 0.0, 0.2, 0.5, 0.5, 0.8, 1, 1.0, 1.5, math.nan]), max_size=4))
steps = st.one_of(junk, st.dictionaries(st.sampled_from(["milestones", "values", "x"]), moments, max_size=3))


@pytest.mark.parametrize("call", [WeightPruning, ChannelPruning, lambda schedule: Ramp(0.0, 1.0, schedule=schedule)])
@given(schedule=st.one_of(junk, st.dictionaries(st.sampled_from(["multi_step", "cubic", "x"]), steps, max_size=2)))
def test_a_schedule_is_taken_or_refused_in_a_sentence(call, schedule):
    check(lambda: call(schedule=schedule), schedule, is_schedule, f"schedule={schedule!r}")


words = st.dictionaries(
    st.one_of(
        st.sampled_from(["channel_pruning", "weight_pruning", "quantization", "distillation", "score", "checkpoint"]),
        st.text(max_size=4),
    ),
    st.one_of(
        junk,
        st.dictionaries(
            st.sampled_from(["start", "end", "freeze", "sparsity", "include", "alpha", "monitor", "x"]),
            junk,
            max_size=3,
        ),
    ),
    max_size=3,
)


@given(content=words)
def test_a_recipe_is_taken_or_refused_in_a_sentence(content):
    """What is accepted gives its callbacks, again and again, and has no word of its own."""
    made = []
    refused = outcome(lambda: made.append(Recipe.load(content)))
    assert refused is None or is_ours(refused), f"{content}: {refused!r}"
    for recipe in made:
        assert len(recipe.callbacks()) == len(recipe.callbacks())
        assert set(recipe.as_plain()) <= {*content, "description"}


@given(text=st.one_of(st.text(max_size=40), words.map(yaml.safe_dump), st.sampled_from(list(recipe_names()))))
def test_a_recipe_file_is_taken_or_refused_in_a_sentence(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    refused = outcome(lambda: Recipe.load(path))
    assert refused is None or is_ours(refused), f"{text!r}: {refused!r}"
