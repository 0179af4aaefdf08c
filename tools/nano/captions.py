"""Captions as tokens: the tokenizer that nano's parts share, and captions taken apart into style and concept.

The tokenizer (a BPE trained on the captions, in CLIP's format) is made on the first call.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from common import Split
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

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
