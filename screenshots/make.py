"""Writes every screen of the app as SVG and PNG: `python screenshots/make.py --workspace DIR [--out DIR]`.

The app runs headless on a real workspace at 120 x 36; nothing is staged. SVG comes from Textual, PNG from
headless Chromium (the only converter that draws the glyphs right), with the font Fira Code installed.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from textual.pilot import Pilot

from engine.workspace import Workspace
from tui.app import MedmergeApp
from tui.backend import LocalBackend
from tui.widgets.topbar import SCREENS

SETTLE_SECONDS = 60.0


async def shoot(workspace: Path, out: Path, size: tuple[int, int], theme: str, only: list[str]) -> list[Path]:
    """The SVG files of all screens of the app on this workspace."""
    app = MedmergeApp(LocalBackend(workspace))
    made = []
    async with app.run_test(size=size) as pilot:
        if theme:
            app.theme = theme
        await _until(pilot, lambda: app.overview is not None)
        for number, (name, _) in enumerate(SCREENS, 1):
            if only and name not in only:
                continue
            app.show(name)
            await _until(pilot, lambda name=name: getattr(app.screen, "NAME", "") == name)  # type: ignore[misc]
            await pilot.pause(1.0)
            await _until(pilot, lambda: not any(w.is_running and w.name != "poll" for w in app.workers))
            app.clear_notifications()
            await pilot.pause(0.5)
            made.append(_save(app, out / f"{number}-{name}.svg"))
        made += await _report(pilot, app, out) if not only or "report" in only else []
    return made


async def _report(pilot: Pilot[None], app: MedmergeApp, out: Path) -> list[Path]:
    """The report of the newest merge that stands, of a linear one if there is one; none where there is no merge."""
    merges = [row for row in app.overview.merges if not row.rejected] if app.overview else []
    if not merges:
        return []
    linear = [row for row in merges if row.verdict and row.verdict.found]
    app.show_report((linear or merges)[0].path)
    await pilot.pause(1.5)
    return [_save(app, out / "3-report.svg")]


def _save(app: MedmergeApp, path: Path) -> Path:
    name = path.stem.partition("-")[2]
    path.write_text(app.export_screenshot(title=f"medmerge-tui: {name}"), encoding="utf-8")
    return path


async def _until(pilot: Pilot[None], condition: Callable[[], object]) -> None:
    waited = 0.0
    while not condition():
        if waited > SETTLE_SECONDS:
            raise SystemExit("the app did not settle")
        await pilot.pause(0.1)
        waited += 0.1


def to_png(svg: Path) -> Path:
    """Draw an SVG with headless Chromium at twice its size. Raises SystemExit where it is missing."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("PNG needs Chromium and the font Fira Code (Debian: chromium, fonts-firacode)")
    text = svg.read_text(encoding="utf-8")
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    width, height = (round(float(number)) for number in box.groups()) if box else (1480, 920)
    png = svg.with_suffix(".png").absolute()
    with tempfile.TemporaryDirectory() as profile:
        page = Path(profile) / "page.html"
        page.write_text(f"<meta charset=utf-8><style>body{{margin:0}}svg{{display:block}}</style>{text}", encoding="utf-8")
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--force-device-scale-factor=2", "--virtual-time-budget=3000", "--run-all-compositor-stages-before-draw",
            f"--user-data-dir={profile}/p", f"--window-size={width},{height}", f"--screenshot={png}", page.as_uri(),
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120)
    return png


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workspace", help="a workspace with something in it")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for the files")
    parser.add_argument("--size", default="120x36", help="columns x rows")
    parser.add_argument("--theme", default="", help="medmerge-dark or medmerge-light")
    parser.add_argument(
        "--only", action="append", default=[], choices=[*(name for name, _ in SCREENS), "report"]
    )
    parser.add_argument("--no-png", action="store_true")
    args = parser.parse_args()
    columns, rows = (int(part) for part in args.size.split("x"))
    args.out.mkdir(parents=True, exist_ok=True)
    workspace = Workspace.find(args.workspace).root
    for svg in asyncio.run(shoot(workspace, args.out, (columns, rows), args.theme, args.only)):
        print(svg if args.no_png else to_png(svg))
    return 0


if __name__ == "__main__":
    sys.exit(main())
