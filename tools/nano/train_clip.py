"""Train a small CLIP on nano's pictures and captions, resumable.

    python tools/nano/train_clip.py --work build/nano --role teacher   its text encoder conditions nano's UNet
    python tools/nano/train_clip.py --work build/nano --role metric --data build/nano/wide-data --vae build/nano/vae.pt

The second is nano-CLIP, the judge: another seed, more pictures (`build_data.py --wide`), used to measure only. With
`--vae` it sees half of the pictures as nano's VAE gives them back, a little blurred, as all are that nano draws.

A batch holds whole concepts in all their styles, because random batches hardly ever need the style to tell two captions
apart. A picture has to find its caption, its concept alone and its style alone, and a caption's embedding has to lie
between those of its parts: otherwise an unseen pair of style and concept means something of its own. Two linear
classifiers, which are thrown away at the end, tell a picture's concept among all concepts, not only among the batch's.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from captions import CaptionParts, caption_parts, make_tokenizer, tokenize
from common import (
    Progress,
    Split,
    augment,
    batch_indices,
    config,
    load,
    mirror_some,
    mixed_precision,
    read_settings,
    to_bytes,
    training_arguments,
)
from copies import pass_through
from sdcompress_bench.resnet_clip import ResNetClip
from stripped import strip
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from train_vae import build as build_vae
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    ResNetConfig,
    VisionTextDualEncoderConfig,
)

from sdcompress.models import nano
from sdcompress.train.muon import make_muon


def build(cfg: dict, tokenizer: CLIPTokenizer) -> CLIPModel | ResNetClip:
    """Returns a new CLIP: of a ResNet if the settings of its pictures' tower have depths, else of a transformer."""
    text = cfg["text"] | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 77,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": cfg["projection_dim"],
    }
    vision = cfg["vision"] | {"image_size": 128}
    # Eager attention: on a CPU its backward is several times as fast as the fused one at these sizes.
    more = {"projection_dim": cfg["projection_dim"], "attn_implementation": "eager"}
    if "depths" not in vision:
        vision["projection_dim"] = cfg["projection_dim"]
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, **more))
    tower = ResNetConfig(**vision, hidden_size=vision["hidden_sizes"][-1])
    config = VisionTextDualEncoderConfig.from_vision_text_configs(tower, CLIPTextConfig(**text), **more)
    return ResNetClip(config).to(memory_format=torch.channels_last)


class Classifiers(nn.Module):
    """Tell a picture's concept and style from what the pictures' tower gives, (B, F).

    Args:
        features: F.
        parts: of the training captions.
    """

    def __init__(self, features: int, parts: CaptionParts) -> None:
        super().__init__()
        self.concept, self.style = nn.Linear(features, len(parts.concepts)), nn.Linear(features, len(parts.styles))
        self.unseen = ~parts.seen

    def loss(
        self, features: torch.Tensor, concept_of: torch.Tensor, style_of: torch.Tensor, lost: torch.Tensor
    ) -> torch.Tensor:
        """Returns the cross entropy of both answers, a scalar.

        Nobody is asked for what a picture has lost. A style that no picture of the concept has is no wrong answer.
        """
        concept, style = lost != 2, lost != 1
        unseen = self.unseen.to(features.device)[concept_of] & concept[:, None]
        by_style = self.style(features).masked_fill(unseen, -1e4)
        return 0.5 * F.cross_entropy(
            self.concept(features[concept]), concept_of[concept], label_smoothing=0.1
        ) + 0.25 * F.cross_entropy(by_style[style], style_of[style])


def clip_loss(
    model: CLIPModel | ResNetClip,
    classifiers: Classifiers,
    pixels: torch.Tensor,
    index: torch.Tensor,
    lost: torch.Tensor,
    parts: CaptionParts,
) -> tuple[torch.Tensor, float]:
    """Returns the loss of a batch, a scalar, and the share of pictures that find their caption among the batch's.

    Args:
        model: the CLIP in training.
        classifiers: trained with it.
        pixels: (B, 3, H, W), float32.
        index: the batch's pictures, (B,).
        lost: what each has lost and is not asked for, (B,), int64: 0 nothing, 1 its style, 2 its concept.
        parts: of the training captions.
    """
    style_of = parts.style_of[index]
    known = parts.concept_of[index].to(pixels.device)
    chosen, concept_of = parts.concept_of[index].unique(return_inverse=True)
    count, styles = len(chosen), len(parts.styles)
    ids = torch.cat([parts.pairs[chosen].flatten(0, 1), parts.concepts[chosen], parts.styles]).to(pixels.device)
    concept_of, style_of = concept_of.to(pixels.device), style_of.to(pixels.device)
    longest = int((ids == model.config.text_config.eos_token_id).float().argmax(-1).max()) + 1
    with mixed_precision(pixels.device.type):
        features = model.vision_model(pixel_values=pixels).pooler_output.flatten(1)
        image = F.normalize(model.visual_projection(features).float(), dim=-1)
        text = F.normalize(model.get_text_features(input_ids=ids[:, :longest]).pooler_output.float(), dim=-1)
    pairs, concept, style = text.split([count * styles, count, styles])
    scale = model.logit_scale.exp().clamp(max=100)
    caption_of = concept_of * styles + style_of
    lost = lost.to(pixels.device)
    whole = lost == 0
    caption_of, complete = caption_of[whole], image[whole]
    # A held-out pair is no wrong answer: else the judge would learn that its concept never has its style.
    seen = parts.seen[chosen].to(pixels.device)
    by_picture = (scale * complete @ pairs.T).masked_fill(~seen.flatten(), -torch.inf)
    by_style = (scale * image @ style.T).masked_fill(~seen[concept_of] & (lost != 2)[:, None], -torch.inf)
    by_caption = scale * pairs[caption_of] @ complete.T
    found = (by_picture.argmax(-1) == caption_of).float().mean().item()
    between = (pairs.view(count, styles, -1) * F.normalize(concept[:, None] + style, dim=-1)).sum(-1)
    loss = (
        F.cross_entropy(by_picture, caption_of) / 2
        + F.cross_entropy(by_caption, torch.arange(len(complete), device=pixels.device)) / 2
        + F.cross_entropy(scale * image[lost != 2] @ concept.T, concept_of[lost != 2]) / 2
        + F.cross_entropy(by_style[lost != 1], style_of[lost != 1]) / 2
        + 4 * (1 - between).mean()
        + classifiers.loss(features.float(), known, style_of, lost)
    )
    return loss, found


@torch.no_grad()
def accuracy(model: CLIPModel | ResNetClip, tokenizer: CLIPTokenizer, split: Split) -> dict[str, float]:
    """Returns the shares of pictures whose caption is the first, or among the first five, of all captions, and of those
    whose own style fits better than the same concept in another style.

    Args:
        model: the CLIP.
        tokenizer: of the captions.
        split: pictures and captions.
    """

    def embed(captions: list[str]) -> torch.Tensor:
        ids = tokenize(tokenizer, captions).to(model.device)
        return F.normalize(model.get_text_features(input_ids=ids).pooler_output, dim=-1)

    count, phrases = len(split.captions), nano.styles()
    pixels = split.pixels(torch.arange(count)).to(model.device)
    image = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    rank = (image @ embed(split.captions).T).argsort(dim=-1, descending=True).cpu()
    hit = rank == torch.arange(count)[:, None]
    styled = [
        caption.replace(phrases[meta["style"]], phrase, 1)
        for caption, meta in zip(split.captions, split.metas, strict=True)
        for phrase in phrases.values()
    ]
    chosen = torch.einsum("nd,nsd->ns", image, embed(styled).view(count, len(phrases), -1)).argmax(-1).tolist()
    right = [list(phrases)[c] == meta["style"] for c, meta in zip(chosen, split.metas, strict=True)]
    return {
        "style": sum(right) / count,
        "top1": hit[:, :1].any(-1).float().mean().item(),
        "top5": hit[:, :5].any(-1).float().mean().item(),
    }


def group_concepts(parts: CaptionParts, names: list[str]) -> list[list[list[int]]]:
    """Returns the pictures of each concept, in two pools: concepts that nano draws, and the others if there are any.

    Args:
        parts: of the training captions.
        names: each picture's concept.
    """
    known = nano.concepts()
    pools: tuple[list[list[int]], list[list[int]]] = ([], [])
    for concept in range(len(parts.concepts)):
        members = torch.where(parts.concept_of == concept)[0].tolist()
        pools[names[members[0]] not in known].append(members)
    return [pool for pool in pools if pool]


def draw_batch(step: int, count: int, pools: list[list[list[int]]], seed: int) -> torch.Tensor:
    """Returns the pictures of a step, (B,), int64: those of `count` concepts, equally many from each pool."""
    share = count // len(pools)
    return torch.tensor(
        [
            picture
            for pool in pools
            for concept in batch_indices(step, share, len(pool), seed).tolist()
            for picture in pool[concept]
        ]
    )


@torch.no_grad()
def redraw(images: torch.Tensor, vae_file: Path, device: str) -> torch.Tensor:
    """Returns pictures as a VAE gives them back, (N, 3, H, W), uint8.

    Args:
        images: (N, 3, H, W), uint8.
        vae_file: its weights, as `train_vae.py` writes them.
        device: cpu or cuda.
    """
    vae = build_vae(config("vae"))
    vae.load_state_dict(torch.load(vae_file, weights_only=True))
    vae.to(device).eval()
    parts = (pass_through(vae, part.to(device).float() / 127.5 - 1) for part in images.split(64))
    return torch.cat([to_bytes(part).cpu() for part in parts])


class Training:
    """What a step changes: the CLIP, its moving average, the classifiers, the optimizer.

    Args:
        model: the CLIP.
        classifiers: trained with it.
        cfg: section `clip` of config.json.
        device: cpu or cuda.
    """

    def __init__(self, model: CLIPModel | ResNetClip, classifiers: Classifiers, cfg: dict, device: str) -> None:
        self.model, self.classifiers, self.cfg = model.to(device), classifiers.to(device), cfg
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(cfg["ema"]), use_buffers=True)
        self.optimizers = [
            make_muon(dict(self.model.named_parameters()), cfg["lr"], weight_decay=0.05),
            torch.optim.AdamW(self.classifiers.parameters(), cfg["lr"], weight_decay=0.05),
        ]
        self.step = self.warmed_from = 0

    def resume(self, progress: Progress) -> None:
        """Go on from a checkpoint, if there is one."""
        if (state := progress.resume()) is None:
            return
        self.model.load_state_dict(state["model"])
        self.average.module.load_state_dict(state.get("average", state["model"]))
        self.average.n_averaged.fill_(state["step"])
        self.step = state["step"]
        if "optimizers" in state:
            self.classifiers.load_state_dict(state["classifiers"])
            for optimizer, known in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(known)
        else:  # unpacked from the shipped weights: the rest is new, and the rate warms up again
            self.warmed_from = self.step

    def keep(self, progress: Progress) -> None:
        """Write the checkpoint."""
        parts = {"model": self.model, "average": self.average.module, "classifiers": self.classifiers}
        states = {name: part.state_dict() for name, part in parts.items()}
        progress.save(step=self.step, optimizers=[each.state_dict() for each in self.optimizers], **states)

    def update(self, loss: torch.Tensor, share: float) -> float:
        """Take a step; returns its learning rate.

        Args:
            loss: a scalar.
            share: of the training that is done, 0 to 1.
        """
        lr = self.cfg["lr"] * min(1, (self.step + 1 - self.warmed_from) / self.cfg["warmup"])
        lr *= 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.average.update_parameters(self.model)
        self.step += 1
        return lr


def note_accuracy(
    progress: Progress, training: Training, tokenizer: CLIPTokenizer, train: Split, heldout: Split
) -> None:
    """Log the average's accuracy on held-out pictures."""
    model = training.average.module
    # The batches in training hold pictures that have lost something; BatchNorm is to know whole ones.
    index = torch.randperm(len(train.captions), generator=torch.Generator().manual_seed(0))[:1024]
    update_bn([train.pixels(part) for part in index.split(128)], model.vision_model, model.device)
    figures = accuracy(model.eval(), tokenizer, heldout)
    progress.note(training.step, **{f"heldout_{name}": value for name, value in figures.items()})


def main() -> None:
    parser = training_arguments(__doc__)
    parser.add_argument("--role", choices=["teacher", "metric"], required=True)
    parser.add_argument("--vae", type=Path, default=None, help="weights of a VAE that redraws half of the pictures")
    args = parser.parse_args()
    progress = Progress(args.work, f"clip-{args.role}", args.minutes)
    cfg = read_settings(args, "clip", args.role)
    torch.manual_seed(cfg["seed"])
    heldout = load("heldout", count=args.pictures)
    train = load("train", args.data, args.pictures)
    train = train.take([i for i, caption in enumerate(train.captions) if caption not in heldout.captions])
    tokenizer = make_tokenizer(train.captions, cfg["vocab_size"], args.work / "tokenizer")
    parts = caption_parts(tokenizer, train)
    model = build(cfg, tokenizer)
    training = Training(model, Classifiers(model.visual_projection.in_features, parts), cfg, args.device)
    training.resume(progress)
    pools = group_concepts(parts, [meta["concept"] for meta in train.metas])
    may_mirror = torch.tensor([meta["mirror"] for meta in train.metas])
    redrawn = Split(redraw(train.images, args.vae, args.device), [], []) if args.vae else train
    while (share := progress.share(training.step, cfg["steps"])) < 1:
        index = draw_batch(training.step, cfg["batch"], pools, cfg["seed"])
        generator = torch.Generator().manual_seed(cfg["seed"] * 1_000_003 + training.step)
        again = torch.rand(len(index), 1, 1, 1, generator=generator) < 0.5
        pixels = torch.where(again, redrawn.pixels(index), train.pixels(index))
        pixels = augment(pixels, generator, strength=2.5, turned=True)
        pixels = mirror_some(pixels, may_mirror[index], generator)
        pixels, lost = strip(pixels, parts.style_of[index], cfg["stripped"], generator)
        pixels = pixels.to(args.device, memory_format=torch.channels_last)
        loss, found = clip_loss(training.model, training.classifiers, pixels, index, lost, parts)
        lr = training.update(loss, share)
        if training.step % progress.every == 0:
            progress.note(training.step, loss=loss.item(), top1_batch=found, lr=lr)
        if training.step % 250 == 0:
            training.keep(progress)
            note_accuracy(progress, training, tokenizer, train, heldout)
    training.keep(progress)
    note_accuracy(progress, training, tokenizer, train, heldout)
    training.average.module.save_pretrained(args.work / f"clip-{args.role}")
    tokenizer.save_pretrained(args.work / f"clip-{args.role}")


if __name__ == "__main__":
    main()
