"""A tokenizer of a folder gives the tokens that transformers' own gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sdcompress_engines.errors import ModelError
from transformers import CLIPTokenizer

from sdcompress.families.build import load_tokenizer
from sdcompress.models import nano

CAT, DOG = "<cat>", "<Dog>"
TEXT = f"a {CAT} flat {DOG} red {CAT.upper()}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(nano.pipeline_folder("nano") / "tokenizer", tmp_path / "tokenizer"))


def change(folder: Path, name: str, content: dict[str, Any]) -> None:
    path = folder / name
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(old | content))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    ("key", "extra"),
    [
        ("additional_special_tokens", [CAT, DOG]),
        ("additional_special_tokens", None),
        ("extra_special_tokens", [CAT, DOG]),
        ("extra_special_tokens", {"cat_token": CAT}),
        ("extra_special_tokens", {}),
    ],
)
def test_further_special_tokens_are_those_of_transformers(folder: Path, key: str, name: str, extra: Any) -> None:
    change(folder, name, {key: extra})
    expected, tokenizer = CLIPTokenizer.from_pretrained(folder), load_tokenizer(folder)
    assert tokenizer(TEXT).input_ids == expected(TEXT).input_ids
    assert len(tokenizer) == len(expected)


@pytest.mark.parametrize("changes", [{}, {"added_tokens_decoder": {}}])
def test_where_two_files_differ_the_filling_of_captions_is_that_of_transformers(
    folder: Path, changes: dict[str, Any]
) -> None:
    """So differ those of SD2 that Stability published."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({"pad_token": "<|endoftext|>", "model_max_length": 77} | changes))
    change(folder, "special_tokens_map.json", {"pad_token": "!"})
    assert load_tokenizer(folder).pad_token == CLIPTokenizer.from_pretrained(folder).pad_token


OPTIONS: dict[str, Any] = {
    "cls_token": ["[CLS]", "<|endoftext|>", None],
    "sep_token": ["[SEP]"],
    "mask_token": ["<mask>"],
    "padding_side": ["left", "right"],
    "truncation_side": ["left", "right"],
    "split_special_tokens": [True, False],
    "added_tokens_decoder": [{}],
}


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_option_gives_the_tokens_of_transformers(folder: Path, data: st.DataObject) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        config = {"pad_token": "!", "model_max_length": 12} | {
            option: data.draw(st.sampled_from(values), option)
            for option, values in OPTIONS.items()
            if name == "tokenizer_config.json" or option.endswith("_token")
            if data.draw(st.booleans())
        }
        (folder / name).write_text(json.dumps(config))
    made, expected = load_tokenizer(folder), CLIPTokenizer.from_pretrained(folder)
    for text in ("a [CLS] cat [SEP] <mask> <|endoftext|> hat!", "a cat " * 20):
        tokens = [each(text, padding="max_length", max_length=12, truncation=True) for each in (made, expected)]
        assert tokens[0].input_ids == tokens[1].input_ids


@pytest.mark.parametrize("is_special", [False, True])
def test_added_tokens_keep_their_numbers(folder: Path, is_special: bool) -> None:
    first = len(load_tokenizer(folder))
    change(folder, "added_tokens.json", {DOG: first, CAT: first + 1})
    if is_special:
        change(folder, "special_tokens_map.json", {"additional_special_tokens": [CAT]})
    tokenizer = load_tokenizer(folder)
    assert tokenizer(TEXT).input_ids == CLIPTokenizer.from_pretrained(folder)(TEXT).input_ids
    assert tokenizer.convert_tokens_to_ids([DOG, CAT]) == [first, first + 1]


@pytest.mark.parametrize("extra", [3, ["", CAT], {"a": 3}, [{"text": CAT}]])
def test_what_is_no_list_of_tokens_is_named(folder: Path, extra: Any) -> None:
    change(folder, "tokenizer_config.json", {"extra_special_tokens": extra})
    with pytest.raises(ModelError, match="extra_special_tokens"):
        load_tokenizer(folder)
