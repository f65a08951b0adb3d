"""Draws emoji of several makers, from packages of openly licensed SVG, to arrays of pixels.

    npm pack emoji-datasource@16.0.0 @iconify-json/twemoji@1.2.5 @iconify-json/openmoji@1.2.29 \
        @iconify-json/fluent-emoji-flat@1.2.6 @iconify-json/emojione@1.2.3     # in a folder PACKAGES
    python benchmarks/render_emoji.py PACKAGES emoji

Writes ``emoji.json`` (name and category of each) and one array ``(emoji, pixels, pixels, 3)`` of bytes per maker.
Needs ``cairosvg`` and ``pillow``.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

STYLES = ("twemoji", "fluent-emoji-flat", "emojione", "openmoji")


def read(packages: Path, package: str, member: str) -> Any:
    """A JSON file out of a package's archive."""
    with tarfile.open(next(packages.glob(f"{package}-*.tgz"))) as archive:
        file = archive.extractfile(f"package/{member}")
        assert file is not None
        return json.load(file)


def svg(icons: dict[str, Any], name: str) -> str | None:
    """The drawing of one emoji; ``None`` if this maker has none."""
    icon = icons["icons"].get(name)
    if icon is None:
        alias = icons.get("aliases", {}).get(name)
        if not alias or set(alias) - {"parent"}:
            return None
        icon = icons["icons"].get(alias["parent"])
        if icon is None:
            return None
    box = [icon.get("left", 0), icon.get("top", 0), *(icon.get(k, icons.get(k, 16)) for k in ("width", "height"))]
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{" ".join(map(str, box))}">{icon["body"]}</svg>'
    )


def draw(source: str, pixels: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The drawing over white."""
    import cairosvg
    from PIL import Image

    made = cairosvg.svg2png(bytestring=source.encode(), output_width=pixels, output_height=pixels)
    image = Image.open(io.BytesIO(made)).convert("RGBA")
    page = Image.new("RGBA", image.size, (255, 255, 255, 255))
    page.alpha_composite(image)
    return np.asarray(page.convert("RGB"))


def main() -> None:
    """Draw every emoji that all makers have."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pixels", type=int, default=96)
    asked = parser.parse_args()
    listed = {entry["unified"].lower(): entry for entry in read(asked.packages, "emoji-datasource", "emoji.json")}
    known = {}
    for points, name in read(asked.packages, "iconify-json-twemoji", "chars.json").items():
        entry = listed.get(points) or listed.get(f"{points}-fe0f")
        if entry is not None:
            known[name] = entry["category"]
    icons = {style: read(asked.packages, f"iconify-json-{style}", "icons.json") for style in STYLES}
    names = sorted(name for name in known if all(svg(icons[style], name) for style in STYLES))
    asked.out.mkdir(parents=True, exist_ok=True)
    for style in STYLES:
        pages = np.stack([draw(str(svg(icons[style], name)), asked.pixels) for name in names])
        np.save(asked.out / f"{style}.npy", pages)
        print(style, pages.shape, flush=True)
    about = [{"name": name, "category": known[name]} for name in names]
    (asked.out / "emoji.json").write_text(json.dumps(about), encoding="utf-8")


if __name__ == "__main__":
    main()
