"""Train nano's UNet on cached latents and text embeddings, resumable.

    python tools/nano/train_unet.py --work build/nano [--until STEP]
    torchrun --nproc-per-node 2 tools/nano/train_unet.py --work build/nano

The second form runs one process a core, which is faster than one process with a thread a core.

The processes share each batch and average the gradients; noise is drawn for the whole batch, so their number changes
nothing.

Epsilon prediction on SD1's schedule, Min-SNR weighting (arXiv 2303.09556), caption dropout, EMA. The learning rate is
constant after warm-up and falls to zero over the last `--cooldown` steps before `--until`, so that a run can be stopped
for a release and continued later from its last checkpoint before the cooldown.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
import torch.distributed
from common import Progress, Split, batch_indices, config, load
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from muon import Muon
from sdcompress_engines.files import replace_file
from train_clip import make_tokenizer, tokenize
from train_vae import build as build_vae
from transformers import CLIPModel

SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}


def build(cfg: dict, cross_attention_dim: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=tuple(cfg["block_out_channels"]),
        layers_per_block=2,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=cfg["attention_heads"],
        norm_num_groups=cfg["norm_num_groups"],
    )


@torch.no_grad()
def cache(work: Path, split: Split) -> dict[str, torch.Tensor]:
    """Latent mean and std (N, 4, 16, 16), their overall scale, token ids, the table of text embeddings; made once."""
    path = work / "cache.pt"
    if not path.exists():
        vae = build_vae(config("vae"))
        vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True))
        moments = [vae.eval().encode(split.pixels(i)).latent_dist for i in torch.arange(len(split.captions)).split(50)]
        mean, std = torch.cat([m.mean for m in moments]), torch.cat([m.std for m in moments])
        clip = CLIPModel.from_pretrained(work / "clip-teacher").eval()
        ids = tokenize(make_tokenizer([], 0, work / "tokenizer"), [*split.captions, ""])
        text = torch.cat([clip.text_model(input_ids=chunk).last_hidden_state for chunk in ids.split(256)])
        torch.save({"mean": mean.half(), "std": std.half(), "scale": 1 / mean.std(), "text": text.half()}, path)
    return torch.load(path, weights_only=True)


def weighted_loss(
    unet: UNet2DConditionModel, cfg: dict, data: dict[str, torch.Tensor], step: int, alphas: torch.Tensor, mine: slice
) -> torch.Tensor:
    """Returns the Min-SNR weighted loss of one process's share of a step's batch.

    Args:
        unet: in training.
        cfg: section `unet` of config.json.
        data: what `cache` returns.
        step: number of the step.
        alphas: cumulative, (1000,), of the noise schedule.
        mine: which rows of the batch this process computes. Noise is drawn for the whole batch.
    """
    count = len(data["mean"])
    generator = torch.Generator().manual_seed(cfg["seed"] * 1_000_003 + step)
    index = batch_indices(step, cfg["batch"], count, cfg["seed"])
    mean, std = data["mean"][index].float(), data["std"][index].float()
    latents = (mean + std * torch.randn(mean.shape, generator=generator)) * data["scale"]
    dropped = torch.rand(len(index), generator=generator) < cfg["caption_dropout"]
    text = data["text"][torch.where(dropped, count, index)].float()
    noise = torch.randn(latents.shape, generator=generator)
    # Stratified timesteps: each of the batch's equal slices of the schedule is hit once.
    strata = torch.arange(len(index)) + torch.rand(len(index), generator=generator)
    timesteps = (strata / len(index) * 1000).long()
    latents, noise, text, timesteps = latents[mine], noise[mine], text[mine], timesteps[mine]
    a = alphas[timesteps].view(-1, 1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        predicted = unet(a.sqrt() * latents + (1 - a).sqrt() * noise, timesteps, text).sample
    error = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
    snr = (alphas / (1 - alphas))[timesteps]
    return (error * (snr.clamp(max=cfg["snr_gamma"]) / snr)).mean()


def average_gradients(unet: UNet2DConditionModel, world: int) -> None:
    """Replace each gradient by its mean over all processes, in one exchange."""
    gradients = [p.grad for p in unet.parameters()]
    flat = torch.cat([g.flatten() for g in gradients])
    torch.distributed.all_reduce(flat)
    means = flat.div_(world).split([g.numel() for g in gradients])
    for gradient, mean_gradient in zip(gradients, means, strict=True):
        gradient.copy_(mean_gradient.view_as(gradient))


def join_processes() -> tuple[int, int]:
    """Returns this process's rank and the number of processes, which then share the cores."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        torch.distributed.init_process_group("gloo")
        torch.set_num_threads(max(1, (os.cpu_count() or world) // world))
    return rank, world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--until", type=int, default=None)
    parser.add_argument("--cooldown", type=int, default=0)
    args = parser.parse_args()
    cfg = config("unet")
    rank, world = join_processes()
    until = args.until or cfg["steps"]
    torch.manual_seed(cfg["seed"])
    data = cache(args.work, load("train"))
    unet = build(cfg, data["text"].shape[-1])
    # Plain products: on a CPU their backward is 2 to 5 times as fast as the fused attention's.
    unet.set_attn_processor(AttnProcessor())
    ema = {k: v.clone() for k, v in unet.state_dict().items()}
    optimizer = Muon(
        dict(unet.named_parameters()),
        lr=cfg["lr"],
        weight_decay=0.01,
        without=("conv_in", "conv_out", "time_embedding"),
    )
    alphas = DDPMScheduler(**SCHEDULE).alphas_cumprod
    progress = Progress(args.work, "unet")
    start = warmed_from = 0
    if state := progress.resume():
        unet.load_state_dict(state["model"])
        ema, start = state["ema"], state["step"]
        if "optimizer" in state:
            optimizer.load_state_dict(state["optimizer"])
        else:  # unpacked from the shipped weights: the optimizer is new and warms up again
            warmed_from = start
    running = 0.0
    for step in range(start, until):
        lr = cfg["lr"] * min(1, (step + 1 - warmed_from) / cfg["warmup"])
        if args.cooldown:
            lr *= min(1, (until - step) / args.cooldown)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = weighted_loss(unet, cfg, data, step, alphas, slice(rank, None, world))
        loss.backward()
        if world > 1:
            average_gradients(unet, world)
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(cfg["ema"], (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.values()), list(unet.state_dict().values()), 1 - decay)
        running = loss.item() if step == start else 0.98 * running + 0.02 * loss.item()
        if rank:
            continue
        if (step + 1) % progress.every == 0:
            progress.note(step + 1, loss=running, lr=lr)
        if (step + 1) % 200 == 0 or step + 1 == until:
            if not args.cooldown or step + 1 <= until - args.cooldown:
                progress.save(step=step + 1, model=unet.state_dict(), ema=ema, optimizer=optimizer.state_dict())
            torch.save(ema, args.work / "unet.tmp")
            replace_file(args.work / "unet.tmp", args.work / "unet.pt")
            about = json.dumps({"step": step + 1, "cooldown": args.cooldown})
            (args.work / "unet.json").write_text(about, encoding="utf-8")


if __name__ == "__main__":
    main()
