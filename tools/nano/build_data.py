"""Render the nano data set: emoji art with captions, packed as webdataset shards.

    python tools/nano/build_data.py --out sdcompress/assets/nano/data

Fetches the pinned npm packages (MIT and Apache-2.0), draws every picture once at 128 px on white, drops blanks and
exact duplicates, holds out (style, concept) pairs for evaluation and writes `train/*.tar.gz`, `heldout/*.tar.gz`,
`index.json` and `NOTICE`. Needs npm, and from PyPI resvg-py and Pillow. The result depends on the pinned versions and
the seed only.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import random
import re
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import resvg_py
from PIL import Image

SIZE_PX = 128
SUPERSAMPLE = 2
SAMPLES_PER_SHARD = 1400

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
        "gradient",
        "a gradient icon of",
        "@iconify-json/fluent-emoji@1.2.7",
        "MIT",
        "Copyright (c) Microsoft Corporation",
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


def concepts(folder: Path) -> list[dict]:
    """The emoji that become concepts: hexcode, caption name and tags, in Unicode order."""
    out = []
    for entry in json.loads((folder / "en/data.json").read_text(encoding="utf-8")):
        if entry.get("group") not in GROUPS or "200D" in entry["hexcode"] or UNWANTED.search(entry["label"]):
            continue
        name = entry["label"].replace("’", "'").replace("“", "").replace("”", "").replace(":", "").lower()
        out.append(
            {
                "hexcode": strip_variation(entry["hexcode"]),
                "name": name,
                "tags": entry.get("tags", []),
                "order": entry["order"],
            }
        )
    return sorted(out, key=lambda c: c["order"])


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


def draw(cache: Path) -> list[dict]:
    """Every (style, concept) picture that is neither blank nor an exact duplicate of an earlier one."""
    base = concepts(fetch(EMOJIBASE, cache))
    sets = {s.name: (RasterSet if "3d" in s.name else SvgSet)(fetch(s.package, cache)) for s in STYLES}
    names = sets["flat"].by_hex
    seen: set[str] = set()
    out = []
    for concept in base:
        for style in STYLES:
            raw = sets[style.name].render(concept["hexcode"], concept["name"], names)
            if raw is None:
                continue
            picture = on_white(raw)
            digest = hashlib.sha256(picture.tobytes()).hexdigest()
            if digest in seen or min(low for low, _ in picture.getextrema()) > 245:
                continue
            seen.add(digest)
            out.append({"style": style, "concept": concept, "picture": picture})
    return out


def hold_out(rows: list[dict], count: int, seed: int) -> set[int]:
    """Returns indices of pictures, at most one a concept, whose concept is seen in at least two other styles.

    Args:
        rows: what `draw` returns.
        count: how many pictures.
        seed: of the choice.
    """
    by_concept: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        by_concept.setdefault(row["concept"]["name"], []).append(i)
    pool = sorted(name for name, members in by_concept.items() if len(members) >= 3)
    rng = random.Random(seed)
    return {rng.choice(by_concept[name]) for name in rng.sample(pool, count)}


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
        "counts": counts | {"concepts": len({r["concept"]["name"] for r in rows})},
        "styles": {
            s.name: {
                "phrase": s.phrase,
                "source": s.package,
                "licence": s.licence,
                "pictures": sum(r["style"] is s for r in rows),
            }
            for s in STYLES
        },
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
    parser.add_argument("--heldout", type=int, default=600)
    parser.add_argument("--quality", type=int, default=74, help="WebP quality")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    rows = draw(args.cache)
    held = hold_out(rows, args.heldout, args.seed)
    for row in rows:
        style, concept = row["style"], row["concept"]
        row["key"] = f"{concept['hexcode']}_{style.name}"
        row["caption"] = f"{style.phrase} {with_article(concept['name'])}"
        row["meta"] = {
            "style": style.name,
            "concept": concept["name"],
            "tags": concept["tags"],
            "source": style.package,
            "licence": style.licence,
        }
    train = [row for i, row in enumerate(rows) if i not in held]
    random.Random(args.seed + 1).shuffle(train)
    heldout = [rows[i] for i in sorted(held)]

    shards = {
        "train": write_shards(train, "train", args.out, args.quality),
        "heldout": write_shards(heldout, "heldout", args.out, args.quality),
    }
    index = make_index(rows, {"train": len(train), "heldout": len(heldout)}, shards, args)
    (args.out / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    write_notice(args.out / "NOTICE")
    total = sum((args.out / f).stat().st_size for f in index["sha256"])
    print(json.dumps(index["counts"] | {"bytes": total}))


if __name__ == "__main__":
    main()
