"""Put nano's trained parts together as the package carries them: fp16 safetensors under `sdcompress/assets/nano/`.

python tools/nano/assemble.py --work build/nano teacher            the pipeline
python tools/nano/assemble.py --work build/nano metric             nano-CLIP
python tools/nano/assemble.py --work build/nano tiny RUN           the UNet of a `sdcompress distill` run
python tools/nano/assemble.py --work build/nano tiny-4step RUN     the LoRA of a `sdcompress few-step --lora` run
python tools/nano/assemble.py --work build/nano decoder RUN        the decoder of a `sdcompress distill-decoder` run
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from captions import make_tokenizer
from common import ROOT, config
from diffusers import AutoencoderTiny, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sdcompress_bench.resnet_clip import load_clip
from sdcompress_engines.manifest import read_manifest, write_manifest
from train_unet import SCHEDULE, build_model, load_latents
from train_vae import build as build_vae

ASSETS = ROOT / "sdcompress/assets/nano"


def strip_names(folder: Path) -> None:
    """Configs say where they were loaded from; what ships does not."""
    for path in folder.rglob("*.json"):
        data = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data, dict) and data.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def teacher(work: Path) -> None:
    cfg = config("unet")
    _, scale = load_latents(work, "train", cfg)
    vae = build_vae(config("vae"))
    vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True))
    vae.register_to_config(scaling_factor=scale)
    model = build_model(work, cfg)
    model.load_state_dict(torch.load(work / "unet.pt", weights_only=True))
    model.text_encoder.set_attn_implementation("sdpa")
    scheduler = PNDMScheduler(
        skip_prk_steps=True,
        steps_offset=1,
        set_alpha_to_one=False,
        **{k: v for k, v in SCHEDULE.items() if k != "clip_sample"},
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=make_tokenizer([], 0, work / "tokenizer"),
        unet=model.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    shutil.rmtree(ASSETS / "teacher", ignore_errors=True)
    pipeline.to(dtype=torch.float16).save_pretrained(ASSETS / "teacher")
    strip_names(ASSETS / "teacher")


def metric(work: Path) -> None:
    shutil.rmtree(ASSETS / "clip", ignore_errors=True)
    load_clip(work / "clip-metric").half().save_pretrained(ASSETS / "clip")
    make_tokenizer([], 0, work / "tokenizer").save_pretrained(ASSETS / "clip")
    strip_names(ASSETS / "clip")


def tiny(run: Path) -> None:
    shutil.rmtree(ASSETS / "tiny", ignore_errors=True)
    UNet2DConditionModel.from_pretrained(run / "pipeline/unet").half().save_pretrained(ASSETS / "tiny")
    shutil.copy(run / "plan.json", ASSETS / "tiny/plan.json")
    strip_names(ASSETS / "tiny")


def tiny_4step(run: Path) -> None:
    shutil.rmtree(ASSETS / "tiny-4step", ignore_errors=True)
    (ASSETS / "tiny-4step").mkdir()
    with safe_open(run / "lora/lora.safetensors", "pt") as file:
        metadata = file.metadata()
    weights = {name: tensor.half() for name, tensor in load_file(run / "lora/lora.safetensors").items()}
    save_file(weights, ASSETS / "tiny-4step/lora.safetensors", metadata=metadata)


def decoder(run: Path) -> None:
    made = read_manifest(run / "decoder")
    assert made is not None, "an ordinary run writes a manifest"
    shutil.rmtree(ASSETS / "decoder", ignore_errors=True)
    AutoencoderTiny.from_pretrained(run / "decoder").half().save_pretrained(ASSETS / "decoder")
    strip_names(ASSETS / "decoder")
    write_manifest(ASSETS / "decoder", made.kind, config=made.config, inputs=made.inputs, seed=made.seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("part", choices=["teacher", "metric", "tiny", "tiny-4step", "decoder"])
    parser.add_argument("run", type=Path, nargs="?")
    args = parser.parse_args()
    if args.part in ("teacher", "metric"):
        {"teacher": teacher, "metric": metric}[args.part](args.work)
    else:
        {"tiny": tiny, "tiny-4step": tiny_4step, "decoder": decoder}[args.part](args.run)
    files = [p for p in ASSETS.rglob("*") if p.suffix == ".safetensors"]
    print(
        json.dumps(
            {str(p.relative_to(ASSETS)): p.stat().st_size for p in files}
            | {"total": sum(p.stat().st_size for p in files)}
        )
    )


if __name__ == "__main__":
    main()
