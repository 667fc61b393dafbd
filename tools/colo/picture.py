# SPDX-License-Identifier: GPL-2.0-or-later
"""The demo as a picture: what the guest did on both sides, and what is left.

All times are of the host's clock, in seconds; the picture counts them from
the moment at which the story begins.
"""

from dataclasses import dataclass, field
from typing import Dict, List, Optional, Tuple

from svg import Picture, Point, Scale

WIDTH, HEIGHT = 1200, 944
LEFT, RIGHT = 84, 1160

INK, MUTED, GRID = '#1f2328', '#59636e', '#e6e9ed'
BLUE, ORANGE = '#1f6feb', '#d4620a'
RED, GREEN = '#cf222e', '#1a7f37'
PAUSE, LAG, MERGE = '#8250df', '#0a7d91', '#b08800'
GAP = '#ffdede'

# How much of the time before the disks are copied is shown, in seconds.
LEAD = 2.0
# How much of the time before and after is in the close-up, in seconds.
BEFORE, AFTER = 0.5, 1.2


@dataclass(frozen=True)
class Work:
    """What the guest of a side had done at a time."""
    when: float
    transactions: int


@dataclass
class Timeline:
    """Everything that the picture shows."""
    victim: str
    survivor: str
    killed_side: str
    began: float
    sync: Tuple[float, float]
    protected: float
    killed: float
    running: float
    first_output: float
    ended: float
    # None if nothing had to be merged
    merged: Optional[float]
    # when the guest stopped and went on
    checkpoints: List[Tuple[float, float]]
    # what the guest did on each side, by the side's name
    work: Dict[str, List[Work]]
    # bytes that the secondary did not have yet
    lag: List[Tuple[float, int]]
    # bytes that were merged, of how many
    merge: List[Tuple[float, int, int]]
    safe: int
    taken_over: int
    at_end: int
    checked: int
    host_checked: int
    wrong: int
    problems: List[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether nothing was lost."""
        return not self.problems and not self.wrong


class Drawing:
    """Draws a timeline."""

    def __init__(self, timeline: Timeline) -> None:
        self.line = timeline
        what = 'Nothing is lost.' if timeline.good else 'Something is lost.'
        self.title = f'The {timeline.killed_side} is killed. {what}'
        self.picture = Picture(WIDTH, HEIGHT, self.title)
        self.time = Scale(max(timeline.began, timeline.sync[0] - LEAD),
                          timeline.ended, LEFT, RIGHT)
        hosts = sorted(timeline.work)
        self.colours = dict(zip(hosts, (BLUE, ORANGE)))

    def draw(self) -> str:
        """Return the picture."""
        self._head()
        self._phases(108, 132)
        self._progress(150, 410)
        self._pauses(446, 516)
        self._lag(552, 622)
        self._seconds(640)
        self._close_up(712, 912)
        self._facts(730, 712)
        return self.picture.whole()

    def since(self, when: float) -> float:
        """Return the time as the picture counts it."""
        return when - self.line.began

    # The head

    def _head(self) -> None:
        picture, line = self.picture, self.line
        picture.text((LEFT - 44, 46), self.title, INK, 28, bold=True)
        picture.text((LEFT - 44, 72), 'A guest writes a database and numbered '
                     f'blocks. {line.victim} gets SIGKILL, {line.survivor} '
                     'carries the guest on.', MUTED, 15)
        colour = GREEN if line.good else RED
        picture.box(900, 18, RIGHT, 88, colour, radius=8)
        picture.text((1030, 52), f'{line.wrong} wrong blocks', 'white', 26,
                     'middle', bold=True)
        below = f'of {line.checked:,} that the guest has checked' \
            if line.good or not line.problems else line.problems[0][:38]
        picture.text((1030, 75), below, 'white', 13, 'middle')

    def _phases(self, top: float, bottom: float) -> None:
        line = self.line
        phases = [
            ('not protected', self.time.low, line.sync[0], '#eaeef2', MUTED),
            ('disks are copied', line.sync[0], line.sync[1], '#ddf4ff', BLUE),
            ('memory', line.sync[1], line.protected, '#ddf4ff', BLUE),
            ('protected', line.protected, line.killed, '#dafbe1', GREEN),
            (f'alone on {line.survivor}', line.killed, line.ended, '#fff1e5',
             '#953800')]
        for name, begin, end, fill, colour in phases:
            left, right = self.time.at(begin), self.time.at(end)
            self.picture.box(left, top, right - 1, bottom, fill,
                             f'{name}: {end - begin:.1f} s', 3)
            if right - left > 7.5 * len(name):
                self.picture.text(((left + right) / 2, top + 17), name,
                                  colour, 13, 'middle')

    # The charts

    def _frame(self, top: float, bottom: float, scale: Scale, name: str,
               ticks: int) -> None:
        """Draw a chart's grid, its unit, and where the kill was."""
        picture = self.picture
        for value in scale.ticks(ticks):
            y = scale.at(value)
            picture.line((LEFT, y), (RIGHT, y), GRID)
            picture.text((LEFT - 8, y + 4), f'{value:,.0f}', MUTED, 12, 'end')
        picture.text((LEFT, top - 8), name, INK, 13, bold=True)
        x = self.time.at(self.line.killed)
        picture.line((x, top), (x, bottom), RED, 1.5, '5 4')

    def _progress(self, top: float, bottom: float) -> None:
        line, picture = self.line, self.picture
        most = max(work.transactions for side in line.work.values()
                   for work in side)
        scale = Scale(0, most * 1.06, bottom, top + 26)
        self._frame(top + 26, bottom, scale,
                    'Transactions that the guest has committed', 5)
        for stopped, resumed in line.checkpoints:
            x = self.time.at(resumed)
            picture.line((x, bottom - 9), (x, bottom), PAUSE, 2)
            picture.box(self.time.at(stopped), top + 26, x, bottom, PAUSE,
                        opacity=0.10)
        # the dotted one first, so that it does not hide the other
        for side in sorted(line.work, reverse=True):
            self._curve(side, self.time, scale, 2.5)
        self._legend(top + 8)
        x = self.time.at(line.killed)
        picture.label((x - 8, top + 44), f'{line.victim} is killed', RED,
                      'end')
        gap = (line.running - line.killed) * 1000
        picture.label((x - 8, bottom - 16), f'the guest runs on '
                      f'{line.survivor} {gap:.0f} ms later', GREEN, 'end')
        picture.line((self.time.at(line.running), top + 26),
                     (self.time.at(line.running), bottom), GREEN, 1.5)

    def _curve(self, side: str, time: Scale, scale: Scale,
               width: float) -> None:
        """Draw a side's work; the killed one ends with a cross."""
        line, colour = self.line, self.colours[side]
        seen = [work for work in line.work[side]
                if time.low <= work.when <= time.high]
        # what survives is drawn with dots while it only stands by
        points = [(time.at(work.when), scale.at(work.transactions))
                  for work in seen]
        standby, own = points, []
        if side != min(line.work):
            standby = [point for work, point in zip(seen, points)
                       if work.when <= line.running]
            own = points[max(len(standby) - 1, 0):] \
                if side == line.survivor else []
            self.picture.curve(standby, colour, width, dash='3 3')
        else:
            own = points
        if own:
            self.picture.curve(own, colour, width)
        if side == line.victim and points:
            self.picture.cross(points[-1], RED)

    def _legend(self, y: float) -> None:
        picture, line = self.picture, self.line
        x = 470.0
        for side in sorted(line.work):
            first = side == min(line.work)
            picture.line((x, y - 4), (x + 26, y - 4), self.colours[side], 3,
                         'none' if first else '3 3')
            text = f'{side} (primary)' if first else \
                f'{side} (secondary, same guest in step)'
            picture.text((x + 32, y), text, INK, 13)
            x += 50 + 7.2 * len(text)
        picture.line((x, y - 9), (x, y), PAUSE, 2)
        picture.text((x + 8, y), 'checkpoint', INK, 13)

    def _pauses(self, top: float, bottom: float) -> None:
        line = self.line
        spans = [(stopped, resumed, (resumed - stopped) * 1000)
                 for stopped, resumed in line.checkpoints]
        times = sorted(ms for _, _, ms in spans)
        scale = Scale(0, times[-1] * 1.1, bottom, top)
        self._frame(top, bottom, scale, 'The guest stood still for each '
                    f'checkpoint (ms): {len(times)} of them, median '
                    f'{times[len(times) // 2]:.0f} ms, longest '
                    f'{times[-1]:.0f} ms', 3)
        for number, (_, resumed, took) in enumerate(spans, 1):
            x = self.time.at(resumed)
            self.picture.box(x - 4, scale.at(took), x + 4, bottom, PAUSE,
                             f'checkpoint {number}: {took:.0f} ms', 1,
                             class_='checkpoint')

    def _lag(self, top: float, bottom: float) -> None:
        line = self.line
        most = max((size for _, size in line.lag), default=0)
        scale = Scale(0, max(most / 1024, 1) * 1.1, bottom, top)
        self._frame(top, bottom, scale, 'The secondary was behind by (KiB), '
                    f'seen {len(line.lag)} times: at most {most / 1024:.0f} '
                    'KiB', 3)
        points: List[Point] = [(self.time.at(when), scale.at(size / 1024))
                               for when, size in line.lag]
        if points:
            edge = [(points[0][0], float(bottom)), *points,
                    (points[-1][0], float(bottom))]
            self.picture.curve(edge, LAG, 1.5, fill='#0a7d9126')

    def _seconds(self, y: float) -> None:
        scale = Scale(self.since(self.time.low), self.since(self.time.high),
                      LEFT, RIGHT)
        for value in scale.ticks(12):
            self.picture.text((scale.at(value), y), f'{value:g}', MUTED, 12,
                              'middle')
        self.picture.text((RIGHT, y + 18), 'seconds since the start', MUTED,
                          12, 'end')

    # The close-up

    def _close_up(self, top: float, bottom: float) -> None:
        line, picture = self.line, self.picture
        right = 690
        checkpoint = line.checkpoints[-1][1]
        end = max(line.first_output, line.merged or 0) + AFTER
        time = Scale(checkpoint - BEFORE, min(end, line.ended), LEFT, right)
        seen = [work.transactions for side in line.work.values()
                for work in side if time.low <= work.when <= time.high]
        low, high = min([*seen, line.safe]), max([*seen, line.safe])
        # room for a label below
        scale = Scale(low - (high - low) * 0.15 - 1, high + 1, bottom - 34,
                      top)
        picture.text((LEFT, top - 14), 'The kill, close up', INK, 15,
                     bold=True)
        for value in scale.ticks(5):
            picture.line((LEFT, scale.at(value)), (right, scale.at(value)),
                         GRID)
            picture.text((LEFT - 8, scale.at(value) + 4), f'{value:g}', MUTED,
                         12, 'end')
        picture.box(time.at(line.killed), top, time.at(line.running),
                    bottom - 34, GAP, 'until the guest runs alone')
        picture.line((time.at(line.killed), top),
                     (time.at(line.killed), bottom - 34), RED, 1.5, '5 4')
        self._safe(time, scale)
        for side in sorted(line.work, reverse=True):
            self._curve(side, time, scale, 2.5)
        self._first_sign(time, scale)
        self._merge(time, bottom - 26, bottom - 8)
        for value in Scale(self.since(time.low), self.since(time.high), LEFT,
                           right).ticks(6):
            picture.text((time.at(value + line.began), bottom + 10),
                         f'{value:.4g} s', MUTED, 12, 'middle')

    def _safe(self, time: Scale, scale: Scale) -> None:
        """Draw what the last checkpoint held, which is what must be kept."""
        line, picture = self.line, self.picture
        checkpoint = line.checkpoints[-1]
        y = scale.at(line.safe)
        picture.box(time.at(checkpoint[0]), scale.end,
                    time.at(checkpoint[1]), scale.begin, PAUSE,
                    'the last checkpoint', opacity=0.18)
        picture.line((time.at(checkpoint[0]), y), (time.end, y), GREEN, 1.5,
                     '2 3')
        picture.label((time.end, y + 17), 'the last checkpoint held '
                      f'{line.safe}', GREEN, 'end')

    def _first_sign(self, time: Scale, scale: Scale) -> None:
        line, picture = self.line, self.picture
        place = (time.at(line.first_output), scale.at(line.taken_over))
        picture.dot(place, GREEN, 6, 'first sign of the guest')
        picture.label((place[0] + 10, place[1] + 18),
                      f'{line.survivor} goes on with {line.taken_over}', GREEN)

    def _merge(self, time: Scale, top: float, bottom: float) -> None:
        line, picture = self.line, self.picture
        if line.merged is None:
            picture.text((LEFT, bottom - 4), 'Nothing to merge: the primary '
                         'has its own disks.', MUTED, 12)
            return
        begin = line.merge[0][0] if line.merge else line.killed
        picture.box(time.at(begin), top, time.at(line.merged), bottom,
                    '#fff8c5')
        points = [(time.at(begin), bottom)]
        height = Scale(0, 1, bottom, top)
        points += [(time.at(when), height.at(done / total if total else 0))
                   for when, done, total in line.merge]
        points += [(time.at(line.merged), top), (time.at(line.merged),
                                                 bottom)]
        picture.curve(points, MERGE, 1, fill=MERGE)
        total = max((total for _, _, total in line.merge), default=0)
        picture.text((time.at(begin) - 8, bottom - 4),
                     f'{total / 1024:,.0f} KiB of overlays merged '
                     f'{(line.merged - line.killed) * 1000:.0f} ms after the '
                     'kill', MUTED, 12, 'end')

    def _facts(self, left: float, top: float) -> None:
        """Write what was counted."""
        line, picture = self.line, self.picture
        picture.text((left, top - 14), 'What is left', INK, 15, bold=True)
        kept = line.taken_over >= line.safe
        facts = [
            (f'{line.safe}', 'transactions in the last checkpoint', INK),
            (f'{line.taken_over}', f'when {line.survivor} took over: '
             + ('none is missing' if kept else 'some are missing'),
             GREEN if kept else RED),
            (f'{line.at_end}', 'at the end, each found in the database', INK),
            (f'{line.checked:,}', 'blocks compared by the guest', INK),
            (f'{line.host_checked:,}', 'blocks compared in the images', INK),
            (f'{line.wrong}', 'wrong blocks', RED if line.wrong else GREEN)]
        for number, (count, text, colour) in enumerate(facts):
            y = top + 16 + 30 * number
            picture.text((left + 80, y), count, colour, 18, 'end', True)
            picture.text((left + 92, y), text, INK, 14)
        for number, problem in enumerate(line.problems[:2]):
            picture.text((left, top + 200 + 18 * number), problem[:60], RED,
                         12)


def draw(timeline: Timeline) -> str:
    """Return the picture of a timeline, as SVG."""
    return Drawing(timeline).draw()
