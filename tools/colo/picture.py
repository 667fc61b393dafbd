# SPDX-License-Identifier: GPL-2.0-or-later
"""The demo as a picture: what the guest did on each host, and what is left.

All times are of the host's clock, in seconds; the picture counts them from
the moment at which the story begins.
"""

from dataclasses import dataclass, field
from typing import Dict, List, Optional, Tuple

from forms import Synced
from guesthost import Beat
from pair import Look
from svg import Picture, Point, Scale

WIDTH, HEIGHT = 1200, 1216
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
class Protection:
    """How a guest came to be protected."""
    secondary: str
    synced: Synced
    protected: float


@dataclass(frozen=True)
class Death:
    """A host that was killed, and what its guest lost by that."""
    side: str
    victim: str
    survivor: str
    when: float
    running: float
    first_output: float
    # None if nothing had to be merged
    merged: Optional[float]
    # bytes that were merged, of how many
    merge: List[Tuple[float, int, int]]
    # transactions: in the last checkpoint before, on the primary at the kill,
    # and on the survivor
    safe: int
    at_kill: int
    taken_over: int

    @property
    def kept(self) -> bool:
        """Whether what is guaranteed was kept."""
        return self.taken_over >= self.safe

    @property
    def gone(self) -> int:
        """Transactions that the primary had, and the survivor has not."""
        return max(self.at_kill - self.taken_over, 0)

    @property
    def words(self) -> str:
        """What is missing."""
        return 'fewer than guaranteed' if not self.kept else \
            f'{self.gone} newer ones are gone' if self.gone else \
            'none is missing'

    @property
    def colour(self) -> str:
        """How good that is."""
        return RED if not self.kept else AMBER if self.gone else GREEN


@dataclass
class Timeline:
    """Everything that the picture shows."""
    began: float
    ended: float
    # each protection ends with a death
    protections: List[Protection]
    deaths: List[Death]
    # when the guest stopped and went on
    checkpoints: List[Tuple[float, float]]
    # what the guest did on each host, by the host's name, oldest first
    work: Dict[str, List[Beat]]
    looks: List[Look]
    # transactions in the end
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
        return not (self.problems or self.wrong) and all(
            death.kept for death in self.deaths)

    @property
    def gone(self) -> int:
        """Transactions that no survivor had."""
        return sum(death.gone for death in self.deaths)

    @property
    def colour(self) -> str:
        """The colour of the verdict."""
        return RED if not self.good else AMBER if self.gone else GREEN

    @property
    def again_words(self) -> str:
        """How the first survivor came to be protected."""
        again = self.protections[1]
        after = again.protected - self.deaths[0].when
        return f'protected again after {after:.1f} s, {again.synced}'


class Drawing:
    """Draws a timeline."""

    def __init__(self, timeline: Timeline) -> None:
        self.line = timeline
        what = 'Something is lost.' if not timeline.good else \
            'The last checkpoint is kept.' if timeline.gone else \
            'Nothing is lost.'
        first, second = timeline.deaths
        self.title = f'{first.victim} is killed, then {second.victim}. {what}'
        self.picture = Picture(WIDTH, HEIGHT, self.title)
        begin = timeline.protections[0].synced.began
        self.time = Scale(max(timeline.began, begin - LEAD), timeline.ended,
                          LEFT, RIGHT)
        self.hosts = list(timeline.work)
        self.colours = dict(zip(self.hosts, HOSTS))

    def draw(self) -> str:
        """Return the picture."""
        line = self.line
        self._head()
        self._phases(104, 128)
        self._progress(168, 420)
        self._pauses(456, 516)
        self._amount(552, 612, 'The secondary was behind by (KiB)', 1024, WAY,
                     [(look.when, look.pending) for look in line.looks
                      if self._is_protected(look.when)])
        self._amount(648, 708, 'Not on a secondary (MiB)', 2**20, LACK,
                     [(look.when, look.lacking) for look in line.looks])
        self._seconds(726)
        for death, left in zip(line.deaths, (LEFT, 662)):
            CloseUp(self, death, left, left + 376).draw(800, 1000)
        self._facts(LEFT - 44, 1060)
        self.picture.text((LEFT - 44, HEIGHT - 14), line.footer, MUTED, 12)
        return self.picture.whole()

    def _is_protected(self, when: float) -> bool:
        return any(safe.protected <= when <= death.when for safe, death
                   in zip(self.line.protections, self.line.deaths))

    def since(self, when: float) -> float:
        """Return the time as the picture counts it."""
        return when - self.line.began

    # The head

    def _head(self) -> None:
        picture, line = self.picture, self.line
        picture.text((LEFT - 44, 46), self.title, INK, 24, bold=True)
        first, second = line.deaths
        picture.text((LEFT - 44, 72), f'{first.survivor} goes on, '
                     f'{line.again_words}; then {second.survivor} goes on.',
                     MUTED, 15)
        picture.box(900, 14, RIGHT, 84, line.colour, radius=8)
        middle = (900 + RIGHT) / 2
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
        copy, alone, safe = (('#ddf4ff', HOSTS[0]), ('#fff1e5', '#953800'),
                             ('#dafbe1', GREEN))
        phases, name, begin = [], 'alone', self.time.low
        for made, death, protected in zip(line.protections, line.deaths,
                                          ('protected', 'protected again')):
            synced = made.synced
            phases += [(name, begin, synced.began, alone),
                       ('disks copied', synced.began, synced.ended, copy),
                       ('memory', synced.ended, made.protected, copy),
                       (protected, made.protected, death.when, safe)]
            name, begin = f'alone on {death.survivor}', death.when
        phases.append((name, begin, line.ended, alone))
        taken = [0.0, 0.0, 0.0]
        for name, begin, end, (fill, colour) in phases:
            left, right = self.time.at(begin), self.time.at(end)
            middle, wide = (left + right) / 2, 8.0 * len(name)
            self.picture.box(left, top, right - 1, bottom, fill,
                             f'{name}: {end - begin:.1f} s', 3)
            if right - left > wide:
                y = top + 17.0
            else:
                middle = min(middle, RIGHT - wide / 2)
                row = next((row for row, end in enumerate(taken)
                            if middle - wide / 2 > end), 2)
                taken[row] = middle + wide / 2
                y = bottom + 14.0 + 14 * row
            self.picture.text((middle, y), name, colour, 13, 'middle')

    # The charts

    def _frame(self, top: float, bottom: float, scale: Scale, name: str,
               ticks: int) -> None:
        """Draw a chart's grid, its unit, and where the kills were."""
        picture = self.picture
        for value in scale.ticks(ticks):
            y = scale.at(value)
            picture.line((LEFT, y), (RIGHT, y), GRID)
            picture.text((LEFT - 8, y + 4), f'{value:,.0f}', MUTED, 12, 'end')
        picture.text((LEFT, top - 8), name, INK, 13, bold=True)
        for when, colour in ((self.line.deaths[0].when, RED),
                             (self.line.protections[1].protected, GREEN),
                             (self.line.deaths[1].when, RED)):
            x = self.time.at(when)
            picture.line((x, top), (x, bottom), colour, 1.5, '5 4')

    def _progress(self, top: float, bottom: float) -> None:
        line, picture = self.line, self.picture
        most = max(beat.tx for host in line.work.values() for beat in host)
        scale = Scale(0, most * 1.06, bottom, top + 26)
        self._frame(top + 26, bottom, scale,
                    'Transactions that the guest has committed', 5)
        for stopped, resumed in line.checkpoints:
            x = self.time.at(resumed)
            picture.line((x, bottom - 9), (x, bottom), PAUSE, 2)
            picture.box(self.time.at(stopped), top + 26, x, bottom, PAUSE,
                        opacity=0.10)
        self.curves(self.time, scale)
        self._legend(top + 18)
        for death, high, low in zip(line.deaths, (top + 44, bottom - 64),
                                    (bottom - 16, bottom - 40)):
            x = self.time.at(death.when)
            picture.label((x - 8, high), f'{death.victim} is killed', RED,
                          'end')
            gap = (death.running - death.when) * 1000
            picture.label((x - 8, low), f'the guest runs on '
                          f'{death.survivor} {gap:.0f} ms later', GREEN, 'end')
        picture.label((self.time.at(line.protections[1].protected) - 8,
                       bottom - 88), line.again_words, GREEN, 'end')

    def curves(self, time: Scale, scale: Scale) -> None:
        """Draw each host's work, with dots while it only stands by.

        There is none while the guest stood still after a kill.  Who is killed
        ends with a cross.
        """
        line = self.line
        runner, begin = self.hosts[0], line.began
        # those with dots first, so that they do not hide the other
        for death in [*line.deaths, None]:
            end = death.when if death else line.ended
            for host in sorted(self.hosts, key=lambda host: host == runner):
                points = [(time.at(beat.when), scale.at(beat.tx))
                          for beat in line.work[host]
                          if max(begin, time.low) <= beat.when
                          <= min(end, time.high)]
                if points:
                    self.picture.curve(
                        points, self.colours[host], 2.5,
                        dash='none' if host == runner else '3 3')
                    if death and host == death.victim and end <= time.high:
                        self.picture.cross(points[-1], RED)
            if death:
                runner, begin = death.survivor, death.running

    def _legend(self, y: float) -> None:
        picture, line = self.picture, self.line
        x = 420.0
        first = line.deaths[0]
        roles = {self.hosts[0]: 'primary',
                 line.protections[0].secondary: 'secondary'}
        roles[line.protections[1].secondary] = (
            f'{first.victim} is back, with its disks')
        for host in self.hosts:
            picture.line((x, y - 4), (x + 26, y - 4), self.colours[host], 3)
            text = f'{host}: {roles[host]}'
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
        begin = self.line.began
        for end in [*(death.when for death in self.line.deaths),
                    self.line.ended]:
            part: List[Point] = [
                (self.time.at(when), scale.at(size / unit))
                for when, size in seen if begin <= when < end]
            begin = end
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

    def _facts(self, left: float, top: float) -> None:
        """Write what was counted."""
        line, picture = self.line, self.picture
        picture.text((left, top), 'What is left', INK, 15, bold=True)
        first, second = line.deaths
        rows = [[(f'{death.safe}', 'transactions guaranteed by a checkpoint',
                  INK),
                 (f'{death.at_kill}', f'when {death.victim} was killed', INK),
                 (f'{death.taken_over}',
                  f'{death.survivor} went on with; {death.words}',
                  death.colour)] for death in (first, second)]
        rows.append([
            (f'{line.at_end}', 'at the end, each found', INK),
            (f'{line.checked + line.host_checked:,}',
             'blocks compared, inside and outside', INK),
            (f'{line.wrong}', 'wrong blocks', RED if line.wrong else GREEN)])
        for column, facts in enumerate(rows):
            for number, (count, text, colour) in enumerate(facts):
                place = left + 382 * column, top + 28 + 25 * number
                picture.text((place[0] + 70, place[1]), count, colour, 17,
                             'end', True)
                picture.text((place[0] + 80, place[1]), text, INK, 14)
        notes, colour = [problem[:160] for problem in line.problems[:1]], RED
        if not notes:
            notes, colour = [
                'Without colo-compare, what the guest has told the outside '
                'since the last checkpoint may be gone.'], MUTED
        picture.text((left, top + 110), notes[0], colour, 12)


class CloseUp:
    """Draws the time around a kill."""

    def __init__(self, drawing: Drawing, death: Death, left: float,
                 right: float) -> None:
        self.drawing = drawing
        self.picture = drawing.picture
        self.death = death
        line = drawing.line
        self.checkpoint = max(c for c in line.checkpoints
                              if c[0] < death.when)
        end = max(death.first_output, death.merged or 0) + AFTER
        self.time = Scale(self.checkpoint[1] - BEFORE, min(end, line.ended),
                          left, right)

    def draw(self, top: float, bottom: float) -> None:
        """Draw it; what is guaranteed stands at the right."""
        death, picture, time = self.death, self.picture, self.time
        low_edge = bottom - 34
        seen = [beat.tx for host in self.drawing.line.work.values()
                for beat in host if time.low <= beat.when <= time.high]
        scale = Scale(min([*seen, death.safe]) - 1,
                      max([*seen, death.at_kill]) + 1, low_edge, top)
        picture.text((time.begin, top - 14), f'{death.victim}, the '
                     f'{death.side}, is killed: close up', INK, 15, bold=True)
        for value in scale.ticks(5):
            picture.line((time.begin, scale.at(value)),
                         (time.end, scale.at(value)), GRID)
            picture.text((time.begin - 8, scale.at(value) + 4), f'{value:g}',
                         MUTED, 12, 'end')
        picture.box(time.at(death.when), top, time.at(death.running),
                    low_edge, GAP, 'until the guest runs alone')
        picture.line((time.at(death.when), top),
                     (time.at(death.when), low_edge), RED, 1.5, '5 4')
        picture.box(time.at(self.checkpoint[0]), top,
                    time.at(self.checkpoint[1]), low_edge, PAUSE,
                    'the last checkpoint', opacity=0.18)
        self.drawing.curves(time, scale)
        picture.dot((time.at(death.first_output),
                     scale.at(death.taken_over)), death.colour, 6,
                    'first sign of the guest')
        self._levels(scale)
        self._merge(bottom - 26, bottom - 8)
        since = self.drawing.since
        for value in Scale(since(time.low), since(time.high), time.begin,
                           time.end).ticks(5):
            picture.text((time.at(value + self.drawing.line.began),
                          bottom + 10), f'{value:.4g} s', MUTED, 12, 'middle')

    def _levels(self, scale: Scale) -> None:
        """Draw what is guaranteed, what there was, and what there is."""
        death, time = self.death, self.time
        below = scale.end
        for count, when, words, colour in sorted((
                (death.safe, self.checkpoint[1], 'guaranteed', GREEN),
                (death.taken_over, death.first_output,
                 f'on {death.survivor}', death.colour),
                (death.at_kill, death.when, 'at the kill',
                 RED if death.gone else MUTED)),
                reverse=True):
            y = scale.at(count)
            self.picture.line((time.at(when), y), (time.end, y), colour, 1.5,
                              '2 3')
            below = max(y + 4, below + 17)
            self.picture.text((time.end + 8, below), f'{count} {words}',
                              colour, 13, bold=True)

    def _merge(self, top: float, bottom: float) -> None:
        death, picture, time = self.death, self.picture, self.time
        if death.merged is None:
            picture.text((time.begin, bottom - 4), 'Nothing to merge: the '
                         'primary has its own disks.', MUTED, 12)
            return
        begin = death.merge[0][0] if death.merge else death.when
        picture.box(time.at(begin), top, time.at(death.merged), bottom,
                    '#fff8c5')
        height = Scale(0, 1, bottom, top)
        points = [(time.at(begin), bottom),
                  *((time.at(min(when, death.merged)),
                     height.at(done / total if total else 0))
                    for when, done, total in death.merge),
                  (time.at(death.merged), top), (time.at(death.merged),
                                                 bottom)]
        picture.curve(points, MERGE, 1, fill=MERGE)
        took = (death.merged - death.when) * 1000
        picture.text((time.at(death.merged) + 8, bottom - 4),
                     f'overlays merged {took:.0f} ms after the kill', MUTED,
                     12)


def draw(timeline: Timeline) -> str:
    """Return the picture of a timeline, as SVG."""
    return Drawing(timeline).draw()
