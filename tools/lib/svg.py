# SPDX-License-Identifier: GPL-2.0-or-later
"""Just enough SVG for a chart: shapes, texts, and axes with round numbers."""

import math
from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple
from xml.sax.saxutils import escape, quoteattr

FONT = "system-ui, 'Segoe UI', 'DejaVu Sans', Helvetica, Arial, sans-serif"

Point = Tuple[float, float]


def round_step(span: float, most: int) -> float:
    """Return the smallest round step that divides span into most parts."""
    raw = span / most
    power = float(10 ** math.floor(math.log10(raw)))
    return next(power * factor for factor in (1, 2, 5, 10)
                if power * factor >= raw * 0.999)


@dataclass(frozen=True)
class Scale:
    """Where values from low to high are between two edges of the picture."""
    low: float
    high: float
    begin: float
    end: float

    def at(self, value: float) -> float:
        """Return the place of a value; those outside are at the edges."""
        part = (value - self.low) / ((self.high - self.low) or 1)
        return self.begin + min(max(part, 0), 1) * (self.end - self.begin)

    def ticks(self, most: int) -> List[float]:
        """Return round values between low and high."""
        step = round_step((self.high - self.low) or 1, most)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [n * step for n in range(first, last + 1)]


class Picture:
    """An SVG in the making."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._size = (width, height)
        self._title = title
        self._shapes: List[str] = []

    def _add(self, tag: str, content: str, tip: Optional[str],
             **attributes: object) -> None:
        words = ' '.join(f'{name.rstrip("_").replace("_", "-")}='
                         f'{quoteattr(self._value(value))}'
                         for name, value in attributes.items())
        if tip is not None:
            content += f'<title>{escape(tip)}</title>'
        self._shapes.append(f'<{tag} {words}>{content}</{tag}>')

    @staticmethod
    def _value(value: object) -> str:
        return f'{value:.1f}' if isinstance(value, float) else str(value)

    def line(self, begin: Point, end: Point, colour: str, width: float = 1,
             dash: str = 'none') -> None:
        """Draw a line."""
        self._add('line', '', None, x1=float(begin[0]), y1=float(begin[1]),
                  x2=float(end[0]), y2=float(end[1]), stroke=colour,
                  stroke_width=width, stroke_dasharray=dash)

    def curve(self, points: Sequence[Point], colour: str, width: float = 2,
              fill: str = 'none', dash: str = 'none') -> None:
        """Draw lines from point to point."""
        self._add('polyline', '', None, fill=fill, stroke=colour,
                  points=' '.join(f'{x:.1f},{y:.1f}' for x, y in points),
                  stroke_width=width, stroke_linejoin='round',
                  stroke_dasharray=dash)

    def box(self, left: float, top: float, right: float, bottom: float,
            fill: str, tip: Optional[str] = None, radius: float = 0,
            opacity: float = 1, class_: str = 'box') -> None:
        """Draw a filled rectangle."""
        self._add('rect', '', tip, x=float(left), y=float(top),
                  width=float(max(right - left, 0)),
                  height=float(max(bottom - top, 0)), fill=fill, rx=radius,
                  opacity=f'{opacity:g}', class_=class_)

    def dot(self, place: Point, colour: str, radius: float = 3,
            tip: Optional[str] = None) -> None:
        """Draw a dot."""
        self._add('circle', '', tip, cx=float(place[0]), cy=float(place[1]),
                  r=radius, fill=colour)

    def cross(self, place: Point, colour: str) -> None:
        """Draw an x."""
        x, y = place
        size = 7
        self.line((x - size, y - size), (x + size, y + size), colour, 3)
        self.line((x - size, y + size), (x + size, y - size), colour, 3)

    def text(self, place: Point, text: str, colour: str, size: float = 13,
             anchor: str = 'start', bold: bool = False, **more: object
             ) -> None:
        """Write a text."""
        self._add('text', escape(text), None, x=float(place[0]),
                  y=float(place[1]), fill=colour, font_size=size,
                  text_anchor=anchor,
                  font_weight='bold' if bold else 'normal', **more)

    def label(self, place: Point, text: str, colour: str, anchor: str
              ) -> None:
        """Write a text that can be read over lines."""
        self.text(place, text, colour, anchor=anchor, bold=True,
                  stroke='white', stroke_width=4, paint_order='stroke',
                  stroke_linejoin='round')

    def whole(self) -> str:
        """Return it as a file that needs no other."""
        width, height = self._size
        shapes = '\n'.join(self._shapes)
        return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" '
                f'height="{height}" viewBox="0 0 {width} {height}" '
                f'font-family="{FONT}">\n<title>{escape(self._title)}</title>'
                f'\n<rect width="{width}" height="{height}" fill="white"/>\n'
                f'{shapes}\n</svg>\n')
