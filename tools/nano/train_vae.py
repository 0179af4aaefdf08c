"""Train nano's VAE (AutoencoderKL, f8, 4 latent channels), resumable.

    python tools/nano/train_vae.py --work build/nano             encoder and decoder
    python tools/nano/train_vae.py --work build/nano --decoder   then the decoder alone, so latents stay as cached

The decoder alone is trained on latents with a little noise, because those that nano draws are not exact either.

Give `--data` the folder of `build_data.py --wide`: the more pictures it sees, the better it draws unseen ones.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from common import Progress, Split, augment, batch_indices, load, mixed_precision, read_settings, training_arguments
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
    for chunk in pixels.to(vae.device).split(25):
        decoded = vae.decode(vae.encode(chunk).latent_dist.mean).sample.clamp(-1, 1)
        mse = ((decoded - chunk) / 2).square().mean(dim=(1, 2, 3))
        values.append(-10 * mse.log10())
    return torch.cat(values).mean().item()


def edge_loss(decoded: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Returns the mean absolute error of the differences between neighboring pixels, a scalar: blurred edges cost here.

    Args:
        decoded: (B, 3, H, W), float32.
        pixels: what it should be, of the same shape.
    """
    across, down = ((decoded - pixels).diff(dim=axis).abs().mean() for axis in (-1, -2))
    return across + down


def reconstruction_loss(
    vae: AutoencoderKL, cfg: dict, pixels: torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the loss of a batch and its mean KL divergence in nats, both scalars.

    Args:
        vae: in training.
        cfg: section `vae` of config.json.
        pixels: (B, 3, 128, 128), float32 in [-1, 1].
        noise: of the posterior, (B, 4, 16, 16), float32.
    """
    with mixed_precision(pixels.device.type):
        posterior = vae.encode(pixels).latent_dist
        spread = (posterior.std.square() + cfg["latent_noise"] ** 2).sqrt()
        decoded = vae.decode(posterior.mean + spread * noise).sample
    decoded, kl = decoded.float(), posterior.kl().float().mean()
    loss = (
        F.mse_loss(decoded, pixels)
        + cfg["l1_weight"] * F.l1_loss(decoded, pixels)
        + cfg["edge_weight"] * edge_loss(decoded, pixels)
        + cfg["kl_weight"] * kl
    )
    return loss, kl


def draw_batch(train: Split, cfg: dict, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the pictures of a step, (B, 3, 128, 128), and the noise of their latents, (B, 4, 16, 16)."""
    generator = torch.Generator().manual_seed(cfg["seed"] * 1_000_003 + step)
    pixels = train.pixels(batch_indices(step, cfg["batch"], len(train.captions), cfg["seed"]))
    # Half of them: resampling blurs, and the decoder has to learn sharp edges.
    moved = torch.rand(len(pixels), generator=generator) < 0.5
    pixels = torch.where(moved[:, None, None, None], augment(pixels, generator), pixels)
    if torch.rand((), generator=generator) < 0.5:
        pixels = pixels.flip(-1)
    return pixels, torch.randn(len(pixels), 4, 16, 16, generator=generator)


def main() -> None:
    parser = training_arguments(__doc__)
    parser.add_argument("--decoder", action="store_true", help="train the decoder alone, from vae.pt")
    args = parser.parse_args()
    progress = Progress(args.work, "vae-decoder" if args.decoder else "vae", args.minutes)
    cfg = read_settings(args, "vae", *(["decoder"] if args.decoder else []))
    torch.manual_seed(cfg["seed"])
    train, heldout = (load("train", args.data, args.pictures), load("heldout", count=args.pictures))
    vae = build(cfg)
    if args.decoder:
        vae.load_state_dict(torch.load(args.work / "vae.pt", weights_only=True))
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    vae.to(args.device)
    parameters = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=cfg["lr"], weight_decay=1e-4, betas=(0.9, 0.99), fused=True)
    step = warmed_from = 0
    if state := progress.resume():
        vae.load_state_dict(state["model"])
        step = state["step"]
        if "optimizer" in state:
            optimizer.load_state_dict(state["optimizer"])
        else:  # unpacked from the shipped weights: the optimizer is new and warms up again
            warmed_from = step
    while (share := progress.share(step, cfg["steps"])) < 1:
        lr = cfg["lr"] * min(1, (step + 1 - warmed_from) / cfg["warmup"])
        lr *= 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = lr
        pixels, noise = draw_batch(train, cfg, step)
        loss, kl = reconstruction_loss(vae, cfg, pixels.to(args.device), noise.to(args.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % progress.every == 0:
            progress.note(step, loss=loss.item(), kl=kl.item(), lr=lr)
        if step % 250 == 0:
            progress.save(step=step, model=vae.state_dict(), optimizer=optimizer.state_dict())
            progress.note(step, psnr_heldout=psnr(vae, heldout.pixels(torch.arange(100))))
    progress.save(step=step, model=vae.state_dict(), optimizer=optimizer.state_dict())
    torch.save({name: value.cpu() for name, value in vae.state_dict().items()}, args.work / "vae.pt")
    progress.note(step, psnr_heldout=psnr(vae, heldout.pixels(torch.arange(len(heldout.captions)))))


if __name__ == "__main__":
    main()
