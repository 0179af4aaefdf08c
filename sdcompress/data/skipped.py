"""What a pass over a source leaves out, and when that is too much."""

from __future__ import annotations

from dataclasses import dataclass, field

from sdcompress_engines.errors import DataError, shorten

EXAMPLE_KEYS = 3
"""Keys that a message names for each reason."""
KEY_SHOWN = 80
"""Longest key in a message; a shard may name a member with a million characters."""


@dataclass
class Skipped:
    """What a pass over a source left out.

    Attributes:
        read: number of usable pictures.
        reasons: why pictures could not be used → their keys.
        filtered: condition that pictures did not meet → their number. Nothing is wrong with these pictures.
        fields: metadata names of pictures that lack the field of a condition, for the error message.
    """

    read: int = 0
    reasons: dict[str, list[str]] = field(default_factory=dict)
    filtered: dict[str, int] = field(default_factory=dict)
    fields: set[str] = field(default_factory=set)

    @property
    def count(self) -> int:
        """Number of pictures that could not be used."""
        return sum(len(keys) for keys in self.reasons.values())

    def add(self, reason: str, key: str) -> None:
        """Count a picture that could not be used."""
        self.reasons.setdefault(reason, []).append(shorten(key, KEY_SHOWN))

    def add_filtered(self, condition: str) -> None:
        """Count a picture that did not meet a condition."""
        self.filtered[condition] = self.filtered.get(condition, 0) + 1

    def merge(self, other: Skipped) -> None:
        """Add what another pass left out, over other pictures."""
        self.read += other.read
        for reason, keys in other.reasons.items():
            self.reasons.setdefault(reason, []).extend(keys)
        for reason, count in other.filtered.items():
            self.filtered[reason] = self.filtered.get(reason, 0) + count
        self.fields |= other.fields

    def check(self, where: object, limit: float) -> None:
        """Refuse a source that has nothing usable, or too little.

        Args:
            where: the source, for the message.
            limit: largest share of pictures that may be unusable, from 0 to 1; filtered pictures do not count.

        Raises:
            DataError: no picture is usable, or more than `limit` of them are not.
        """
        if self.read == 0 and self.filtered:
            counts = "; ".join(f"{reason}: {count}" for reason, count in self.filtered.items())
            fields = f"other conditions; the fields are {', '.join(sorted(self.fields))}"
            raise DataError(
                f"has no picture left after filtering ({counts})",
                where=str(where),
                hint=fields if self.fields else "weaker conditions",
            )
        examples = "; ".join(
            f"{reason}: {len(keys)} ({', '.join(keys[:EXAMPLE_KEYS])})" for reason, keys in self.reasons.items()
        )
        if self.read == 0:
            raise DataError(
                f"holds no captioned picture{f' ({examples})' if examples else ''}",
                where=str(where),
                expected="pictures with captions: a .txt beside each, metadata.jsonl / metadata.csv, or webdataset"
                " shards",
            )
        if self.count > limit * (self.read + self.count):
            raise DataError(
                f"{self.count} of {self.read + self.count} pictures cannot be used: {examples}",
                where=str(where),
                expected=f"at most {limit:.0%}",
                hint="--max-unusable SHARE, to accept more",
            )
