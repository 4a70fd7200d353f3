"""Take a picture of one section of a report's page with chromium.

    python docs/images/take.py demo/diagnose/diagnose.html docs/images/diagnose.png [--section ID] [--height PIXELS]

ID is the anchor of a section or a figure, as links within the page name it; without it the picture begins at the top.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

WIDTH, MARGIN, COLORS, LIMIT = 1280, 80, 64, 200_000
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
# Writes the anchor's distance from the top of the page, in pixels, into the document.
MEASURE = '<script>document.title = "top " + document.getElementById("{}").getBoundingClientRect().top</script>'


def chromium(*words: str) -> str:
    """Run chromium and return its standard output."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        sys.exit("take.py needs chromium")
    done = subprocess.run([found, *FLAGS, *words], check=True, capture_output=True, text=True, timeout=120)
    return done.stdout


def top_of(page: Path, section: str) -> int:
    """Return the distance of a section from the top of the page, in pixels."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "page.html"
        html = re.sub(r"<meta http-equiv=.Content-Security-Policy[^>]*>", "", page.read_text(encoding="utf-8"))
        copy.write_text(html + MEASURE.format(section), encoding="utf-8")
        found = re.search(r"<title>top ([\d.]+)", chromium(f"--window-size={WIDTH},1000", "--dump-dom", copy.as_uri()))
    return int(float(found[1])) if found else sys.exit(f"the page has no section {section}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--section")
    parser.add_argument("--height", type=int, default=1000)
    args = parser.parse_args()
    page = args.page.resolve()
    top = max(0, top_of(page, args.section) - 30) if args.section else 0
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "page.png"
        chromium(f"--window-size={WIDTH},{top + args.height}", f"--screenshot={shot}", page.as_uri())
        image = Image.open(shot).convert("RGB").crop((MARGIN, top, WIDTH - MARGIN, top + args.height))
    image.quantize(COLORS, dither=Image.Dither.NONE).save(args.output, optimize=True)
    size = args.output.stat().st_size
    print(f"wrote {args.output}: {size / 1000:.0f} kB")
    if size > LIMIT:
        sys.exit(f"more than {LIMIT / 1000:.0f} kB: choose fewer pixels")


if __name__ == "__main__":
    main()
