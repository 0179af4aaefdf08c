"""What the studies of a new word share: pictures captioned with a word that nano has never seen, and their judge.

The word is "sketch". The training pictures are nano's line drawings, with captions "a sketch of ..." in place of "a
black line drawing of ...".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdcompress_engines.files import write_atomically

from sdcompress.data import nano_prompts
from sdcompress.data.sources import open_source
from sdcompress.models import nano

from .quality import ClipMetric, judge_pipeline
from .scenario import Prompt

STYLE, WORD = "line", "a sketch of"


def write_word_pictures(folder: Path) -> None:
    """Write the line drawings of the training shards as an image folder, captioned with the new word."""
    folder.mkdir(parents=True)
    phrase = nano.styles()[STYLE]
    for number, record in enumerate(r for r in open_source("nano") if r.meta["style"] == STYLE):
        write_atomically(folder / f"{number:04d}.webp", record.encoded)
        write_atomically(folder / f"{number:04d}.txt", record.caption.replace(phrase, WORD, 1))


class WordJudge:
    """Draws pictures of held-out concepts and judges them with nano-CLIP; picture i has the seed i.

    Args:
        count: number of prompts.
    """

    def __init__(self, count: int) -> None:
        self.metric, self.styles = ClipMetric(nano.metric_folder()), nano.styles()
        heldout = nano_prompts.draw_prompts("heldout", count)
        self.others = [Prompt(prompt.caption, prompt.style) for prompt in heldout]
        # CLIP gets the phrase that it knows; the model gets the new word.
        expected = (prompt.caption.replace(self.styles[prompt.style], self.styles[STYLE], 1) for prompt in heldout)
        self.expected = [Prompt(caption, STYLE) for caption in expected]
        self.captions = [prompt.caption.replace(self.styles[prompt.style], WORD, 1) for prompt in heldout]

    def judge(self, pipeline: Any) -> dict[str, float]:
        """Returns the shares of pictures of the new word in its style, and with the right caption among the top 5."""
        return judge_pipeline(self.metric, pipeline, self.captions, self.expected, self.styles)

    def judge_known_phrase(self, pipeline: Any) -> dict[str, float]:
        """Returns what `judge` returns, where the prompts have the phrase that nano knows for this style."""
        captions = [prompt.caption for prompt in self.expected]
        return judge_pipeline(self.metric, pipeline, captions, self.expected, self.styles)

    def judge_others(self, pipeline: Any) -> dict[str, float]:
        """Returns what `judge` returns, for the same concepts in their held-out styles, prompted without the word."""
        captions = [prompt.caption for prompt in self.others]
        return judge_pipeline(self.metric, pipeline, captions, self.others, self.styles)
