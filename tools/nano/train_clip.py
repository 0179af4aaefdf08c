"""Train a small CLIP on nano's pictures and captions, resumable.

    python tools/nano/train_clip.py --work build/nano --role teacher   its text encoder conditions nano's UNet
    python tools/nano/train_clip.py --work build/nano --role metric --data build/nano/wide-data

The second is nano-CLIP, the judge: another seed, more pictures (`build_data.py --wide`), used to measure only.

A batch holds whole concepts in all their styles, because random batches hardly ever need the style to tell two captions
apart. A picture has to find its caption, its concept alone and its style alone, and a caption's embedding has to lie
between those of its parts: otherwise an unseen pair of style and concept means something of its own.

The tokenizer (a BPE trained on the captions, in CLIP's format) is made on the first call and shared.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from common import Progress, Split, augment, batch_indices, load, mixed_precision, read_settings, training_arguments
from stripped import strip
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from sdcompress.models import nano
from sdcompress.train.muon import make_muon

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


@dataclass(frozen=True)
class CaptionParts:
    """The captions of a split taken apart, as token ids.

    Attributes:
        style_of: index of each picture's style, (N,).
        concept_of: index of each picture's concept, (N,).
        styles: the style phrases alone, (S, 77).
        concepts: the concepts alone, (C, 77).
        pairs: each concept in each style, (C, S, 77). No picture is needed for them, so held-out pairs are among them.
        seen: which of the pairs have a picture, (C, S), bool.
    """

    style_of: torch.Tensor
    concept_of: torch.Tensor
    styles: torch.Tensor
    concepts: torch.Tensor
    pairs: torch.Tensor
    seen: torch.Tensor


def caption_parts(tokenizer: CLIPTokenizer, split: Split) -> CaptionParts:
    phrases = nano.styles()
    names = [
        caption.removeprefix(phrases[meta["style"]]).strip()
        for caption, meta in zip(split.captions, split.metas, strict=True)
    ]
    concepts = list(dict.fromkeys(names))
    pairs = tokenize(tokenizer, [f"{phrase} {name}" for name in concepts for phrase in phrases.values()])
    style_of = torch.tensor([list(phrases).index(meta["style"]) for meta in split.metas])
    concept_of = torch.tensor([concepts.index(name) for name in names])
    seen = torch.zeros(len(concepts), len(phrases), dtype=torch.bool)
    seen[concept_of, style_of] = True
    return CaptionParts(
        style_of,
        concept_of,
        tokenize(tokenizer, [phrase.removesuffix(" of") for phrase in phrases.values()]),
        tokenize(tokenizer, concepts),
        pairs.view(len(concepts), len(phrases), -1),
        seen,
    )


def clip_loss(
    model: CLIPModel, pixels: torch.Tensor, index: torch.Tensor, lost: torch.Tensor, parts: CaptionParts
) -> tuple[torch.Tensor, float]:
    """Returns the loss of a batch, a scalar, and the share of pictures that find their caption among the batch's.

    Args:
        model: the CLIP in training.
        pixels: (B, 3, H, W), float32.
        index: the batch's pictures, (B,).
        lost: what each has lost and is not asked for, (B,), int64: 0 nothing, 1 its style, 2 its concept.
        parts: of the training captions.
    """
    style_of = parts.style_of[index]
    chosen, concept_of = parts.concept_of[index].unique(return_inverse=True)
    count, styles = len(chosen), len(parts.styles)
    ids = torch.cat([parts.pairs[chosen].flatten(0, 1), parts.concepts[chosen], parts.styles]).to(pixels.device)
    concept_of, style_of = concept_of.to(pixels.device), style_of.to(pixels.device)
    longest = int((ids == model.config.text_config.eos_token_id).float().argmax(-1).max()) + 1
    with mixed_precision(pixels.device.type):
        image = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)
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
    )
    return loss, found


@torch.no_grad()
def accuracy(model: CLIPModel, tokenizer: CLIPTokenizer, split: Split) -> dict[str, float]:
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


def main() -> None:
    parser = training_arguments(__doc__)
    parser.add_argument("--role", choices=["teacher", "metric"], required=True)
    args = parser.parse_args()
    progress = Progress(args.work, f"clip-{args.role}", args.minutes)
    cfg = read_settings(args, "clip", args.role)
    torch.manual_seed(cfg["seed"])
    train, heldout = (load("train", args.data, args.pictures), load("heldout", count=args.pictures))
    tokenizer = make_tokenizer(train.captions, cfg["vocab_size"], args.work / "tokenizer")
    model = build(cfg, tokenizer).to(args.device)
    optimizer = make_muon(dict(model.named_parameters()), cfg["lr"], weight_decay=0.1)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(cfg["ema"]))
    step = warmed_from = 0
    if state := progress.resume():
        model.load_state_dict(state["model"])
        average.module.load_state_dict(state.get("average", state["model"]))
        average.n_averaged.fill_(state["step"])
        step = state["step"]
        if "optimizer" in state:
            optimizer.load_state_dict(state["optimizer"])
        else:  # unpacked from the shipped weights: the optimizer is new and warms up again
            warmed_from = step
    parts = caption_parts(tokenizer, train)
    pools = group_concepts(parts, [meta["concept"] for meta in train.metas])
    while (share := progress.share(step, cfg["steps"])) < 1:
        lr = cfg["lr"] * min(1, (step + 1 - warmed_from) / cfg["warmup"])
        lr *= 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = lr
        index = draw_batch(step, cfg["batch"], pools, cfg["seed"])
        generator = torch.Generator().manual_seed(cfg["seed"] * 1_000_003 + step)
        pixels = augment(train.pixels(index), generator, strength=2.5, turned=True)
        pixels, lost = strip(pixels, parts.style_of[index], cfg["stripped"], generator)
        loss, found = clip_loss(model, pixels.to(args.device), index, lost, parts)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update_parameters(model)
        step += 1
        if step % progress.every == 0:
            progress.note(step, loss=loss.item(), top1_batch=found, lr=lr)
        if step % 250 == 0:
            keep(progress, step, model, average, optimizer)
            note_accuracy(progress, step, average.module, tokenizer, heldout)
    keep(progress, step, model, average, optimizer)
    note_accuracy(progress, step, average.module, tokenizer, heldout)
    average.module.save_pretrained(args.work / f"clip-{args.role}")
    tokenizer.save_pretrained(args.work / f"clip-{args.role}")


def keep(
    progress: Progress, step: int, model: CLIPModel, average: AveragedModel, optimizer: torch.optim.Optimizer
) -> None:
    """Write the checkpoint."""
    states = {"model": model.state_dict(), "average": average.module.state_dict(), "optimizer": optimizer.state_dict()}
    progress.save(step=step, **states)


def note_accuracy(progress: Progress, step: int, model: CLIPModel, tokenizer: CLIPTokenizer, heldout: Split) -> None:
    figures = accuracy(model.eval(), tokenizer, heldout)
    progress.note(step, **{f"heldout_{name}": value for name, value in figures.items()})


if __name__ == "__main__":
    main()
