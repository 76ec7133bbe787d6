"""The console that everything styled is printed on."""

from collections.abc import Iterator

from rich.console import Console
from rich.segment import Segment
from rich.text import Text

from glm45_tune.terminal import visible


class Terminal(Console):
    """A rich console that obeys its own styles alone."""

    def render_str(self, text: str, **options) -> Text:
        # Before it is measured, and before rich drops some control characters of it without a word.
        return super().render_str(visible(text), **options)

    def render(self, renderable, options=None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)
