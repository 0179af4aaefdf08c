"""How well pictures show their captions, judged by a CLIP, and the same figures of real pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sdcompress_engines.errors import DataError, ModelError, shorten
from sdcompress_engines.json_files import read_json_object

from sdcompress.data.skipped import Skipped
from sdcompress.data.sources import open_source
from sdcompress.support.pipeline import TextToImagePipeline

from .scenario import Prompt
from .stats import share_interval


@dataclass(frozen=True)
class Share:
    """A share of `count` with its 95% interval, all in [0, 1]."""

    share: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, hits: torch.Tensor) -> Share:
        """Returns the share of True in a bool tensor, (N,)."""
        return cls(hits.float().mean().item(), *share_interval(int(hits.sum()), len(hits)), len(hits))


class ClipMetric:
    """A CLIP that judges pictures.

    Pictures are normalized by its `preprocessor_config.json`, or to [-1, 1] if it has none (nano-CLIP).

    Args:
        folder: of a transformers `CLIPModel`, or of a `ResNetClip`, and its tokenizer.
        device: where it runs.

    Raises:
        ModelError: the folder has no such model, or a damaged one.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        from sdcompress.families.build import load_tokenizer

        from .resnet_clip import load_clip

        self.model = load_clip(folder).eval().to(device)
        self.tokenizer = load_tokenizer(folder)
        self.device = device
        file = folder / "preprocessor_config.json"
        config = read_json_object(file, ModelError) if file.is_file() else {}
        self.mean, self.std = (
            torch.tensor(_read_color(config, key, file), device=device).view(3, 1, 1)
            for key in ("image_mean", "image_std")
        )

    @torch.inference_mode()
    def image_features(self, images: Sequence[Image.Image], batch: int = 64) -> torch.Tensor:
        """Returns unit vectors, (N, D), float32.

        Args:
            images: N pictures.
            batch: pictures at once.
        """
        side = self.model.config.vision_config.image_size
        parts = []
        for start in range(0, len(images), batch):
            pixels = torch.stack(
                [
                    to_pixels(i if i.size == (side, side) else i.resize((side, side), Image.Resampling.BICUBIC))
                    for i in images[start : start + batch]
                ]
            )
            parts.append(
                self.model.get_image_features(
                    pixel_values=(pixels.to(self.device) - self.mean) / self.std
                ).pooler_output
            )
        return torch.nn.functional.normalize(torch.cat(parts), dim=-1)

    @torch.inference_mode()
    def text_features(self, captions: Sequence[str]) -> torch.Tensor:
        """Returns unit vectors, (N, D), float32."""
        ids = self.tokenizer(
            list(captions), padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids.to(self.device)
        return torch.nn.functional.normalize(
            torch.cat([self.model.get_text_features(input_ids=part).pooler_output for part in ids.split(256)]), dim=-1
        )

    def clip_score(self, images: Sequence[Image.Image], captions: Sequence[str]) -> float:
        """Returns the mean cosine of each picture with its caption, × 100.

        Hessel et al. 2021, arXiv 2104.08718, without their clip at zero and weight of 2.5.
        """
        return self.clip_scores(images, captions).mean().item()

    def clip_scores(self, images: Sequence[Image.Image], captions: Sequence[str]) -> torch.Tensor:
        """Returns the cosine of each picture with its caption, × 100; (N,), float32, on the CPU."""
        return 100 * (self.image_features(images) * self.text_features(captions)).sum(-1).cpu()

    def style_accuracy(
        self, images: Sequence[Image.Image], prompts: Sequence[Prompt], styles: Mapping[str, str]
    ) -> Share:
        """Returns the share of pictures whose own caption scores higher than the same concept in every other style.

        Chance is 1 / number of styles.

        Args:
            images: a picture for each prompt.
            prompts: each caption is `styles[style]` and a concept.
            styles: style → the phrase with which its captions start.

        Raises:
            DataError: a prompt has another style.
        """
        phrases = list(styles.values())
        captions, target = [], []
        for prompt in prompts:
            phrase = styles.get(prompt.style)
            if phrase is None or not prompt.caption.startswith(phrase):
                raise DataError(
                    f"prompt {prompt.caption!r} of style {prompt.style!r}",
                    expected=f"one that starts with one of {phrases}",
                )
            captions += [p + prompt.caption.removeprefix(phrase) for p in phrases]
            target.append(phrases.index(phrase))
        text = self.text_features(captions).view(len(prompts), len(phrases), -1)
        picked = torch.einsum("nd,nsd->ns", self.image_features(images), text).argmax(-1).cpu()
        return Share.of(picked == torch.tensor(target))

    def retrieval(self, images: Sequence[Image.Image], captions: Sequence[str], k: int = 5) -> dict[str, Share]:
        """Returns `top1` and `top{k}`: the shares of pictures whose caption is the first, or among the first k.

        Args:
            images: a picture for each caption.
            captions: all that a picture can match.
            k: how many count for the second share.
        """
        distinct = list(dict.fromkeys(captions))
        target = torch.tensor([distinct.index(caption) for caption in captions])
        rank = (self.image_features(images) @ self.text_features(distinct).T).argsort(dim=-1, descending=True).cpu()
        hit = rank == target[:, None]
        return {"top1": Share.of(hit[:, 0]), f"top{k}": Share.of(hit[:, :k].any(-1))}


def judge(
    metric: ClipMetric, images: Sequence[Image.Image], prompts: Sequence[Prompt], styles: Mapping[str, str]
) -> dict[str, Any]:
    """Returns the figures of a set of pictures: `clip_score`, `top1`, `top5`, and `style` if there are styles.

    Args:
        metric: the CLIP.
        images: a picture for each prompt.
        prompts: captions, with their styles if there are any.
        styles: style → the phrase with which its captions start; may be empty.
    """
    captions = [prompt.caption for prompt in prompts]
    figures: dict[str, Any] = {"clip_score": metric.clip_score(images, captions), **metric.retrieval(images, captions)}
    return figures | ({"style": metric.style_accuracy(images, prompts, styles)} if styles else {})


def judge_pipeline(
    metric: ClipMetric,
    pipeline: TextToImagePipeline,
    captions: Sequence[str],
    prompts: Sequence[Prompt],
    styles: Mapping[str, str],
) -> dict[str, float]:
    """Returns `style_accuracy` and `retrieval_top5` of the pictures that a pipeline draws on the CPU.

    They are drawn in bf16 if the CPU has instructions for it.

    Args:
        metric: the CLIP.
        pipeline: a text-to-image pipeline; picture i has the seed i.
        captions: what the pipeline draws.
        prompts: what the CLIP expects of each picture.
        styles: style → the phrase with which its captions start.
    """
    from sdcompress.sampling import generate

    half = torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())
    with torch.inference_mode(), half:
        images = generate(pipeline, captions, seeds=list(range(len(captions))), batch_size=50)
    figures = judge(metric, images, prompts, styles)
    return {"style_accuracy": figures["style"].share, "retrieval_top5": figures["top5"].share}


def read_shard(shard: Path) -> tuple[list[Image.Image], list[Prompt]]:
    """Returns the pictures (RGB) of a webdataset shard (a tar file), and their prompts, in the shard's order.

    Raises:
        DataError: the shard has no pictures with captions, or a broken one.
    """
    records = {each.caption: each for each in open_source(shard).read_unit(0, Skipped()) if each.caption}
    if not records:
        raise DataError("no picture with a caption", where=shard, expected="pairs of picture and .txt")
    prompts = [Prompt(caption, str(each.meta.get("style") or "")) for caption, each in records.items()]
    return [each.picture() for each in records.values()], prompts


def real_pictures(shard: Path, prompts: Sequence[Prompt]) -> tuple[list[Image.Image], list[Prompt]]:
    """Returns the shard's pictures of the prompts, and their prompts.

    If the shard lacks some of them, its first pictures are taken, as many as there are prompts: retrieval is harder
    among more captions.
    """
    images, found = read_shard(shard)
    at = {prompt.caption: index for index, prompt in enumerate(found)}
    picked = (
        [at[p.caption] for p in prompts]
        if all(p.caption in at for p in prompts)
        else list(range(min(len(prompts), len(found))))
    )
    return [images[i] for i in picked], [found[i] for i in picked]


def _read_color(config: Mapping[str, Any], key: str, file: Path) -> list[float]:
    """Returns the three numbers by which pictures are normalized; 0.5 where the config has none."""
    values = config.get(key, [0.5] * 3)
    listed = isinstance(values, list) and len(values) == 3
    if not (listed and all(type(value) in (int, float) and 0 < value < 256 for value in values)):
        raise ModelError(f"{key}: {shorten(repr(values), 60)}", where=file, expected="three positive numbers")
    return [float(value) for value in values]


def to_pixels(image: Image.Image) -> torch.Tensor:
    """Returns an image as a tensor, (3, H, W), float32, in [0, 1]."""
    image = image.convert("RGB")
    return (
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        .view(image.height, image.width, 3)
        .permute(2, 0, 1)
        .float()
        / 255
    )
