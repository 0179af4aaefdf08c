"""Render the nano data set: emoji art with captions, packed as webdataset shards.

    python tools/nano/build_data.py --out sdcompress/assets/nano/data

Fetches the pinned npm packages (MIT and Apache-2.0), draws each concept of `concepts.csv` in each style at 256 px on
white, reduces it to 128 px, drops blanks and exact duplicates, and writes `train/*.tar.gz`, `heldout/*.tar.gz`,
`index.json` and `NOTICE`. `concepts.csv` also says which style of a concept is held out for evaluation, and whether a
mirrored picture still shows the concept. A held-out picture that is nearly the same in another style is left out: a
model would have seen it. Needs npm, and from PyPI resvg-py and Pillow. The result depends on the pinned
versions, `concepts.csv` and the seed only.

    python tools/nano/build_data.py --wide --out build/nano/wide-data

This draws every concept that the packages have, without the held-out pairs: the judge learns from them as well.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import io
import json
import random
import re
import shutil
import subprocess
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import resvg_py
from near_copies import is_near_copy
from PIL import Image

SIZE_PX = 128
SUPERSAMPLE = 2
SAMPLES_PER_SHARD = 300
CONCEPTS = Path(__file__).with_name("concepts.csv")

EMOJIBASE = "emojibase-data@17.0.0"


@dataclass(frozen=True)
class Style:
    """One look: the caption's phrase, and the package its pictures come from."""

    name: str
    phrase: str
    package: str
    licence: str
    copyright: str


STYLES = (
    Style(
        "flat", "a flat icon of", "@iconify-json/fluent-emoji-flat@1.2.6", "MIT", "Copyright (c) Microsoft Corporation"
    ),
    Style(
        "line",
        "a black line drawing of",
        "@iconify-json/fluent-emoji-high-contrast@1.2.6",
        "MIT",
        "Copyright (c) Microsoft Corporation",
    ),
    Style(
        "3d",
        "a 3d render of",
        "@lobehub/fluent-emoji-3d@1.1.0",
        "MIT",
        "Copyright (c) Microsoft Corporation; packaged by LobeHub",
    ),
    Style("cartoon", "a cartoon of", "@iconify-json/noto@1.2.9", "Apache-2.0", "Copyright Google Inc."),
)

# Smileys, people, animals, food, travel, activities, objects. Components, symbols (mostly lettering) and flags stay
# out.
GROUPS = {0, 1, 3, 4, 5, 6, 7}
# Gendered and joined variants repeat one picture many times; clock faces, keycaps and lettering are told apart by text
# alone.
UNWANTED = re.compile(r"o’clock|-thirty|flag|keycap|Japanese|button|^(woman|man|women|men|boy|girl|Mrs\. Claus)\b")


def fetch(package: str, cache: Path) -> Path:
    """Download and unpack one npm package (`name@version`); returns its folder."""
    target = cache / package.replace("/", "+")
    if not (target / "package").exists():
        target.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["npm", "pack", package, "--silent", "--pack-destination", str(target)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        (archive,) = target.glob("*.tgz")
        with tarfile.open(archive) as tar:
            tar.extractall(target, filter="data")
    return target / "package"


def strip_variation(hexcode: str) -> str:
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


@dataclass(frozen=True)
class Concept:
    """One thing that is drawn in every style.

    Attributes:
        name: as captions call it.
        emoji: its name in emojibase.
        hexcode: code points of the emoji, joined by `-`, without variation selectors.
        tags: other words for it, from emojibase.
        held_out: the style that no model is trained on, or "".
        mirror: whether a mirrored picture still shows it.
    """

    name: str
    emoji: str
    hexcode: str
    tags: list[str]
    held_out: str = ""
    mirror: bool = True


def every_emoji(folder: Path) -> list[Concept]:
    """Returns the emoji that can become concepts, in Unicode order.

    Args:
        folder: of the emojibase package.
    """
    entries = sorted(json.loads((folder / "en/data.json").read_text(encoding="utf-8")), key=lambda e: e.get("order", 0))
    found = []
    for entry in entries:
        if entry.get("group") in GROUPS and "200D" not in entry["hexcode"] and not UNWANTED.search(entry["label"]):
            name = entry["label"].replace("’", "'").replace("“", "").replace("”", "").replace(":", "").lower()
            found.append(Concept(name, name, strip_variation(entry["hexcode"]), entry.get("tags", [])))
    return found


def choose_concepts(emoji: list[Concept], wide: bool) -> list[Concept]:
    """Returns the concepts of `concepts.csv`.

    Args:
        emoji: all there are.
        wide: also return every other emoji.
    """
    with CONCEPTS.open(encoding="utf-8", newline="") as file:
        rows = {row["emoji"]: row for row in csv.DictReader(file)}
    chosen = []
    for concept in emoji:
        if row := rows.pop(concept.name, None):
            chosen.append(
                replace(concept, name=row["concept"], held_out=row["held_out"], mirror=row["mirror"] == "yes")
            )
        elif wide:
            chosen.append(concept)
    if rows:
        raise SystemExit(f"{CONCEPTS}: emojibase has no {', '.join(sorted(rows))}")
    return chosen


def with_article(name: str) -> str:
    """`wine glass` → `a wine glass`; plurals and mass nouns ending in s stay bare."""
    last = name.split()[-1]
    if last.endswith("s") and not last.endswith(("ss", "us", "is")):
        return name
    return f"{'an' if name[0] in 'aeio' else 'a'} {name}"


class SvgSet:
    """Pictures of one Iconify package, found by code point where the package maps them, else by name."""

    def __init__(self, folder: Path) -> None:
        self.data = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
        chars = json.loads((folder / "chars.json").read_text(encoding="utf-8"))
        self.by_hex = {strip_variation(code): name for code, name in chars.items()}

    def render(self, hexcode: str, name: str, names: dict[str, str]) -> Image.Image | None:
        """Returns the picture of a concept with transparency, enlarged by `SUPERSAMPLE`; None if the package has none.

        Args:
            hexcode: code points of the emoji, joined by `-`, without variation selectors.
            name: the concept's name.
            names: hexcode → icon name in the flat set, for packages that do not map this code point.
        """
        icon = self.by_hex.get(hexcode) or names.get(hexcode) or re.sub(r"[^a-z0-9]+", "-", name).strip("-")
        body = self.data["icons"].get(icon)
        if body is None and icon in self.data.get("aliases", {}):
            body = self.data["icons"].get(self.data["aliases"][icon]["parent"])
        if body is None:
            return None
        left, top, width, height = (
            body.get(k, self.data.get(k, d)) for k, d in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
        )
        side = SIZE_PX * SUPERSAMPLE
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="#222" '
            f'viewBox="{left} {top} {width} {height}" width="{side}" height="{side}">{body["body"]}</svg>'
        )
        return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")


class RasterSet:
    """Pictures of a package that ships rasters named by code point."""

    def __init__(self, folder: Path) -> None:
        self.files = {strip_variation(p.stem): p for p in (folder / "assets").glob("*.webp")}

    def render(self, hexcode: str, name: str, names: dict[str, str]) -> Image.Image | None:
        """Returns the picture of a concept with transparency, in the file's own size, or None if there is no file.

        Args:
            hexcode: code points of the emoji, joined by `-`, without variation selectors.
            name: not used.
            names: not used; the files are named by code point.
        """
        path = self.files.get(hexcode)
        return Image.open(path).convert("RGBA") if path else None


def on_white(picture: Image.Image) -> Image.Image:
    canvas = Image.new("RGBA", picture.size, "white")
    canvas.alpha_composite(picture)
    return canvas.convert("RGB").resize((SIZE_PX, SIZE_PX), Image.Resampling.LANCZOS)


def encode(picture: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=quality, method=6)
    return buffer.getvalue()


def draw(cache: Path, wide: bool) -> list[dict]:
    """Returns the (style, concept) pictures, except those that are blank or equal to an earlier one.

    Args:
        cache: folder of the npm packages.
        wide: draw every emoji, not the concepts of `concepts.csv` alone.
    """
    base = choose_concepts(every_emoji(fetch(EMOJIBASE, cache)), wide)
    sets = {s.name: (RasterSet if "3d" in s.name else SvgSet)(fetch(s.package, cache)) for s in STYLES}
    names = sets["flat"].by_hex
    seen: set[str] = set()
    out = []
    for concept in base:
        for style in STYLES:
            raw = sets[style.name].render(concept.hexcode, concept.emoji, names)
            if raw is None:
                continue
            picture = on_white(raw)
            digest = hashlib.sha256(picture.tobytes()).hexdigest()
            if digest in seen or min(low for low, _ in picture.getextrema()) > 245:
                continue
            seen.add(digest)
            out.append({"style": style, "concept": concept, "picture": picture})
    return out


def split_rows(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """Returns the training and the held-out pictures; a held-out one that is a near copy of another is in neither."""
    by_concept: dict[str, list[dict]] = {}
    for row in rows:
        by_concept.setdefault(row["concept"].name, []).append(row)
    train = [row for row in rows if row["concept"].held_out != row["style"].name]
    heldout = [
        row
        for row in rows
        if row["concept"].held_out == row["style"].name
        and not is_near_copy(
            row["picture"], [other["picture"] for other in by_concept[row["concept"].name] if other is not row]
        )
    ]
    return train, heldout


def describe(row: dict) -> None:
    """Add the key, the caption and the metadata to a picture of `draw`."""
    style, concept = row["style"], row["concept"]
    row["key"] = f"{concept.hexcode}_{style.name}"
    row["caption"] = f"{style.phrase} {with_article(concept.name)}"
    row["meta"] = {
        "style": style.name,
        "concept": concept.name,
        "tags": concept.tags,
        "mirror": concept.mirror,
        "source": style.package,
        "licence": style.licence,
    }


def write_shards(rows: list[dict], split: str, out: Path, quality: int) -> list[str]:
    """Write webdataset shards and return their names.

    Args:
        rows: pictures with `key`, `caption` and `meta`.
        split: `train` or `heldout`, the folder of the shards.
        out: the folder of all splits.
        quality: of WebP, 0 to 100.
    """
    files = []
    (out / split).mkdir(parents=True, exist_ok=True)
    for start in range(0, len(rows), SAMPLES_PER_SHARD):
        path = out / split / f"{start // SAMPLES_PER_SHARD:02d}.tar.gz"
        with (
            path.open("wb") as raw,
            gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w") as tar,
        ):
            for row in rows[start : start + SAMPLES_PER_SHARD]:
                for extension, payload in (
                    ("webp", encode(row["picture"], quality)),
                    ("txt", row["caption"].encode()),
                    ("json", json.dumps(row["meta"], sort_keys=True).encode()),
                ):
                    info = tarfile.TarInfo(f"{row['key']}.{extension}")
                    info.size = len(payload)
                    tar.addfile(info, io.BytesIO(payload))
        files.append(f"{split}/{path.name}")
    return files


def make_index(
    rows: list[dict], counts: dict[str, int], shards: dict[str, list[str]], args: argparse.Namespace
) -> dict[str, Any]:
    """Returns `index.json`: what the shards hold and what they were made from.

    Args:
        rows: all pictures.
        counts: split → number of pictures.
        shards: split → names of its shards.
        args: of the command line.
    """
    return {
        "size_px": SIZE_PX,
        "counts": counts | {"concepts": len({r["concept"].name for r in rows})},
        "styles": {
            s.name: {
                "phrase": s.phrase,
                "source": s.package,
                "licence": s.licence,
                "pictures": sum(r["style"] is s for r in rows),
            }
            for s in STYLES
        },
        "concepts": {r["concept"].name: ", ".join(r["concept"].tags) for r in rows},
        "shards": shards,
        "sha256": {
            f: hashlib.sha256((args.out / f).read_bytes()).hexdigest() for f in shards["train"] + shards["heldout"]
        },
        "webp_quality": args.quality,
        "seed": args.seed,
    }


def write_notice(path: Path) -> None:
    """Write the sources of the pictures and their licences."""
    lines = [
        "The pictures in these shards are drawn from openly licensed emoji art, rendered to 128 x 128 pixels on white.",
        "",
        *(f"{s.name}: npm {s.package}, licence {s.licence}, {s.copyright}" for s in STYLES),
        f"names and tags: npm {EMOJIBASE}, licence MIT, Copyright (c) Miles Johnson",
        "",
        "Licence texts: licenses/MIT.txt and licenses/Apache-2.0.txt beside this file.",
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("sdcompress/assets/nano/data"))
    parser.add_argument("--cache", type=Path, default=Path("build/npm"), help="where npm packages are kept")
    parser.add_argument("--wide", action="store_true", help="every concept there is, without the held-out pairs")
    parser.add_argument("--quality", type=int, default=88, help="WebP quality")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shutil.rmtree(args.out / "train", ignore_errors=True)
    shutil.rmtree(args.out / "heldout", ignore_errors=True)

    rows = draw(args.cache, args.wide)
    for row in rows:
        describe(row)
    train, heldout = split_rows(rows)
    random.Random(args.seed).shuffle(train)

    shards = {
        "train": write_shards(train, "train", args.out, args.quality),
        "heldout": write_shards(heldout, "heldout", args.out, args.quality),
    }
    index = make_index(train + heldout, {"train": len(train), "heldout": len(heldout)}, shards, args)
    (args.out / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    write_notice(args.out / "NOTICE")
    total = sum((args.out / f).stat().st_size for f in index["sha256"])
    print(json.dumps(index["counts"] | {"bytes": total}))


if __name__ == "__main__":
    main()
