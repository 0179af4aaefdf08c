"""YAML that somebody else may have written: names, plain values, lists and mappings, within limits.

Of YAML 1.2 this reads null, true, false, finite numbers of 64 bits and text; a date or `yes` is text. Other tags,
repeated names, and aliases without end are refused, each with its line.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, NoReturn

import yaml
from sdcompress_engines.errors import UsageError, shorten
from sdcompress_engines.files import check_regular

MOST_KIB = 256
"""Largest file that is read; recipes and suites have 3 KiB."""
MOST_LEVELS = 16
"""Deepest nesting; suites have 3 levels."""
MOST_VALUES = 10_000
"""Most names and values of a file; what an alias stands for counts each time."""
MOST_NAME = 200
"""Longest name of a value, in characters."""

_TAG = "tag:yaml.org,2002:"
_NULL, _BOOL, _INT, _FLOAT, _TEXT, _LIST, _MAP, _MERGE = (
    f"{_TAG}{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")
)
_FLOAT_TEXT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
_PLAIN = {  # tag of a plain value → what the whole value looks like, in this order
    tag: re.compile(rf"(?:{text})\Z")
    for tag, text in (
        (_NULL, "~|null|Null|NULL|"),
        (_BOOL, "true|True|TRUE|false|False|FALSE"),
        (_INT, "[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
        (_FLOAT, _FLOAT_TEXT),
        (_MERGE, "<<"),
    )
}
_RESOLVERS = {None: list(_PLAIN.items())}


class _FaultAt(Exception):
    """A fault of a YAML text, with its mark."""

    def __init__(self, what: str, mark: Any) -> None:
        super().__init__(what)
        self.mark = mark


class _Loader(yaml.SafeLoader):
    """Composes the nodes of one document, and counts them."""

    yaml_implicit_resolvers = _RESOLVERS

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.level = self.values = 0
        self.sizes: dict[str, int] = {}  # of what has an anchor and is complete

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        anchor, before = event.anchor, self.values
        if isinstance(event, yaml.AliasEvent):
            if anchor in self.anchors and anchor not in self.sizes:
                raise _FaultAt(f"*{shorten(anchor, 40)} stands inside what it stands for", event.start_mark)
            self.values += self.sizes.get(anchor, 0)
        self.values += 1
        if self.values > MOST_VALUES:
            raise _FaultAt(f"more than {MOST_VALUES:,} values, aliases counted each time", event.start_mark)
        if self.level >= MOST_LEVELS:
            raise _FaultAt(f"more than {MOST_LEVELS} levels", event.start_mark)
        self.level += 1
        node = super().compose_node(parent, index)
        self.level -= 1
        if anchor is not None and not isinstance(event, yaml.AliasEvent):
            self.sizes[anchor] = self.values - before
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes every text that the loader would read as something else."""

    yaml_implicit_resolvers = _RESOLVERS

    def ignore_aliases(self, data: Any) -> bool:
        return True


def read_mapping(path: Path, content: str) -> dict[str, Any]:
    """Returns a YAML file's mapping; an empty file is an empty mapping.

    Args:
        path: the file: UTF-8, with a byte-order mark or without.
        content: what the mapping holds, for the message: "knobs" or "settings".

    Raises:
        UsageError: the file is no regular file, is too large, is not YAML as this module reads it, or not a mapping.
        OSError: there is nothing, or it may not be read.
    """
    check_regular(path, UsageError)
    if (size := path.stat().st_size) > MOST_KIB * 1024:
        raise UsageError(f"has {size / 1024:,.0f} KiB", where=path, expected=f"a YAML file of at most {MOST_KIB} KiB")
    values = parse_yaml(path.read_bytes(), path)
    if not isinstance(values, dict | None):
        raise UsageError(f"is not a mapping of {content}", where=path, expected="NAME: VALUE in each line")
    return values or {}


def parse_yaml(text: bytes | str, where: str | Path | None = None) -> Any:
    """Returns the value of a YAML text: None, bool, int, float, str, or a list or dict of these. Names are text.

    Args:
        text: UTF-8 where it is bytes.
        where: the file or option that holds it, for the message.

    Raises:
        UsageError: it is no UTF-8, no YAML, holds several documents or something else than plain values, or is over a
            limit of this module.
    """
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        node = _Loader(text).get_single_node()
        return None if node is None else _value_of(node)
    except UnicodeDecodeError as error:
        raise UsageError(f"is not YAML (byte {error.start} is not UTF-8)", where=where) from error
    except yaml.reader.ReaderError as error:
        line = str(text).count("\n", 0, error.position) + 1
        raise UsageError(f"is not YAML (line {line}: the character {error.character:#x})", where=where) from error
    except (_FaultAt, yaml.MarkedYAMLError) as error:
        raise UsageError(f"is not YAML that sdcompress reads ({_describe(error)})", where=where) from error
    except (yaml.YAMLError, ValueError, IndexError) as error:  # PyYAML's own, on a cut escape or directive
        raise UsageError(f"is not YAML ({shorten(error, 120)})", where=where) from error


def write_yaml(values: dict[str, Any]) -> str:
    """Returns a mapping as YAML that `parse_yaml` reads back equal; lists of plain values stand on one line."""
    has_lists = any(isinstance(value, list | dict) for value in values.values())
    return yaml.dump(
        values,
        Dumper=_Dumper,
        default_flow_style=None if has_lists else False,
        allow_unicode=True,
        sort_keys=False,
        width=10_000,
    )


def _describe(error: _FaultAt | yaml.MarkedYAMLError) -> str:
    if isinstance(error, _FaultAt):
        mark, what = error.mark, str(error)
    else:
        mark, what = error.problem_mark or error.context_mark, error.problem or error.context or "a fault"
        if "'\\t'" in what:
            what = "a tab; indent with spaces"
        elif "single document" in (error.context or ""):
            what = "a second document; one is read"
    return f"line {mark.line + 1}: {shorten(what, 160)}" if mark else shorten(what, 160)


def _value_of(node: yaml.Node) -> Any:
    """Returns the value of a node, built without any of PyYAML's constructors."""
    if isinstance(node, yaml.MappingNode) and node.tag == _MAP:
        return _mapping_of(node)
    if isinstance(node, yaml.SequenceNode) and node.tag == _LIST:
        return [_value_of(item) for item in node.value]
    if isinstance(node, yaml.ScalarNode):
        return _scalar_of(node)
    _refuse(f"the tag {shorten(node.tag, 60)}; only plain values are read", node)


def _mapping_of(node: yaml.MappingNode) -> dict[str, Any]:
    own: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            _refuse("a list or mapping as a name", key)
        if key.tag == _MERGE:
            merged = _merged_of(value) | merged
            continue
        name = key.value
        if len(name) > MOST_NAME or not name.isprintable():
            _refuse(f"a name that is too long or not printable, {shorten(name, 40)}", key)
        if name in own:
            _refuse(f"the name {name!r} is there twice", key)
        own[name] = _value_of(value)
    return merged | own


def _merged_of(node: yaml.Node) -> dict[str, Any]:
    """Returns the mapping that `<<` adds: one mapping, or several of which the first wins."""
    parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
    merged: dict[str, Any] = {}
    for part in parts:
        if not isinstance(part, yaml.MappingNode):
            _refuse("<< takes a mapping", part)
        merged = _mapping_of(part) | merged
    return merged


def _scalar_of(node: yaml.ScalarNode) -> bool | int | float | str | None:
    text: str = node.value
    if node.tag in _PLAIN and not _PLAIN[node.tag].match(text):  # such as !!int x
        _refuse(f"{shorten(repr(text), 40)} with the tag !!{node.tag.removeprefix(_TAG)}", node)
    if node.tag == _NULL:
        return None
    if node.tag == _BOOL:
        return text.lower() == "true"
    if node.tag == _INT:
        return _int_of(text, node)
    if node.tag == _FLOAT:
        number = float(text) if re.search("[0-9]", text) else math.inf
        if not math.isfinite(number):
            _refuse(f"{shorten(text, 40)} is not a finite number", node)
        return number
    if node.tag not in (_TEXT, _MERGE):
        _refuse(f"the tag {shorten(node.tag, 60)}; only plain values are read", node)
    if re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]", text):
        _refuse("a control character in a text", node)
    return text


def _int_of(text: str, node: yaml.Node) -> int:
    number = int(text, 0 if text[1:2] in ("o", "x") else 10) if len(text) < 30 else 2**64
    if not -(2**63) <= number < 2**63:
        _refuse(f"{shorten(text, 40)} is a number of more than 64 bits", node)
    return number


def _refuse(what: str, node: yaml.Node) -> NoReturn:
    raise _FaultAt(what, node.start_mark)
