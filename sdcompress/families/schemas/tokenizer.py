"""The files of CLIP's tokenizer: its vocabulary, merges and special tokens are read; the rules are always CLIP's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from sdcompress_engines.errors import ModelError, shorten
from sdcompress_engines.files import check_regular
from sdcompress_engines.json_files import read_json

from sdcompress.families.schemas.base import ComponentSchema, check_content, require

FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
)
"""All files that are read; others, such as code and chat templates, are not."""
CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")
CONTEXT = 77
"""Tokens of a caption in every published model, where the config does not say."""

_MOST_MIB = 16
"""Largest file that is read; CLIP's `tokenizer.json` has 3.5 MiB."""
_MOST_TOKENS = 10**6
_EXTRA = ("extra_special_tokens", "additional_special_tokens")
"""Two names of one thing: transformers 5's, which counts where both are there, and 4's."""
_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _check_token(value: Any) -> Any:
    text = _content(value)
    require(
        isinstance(text, str) and 0 < len(text) <= 200,
        f"{shorten(repr(value), 40)}, expected a token, or an object with its content",
    )
    if isinstance(value, dict):
        require(
            all(isinstance(value.get(flag, False), bool) for flag in _FLAGS),
            f"a flag of the token {text!r} is not true or false",
        )
    return value


Token = Annotated[Any, AfterValidator(_check_token)]


def _as_list(value: Any) -> Any:
    """Returns further special tokens as a list; transformers has also written objects of names and tokens, and null."""
    return list(value.values()) if isinstance(value, dict) else [] if value is None else value


_Tokens = Annotated[list[Token], BeforeValidator(_as_list), Field(max_length=1000, default_factory=list)]


class _SpecialTokens(ComponentSchema):
    bos_token: Token = "<|startoftext|>"
    eos_token: Token = "<|endoftext|>"
    unk_token: Token = "<|endoftext|>"
    pad_token: Token = "<|endoftext|>"
    # CLIP has no use for these three, but a prompt may hold them.
    cls_token: Token | None = None
    sep_token: Token | None = None
    mask_token: Token | None = None
    additional_special_tokens: _Tokens
    extra_special_tokens: _Tokens


class _Config(_SpecialTokens):
    tokenizer_class: Literal["CLIPTokenizer", "CLIPTokenizerFast"] | None = None
    # Without a limit transformers writes 10^30.
    model_max_length: Annotated[float, Field(ge=2, le=1e31)] = CONTEXT
    padding_side: Literal["left", "right"] = "right"
    truncation_side: Literal["left", "right"] = "right"
    split_special_tokens: bool = False
    added_tokens_decoder: Annotated[dict[str, Token], Field(default_factory=dict)]


_OPTIONS = ("padding_side", "truncation_side", "split_special_tokens")


@dataclass(frozen=True)
class TokenizerParts:
    """What a tokenizer is built from.

    Attributes:
        vocabulary: token → number.
        merges: pairs of tokens, the most frequent first.
        special: `bos_token`, `eos_token`, `unk_token`, `pad_token` and others → the token.
        extra: further special tokens; those without a number in `added` follow the vocabulary.
        added: number → a token that was added to the vocabulary, with its flags.
        context: tokens of a caption.
        options: where a caption is cut and filled, and how its special tokens are read, by transformers' names.
    """

    vocabulary: dict[str, int]
    merges: list[tuple[str, str]]
    special: dict[str, Any]
    extra: list[Any]
    added: dict[int, Any]
    context: int
    options: dict[str, Any]


def read_tokenizer_files(folder: Path) -> dict[str, Any]:
    """Returns name → content of those of `FILES` that a folder holds; JSON is decoded.

    Raises:
        ModelError: a file is too large, or neither JSON nor text.
    """
    files: dict[str, Any] = {}
    for name in FILES:
        path = folder / name
        if not path.exists():
            continue
        if path.suffix == ".json":
            files[name] = read_json(path, ModelError, most_mib=_MOST_MIB)
            continue
        check_regular(path, ModelError)
        if path.stat().st_size > _MOST_MIB * 2**20:
            raise ModelError("is too large", where=path, expected=f"at most {_MOST_MIB} MiB")
        try:
            files[name] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(f"is not text ({shorten(error, 120)})", where=path, expected="UTF-8") from error
    return files


def check_tokenizer(files: Mapping[str, Any], where: str | Path) -> TokenizerParts:
    """Returns what a tokenizer is built from.

    Args:
        files: name → content of those of `FILES` that are there; JSON is decoded.
        where: the folder, or the file that holds them, for the message.

    Raises:
        ModelError: a file is missing or broken; the message names it.
    """
    config = _check(_Config, files, "tokenizer_config.json", where)
    older = _check(_SpecialTokens, files, "special_tokens_map.json", where)
    if "added_tokens_decoder" in config:  # transformers then leaves the older file alone
        older = {}
    names = _SpecialTokens.model_fields.keys() - set(_EXTRA)
    # As in transformers, the last counts. Of SD2's published files, only the older one has the right `pad_token`.
    tokens = {name: value for source in (config, older) for name, value in source.items() if name in names and value}
    named = [_as_list(source.get(name)) for source in (config, older) for name in _EXTRA]
    extra: list[Any] = next(filter(None, named), [])
    if "pad_token" not in tokens:  # the published models have different ones
        raise _fault(where, "tokenizer_config.json", "does not say what fills a caption", 'a "pad_token"')
    if "vocab.json" in files and "merges.txt" in files:
        model: Any = {"vocab": files["vocab.json"], "merges": str(files["merges.txt"]).splitlines()}
        source = "vocab.json"
    else:
        source = "tokenizer.json"
        content = files.get(source)
        model = content.get("model") if isinstance(content, dict) else None
        if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
            raise _fault(where, source, "holds no vocabulary", "one of CLIP's kind, or vocab.json and merges.txt")
    vocabulary = _check_vocabulary(model.get("vocab"), where, source)
    merges = _check_merges(model.get("merges"), where, source)
    config_extra, config_more, older_extra, _ = named  # again as in transformers
    special = [_content(token) for token in (*tokens.values(), *config_extra, *config_more, *older_extra)]
    added = _collect_added(files, config, special, where)
    context = int(min(config.get("model_max_length", CONTEXT), 10**9))
    options = {name: config[name] for name in _OPTIONS if name in config}
    return TokenizerParts(vocabulary, merges, tokens, extra, added, context, options)


def _check(schema: type[ComponentSchema], files: Mapping[str, Any], name: str, where: str | Path) -> dict[str, Any]:
    content = files.get(name, {})
    if not isinstance(content, dict):
        raise _fault(where, name, "is no object", 'a JSON object: {"NAME": VALUE, ...}')
    return check_content(schema, content, f"{where}/{name}")[0]


def _fault(where: str | Path, name: str, what: str, expected: str) -> ModelError:
    return ModelError(what, where=f"{where}/{name}", expected=expected)


def _check_vocabulary(vocabulary: Any, where: str | Path, name: str) -> dict[str, int]:
    if (
        not isinstance(vocabulary, dict)
        or not 1 <= len(vocabulary) <= _MOST_TOKENS
        or not all(type(number) is int and 0 <= number < _MOST_TOKENS for number in vocabulary.values())
        or len(set(vocabulary.values())) < len(vocabulary)
    ):
        raise _fault(where, name, "holds no vocabulary", "an object of tokens, each with a number of its own")
    return vocabulary


def _check_merges(merges: Any, where: str | Path, name: str) -> list[tuple[str, str]]:
    if isinstance(merges, list) and merges and str(merges[0]).startswith("#version"):
        merges = merges[1:]
    if isinstance(merges, list) and len(merges) <= _MOST_TOKENS:
        pairs = [tuple(each.split(" ")) if isinstance(each, str) else each for each in merges if each != ""]
        if all(
            isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(part, str) and part for part in pair)
            for pair in pairs
        ):
            return [(pair[0], pair[1]) for pair in pairs]
    raise _fault(where, name, "holds no merges", "a list of pairs of tokens")


def _collect_added(
    files: Mapping[str, Any], config: Mapping[str, Any], special: list[Any], where: str | Path
) -> dict[int, Any]:
    """Returns number → token of all tokens that were added to the vocabulary.

    Upper and lower case are one in those of `added_tokens.json`, except in `special`.
    """
    added: dict[int, Any] = {}
    listed = {} if "added_tokens_decoder" in config else files.get("added_tokens.json", {})
    whole = files.get("tokenizer.json", {})
    try:
        entries = [(entry["id"], entry) for entry in (whole.get("added_tokens") or [])]
        entries += [
            (number, {"content": token, "normalized": token not in special, "special": token in special})
            for token, number in listed.items()
        ]
        entries += [(int(number), token) for number, token in config.get("added_tokens_decoder", {}).items()]
        for number, token in entries:
            if type(number) is not int or not 0 <= number < _MOST_TOKENS:
                raise ValueError(f"the number {shorten(repr(number), 40)}")
            added[number] = _check_token(token)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"has broken added tokens ({shorten(error, 120)})", where=where, expected="tokens with their numbers"
        ) from error
    return added
