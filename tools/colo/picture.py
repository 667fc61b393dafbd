# SPDX-License-Identifier: GPL-2.0-or-later
"""The demo as a picture: what the guest did on both sides, and what is left.

All times are of the host's clock, in seconds; the picture counts them from
the moment at which the story begins.
"""

from dataclasses import dataclass, field
from typing import Dict, List, Optional, Tuple

from svg import Picture, Point, Scale

WIDTH, HEIGHT = 1200, 1072
LEFT, RIGHT = 84, 1160

INK, MUTED, GRID = '#1f2328', '#59636e', '#e6e9ed'
HOSTS = '#1f6feb', '#d4620a', '#bf3989'
RED, AMBER, GREEN = '#cf222e', '#9a6700', '#1a7f37'
PAUSE, WAY, LACK, MERGE = '#8250df', '#0a7d91', '#6e7781', '#b08800'
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


@dataclass(frozen=True)
class Look:
    """What the secondary did not have at a time, in bytes."""
    when: float
    # already on the way
    pending: int
    lacking: int


@dataclass(frozen=True)
class Protection:
    """How a guest came to be protected."""
    secondary: str
    # when its disks were copied
    sync: Tuple[float, float]
    protected: float
    # bytes, of how many
    copied: int
    size: int


@dataclass
class Timeline:
    """Everything that the picture shows."""
    victim: str
    survivor: str
    killed_side: str
    began: float
    first: Protection
    killed: float
    running: float
    first_output: float
    again: Protection
    ended: float
    # None if nothing had to be merged
    merged: Optional[float]
    # when the guest stopped and went on
    checkpoints: List[Tuple[float, float]]
    # what the guest did on each side, by the side's name
    work: Dict[str, List[Work]]
    looks: List[Look]
    # bytes that were merged, of how many
    merge: List[Tuple[float, int, int]]
    # transactions: in the last checkpoint before the kill, on the primary at
    # the kill, on the survivor, and in the end
    safe: int
    at_kill: int
    taken_over: int
    at_end: int
    checked: int
    host_checked: int
    wrong: int
    # with what, and on what, it was run
    footer: str
    problems: List[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether all that is guaranteed was kept."""
        return not (self.problems or self.wrong
                    or self.taken_over < self.safe)

    @property
    def gone(self) -> int:
        """Transactions that the primary had, and the survivor has not."""
        return max(self.at_kill - self.taken_over, 0)

    @property
    def colour(self) -> str:
        """The colour of the verdict."""
        return RED if not self.good else AMBER if self.gone else GREEN

    @property
    def again_words(self) -> str:
        """How the survivor came to be protected."""
        again = self.again
        return (f'protected again after {again.protected - self.killed:.1f} '
                f's, {copied_words(again.copied, again.size)}')


def copied_words(copied: int, size: int) -> str:
    """How much of disks was copied, which may be some of them twice."""
    if copied >= size:
        return f'all {size / 2**20:.0f} MiB copied'
    return (f'{copied / 2**20:.{1 if copied < 2**25 else 0}f} of '
            f'{size / 2**20:.0f} MiB copied')


class Drawing:
    """Draws a timeline."""

    def __init__(self, timeline: Timeline) -> None:
        self.line = timeline
        what = 'Something is lost.' if not timeline.good else \
            'The last checkpoint is kept.' if timeline.gone else \
            'Nothing is lost.'
        self.title = f'The {timeline.killed_side} is killed. {what}'
        self.picture = Picture(WIDTH, HEIGHT, self.title)
        self.time = Scale(max(timeline.began, timeline.first.sync[0] - LEAD),
                          timeline.ended, LEFT, RIGHT)
        self.sides = sorted(timeline.work)
        self.colours = dict(zip(self.sides, HOSTS))

    def draw(self) -> str:
        """Return the picture."""
        line = self.line
        self._head()
        self._phases(104, 128)
        self._progress(168, 420)
        self._pauses(456, 516)
        self._amount(552, 612, 'The secondary was behind by (KiB)', 1024, WAY,
                     [(look.when, look.pending) for look in line.looks
                      if line.first.protected <= look.when <= line.killed
                      or look.when >= line.again.protected])
        self._amount(648, 708, 'Not on a secondary (MiB)', 2**20, LACK,
                     [(look.when, look.lacking) for look in line.looks])
        self._seconds(726)
        self._close_up(800, 1000)
        self._facts(740, 800)
        self.picture.text((LEFT - 44, HEIGHT - 14), line.footer, MUTED, 12)
        return self.picture.whole()

    def since(self, when: float) -> float:
        """Return the time as the picture counts it."""
        return when - self.line.began

    # The head

    def _head(self) -> None:
        picture, line = self.picture, self.line
        picture.text((LEFT - 44, 46), self.title, INK, 28, bold=True)
        picture.text((LEFT - 44, 72), f'{line.victim} gets SIGKILL, '
                     f'{line.survivor} carries the guest on; '
                     f'{line.again_words}.', MUTED, 15)
        picture.box(880, 14, RIGHT, 84, line.colour, radius=8)
        middle = (880 + RIGHT) / 2
        picture.text((middle, 48), f'{line.wrong} wrong blocks', 'white', 26,
                     'middle', bold=True)
        if line.problems:
            below = line.problems[0][:40]
        elif line.gone:
            below = f'{line.gone} newer than the checkpoint are gone'
        else:
            below = f'of {line.checked:,} that the guest has checked'
        picture.text((middle, 71), below, 'white', 13, 'middle')

    def _phases(self, top: float, bottom: float) -> None:
        """Draw what was when; a name that has no room stands below."""
        line = self.line
        first, again = line.first, line.again
        copy, alone, safe = (('#ddf4ff', HOSTS[0]), ('#fff1e5', '#953800'),
                             ('#dafbe1', GREEN))
        phases = [
            ('alone', self.time.low, first.sync[0], alone),
            ('disks copied', *first.sync, copy),
            ('memory', first.sync[1], first.protected, copy),
            ('protected', first.protected, line.killed, safe),
            (f'alone on {line.survivor}', line.killed, again.sync[0], alone),
            ('disks copied', *again.sync, copy),
            ('memory', again.sync[1], again.protected, copy),
            ('protected again', again.protected, line.ended, safe)]
        taken = [0.0, 0.0]
        for name, begin, end, (fill, colour) in phases:
            left, right = self.time.at(begin), self.time.at(end)
            middle, wide = (left + right) / 2, 8.0 * len(name)
            self.picture.box(left, top, right - 1, bottom, fill,
                             f'{name}: {end - begin:.1f} s', 3)
            if right - left > wide:
                y = top + 17.0
            else:
                row = 0 if middle - wide / 2 > taken[0] else 1
                taken[row] = middle + wide / 2
                y = bottom + 14.0 + 14 * row
            self.picture.text((middle, y), name, colour, 13, 'middle')

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
        for when, colour in ((self.line.killed, RED),
                             (self.line.again.protected, GREEN)):
            x = self.time.at(when)
            picture.line((x, top), (x, bottom), colour, 1.5, '5 4')

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
        # those with dots first, so that they do not hide the other
        for side in reversed(self.sides):
            self._curve(side, self.time, scale, 2.5)
        self._legend(top + 18)
        x = self.time.at(line.killed)
        picture.label((x - 8, top + 44), f'{line.victim} is killed', RED,
                      'end')
        gap = (line.running - line.killed) * 1000
        picture.label((x - 8, bottom - 16), f'the guest runs on '
                      f'{line.survivor} {gap:.0f} ms later', GREEN, 'end')
        picture.label((self.time.at(line.again.protected) - 8, bottom - 40),
                      line.again_words, GREEN, 'end')

    def _curve(self, side: str, time: Scale, scale: Scale,
               width: float) -> None:
        """Draw a side's work, with dots while it only stands by.

        There is none while the guest stood still after the kill.  The killed
        side ends with a cross.
        """
        line, colour = self.line, self.colours[side]
        seen = [work for work in line.work[side]
                if time.low <= work.when <= time.high]
        runs_before = side == self.sides[0]
        for part, runs in (
                ([w for w in seen if w.when <= line.killed], runs_before),
                ([w for w in seen if w.when >= line.running],
                 side == line.survivor)):
            points = [(time.at(work.when), scale.at(work.transactions))
                      for work in part]
            if points:
                self.picture.curve(points, colour, width,
                                   dash='none' if runs else '3 3')
                if side == line.victim:
                    self.picture.cross(points[-1], RED)

    def _legend(self, y: float) -> None:
        picture, line = self.picture, self.line
        x = 460.0
        roles = ('primary', 'secondary, then primary', 'secondary') \
            if line.killed_side == 'primary' else \
            ('primary', 'secondary', 'secondary, same disks')
        for side, role in zip(self.sides, roles):
            picture.line((x, y - 4), (x + 26, y - 4), self.colours[side], 3)
            text = f'{side}: {role}'
            picture.text((x + 32, y), text, INK, 13)
            x += 52 + 6.9 * len(text)
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

    def _amount(self, top: float, bottom: float, name: str, unit: int,
                colour: str, seen: List[Tuple[float, int]]) -> None:
        """Draw how many bytes there were of something."""
        most = max((size for _, size in seen), default=0) / unit
        scale = Scale(0, max(most, 1) * 1.1, bottom, top)
        self._frame(top, bottom, scale, f'{name}: at most {most:,.0f}, seen '
                    f'{len(seen)} times', 3)
        points: List[Point] = [(self.time.at(when), scale.at(size / unit))
                               for when, size in seen]
        killed = self.time.at(self.line.killed)
        for part in ([p for p in points if p[0] < killed],
                     [p for p in points if p[0] >= killed]):
            if part:
                edge = [(part[0][0], float(bottom)), *part,
                        (part[-1][0], float(bottom))]
                self.picture.curve(edge, colour, 1.5, fill=f'{colour}26')

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
        right, low_edge = 560, bottom - 34
        checkpoint = max(c for c in line.checkpoints if c[0] < line.killed)
        end = max(line.first_output, line.merged or 0) + AFTER
        time = Scale(checkpoint[1] - BEFORE, min(end, line.ended), LEFT, right)
        seen = [work.transactions for side in line.work.values()
                for work in side if time.low <= work.when <= time.high]
        scale = Scale(min([*seen, line.safe]) - 1,
                      max([*seen, line.at_kill]) + 1, low_edge, top)
        picture.text((LEFT, top - 14), 'The kill, close up', INK, 15,
                     bold=True)
        for value in scale.ticks(5):
            picture.line((LEFT, scale.at(value)), (right, scale.at(value)),
                         GRID)
            picture.text((LEFT - 8, scale.at(value) + 4), f'{value:g}', MUTED,
                         12, 'end')
        picture.box(time.at(line.killed), top, time.at(line.running),
                    low_edge, GAP, 'until the guest runs alone')
        picture.line((time.at(line.killed), top),
                     (time.at(line.killed), low_edge), RED, 1.5, '5 4')
        picture.box(time.at(checkpoint[0]), top, time.at(checkpoint[1]),
                    low_edge, PAUSE, 'the last checkpoint', opacity=0.18)
        for side in reversed(self.sides):
            self._curve(side, time, scale, 2.5)
        picture.dot((time.at(line.first_output), scale.at(line.taken_over)),
                    line.colour, 6, 'first sign of the guest')
        self._levels(time, scale, checkpoint[1])
        self._merge(time, bottom - 26, bottom - 8)
        for value in Scale(self.since(time.low), self.since(time.high), LEFT,
                           right).ticks(6):
            picture.text((time.at(value + line.began), bottom + 10),
                         f'{value:.4g} s', MUTED, 12, 'middle')

    def _levels(self, time: Scale, scale: Scale, checkpoint: float) -> None:
        """Draw what is guaranteed, what there was, and what there is."""
        line, picture = self.line, self.picture
        below = scale.end
        for count, when, words, colour in sorted((
                (line.safe, checkpoint, 'guaranteed', GREEN),
                (line.taken_over, line.first_output, f'on {line.survivor}',
                 line.colour),
                (line.at_kill, line.killed, 'at the kill',
                 RED if line.gone else MUTED)),
                reverse=True):
            y = scale.at(count)
            picture.line((time.at(when), y), (time.end, y), colour, 1.5, '2 3')
            below = max(y + 4, below + 17)
            picture.text((time.end + 8, below), f'{count} {words}', colour, 13,
                         bold=True)

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
        points += [(time.at(min(when, line.merged)),
                    height.at(done / total if total else 0))
                   for when, done, total in line.merge]
        points += [(time.at(line.merged), top), (time.at(line.merged),
                                                 bottom)]
        picture.curve(points, MERGE, 1, fill=MERGE)
        total = max((total for _, _, total in line.merge), default=0)
        picture.text((time.at(line.merged) + 8, bottom - 4),
                     f'{total / 1024:,.0f} KiB of overlays merged '
                     f'{(line.merged - line.killed) * 1000:.0f} ms after the '
                     'kill', MUTED, 12)

    def _facts(self, left: float, top: float) -> None:
        """Write what was counted."""
        line, picture = self.line, self.picture
        picture.text((left, top - 14), 'What is left', INK, 15, bold=True)
        missing = 'fewer than guaranteed' if line.taken_over < line.safe else \
            f'{line.gone} newer ones are gone' if line.gone else \
            'none is missing'
        facts = [
            (f'{line.safe}', 'transactions guaranteed by a checkpoint',
             INK),
            (f'{line.at_kill}', 'on the primary at the kill', INK),
            (f'{line.taken_over}', f'{line.survivor} went on with; {missing}',
             line.colour),
            (f'{line.at_end}', 'at the end, each found in the database', INK),
            (f'{line.checked:,}', 'blocks compared by the guest', INK),
            (f'{line.host_checked:,}', 'blocks compared in the images', INK),
            (f'{line.wrong}', 'wrong blocks', RED if line.wrong else GREEN)]
        for number, (count, text, colour) in enumerate(facts):
            y = top + 14 + 25 * number
            picture.text((left + 80, y), count, colour, 17, 'end', True)
            picture.text((left + 92, y), text, INK, 14)
        notes, colour = [problem[:60] for problem in line.problems[:2]], RED
        if not notes and line.killed_side == 'primary':
            notes, colour = [
                'Without colo-compare, what the guest has told the outside',
                'since the last checkpoint may be gone.'], MUTED
        for number, text in enumerate(notes):
            picture.text((left + 22, top + 196 + 17 * number), text, colour,
                         12)


def draw(timeline: Timeline) -> str:
    """Return the picture of a timeline, as SVG."""
    return Drawing(timeline).draw()
