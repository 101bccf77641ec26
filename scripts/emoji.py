"""Draw the pictures of the experiment `emoji`: animals and fruit on four colours, with captions.

The drawings are those of Noto Color Emoji (Google, SIL Open Font License 1.1), Debian's package
fonts-noto-color-emoji; their names are those of Unicode. `python -m scripts.emoji emoji` writes a folder
of PNG files and their metadata.jsonl, with captions such as "strawberry on blue".
"""

import argparse
import json
import unicodedata
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
DRAWN = 109  # the one size of the font's bitmaps
SIZE = 24  # pixels of a picture
RANGES = ((0x1F345, 0x1F353), (0x1F42D, 0x1F43C))  # tomato to strawberry, mouse to panda face
GROUNDS = {
    "white": (255, 255, 255),
    "yellow": (255, 226, 120),
    "blue": (140, 190, 255),
    "pink": (255, 190, 210),
}


def drawing(font: ImageFont.FreeTypeFont, letter: str) -> Image.Image | None:
    """Draw one emoji, SIZE x SIZE with transparency; None where the font has none."""
    sheet = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(sheet).text((10, 10), letter, font=font, embedded_color=True)
    box = sheet.getbbox()
    if box is None:
        return None
    cut = sheet.crop(box)
    side = max(cut.size) + 12
    square = Image.new("RGBA", (side, side))
    square.paste(cut, ((side - cut.width) // 2, (side - cut.height) // 2))
    return square.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write the pictures")
    parser.add_argument("--font", default=FONT, help="NotoColorEmoji.ttf")
    given = parser.parse_args()
    if not Path(given.font).is_file():
        parser.error(f"--font {given.font} is missing; apt install fonts-noto-color-emoji")
    font = ImageFont.truetype(given.font, DRAWN)
    given.folder.mkdir(parents=True)
    rows = []
    for code in (code for first, last in RANGES for code in range(first, last + 1)):
        name = unicodedata.name(chr(code), "").lower()
        drawn = drawing(font, chr(code)) if name else None
        for ground, colour in GROUNDS.items() if drawn is not None else ():
            picture = Image.new("RGBA", (SIZE, SIZE), colour)
            picture.alpha_composite(drawn)
            file = f"{code:x}_{ground}.png"
            picture.convert("RGB").save(given.folder / file)
            rows.append({"file_name": file, "text": f"{name} on {ground}"})
    lines = [json.dumps(row) for row in rows]
    (given.folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    (given.folder.parent / f"{given.folder.name}.txt").write_text(
        "\n".join(row["text"] for row in rows) + "\n"
    )
    print(f"{len(rows)} pictures of {len(rows) // len(GROUNDS)} emoji in {given.folder}")


if __name__ == "__main__":
    main()
