"""Train nano's VAE (AutoencoderKL, f8, 4 latent channels), resumable.

python tools/nano/train_vae.py --work build/nano             encoder and decoder
python tools/nano/train_vae.py --work build/nano --decoder   then the decoder alone, so latents stay as cached
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from common import Progress, batch_indices, config, load
from diffusers import AutoencoderKL


def build(cfg: dict) -> AutoencoderKL:
    levels = len(cfg["block_out_channels"])
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(cfg["block_out_channels"]),
        layers_per_block=cfg["layers_per_block"],
        latent_channels=4,
        norm_num_groups=cfg["norm_num_groups"],
        sample_size=128,
    )
    # A posterior that starts narrow: at unit width the noise hides the picture and the decoder learns to ignore the
    # latents.
    torch.nn.init.constant_(vae.quant_conv.bias[4:], -5.0)
    return vae


@torch.no_grad()
def psnr(vae: AutoencoderKL, pixels: torch.Tensor) -> float:
    """Mean PSNR in dB of reconstructions from the latent mean, peak 1.0."""
    values = []
    for chunk in pixels.split(25):
        decoded = vae.decode(vae.encode(chunk).latent_dist.mean).sample.clamp(-1, 1)
        mse = ((decoded - chunk) / 2).square().mean(dim=(1, 2, 3))
        values.append(-10 * mse.log10())
    return torch.cat(values).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--decoder", action="store_true")
    args = parser.parse_args()
    cfg = config("vae")
    torch.manual_seed(cfg["seed"])
    train, heldout = load("train"), load("heldout")
    vae = build(cfg)
    if args.decoder:
        vae.load_state_dict(torch.load(args.work / "vae.pt", weights_only=True))
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    steps = cfg["decoder_steps" if args.decoder else "steps"]
    name = "vae-decoder" if args.decoder else "vae"
    parameters = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=cfg["lr"], weight_decay=1e-4, betas=(0.9, 0.99), fused=True)
    progress = Progress(args.work, name)
    start = 0
    if state := progress.resume():
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]

    def reconstruct(pixels: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        posterior = vae.encode(pixels).latent_dist
        return vae.decode(posterior.mean + posterior.std * noise).sample, posterior.kl()

    for step in range(start, steps):
        lr = (
            cfg["lr"]
            * min(1, (step + 1) / cfg["warmup"])
            * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        generator = torch.Generator().manual_seed(cfg["seed"] * 1_000_003 + step)
        pixels = train.pixels(batch_indices(step, cfg["batch"], len(train.captions), cfg["seed"]))
        if torch.rand((), generator=generator) < 0.5:
            pixels = pixels.flip(-1)
        noise = torch.randn(len(pixels), 4, 16, 16, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            decoded, kl = reconstruct(pixels, noise)
        decoded = decoded.float()
        loss = (
            F.mse_loss(decoded, pixels)
            + cfg["l1_weight"] * F.l1_loss(decoded, pixels)
            + cfg["kl_weight"] * kl.float().mean()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % progress.every == 0:
            progress.note(step + 1, loss=loss.item(), kl=kl.float().mean().item(), lr=lr)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            progress.save(step=step + 1, model=vae.state_dict(), optimizer=optimizer.state_dict())
            progress.note(step + 1, psnr_heldout=psnr(vae, heldout.pixels(torch.arange(100))))
    torch.save(vae.state_dict(), args.work / "vae.pt")
    progress.note(steps, psnr_heldout=psnr(vae, heldout.pixels(torch.arange(len(heldout.captions)))))


if __name__ == "__main__":
    main()
