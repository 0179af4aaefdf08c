"""Train a small CLIP on nano's pictures and captions, resumable.

    python tools/nano/train_clip.py --work build/nano --role teacher   its text encoder conditions nano's UNet
    python tools/nano/train_clip.py --work build/nano --role metric    nano-CLIP: another seed, used to measure only

The tokenizer (a BPE trained on the captions, in CLIP's format) is made on the first call and shared.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from common import Progress, Split, batch_indices, config, load
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from sdcompress.models import nano

START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def make_tokenizer(captions: list[str], vocab_size: int, folder: Path) -> CLIPTokenizer:
    """Returns the tokenizer in a folder, after training one there if there is none.

    Args:
        captions: to train on.
        vocab_size: number of tokens.
        folder: of the tokenizer.
    """
    if not (folder / "tokenizer_config.json").exists():
        bpe = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix="</w>"))
        bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(CLIP_WORDS), "removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        bpe.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        bpe.train_from_iterator(
            captions,
            trainers.BpeTrainer(
                vocab_size=vocab_size,
                special_tokens=[],
                initial_alphabet=alphabet,
                end_of_word_suffix="</w>",
                show_progress=False,
            ),
        )
        folder.mkdir(parents=True, exist_ok=True)
        bpe.model.save(str(folder))
        vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        # CLIP's files hold the alphabet twice, bare and word-final, so that any text can be spelled, and the two marks
        # last.
        tokens = sorted(vocab, key=vocab.get)
        tokens += [c + "</w>" for c in sorted(alphabet) if c + "</w>" not in vocab]
        tokens += [START, END]
        merges = [
            tuple(line.split())
            for line in (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
            if not line.startswith("#")
        ]
        tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=77)
        tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def build(cfg: dict, tokenizer: CLIPTokenizer) -> CLIPModel:
    text = cfg["text"] | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 77,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": cfg["projection_dim"],
    }
    vision = cfg["vision"] | {"image_size": 128, "projection_dim": cfg["projection_dim"]}
    # Eager attention: on a CPU its backward is several times as fast as the fused one at these sizes.
    return CLIPModel(
        CLIPConfig(
            text_config=text, vision_config=vision, projection_dim=cfg["projection_dim"], attn_implementation="eager"
        )
    )


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    return tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift by up to 10 px, scale by 0.85-1.1, brightness by ±5%: on white, what stays the same picture."""
    count = len(pixels)
    scale = 1 / (0.85 + 0.25 * torch.rand(count, generator=generator))
    shift = (torch.rand(count, 2, generator=generator) - 0.5) * 0.32
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels - 1, grid, align_corners=False) + 1
    return moved * (0.95 + 0.05 * torch.rand(count, 1, 1, 1, generator=generator))


@dataclass(frozen=True)
class CaptionParts:
    """The captions of a split taken apart, as token ids.

    Attributes:
        style_of: index of each picture's style, (N,).
        styles: the style phrases alone, (S, 77).
        concepts: each picture's concept alone, (N, 77).
        in_every_style: each picture's concept in each style, S tensors of (N, 77).
    """

    style_of: torch.Tensor
    styles: torch.Tensor
    concepts: torch.Tensor
    in_every_style: list[torch.Tensor]


def caption_parts(tokenizer: CLIPTokenizer, split: Split) -> CaptionParts:
    phrases = nano.styles()
    concepts = [
        caption.removeprefix(phrases[meta["style"]]).strip()
        for caption, meta in zip(split.captions, split.metas, strict=True)
    ]
    return CaptionParts(
        torch.tensor([list(phrases).index(meta["style"]) for meta in split.metas]),
        tokenize(tokenizer, [phrase.removesuffix(" of") for phrase in phrases.values()]),
        tokenize(tokenizer, concepts),
        [tokenize(tokenizer, [f"{phrase} {text}" for text in concepts]) for phrase in phrases.values()],
    )


def contrastive_loss(
    model: CLIPModel, pixels: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Returns CLIP's loss of a batch, its image features (B, D), and the share of captions found among the batch's.

    Args:
        model: the CLIP in training.
        pixels: (B, 3, H, W), float32.
        ids: tokens of the captions, (B, T), int64.
    """
    with torch.autocast("cpu", torch.bfloat16):
        image = model.get_image_features(pixel_values=pixels).pooler_output.float()
        text = model.get_text_features(input_ids=ids).pooler_output.float()
    logits = model.logit_scale.exp().clamp(max=100) * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    target = torch.arange(len(ids))
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return loss, image, (logits.argmax(-1) == target).float().mean().item()


def composed(
    model: CLIPModel, image: torch.Tensor, index: torch.Tensor, parts: CaptionParts, longest: int
) -> torch.Tensor:
    """Returns the loss that makes a caption the sum of its parts, so that unseen pairs of style and concept mean both.

    The style's phrase alone has to find the picture's style, and each concept in every style has to lie between the
    phrase's and the concept's own embedding.

    Args:
        model: the CLIP in training.
        image: image features of the batch, (B, D).
        index: the batch's pictures, (B,).
        parts: of the training captions.
        longest: tokens of the longest caption in the batch.
    """

    def embed(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.normalize(model.get_text_features(input_ids=ids[:, :longest]).pooler_output.float(), dim=-1)

    some = index[torch.randperm(len(index))[:24]]
    styles, concepts = embed(parts.styles), embed(parts.concepts[some])
    style_logits = model.logit_scale.exp().clamp(max=100) * F.normalize(image, dim=-1) @ styles.T
    between = [
        1 - (embed(ids[some]) * F.normalize(concepts + styles[i], dim=-1)).sum(-1).mean()
        for i, ids in enumerate(parts.in_every_style)
    ]
    return F.cross_entropy(style_logits, parts.style_of[index]) / 2 + 4 * torch.stack(between).mean()


@torch.no_grad()
def accuracy(model: CLIPModel, tokenizer: CLIPTokenizer, split: Split) -> dict[str, float]:
    """Returns how often, of the first 200 pictures, the caption is found among them and the style among its concept's.

    Args:
        model: the CLIP.
        tokenizer: of the captions.
        split: pictures and captions.
    """
    ids = tokenize(tokenizer, split.captions)
    n = min(200, len(split.captions))
    image = F.normalize(model.get_image_features(pixel_values=split.pixels(torch.arange(n))).pooler_output, dim=-1)
    text = F.normalize(model.get_text_features(input_ids=ids[:n]).pooler_output, dim=-1)
    rank = (image @ text.T).argsort(dim=-1, descending=True)
    hit = rank == torch.arange(n)[:, None]
    phrases = nano.styles()
    in_every_style = [
        split.captions[i].replace(phrases[split.metas[i]["style"]], phrase, 1)
        for i in range(n)
        for phrase in phrases.values()
    ]
    styled = F.normalize(
        model.get_text_features(input_ids=tokenize(tokenizer, in_every_style)).pooler_output, dim=-1
    ).view(n, len(phrases), -1)
    chosen = torch.einsum("nd,nsd->ns", image, styled).argmax(-1)
    right = [list(phrases)[c] == meta["style"] for c, meta in zip(chosen.tolist(), split.metas[:n], strict=True)]
    return {
        "style": sum(right) / n,
        "top1": hit[:, :1].any(-1).float().mean().item(),
        "top5": hit[:, :5].any(-1).float().mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--role", choices=["teacher", "metric"], required=True)
    args = parser.parse_args()
    cfg = config("clip")
    seed = cfg["seed"][args.role]
    torch.manual_seed(seed)
    train, heldout = load("train"), load("heldout")
    tokenizer = make_tokenizer(train.captions, cfg["vocab_size"], args.work / "tokenizer")
    ids = tokenize(tokenizer, train.captions)
    model = build(cfg, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg["lr"], weight_decay=0.1, betas=(0.9, 0.98), fused=True)
    progress = Progress(args.work, f"clip-{args.role}")
    start = warmed_from = 0
    if state := progress.resume():
        model.load_state_dict(state["model"])
        start = state["step"]
        if "optimizer" in state:
            optimizer.load_state_dict(state["optimizer"])
        else:  # unpacked from the shipped weights: the optimizer is new and warms up again
            warmed_from = start
    steps = cfg["steps"][args.role]
    parts = caption_parts(tokenizer, train)
    by_concept: dict[str, list[int]] = {}
    for i, meta in enumerate(train.metas):
        by_concept.setdefault(meta["concept"], []).append(i)
    members = list(by_concept.values())
    for step in range(start, steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        lr = cfg["lr"] * min(1, (step + 1 - warmed_from) / cfg["warmup"]) * (0.02 + 0.98 * cosine)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if step < cfg["grouped_from"]:
            index = batch_indices(step, cfg["batch"], len(train.captions), seed)
        else:  # concepts in all their styles, which style alone tells apart: random batches hardly ever need that
            drawn = batch_indices(step, cfg["concepts_per_batch"], len(members), seed).tolist()
            index = torch.tensor([i for concept in drawn for i in members[concept]])
        pixels = augment(train.pixels(index), torch.Generator().manual_seed(seed * 1_000_003 + step))
        longest = int((ids[index] == tokenizer.eos_token_id).float().argmax(-1).max()) + 1
        loss, image, top1 = contrastive_loss(model, pixels, ids[index, :longest])
        if step >= cfg["composed_from"]:
            loss = loss + cfg["composed_weight"] * composed(model, image, index, parts, longest)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % progress.every == 0:
            progress.note(step + 1, loss=loss.item(), top1_batch=top1, lr=lr)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            progress.save(step=step + 1, model=model.state_dict(), optimizer=optimizer.state_dict())
            progress.note(
                step + 1, **{f"heldout_{k}": v for k, v in accuracy(model.eval(), tokenizer, heldout).items()}
            )
            model.train()
    model.save_pretrained(args.work / f"clip-{args.role}")
    tokenizer.save_pretrained(args.work / f"clip-{args.role}")


if __name__ == "__main__":
    main()
