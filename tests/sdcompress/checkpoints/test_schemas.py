"""Configs of published models pass their schema; any other content is a line, in no time and without a traceback."""

from __future__ import annotations

import copy
import inspect
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from sdcompress_engines.errors import ModelError

from sdcompress.families.build import build_scheduler
from sdcompress.families.configs import CONFIGS
from sdcompress.families.schemas.check import check_config, check_match, config_file
from sdcompress.families.schemas.index import check_index, component_classes
from sdcompress.families.schemas.scheduler import SCHEDULERS as SCHEDULER_CLASSES
from sdcompress.families.schemas.scheduler import SchedulerSchema
from sdcompress.families.schemas.text_encoder import TextEncoderSchema
from sdcompress.families.schemas.tiny_vae import TinyVaeSchema
from sdcompress.families.schemas.unet import UNetSchema
from sdcompress.families.schemas.vae import VaeSchema
from sdcompress.models.nano import teacher_folder
from sdcompress.prune.cost import count_unet_parameters
from sdcompress.prune.presets import PRESETS, make_plan

from .real_configs import SCHEDULERS, TEXT_ENCODERS, UNETS, VAES, shipped

NANO = teacher_folder()


def nano(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((NANO / name).read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize("name", UNETS)
def test_a_published_unet_passes(name: str) -> None:
    family, changes = UNETS[name]
    config = shipped(family, "unet") | changes
    checked = check_config("unet", config, name)
    assert {key: value for key, value in checked.items() if not key.startswith("_")} == {
        key: value for key, value in config.items() if not key.startswith("_")
    }
    assert count_unet_parameters(checked) > 2e8


@pytest.mark.parametrize(
    ("component", "models"), [("vae", VAES), ("text_encoder", TEXT_ENCODERS)], ids=["vae", "text_encoder"]
)
def test_published_vaes_and_text_encoders_pass(component: str, models: dict[str, Any]) -> None:
    for name, (family, changes) in models.items():
        check_config(component, shipped(family, component) | changes, name)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_published_scheduler_is_built(name: str) -> None:
    assert type(build_scheduler(SCHEDULERS[name], name)).__name__ == SCHEDULERS[name]["_class_name"]


def test_the_shipped_configs_fit_each_other() -> None:
    for folder in [NANO, *(path.parent for path in sorted(CONFIGS.glob("*/model_index.json")))]:
        index = check_index(json.loads((folder / "model_index.json").read_text(encoding="utf-8")), folder)
        names = [name for name in component_classes(index["_class_name"]) if not name.startswith("tokenizer")]
        configs = {
            name: check_config(name, json.loads((folder / config_file(name)).read_text(encoding="utf-8")), name)
            for name in names
        }
        check_match(configs, folder, index)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_students_pass(preset: str, family: str) -> None:
    if (preset, family) != ("bk-tiny", "sdxl"):
        check_config("unet", make_plan(shipped(family, "unet"), preset).student_config(), preset)


SCHEMAS_AND_CLASSES = (
    (UNetSchema, diffusers.UNet2DConditionModel),
    (VaeSchema, diffusers.AutoencoderKL),
    (TinyVaeSchema, diffusers.AutoencoderTiny),
)


def test_schemas_know_every_entry_of_the_libraries() -> None:
    """A new version that adds an entry must be looked at: the entry may change the result."""
    for schema, diffusers_class in SCHEMAS_AND_CLASSES:
        parameters = {k: p for k, p in inspect.signature(diffusers_class.__init__).parameters.items() if k != "self"}
        fields = dict(schema.model_fields)
        if schema is TinyVaeSchema:
            del fields["block_out_channels"]  # in its config, and no argument
        assert parameters.keys() == fields.keys()
        for name, field in fields.items():
            default = field.get_default(call_default_factory=True)
            usual = parameters[name].default
            assert field.is_required() or default == (list(usual) if isinstance(default, list) else usual), name
    known = SchedulerSchema.model_fields.keys() | {"self", "args", "kwargs"}
    for name in SCHEDULER_CLASSES:
        assert inspect.signature(getattr(diffusers, name).__init__).parameters.keys() <= known, name
    defaults = transformers.CLIPTextConfig()
    for name, field in TextEncoderSchema.model_fields.items():
        assert field.default == getattr(defaults, name), name


@pytest.mark.parametrize(
    ("component", "changes", "words"),
    [
        ("unet", {"block_out_channels": [320] * 5000}, "block_out_channels"),
        ("unet", {"layers_per_block": 10**6}, "layers_per_block: expected a whole number from 1 to 8"),
        ("unet", {"sample_size": 10**9}, "sample_size"),
        ("unet", {"down_block_types": ["EvilBlock2D"] * 4}, "down_block_types"),
        ("unet", {"act_fn": "os.system"}, "act_fn"),
        ("unet", {"cross_attention_dim": "96"}, "cross_attention_dim"),
        ("unet", {"norm_num_groups": 0}, "norm_num_groups"),
        ("unet", {"block_out_channels": [10_240] * 4, "layers_per_block": 8, "norm_num_groups": 32}, "billion"),
        ("unet", {"transformer_layers_per_block": 64, "layers_per_block": 8}, "transformer blocks"),
        ("unet", {"attention_head_dim": 7}, "7 heads, which do not divide 48 channels"),
        ("unet", {"block_out_channels": [48, 80]}, "down_block_types has 4 entries for 2 levels"),
        ("unet", {"act_fn": 3, "in_channels": -1, "dropout": float("nan")}, "in_channels.*dropout.*act_fn"),
        ("unet", {"_class_name": "UNet3DConditionModel"}, "UNet3DConditionModel"),
        ("unet", {"dual_cross_attention": True, "class_embeddings_concat": True}, "dual.*False.*concat.*False"),
        ("vae", {"latent_channels": None}, "latent_channels"),
        ("vae", {"scaling_factor": 0}, "scaling_factor"),
        ("text_encoder", {"hidden_size": 10**9}, "hidden_size"),
        ("unet", {"time_embedding_type": "fourier"}, "time_embedding_type"),  # half precision has too few digits
        ("text_encoder", {"eos_token_id": None}, "eos_token_id"),
        ("text_encoder", {"num_attention_heads": 5}, "num_attention_heads is 5"),
        (
            "text_encoder",
            {"vocab_size": 10**6, "hidden_size": 8192, "num_hidden_layers": 96, "num_attention_heads": 8},
            "billion",
        ),
        ("text_encoder", {"_attn_implementation": "someone/kernel"}, "names code"),
        ("text_encoder", {"auto_map": {"AutoModel": "evil.Model"}}, "names code"),
        ("scheduler", {"_class_name": "DiffusionPipeline"}, "DiffusionPipeline"),
        ("scheduler", {"beta_start": 2}, "beta_start"),
    ],
)
def test_faults_are_named(component: str, changes: dict[str, Any], words: str) -> None:
    started = time.perf_counter()
    with pytest.raises(ModelError, match=words) as refusal:
        check_config(component, nano(config_file(component)) | changes, "here/config.json")
    assert time.perf_counter() - started < 5
    assert len(str(refusal.value)) < 600


def test_entries_that_would_replace_methods_are_left_out() -> None:
    config = nano("unet/config.json") | {"items": 5, "from_config": 1, "_use_default_values": ["block_out_channels"]}
    assert check_config("unet", config, "here") == check_config("unet", nano("unet/config.json"), "here")


def fault(check: Callable[[], Any]) -> str:
    """Returns the line with which a content is refused; empty where it passes."""
    try:
        check()
    except ModelError as refusal:
        return str(refusal)
    return ""


ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from([0, -1, 10**9, 10**400, 2, 0.5]),
        st.floats(),
        st.text(max_size=20),
        st.just("x" * 5000),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=8,
)
COMPONENTS = ("unet", "vae", "text_encoder", "scheduler")


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_changed_config_passes_or_is_one_line(data: st.DataObject) -> None:
    component = data.draw(st.sampled_from(COMPONENTS))
    config = copy.deepcopy(nano(config_file(component)))
    for key in data.draw(st.lists(st.sampled_from([*config, "auto_map", "keys"]), min_size=1, max_size=3)):
        if data.draw(st.booleans()):
            config[key] = data.draw(ANYTHING)
        else:
            config.pop(key, None)
    started = time.perf_counter()
    line = fault(lambda: check_config(component, config, "here/config.json"))
    assert time.perf_counter() - started < 5
    assert len(line) < 600
    assert "\n" not in line


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from([*json.loads((NANO / "model_index.json").read_text()), "extra"]), value=ANYTHING)
def test_a_changed_index_passes_or_is_one_line(name: str, value: Any) -> None:
    line = fault(lambda: check_index(nano("model_index.json") | {name: value}, Path("here/model_index.json")))
    assert len(line) < 600
    assert "\n" not in line
