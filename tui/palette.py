"""The command palette: every action under a name like "merge: run", made from the screens' own bindings."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from textual.app import App
from textual.binding import Binding
from textual.command import DiscoveryHit, Hit, Hits, Provider

from tui.safe_text import plain
from tui.screens.base import MedScreen
from tui.widgets.topbar import SCREENS


class GoProvider(Provider):
    """`go: Merge` for every screen."""

    async def discover(self) -> Hits:
        for number, (name, title) in enumerate(SCREENS, 1):
            yield DiscoveryHit(f"go: {title}", partial(_show, self.app, name), help=f"key {number}")

    async def search(self, query: str) -> Hits:
        matcher = self.matcher(query)
        for number, (name, title) in enumerate(SCREENS, 1):
            words = f"go: {title}"
            score = matcher.match(words)
            if score > 0:
                yield Hit(
                    score, matcher.highlight(words), partial(_show, self.app, name), help=f"key {number}"
                )


class ActionProvider(Provider):
    """`merge: verify` for every action the screen below allows now, and those that work everywhere."""

    def _commands(self) -> list[tuple[str, Binding]]:
        screen = self.screen
        group = screen.NAME if isinstance(screen, MedScreen) else "here"
        found: dict[str, tuple[str, Binding]] = {}
        for active in screen.active_bindings.values():
            binding = active.binding
            if (
                not active.enabled
                or not binding.description
                or binding.action.startswith(("show(", "app.focus"))
            ):
                continue
            if active.node is self.app:
                found.setdefault(binding.action, (f"app: {binding.description}", binding))
            elif active.node is screen:
                found.setdefault(binding.action, (f"{group}: {binding.description}", binding))
        return list(found.values())

    async def discover(self) -> Hits:
        for words, binding in self._commands():
            yield DiscoveryHit(words, self._run(binding), help=f"key {self.app.get_key_display(binding)}")

    async def search(self, query: str) -> Hits:
        matcher = self.matcher(query)
        for words, binding in self._commands():
            score = matcher.match(words)
            if score > 0:
                key = self.app.get_key_display(binding)
                yield Hit(score, matcher.highlight(words), self._run(binding), help=f"key {key}")

    def _run(self, binding: Binding) -> Callable[[], Awaitable[object]]:
        screen, app = self.screen, self.app

        async def run() -> None:
            await app.run_action(binding.action, screen if _has(screen, binding.action) else app)

        return run


class ReportProvider(Provider):
    """`report: NAME` for every merge."""

    def _merges(self) -> list[tuple[str, str]]:
        overview = getattr(self.app, "overview", None)
        return [(plain(row.name), row.path) for row in overview.merges] if overview else []

    async def discover(self) -> Hits:
        for name, path in self._merges()[:3]:
            yield DiscoveryHit(f"report: {name}", partial(_report, self.app, path), help="its verdict")

    async def search(self, query: str) -> Hits:
        matcher = self.matcher(query)
        for name, path in self._merges():
            score = matcher.match(f"report: {name}")
            if score > 0:
                words = matcher.highlight(f"report: {name}")
                yield Hit(score, words, partial(_report, self.app, path), help="its verdict")


class ThemeProvider(Provider):
    """`theme: NAME`: ours first, then Textual's."""

    def _names(self) -> list[str]:
        return sorted(self.app.available_themes, key=lambda name: (not name.startswith("medmerge"), name))

    async def discover(self) -> Hits:
        for name in self._names()[:2]:
            yield DiscoveryHit(f"theme: {name}", partial(setattr, self.app, "theme", name))

    async def search(self, query: str) -> Hits:
        matcher = self.matcher(query)
        for name in self._names():
            score = matcher.match(f"theme: {name}")
            if score > 0:
                words = matcher.highlight(f"theme: {name}")
                yield Hit(score, words, partial(setattr, self.app, "theme", name))


def _show(app: App[object], name: str) -> None:
    app.call_later(app.run_action, f"show('{name}')")


def _report(app: App[object], path: str) -> None:
    app.call_later(app.show_report, path)  # type: ignore[attr-defined]


def _has(node: object, action: str) -> bool:
    return hasattr(node, f"action_{action.partition('(')[0]}")
