"""Train nano's UNet and its text encoder on cached latents, resumable.

    python tools/nano/train_unet.py --work build/nano [--steps STEP] [--more build/nano/wide-data]
    torchrun --nproc-per-node 2 tools/nano/train_unet.py --work build/nano

With `--more`, every second step is of pictures of other things in the same styles, which lowers the loss of held-out
pictures. A picture that is held out, or nearly the same as one that is, is not among them.

The second form runs one process a core, which is faster than one process with a thread a core.

The processes share each batch and average the gradients; noise is drawn for the whole batch, so their number changes
nothing.

Epsilon prediction on SD1's schedule, Min-SNR weighting (arXiv 2303.09556), EMA. Each picture is cached in several
views, shifted and scaled a little and mirrored where that still shows the concept. Some captions are dropped, and some
lose their style or their concept, so that each is also learned alone. The learning rate is constant after warm-up and
falls to zero over the last `--cooldown` steps, so that a run can be stopped for a release and continued later from its
last checkpoint before the cooldown.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed
from captions import make_tokenizer, tokenize
from common import (
    DATA,
    Progress,
    Split,
    augment,
    batch_indices,
    config,
    load,
    mirror_some,
    mixed_precision,
    read_settings,
    training_arguments,
)
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from near_copies import find_near_copies
from PIL import Image
from sdcompress_engines.files import replace_file
from train_vae import build as build_vae
from transformers import CLIPModel, CLIPTextModel

from sdcompress.models import nano
from sdcompress.train.muon import make_muon

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


@dataclass(frozen=True)
class Latents:
    """Pictures as the VAE's encoder gives them, several views of each, and the captions as tokens.

    Attributes:
        mean, std: of the posterior, (N, V, 4, 16, 16), float16. View 0 is the picture itself.
        captions: token ids of "style concept", of the concept alone, of the style alone, (3, N, 77), int64.
        nothing: token ids of the empty caption, (77,), int64.
    """

    mean: torch.Tensor
    std: torch.Tensor
    captions: torch.Tensor
    nothing: torch.Tensor


@torch.no_grad()
def encode_views(vae: AutoencoderKL, split: Split, views: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns mean and standard deviation of the latents, each (N, V, 4, 16, 16), float16.

    Args:
        vae: the VAE, in float32.
        split: N pictures.
        views: V; the first one is not augmented.
        seed: of the augmentation.
    """
    may_mirror = torch.tensor([meta["mirror"] for meta in split.metas])
    mean, std = [], []
    for view in range(views):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + view)
        for index in torch.arange(len(split.captions)).split(8):  # small ones stay in a CPU's cache
            pixels = split.pixels(index)
            if view > 0:
                pixels = mirror_some(augment(pixels, generator), may_mirror[index], generator)
            posterior = vae.encode(pixels.to(vae.device)).latent_dist
            mean.append(posterior.mean.half().cpu())
            std.append(posterior.std.half().cpu())
    shape = (views, len(split.captions), 4, 16, 16)
    return torch.cat(mean).view(shape).transpose(0, 1), torch.cat(std).view(shape).transpose(0, 1)


def load_latents(
    work: Path, split: str, cfg: dict, data: Path = DATA, count: int | None = None, device: str = "cpu"
) -> tuple[Latents, float]:
    """Returns the latents of a split and the VAE's scaling factor (1 / standard deviation of the training latents).

    Args:
        work: with `vae.pt` and the tokenizer.
        split: `train` or `heldout`.
        cfg: section `unet` of config.json.
        data: folder of the shards.
        count: how many of the split's pictures; None is all.
        device: of the VAE.
    """
    return encode(work, split, load(split, data, count), cfg, cfg["views"] if split == "train" else 1, device)


def select_more(more: Split, known: Split, heldout: Split) -> Split:
    """Returns the pictures of `more` that are neither known, nor held out, nor nearly the same as a held-out one.

    Args:
        more: to choose from.
        known: pictures that are trained on in any case.
        heldout: pictures that must stay unseen.
    """
    captions = {*known.captions, *heldout.captions}
    unseen = [to_picture(image) for image in heldout.images]
    near = find_near_copies([to_picture(image) for image in more.images], unseen)
    kept = [i for i, caption in enumerate(more.captions) if caption not in captions and not near[i]]
    return more.take(kept)


def to_picture(image: torch.Tensor) -> Image.Image:
    """Returns a picture of a (3, H, W) tensor, uint8."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def encode(work: Path, name: str, pictures: Split, cfg: dict, views: int, device: str) -> tuple[Latents, float]:
    """Returns the latents of pictures and the scaling factor that they give.

    They are computed once and kept in the work folder.

    Args:
        work: with `vae.pt` and the tokenizer.
        name: of the file.
        pictures: to encode.
        cfg: section `unet` of config.json.
        views: of each picture.
        device: of the VAE.
    """
    path = work / f"latents-{name}-{len(pictures.captions)}.pt"
    if not path.exists():
        vae = build_vae(config("vae")).eval().to(device)
        vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True))
        mean, std = encode_views(vae, pictures, views, cfg["seed"])
        tokenizer = make_tokenizer([], 0, work / "tokenizer")
        phrases = [nano.styles()[meta["style"]] for meta in pictures.metas]
        concepts = [c.removeprefix(p).strip() for c, p in zip(pictures.captions, phrases, strict=True)]
        texts = (pictures.captions, concepts, [p.removesuffix(" of") for p in phrases])
        state = {
            "mean": mean.contiguous(),
            "std": std.contiguous(),
            "captions": torch.stack([tokenize(tokenizer, text) for text in texts]),
            "nothing": tokenize(tokenizer, [""])[0],
            "scale": 1 / mean[:, 0].float().std().item(),
        }
        temporary = path.with_suffix(f".{os.getpid()}")  # each process of a run may be here at the same time
        torch.save(state, temporary)
        replace_file(temporary, path)
    state = torch.load(path, weights_only=True)
    scale = state.pop("scale")
    return Latents(**state), scale


class TextAndUNet(torch.nn.Module):
    """What is trained: the text encoder and the UNet that it conditions."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Returns the predicted noise, of the shape of `noisy`.

        Args:
            noisy: latents with noise, (B, 4, 16, 16).
            timesteps: (B,), int64.
            ids: tokens, (B, 77), int64.
        """
        distinct, place = ids.unique(dim=0, return_inverse=True)
        text = self.text_encoder(input_ids=distinct).last_hidden_state[place]
        return self.unet(noisy, timesteps, text).sample


def weighted_loss(
    model: TextAndUNet, cfg: dict, data: Latents, scale: float, step: int, alphas: torch.Tensor, mine: slice
) -> torch.Tensor:
    """Returns the Min-SNR weighted loss of one process's share of a step's batch.

    Args:
        model: in training.
        cfg: section `unet` of config.json.
        data: of the training split.
        scale: the VAE's scaling factor.
        step: number of the step.
        alphas: cumulative, (1000,), of the noise schedule, on the model's device.
        mine: which rows of the batch this process computes. Noise is drawn for the whole batch.
    """
    generator = torch.Generator().manual_seed(cfg["seed"] * 1_000_003 + step)
    index = batch_indices(step, cfg["batch"], len(data.mean), cfg["seed"])
    view = torch.randint(data.mean.shape[1], (len(index),), generator=generator)
    mean, std = data.mean[index, view].float(), data.std[index, view].float()
    latents = (mean + std * torch.randn(mean.shape, generator=generator)) * scale
    draw = torch.rand(len(index), generator=generator)
    nothing, alone = cfg["caption_dropout"], cfg["part_alone"]
    part = (draw < nothing + 2 * alone).long() + (draw < nothing + alone).long()
    ids = torch.where((draw < nothing)[:, None], data.nothing, data.captions[part, index])
    noise = torch.randn(latents.shape, generator=generator)
    # Stratified timesteps: each of the batch's equal slices of the schedule is hit once.
    strata = torch.arange(len(index)) + torch.rand(len(index), generator=generator)
    timesteps = (strata / len(index) * 1000).long()
    device = model.unet.device
    latents, noise, ids, timesteps = (part[mine].to(device) for part in (latents, noise, ids, timesteps))
    a = alphas[timesteps].view(-1, 1, 1, 1)
    with mixed_precision(latents.device.type):
        predicted = model(a.sqrt() * latents + (1 - a).sqrt() * noise, timesteps, ids)
    error = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
    snr = (alphas / (1 - alphas))[timesteps]
    return (error * (snr.clamp(max=cfg["snr_gamma"]) / snr)).mean()


@torch.no_grad()
def heldout_loss(model: TextAndUNet, cfg: dict, data: Latents, scale: float, alphas: torch.Tensor) -> float:
    """Returns the Min-SNR weighted loss of the held-out pictures, with the same noise at each call."""
    whole = cfg | {"batch": len(data.mean), "caption_dropout": 0.0, "part_alone": 0.0}
    return weighted_loss(model, whole, data, scale, 0, alphas, slice(None)).item()


def average_gradients(model: torch.nn.Module, world: int) -> None:
    """Replace each gradient by its mean over all processes, in one exchange."""
    gradients = [p.grad for p in model.parameters()]
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


def load_text_encoder(work: Path) -> CLIPTextModel:
    """Returns the text encoder that `train_clip.py` trained, or the one that ships if there is none."""
    if not (work / "clip-teacher").is_dir():
        return CLIPTextModel.from_pretrained(nano.teacher_folder() / "text_encoder", dtype=torch.float32)
    clip = CLIPModel.from_pretrained(work / "clip-teacher")
    text_encoder = CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict(clip.text_model.state_dict())
    return text_encoder


def build_model(work: Path, cfg: dict) -> TextAndUNet:
    text_encoder = load_text_encoder(work)
    # Plain products: on a CPU their backward is 2 to 5 times as fast as the fused attention's.
    text_encoder.set_attn_implementation("eager")
    unet = build(cfg, text_encoder.config.hidden_size)
    unet.set_attn_processor(AttnProcessor())
    return TextAndUNet(text_encoder, unet)


def keep_average(work: Path, ema: dict[str, torch.Tensor], step: int, cooldown: int) -> None:
    """Write `unet.pt`, which `assemble.py` reads."""
    torch.save({name: value.cpu() for name, value in ema.items()}, work / "unet.tmp")
    replace_file(work / "unet.tmp", work / "unet.pt")
    (work / "unet.json").write_text(json.dumps({"step": step, "cooldown": cooldown}), encoding="utf-8")


def main() -> None:
    parser = training_arguments(__doc__)
    parser.add_argument("--more", type=Path, default=None, help="shards of more things, for every second step")
    parser.add_argument("--cooldown", type=int, default=0, help="over how many of the last steps the rate falls")
    args = parser.parse_args()
    progress = Progress(args.work, "unet", args.minutes)
    cfg = read_settings(args, "unet")
    (rank, world), until = join_processes(), cfg["steps"]
    torch.manual_seed(cfg["seed"])
    (train, scale), (heldout, _) = (
        load_latents(args.work, split, cfg, args.data, args.pictures, args.device) for split in ("train", "heldout")
    )
    more = None
    if args.more:
        chosen = select_more(load("train", args.more), load("train", args.data), load("heldout", args.data))
        more, _ = encode(args.work, "more", chosen, cfg, cfg["more_views"], args.device)
    model = build_model(args.work, cfg).to(args.device)
    ema = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = make_muon(dict(model.named_parameters()), cfg["lr"], weight_decay=0.01)
    alphas = DDPMScheduler(**SCHEDULE).alphas_cumprod.to(args.device)
    step = warmed_from = 0
    if state := progress.resume():
        model.load_state_dict(state["model"])
        ema, step = {name: value.to(args.device) for name, value in state["ema"].items()}, state["step"]
        if "optimizer" in state:
            optimizer.load_state_dict(state["optimizer"])
        else:  # unpacked from the shipped weights: the optimizer is new and warms up again
            warmed_from = step
    running = None
    while (share := progress.share(step, until)) < 1:
        # In steps, or for a run of so many minutes in time: over its last fifth.
        cooling = (until - step) / args.cooldown if args.cooldown else 5 * (1 - share) if args.minutes < math.inf else 1
        for group in optimizer.param_groups:
            group["lr"] = cfg["lr"] * min(1, (step + 1 - warmed_from) / cfg["warmup"], cooling)
        data = train if more is None or step % 2 else more
        loss = weighted_loss(model, cfg, data, scale, step, alphas, slice(rank, None, world))
        loss.backward()
        if world > 1:
            average_gradients(model, world)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(cfg["ema"], (1 + step) / (10 + step))
        weights = model.state_dict()
        torch._foreach_lerp_([ema[name] for name in weights], list(weights.values()), 1 - decay)
        running = loss.detach() if running is None else running.lerp(loss.detach(), 0.02)
        step += 1
        if rank:
            continue
        if step % progress.every == 0:
            progress.note(step, loss=running.item(), lr=optimizer.param_groups[0]["lr"])
        if step % 200 == 0:
            if not args.cooldown or step <= until - args.cooldown:
                progress.save(step=step, model=model.state_dict(), ema=ema, optimizer=optimizer.state_dict())
            keep_average(args.work, ema, step, args.cooldown)
            progress.note(step, heldout_loss=heldout_loss(model, cfg, heldout, scale, alphas))
    if not rank:
        keep_average(args.work, ema, step, args.cooldown)
        if step % 200:  # else it is in the log already
            progress.note(step, heldout_loss=heldout_loss(model, cfg, heldout, scale, alphas))


if __name__ == "__main__":
    main()
