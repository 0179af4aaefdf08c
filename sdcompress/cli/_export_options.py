"""The options of `sdcompress export`."""

from __future__ import annotations

from typing import Any

import click

from sdcompress.cli._console import force_option, output_option
from sdcompress.cli._types import NAME, OPSET, Capability, FilePath, Shapes, Whole

# As in `sdcompress_engines.signature` and `.profiles`, which load torch; a test checks that they are equal.
COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "vae_decoder", "vae_encoder")
HOSTS = ("diffusers", "webui", "comfyui")
PRESETS = ("dynamic", "webui", "few-step", "sd15-512", "sd15-dynamic", "sdxl-1024")
QUANTIZED = ("fp8", "int8")


_MODEL_OPTIONS = (
    output_option(),
    click.option(
        "--precision",
        type=click.Choice(["fp32", "fp16", "bf16", *QUANTIZED]),
        default=None,
        help=(
            "Precision of weights, inputs and outputs; fp8 and int8 quantize the UNet."
            "  [default: fp32; fp16 with --trt]"
        ),
    ),
    click.option("--trt", is_flag=True, help="Build TensorRT engines too: DIR/onnx and DIR/engine."),
    click.option(
        "--ldm",
        is_flag=True,
        help="Write one .safetensors in LDM layout, which A1111, Forge and ComfyUI load; -o is that file.",
    ),
    click.option(
        "--signature",
        "host",
        type=click.Choice(HOSTS),
        default="diffusers",
        show_default=True,
        help="Naming of the inputs and outputs; with webui and comfyui only the UNet is exported.",
    ),
    click.option(
        "--component",
        "components",
        type=click.Choice(COMPONENTS),
        multiple=True,
        help="Component to export; repeat for more.  [default: all that text-to-image needs]",
    ),
    click.option(
        "--lora", "loras", type=NAME, multiple=True, metavar="FILE[:WEIGHT]", help="LoRA to bake in; repeat for more."
    ),
    click.option(
        "--decoder",
        type=FilePath(),
        default=None,
        metavar="DIR",
        help="Small decoder to export in the place of the VAE, from `distill-decoder`; `nano` is the built-in one.",
    ),
    click.option(
        "--opset",
        type=OPSET,
        default=None,
        help="ONNX opset.  [default: 23; 20 for TensorRT before 10.14]",
    ),
)
_ENGINE_OPTIONS = (
    click.option(
        "--flavour",
        type=click.Choice(["tensorrt", "tensorrt-rtx"]),
        default=None,
        help="Library to build with.  [default: tensorrt with a GPU, else tensorrt-rtx]",
    ),
    click.option(
        "--profile",
        "profiles",
        type=NAME,
        multiple=True,
        metavar="PRESET|RANGES",
        help=(
            f"Shapes to build for: {', '.join(PRESETS)}, or batch=1:2:8,height=512,...; repeat for more in one"
            " engine.  [default: dynamic; few-step for a model without guidance]"
        ),
    ),
    click.option(
        "--batch",
        type=Shapes("batch"),
        default=None,
        metavar="MIN:OPT:MAX",
        help="Samples in one UNet call; with guidance, a picture takes two.",
    ),
    click.option(
        "--height",
        type=Shapes("height"),
        default=None,
        metavar="MIN:OPT:MAX",
        help="Height of the picture in pixels; one number makes it fixed.",
    ),
    click.option(
        "--width", type=Shapes("width"), default=None, metavar="MIN:OPT:MAX", help="Width of the picture in pixels."
    ),
    click.option(
        "--tokens",
        type=Shapes("tokens"),
        default=None,
        metavar="MIN:OPT:MAX",
        help="Tokens of the prompt: 77, or a multiple of 77 for long prompts.",
    ),
    click.option(
        "--compute-capability",
        "compute_capabilities",
        type=Capability(),
        multiple=True,
        help=(
            "GPU to build for; repeat for more.  [default: this machine's for tensorrt, all from 8.0 on for"
            " tensorrt-rtx]"
        ),
    ),
    click.option(
        "--optimization-level",
        type=Whole(0, 5),
        default=None,
        help="How long tensorrt searches.  [default: 3]",
    ),
    click.option(
        "--workspace",
        "workspace_mib",
        type=Whole(1, 2**20),
        default=None,
        metavar="MIB",
        help="Limit of a layer's scratch memory.",
    ),
    click.option(
        "--refit",
        type=click.Choice(["any", "identical"]),
        default=None,
        help="Let weights be replaced later; any costs speed.  [default: off]",
    ),
    click.option(
        "--no-lora",
        "no_lora",
        is_flag=True,
        help="Build engines with fixed weights, which take no LoRA.  [default: they take LoRAs, if the card is here]",
    ),
    click.option(
        "--strip-plan",
        is_flag=True,
        help="Build engines without weights, which are read from the ONNX graph when they are loaded.",
    ),
    click.option(
        "--weight-streaming",
        is_flag=True,
        help="Let weights stay in host memory, for GPUs that are too small for them.",
    ),
    click.option(
        "--hardware-compatible",
        type=click.Choice(["ampere_plus", "same_compute_capability"]),
        default=None,
        help="tensorrt: run on other GPUs too, slower.",
    ),
    click.option(
        "--version-compatible",
        is_flag=True,
        help="tensorrt: run on newer versions of the same major too, slower.",
    ),
)
_CHECK_OPTIONS = (
    click.option(
        "--calibration-prompts",
        type=FilePath(),
        default=None,
        metavar="FILE",
        help="fp8, int8: prompts to calibrate with, one a line.  [default: built-in ones]",
    ),
    click.option("--keep-failed", is_flag=True, help="Keep graphs that are too far from torch in DIR.failed."),
    force_option,
)


def export_options(command: Any) -> Any:
    """Add the options of `export`: those of the model, of the engines, and of the checks."""
    for option in reversed((*_MODEL_OPTIONS, *_ENGINE_OPTIONS, *_CHECK_OPTIONS)):
        command = option(command)
    return command
