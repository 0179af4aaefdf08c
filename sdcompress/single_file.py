"""Read a Stable Diffusion checkpoint kept in one file, in the LDM layout of WebUIs and checkpoint sites, without a
network.

What a file does not say (noise schedule, tokenizer, text encoder and VAE figures) comes from the configs in
`assets/configs`; the UNet's comes from the shapes of its weights, so that students load as teachers do. Files that
`hosts.ldm.write_ldm` wrote carry their configs and need neither.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from sdcompress_engines.errors import ModelError

from sdcompress.family import FAMILIES, family_of
from sdcompress.hosts import ldm

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

CONFIGS = Path(__file__).parent / "assets" / "configs"
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
V_BIAS_SPREAD = 0.09  # between what epsilon and v-prediction training leave in SD2's last attention; ComfyUI's figure
_HEAD_WIDTH = 64  # of every attention head of SD2.x and SDXL; SD1.x has eight heads of any width
_SD1_HEADS = 8
_GROUPS = 32
VOCABULARY = "sd1/tokenizer"  # CLIP's, which all families share
_CONFIG_NAME = re.compile(r"(model_index\.json|[a-z0-9_]+/[A-Za-z0-9_]+\.(json|txt))")
_PARTS = {"unet": (ldm.UNET,), "vae": (ldm.VAE,), "text_encoder": ("cond_stage_model.", "conditioner.embedders.")}
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
}
CHECKPOINT, LORA, UNKNOWN = "a Stable Diffusion checkpoint", "a LoRA", "unknown weights"
# An EMA copy's keys are written without dots; these are what they are made of.
_EMA = "model_ema.diffusion_model"
_EMA_PART = re.compile(
    r"(input_blocks|output_blocks)(\d+)(\d)|(label_emb)(\d)(\d)|(middle_block|time_embed|in_layers|out_layers|emb_layers|transformer_blocks|to_out|net|out)(\d+)"
    r"|(skip_connection|attn[12]|norm[123]?|proj_in|proj_out|proj|to_[qkv]|ff|conv|op|weight|bias)"
)
# What else a weight file can be, by its keys; the first that fits.
_OTHERS = {
    LORA: re.compile(r"\.lora_(down|up|A|B)\.|\.lora\.(down|up)\.|\.lora_linear_layer\."),
    "a LoHa or LoKr adapter": re.compile(r"\.(hada_w1|lokr_w1)"),
    "a ControlNet": re.compile(r"^control_model\.|^controlnet_cond_embedding\.|(^|\.)input_hint_block\."),
    "a textual-inversion embedding": re.compile(r"^(emb_params|string_to_param|clip_[lg])$"),
    "a Stable Diffusion 3 transformer": re.compile(r"(^|\.)joint_blocks\.\d"),
    "a Flux transformer": re.compile(r"(^|\.)(double_blocks|single_transformer_blocks)\.\d"),
    "a UNet alone in diffusers' layout": re.compile(r"^(down_blocks\.\d+\.|time_embedding\.linear_1\.)"),
    "a UNet alone, without the prefix of a checkpoint": re.compile(r"^(input_blocks|output_blocks)\.\d"),
    "a VAE alone": re.compile(r"^(first_stage_model\.)?(en|de)coder\.(conv_in|down|up|mid)"),
    "a text encoder alone": re.compile(r"(^|\.)text_model\.encoder\.|(^|\.)transformer\.resblocks\.\d"),
}
_LORA_DOWN = re.compile(r"\.(lora_down|lora_A|lora\.down|lora_A\.default|lora_linear_layer\.down)\.weight$")


@dataclass(frozen=True)
class Weights:
    """A weight file, opened: what its header says, and a way to its tensors.

    Attributes:
        path: the file.
        shapes: key → shape, of all tensors. Keys are LDM's, whichever dialect of it the file is in.
        dtypes: key → dtype, in torch's names (`float16`).
        metadata: safetensors' metadata; empty for pickles.
        read: key → the tensor, in the file's dtype, on the CPU.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    metadata: Mapping[str, str] = field(repr=False)
    read: Callable[[str], torch.Tensor] = field(repr=False)

    @cached_property
    def configs(self) -> dict[str, Any] | None:
        """Relative path → content of the configs that `write_ldm` put into the file, text files as text; None where it
        has none.

        Raises:
            ModelError: they are broken.
        """
        if ldm.METADATA_KEY not in self.metadata:
            return None
        try:
            files = {
                name: json.loads(text) if name.endswith(".json") else str(text)
                for name, text in json.loads(self.metadata[ldm.METADATA_KEY]).items()
            }
        except (ValueError, TypeError, AttributeError) as error:
            raise ModelError(f"carries broken configs ({error})", where=self.path) from error
        strange = [name for name in files if not _CONFIG_NAME.fullmatch(name)]
        lacks = [
            name
            for name in ("model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json")
            if not isinstance(files.get(name), dict)
        ]
        if strange or lacks:
            raise ModelError(
                f"carries broken configs ({f'a strange name, {strange[0]!r}' if strange else f'no {lacks[0]}'})",
                where=self.path,
            )
        return files


def open_weights(path: Path) -> Weights:
    """Open a weight file: of `.safetensors` only the header is read, of pickles all, and tensors only (`weights_only`).

    Raises:
        ModelError: a kind of file that is not read, a broken or cut file, or a pickle with code in it.
    """
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in PICKLES:
        return _open_pickle(path)
    raise ModelError(
        f"is a {path.suffix or 'nameless'} file",
        where=path,
        expected=f"a checkpoint in .safetensors, or {', '.join(PICKLES[:2])}",
    )


def _open_safetensors(path: Path) -> Weights:
    try:
        file = safe_open(path, "pt")
        names = _ldm_names(file.keys())
        views = {key: file.get_slice(name) for key, name in names.items()}
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"is no whole safetensors file ({str(error).splitlines()[0]})", where=path, hint="copy or download it again"
        ) from error
    shapes = {key: tuple(view.get_shape()) for key, view in views.items()}
    return Weights(
        path,
        shapes,
        {key: _DTYPES.get(view.get_dtype(), view.get_dtype()) for key, view in views.items()},
        file.metadata() or {},
        lambda key: file.get_tensor(names[key]),
    )


def _reason(error: BaseException) -> str:
    """The line of an error that says what is wrong; torch puts its advice before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "Unpickler error" in line), lines[0] if lines else type(error).__name__)


def _open_pickle(path: Path) -> Weights:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|class|operand) `?([A-Za-z_0-9][\w.]*)", str(error))
        if named is None:
            raise ModelError(
                f"is no whole checkpoint ({_reason(error)})", where=path, hint="copy or download it again"
            ) from error
        raise ModelError(
            f"is a pickle with more than tensors in it ({named[1]}), which could run code; it was not loaded",
            where=path,
            expected="tensors only",
            hint="the .safetensors of the same model",
        ) from error
    except (
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        AttributeError,
        IndexError,
        TypeError,
        struct.error,
    ) as error:
        raise ModelError(
            f"is no whole checkpoint ({_reason(error)})", where=path, hint="copy or download it again"
        ) from error
    state = loaded
    while isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    found = (
        {key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}
        if isinstance(state, dict)
        else {}
    )
    tensors = {key: found[name] for key, name in _ldm_names(found).items()}
    if not tensors:
        raise ModelError("holds no tensors", where=path, expected="a Stable Diffusion checkpoint")
    return Weights(
        path,
        {key: tuple(value.shape) for key, value in tensors.items()},
        {key: str(value.dtype).removeprefix("torch.") for key, value in tensors.items()},
        {},
        tensors.__getitem__,
    )


def _ldm_names(names: Iterable[str]) -> dict[str, str]:
    """Key in the LDM layout → key in the file.

    A training checkpoint holds the model and an EMA copy of it: as A1111, ComfyUI and diffusers do, the model is taken,
    and the copy only where it is alone.
    """
    names = list(names)
    only_ema = not any(name.startswith(ldm.UNET) for name in names)
    found = {}
    for name in names:
        key = name
        if name.startswith("vae."):
            key = ldm.VAE + name.removeprefix("vae.")
        elif only_ema and name.startswith(_EMA):
            key = ldm.UNET + ".".join(
                part
                for match in _EMA_PART.finditer(name.removeprefix(_EMA))
                for part in match.groups()
                if part is not None
            )
        found[key] = name
    return found


def kind_of(weights: Weights) -> str:
    """What a weight file is: `CHECKPOINT`, `LORA`, `a VAE alone`, ...; `unknown weights` where its keys do not tell."""
    if any(key.startswith(f"{ldm.UNET}input_blocks.") for key in weights.shapes):
        return CHECKPOINT
    return next(
        (name for name, pattern in _OTHERS.items() if any(pattern.search(key) for key in weights.shapes)), UNKNOWN
    )


def check_checkpoint(weights: Weights) -> None:
    """Refuse a file that is no whole Stable Diffusion checkpoint.

    Raises:
        ModelError: says what the file is, or what it lacks.
    """
    kind = kind_of(weights)
    if kind != CHECKPOINT:
        hint = "sdcompress generate MODEL PROMPT --lora FILE" if kind == LORA else None
        raise ModelError(
            f"is {kind}, no checkpoint: it has no UNet with VAE and text encoder",
            where=weights.path,
            expected="a Stable Diffusion checkpoint in LDM layout",
            hint=hint,
        )
    lacks = [
        name.replace("_", " ")
        for name, prefix in _PARTS.items()
        if not any(key.startswith(prefix) for key in weights.shapes)
    ]
    if lacks:
        raise ModelError(
            f"has no {' and no '.join(lacks)}",
            where=weights.path,
            expected="a Stable Diffusion checkpoint with UNet, VAE and text encoder",
        )


def component_parameters(weights: Weights) -> dict[str, int]:
    """Component → number of parameters the file holds of it; training's leftovers (EMA, loss, schedule) are not
    counted.
    """
    prefixes = dict(_PARTS)
    if any(key.startswith("conditioner.embedders.1.") for key in weights.shapes):
        prefixes |= {"text_encoder": ("conditioner.embedders.0.",), "text_encoder_2": ("conditioner.embedders.1.",)}
    return {
        name: sum(
            math.prod(shape)
            for key, shape in weights.shapes.items()
            if key.startswith(prefix) and "float" in weights.dtypes[key]
        )
        for name, prefix in prefixes.items()
    }


def lora_facts(weights: Weights) -> dict[str, Any]:
    """A LoRA's ranks, number of adapted layers, naming (`kohya` or `diffusers`), the components it changes, and what it
    was made for where it says so.
    """
    downs = {key: shape[0] for key, shape in weights.shapes.items() if _LORA_DOWN.search(key)}
    layers = {_LORA_DOWN.sub("", key) for key in downs}
    kohya = any(key.startswith("lora_") for key in layers)
    parts = {
        "unet": ("lora_unet_", "unet."),
        "text_encoder": ("lora_te_", "lora_te1_", "text_encoder."),
        "text_encoder_2": ("lora_te2_", "text_encoder_2."),
    }
    counts = {name: sum(key.startswith(prefixes) for key in layers) for name, prefixes in parts.items()}
    about = next(
        (
            weights.metadata[key]
            for key in ("ss_base_model", "ss_base_model_version", "ss_sd_model_name", "modelspec.architecture")
            if weights.metadata.get(key)
        ),
        None,
    )
    return {
        "rank": sorted(set(downs.values())),
        "layers": len(layers),
        "naming": "kohya" if kohya else "diffusers",
        "components": {name: count for name, count in counts.items() if count},
        "made_for": about,
    }


def unet_config_of(weights: Weights) -> dict[str, Any]:
    """The diffusers config of a checkpoint's UNet: the one it carries, else told by the shapes of its weights.

    Raises:
        ModelError: no Stable Diffusion UNet, or one of unusual widths whose heads the weights do not tell.
    """
    if weights.configs is not None:
        return dict(weights.configs["unet/config.json"])
    shapes = {key.removeprefix(ldm.UNET): shape for key, shape in weights.shapes.items() if key.startswith(ldm.UNET)}
    try:
        derived = _unet_from_shapes(shapes)
    except (KeyError, IndexError, StopIteration, ValueError) as error:
        raise ModelError(
            f"has a UNet unlike Stable Diffusion's ({error} is missing)",
            where=weights.path,
            expected="a UNet of SD1.x, SD2.x or SDXL, or a student of one",
        ) from error
    family = family_of(derived)
    if family == "other":
        raise ModelError(
            "has a UNet that is none of SD1.x, SD2.x and SDXL",
            where=weights.path,
            expected=", ".join(list(FAMILIES.values())[:3]),
        )
    channels = derived["block_out_channels"]
    if any(width % _GROUPS for width in channels) or (
        family != "sd1" and any(width % _HEAD_WIDTH for width in channels)
    ):
        raise ModelError(
            f"has a UNet of unusual widths {channels}: its heads and groups are not told by the weights",
            where=weights.path,
            hint="convert it to a diffusers folder with its own config",
        )
    derived["attention_head_dim"] = _SD1_HEADS if family == "sd1" else [width // _HEAD_WIDTH for width in channels]
    if family == "sd2" and prediction_type(weights) == "v_prediction":
        derived |= {"sample_size": 96, "upcast_attention": True}  # as stabilityai/stable-diffusion-2-1: 768 px
    return _read_config(family, "unet/config.json") | derived


def _unet_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What a UNet's LDM weights say of its diffusers config.

    Within a level every entry is one resnet–attention pair; a sampler ends the level.
    """

    def depth(block: str) -> int:
        return len(
            {
                key.split(".")[len(block.split(".")) + 1]
                for key in shapes
                if key.startswith(f"{block}.transformer_blocks.")
            }
        )

    def count(side: str) -> int:
        return len({key.split(".")[1] for key in shapes if key.startswith(f"{side}.")})

    channels: list[int] = []
    down: list[list[int]] = [[]]
    for i in range(1, count("input_blocks")):
        if f"input_blocks.{i}.0.op.weight" in shapes:
            down.append([])
        else:
            channels[len(down) - 1 :] = [shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0]]
            down[-1].append(depth(f"input_blocks.{i}.1"))
    up: list[list[int]] = [[]]
    for i in range(count("output_blocks")):
        up[-1].append(depth(f"output_blocks.{i}.1"))
        if any(f"output_blocks.{i}.{j}.conv.weight" in shapes for j in (1, 2)):
            up.append([])
    if len(down) != len(up):
        raise ValueError(f"{len(down)} levels down and {len(up)} up: a sampler")
    pairs = [len(level) for level in down]
    attended = [any(level) for level in down]
    config: dict[str, Any] = {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": pairs[0] if len(set(pairs)) == 1 else pairs,
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attended],
        "up_block_types": ["CrossAttnUpBlock2D" if any(level) else "UpBlock2D" for level in up],
        "mid_block_type": (
            "UNetMidBlock2DCrossAttn"
            if depth("middle_block.1")
            else "UNetMidBlock2D"
            if count("middle_block")
            else None
        ),
        "cross_attention_dim": next(
            shape[1] for key, shape in shapes.items() if key.endswith("transformer_blocks.0.attn2.to_k.weight")
        ),
        "use_linear_projection": (
            next(len(shape) for key, shape in shapes.items() if key.endswith(".1.proj_in.weight")) == 2
        ),
    }
    down_depths, up_depths = ([_depths(level) for level in side] for side in (down, up))
    config["transformer_layers_per_block"] = 1 if set(map(str, down_depths)) == {"1"} else down_depths
    if up_depths != down_depths[::-1]:
        config["reverse_transformer_layers_per_block"] = up_depths
    if "label_emb.0.0.weight" in shapes:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": shapes["label_emb.0.0.weight"][1],
        }
    return config


def _depths(level: list[int]) -> int | list[int]:
    """A level's numbers of transformer blocks as diffusers writes them: one figure where they are equal, 1 where there
    are none.
    """
    return max(level[0], 1) if len(set(level)) == 1 else level


def prediction_type(weights: Weights) -> str:
    """`epsilon` or `v_prediction`: from the config the file carries, its `v_pred` key or its metadata, else, for SD2.x,
    from its weights.

    SD2.x checkpoints of both kinds have equal shapes; in ComfyUI's published observation the bias of the last
    attention's first norm is spread more than 0.09 (population standard deviation) after training for v-prediction.
    """
    if weights.configs is not None:
        return str(weights.configs["scheduler/scheduler_config.json"].get("prediction_type", "epsilon"))
    said = weights.metadata.get("modelspec.prediction_type", "")
    if ldm.V_PREDICTION in weights.shapes or said in ("v", "v_prediction", "v-prediction"):
        return "v_prediction"
    if said == "epsilon" or not any(key.startswith("cond_stage_model.model.") for key in weights.shapes):
        return "epsilon"
    last = re.compile(r"model\.diffusion_model\.output_blocks\.(\d+)\.1\.transformer_blocks\.0\.norm1\.bias")
    found = {int(match[1]): key for key in weights.shapes if (match := last.fullmatch(key))}
    if not found:
        return "epsilon"
    return (
        "v_prediction"
        if weights.read(found[max(found)]).float().std(unbiased=False).item() > V_BIAS_SPREAD
        else "epsilon"
    )


def configs_of(weights: Weights) -> dict[str, dict[str, Any]]:
    """A pipeline folder's configs, relative path → content, as they hold for this checkpoint; no weights are loaded.

    Raises:
        ModelError: no whole Stable Diffusion checkpoint, or of no family that is known.
    """
    check_checkpoint(weights)
    if weights.configs is not None:
        return {name: dict(content) for name, content in weights.configs.items() if isinstance(content, dict)}
    unet = unet_config_of(weights)
    folder = CONFIGS / family_of(unet)
    names = [
        path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.json")) if path.name != "vocab.json"
    ]
    configs: dict[str, dict[str, Any]] = {
        name: json.loads((folder / name).read_text(encoding="utf-8")) for name in names
    }
    scheduler = configs["scheduler/scheduler_config.json"]
    scheduler["prediction_type"] = prediction_type(weights)
    if ldm.ZERO_SNR in weights.shapes:
        if scheduler["_class_name"] == "PNDMScheduler":  # which cannot
            configs["model_index.json"]["scheduler"] = ["diffusers", "DDIMScheduler"]
            scheduler |= {"_class_name": "DDIMScheduler", "clip_sample": False}
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return configs | {"unet/config.json": unet}


def _read_config(family: str, name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((CONFIGS / family / name).read_text(encoding="utf-8"))
    return config


def load_single_file(path: Path, *, as_stored: bool = False) -> DiffusionPipeline:
    """The pipeline of a single-file checkpoint on the CPU, without a safety checker: in fp32, or with `as_stored` in
    half precision where the file is.

    Raises:
        ModelError: as `open_weights` and `configs_of`; or a weight that is missing or of another shape than the config
            says.
    """
    import diffusers

    weights = open_weights(path)
    configs = configs_of(weights)
    index = configs["model_index.json"]
    channels = configs["unet/config.json"].get("in_channels", 4)
    if channels != configs["vae/config.json"].get("latent_channels", 4):
        raise ModelError(
            f"has a UNet of {channels} input channels: an inpainting or editing model",
            where=path,
            expected="a text-to-image model, whose UNet takes the VAE's 4 channels",
        )
    sdxl = "text_encoder_2/config.json" in configs
    parts: dict[str, Any] = {}
    try:
        for name in ("unet", "vae", "text_encoder", "text_encoder_2")[: 3 + sdxl]:
            parts[name] = _load_part(weights, name, configs[f"{name}/config.json"], sdxl, as_stored)
        parts["scheduler"] = _load_scheduler(configs["scheduler/scheduler_config.json"], path)
        for name in ("tokenizer", "tokenizer_2")[: 1 + sdxl]:
            parts[name] = _load_tokenizer(weights, name, configs)
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise ModelError(
            f"has configs that build no pipeline ({(str(error) or type(error).__name__).splitlines()[0]})", where=path
        ) from error
    if sdxl:
        return diffusers.StableDiffusionXLPipeline(
            **parts,
            force_zeros_for_empty_prompt=bool(index.get("force_zeros_for_empty_prompt", True)),
            add_watermarker=False,
        )
    return diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def _load_scheduler(config: dict[str, Any], path: Path) -> Any:
    import diffusers

    kind: Any = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise ModelError(f"names a scheduler that diffusers does not have, {config.get('_class_name')!r}", where=path)
    scheduler: Any = kind
    return scheduler.from_config(config)


def _load_part(weights: Weights, name: str, config: dict[str, Any], sdxl: bool, as_stored: bool) -> Any:
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        part = _build(name, config)
    places = _places(weights, name, part, sdxl)
    state = {}
    for key, empty in part.state_dict().items():
        if not empty.is_meta:
            state[key] = empty
            continue
        place = places[key]
        if place.name not in weights.shapes:
            raise ModelError(
                f"the {name} lacks {place.name}",
                where=weights.path,
                expected=f"shape {tuple(empty.shape)}",
                hint="copy or download it again, or convert it to a diffusers folder",
            )
        tensor = place.take(weights.read(place.name))
        if tensor.shape != empty.shape and tensor.numel() == empty.numel():
            tensor = tensor.view(empty.shape)  # attention weights are 1×1 convolutions in LDM's VAE
        if tensor.shape != empty.shape:
            raise ModelError(
                f"the {name}'s {place.name} has shape {tuple(tensor.shape)}",
                where=weights.path,
                expected=f"{tuple(empty.shape)}",
                hint="convert it to a diffusers folder with its own config",
            )
        state[key] = tensor.to(
            tensor.dtype if as_stored and tensor.dtype in (torch.float16, torch.bfloat16) else torch.float32, copy=True
        ).contiguous()
    part.load_state_dict(state, assign=True)
    return part.eval()


def _build(name: str, config: dict[str, Any]) -> Any:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    if name == "unet":
        return UNet2DConditionModel.from_config(config)
    if name == "vae":
        return AutoencoderKL.from_config(config)
    kind = CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel
    return kind(
        CLIPTextConfig(
            **{key: value for key, value in config.items() if key not in ("architectures", "dtype", "torch_dtype")}
        )
    )


@dataclass(frozen=True)
class _Place:
    """Where a parameter lies in the file: its LDM key, and how it is taken from that tensor."""

    name: str
    take: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor


def _places(weights: Weights, name: str, part: Any, sdxl: bool) -> dict[str, _Place]:
    keys = [key for key, value in part.state_dict().items() if value.is_meta]
    if name == "unet":
        return {key: _Place(ldm.UNET + place) for key, place in ldm.unet_keys(keys).items()}
    if name == "vae":
        return {key: _Place(ldm.VAE + place) for key, place in ldm.vae_keys(keys).items()}
    openclip = ldm.is_openclip(part.config)
    prefix, projection = ldm.text_prefixes(sdxl, openclip)
    plain = {key: key.removeprefix("text_model.") for key in keys}
    if openclip:
        return {
            key: _openclip_place(prefix + place, plain[key])
            for key, place in zip(plain, ldm.openclip_keys(plain.values()).values(), strict=True)
        }
    if not any(key.startswith(prefix) for key in weights.shapes):
        prefix = prefix.removesuffix("text_model.")  # as some checkpoints of 2022 have it
    return {
        key: _Place((projection if bare.startswith("text_projection") else prefix) + bare)
        for key, bare in plain.items()
    }


def _openclip_place(name: str, key: str) -> _Place:
    third = ldm.qkv_third(key)
    if third is not None:
        return _Place(name, lambda tensor: tensor.chunk(3)[third])
    return _Place(name, (lambda tensor: tensor.T) if name.endswith("text_projection") else lambda tensor: tensor)


def _load_tokenizer(weights: Weights, name: str, configs: Mapping[str, Any]) -> Any:
    from transformers import CLIPTokenizer

    found = configs if weights.configs is None else weights.configs
    files = {path.partition("/")[2]: content for path, content in found.items() if path.startswith(f"{name}/")}
    if not {"vocab.json", "tokenizer.json"} & set(files):
        files |= {
            file: (CONFIGS / VOCABULARY / file).read_text(encoding="utf-8") for file in ("vocab.json", "merges.txt")
        }
    with tempfile.TemporaryDirectory() as scratch:
        for file, content in files.items():
            (Path(scratch) / file).write_text(
                content if isinstance(content, str) else json.dumps(content), encoding="utf-8"
            )
        return CLIPTokenizer.from_pretrained(scratch, local_files_only=True)


@cache
def _vocabulary() -> dict[str, int]:
    vocabulary: dict[str, int] = json.loads((CONFIGS / VOCABULARY / "vocab.json").read_text(encoding="utf-8"))
    return vocabulary


def shared_vocabulary() -> Mapping[str, int]:
    """CLIP's vocabulary, token → number, as the package carries it."""
    return _vocabulary()
