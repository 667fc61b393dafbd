# SPDX-License-Identifier: GPL-2.0-or-later
"""Lays out what is known, for a terminal of 80 columns or more."""

import textwrap
import time
from dataclasses import dataclass, field
from typing import Iterable, List, Optional, Sequence, Tuple

from figures import (PROTECTED, UNPROTECTED, Event, Json, NodeFigures,
                     Portion, Watched, clock, verdict)

SPARKS = '▁▂▃▄▅▆▇█'
PLAIN_SPARKS = '.:-=+*#@'
# The columns of the table; the last one takes what is left.
COLUMNS = (15, 16, 18, 17)
MIN_WIDTH = 80
# From here on there is room for a sparkline in the table.
WIDE = 100
# How many events a snapshot shows.
EVENTS_SHOWN = 8

CODES = {'bold': '1', 'dim': '2', 'red': '31;1', 'green': '32',
         'yellow': '33', 'cyan': '36'}
STAGES = {'running': 'green', 'done': 'cyan', 'failover': 'yellow',
          'stopped': 'yellow', 'syncing': 'yellow', 'broken': 'red',
          'failover-failed': 'red'}


@dataclass
class Text:
    """A line of the screen: texts and their styles."""
    parts: List[Tuple[str, str]] = field(default_factory=list)

    def add(self, text: str, style: str = '', width: int = 0) -> 'Text':
        """Add a text, cut or filled up to a width if there is one."""
        if width:
            text = f'{text[:width - 1]:<{width}}'
        self.parts.append((text, style))
        return self

    @property
    def length(self) -> int:
        """How many columns it takes."""
        return sum(len(text) for text, _ in self.parts)

    def show(self, width: int, colour: bool) -> str:
        """Return it as the terminal wants it, no longer than width."""
        shown = []
        for text, style in self.parts:
            text = text[:width]
            width -= len(text)
            if colour and style and text:
                text = f'\033[{CODES[style]}m{text}\033[0m'
            shown.append(text)
        line = ''.join(shown)
        return line if colour else line.rstrip()


def size(number: float) -> str:
    """Say how many bytes."""
    if number < 1024:
        return f'{number:.0f} B'
    for unit in ('KiB', 'MiB', 'GiB', 'TiB'):
        number /= 1024
        if number < 999.5:
            break
    return f'{number:.{2 if number < 9.95 else 3}g} {unit}'


def duration(seconds: float) -> str:
    """Say how long."""
    if seconds < 0.0995:
        return f'{seconds * 1e3:.2g} ms'
    if seconds < 0.9995:
        return f'{seconds * 1e3:.0f} ms'
    if seconds < 99.5:
        return f'{seconds:.3g} s'
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{rest:02}'


def millis(nanoseconds: int) -> str:
    """Say how many milliseconds."""
    value = nanoseconds / 1e6
    return f'{value:.{0 if value >= 10 else 1 if value >= 1 else 2}f}'


def sparkline(values: Iterable[float], width: int, sparks: str) -> str:
    """Draw the last values, each as a bar against the largest of them."""
    last = list(values)[-width:]
    most = max(last, default=0)
    top = len(sparks) - 1
    return ''.join(sparks[round(value / most * top) if most else 0]
                   for value in last)


def bar(progress: Portion, width: int) -> str:
    """Draw how far something is, and say it."""
    filled = int(progress.part * width)
    text = (f'[{"#" * filled}{"." * (width - filled)}] '
            f'{100 * progress.part:3.0f} %  {size(progress.done)} of '
            f'{size(progress.total)}')
    if progress.done < progress.total and progress.seconds_left is not None:
        text += f', {duration(progress.seconds_left)} left'
    return text


class View:
    """Draws the sides."""

    def __init__(self, width: int, max_age: float,
                 sparks: str = SPARKS) -> None:
        self.width = max(width, MIN_WIDTH)
        self.max_age = max_age
        self.sparks = sparks

    def lines(self, sides: Sequence[Watched], events: Sequence[Event],
              height: Optional[int] = None) -> List[Text]:
        """Return all lines; the last events fill what is left of height."""
        status, text = verdict(sides, self.max_age)
        style = {PROTECTED: 'green', UNPROTECTED: 'red'}.get(status, 'yellow')
        lines = [Text().add(part, style)
                 for part in textwrap.wrap(text, self.width)] + [Text()]
        for side in sides:
            lines += self.side(side)
            lines.append(Text())
        room = EVENTS_SHOWN if height is None else height - len(lines) - 1
        if events and room > 0:
            lines.append(Text().add('EVENTS', 'bold'))
            lines += [self.event(event) for event in list(events)[-room:]]
        return lines if height is None else lines[:height]

    def side(self, side: Watched) -> List[Text]:
        """Draw a side."""
        lines = [self._head(side)]
        if side.trouble is not None and not side.heard:
            return lines
        if side.pauses:
            lines.append(self._pauses(side))
        for name, job in side.jobs.items():
            kind = job.info['type']
            if kind in ('mirror', 'replica-sync'):
                kind = 'sync'
            lines.append(self._bar(f'{kind} {name}', job.progress))
        for primary in (True, False):
            nodes = [node for node in side.nodes.values()
                     if node.is_primary == primary]
            if nodes:
                lines.append(self._heading(primary))
            for node in nodes:
                lines += self._node(node)
        if not side.nodes:
            lines.append(Text().add('  no replication node', 'dim'))
        if side.trouble is not None:
            # what it was when it was last heard of
            for line in lines[1:]:
                line.parts = [(text, 'dim') for text, _ in line.parts]
        return lines

    def _head(self, side: Watched) -> Text:
        line = Text().add(side.name, 'bold').add('  ')
        if side.trouble is not None:
            gone = f'gone since {clock(int(side.since * 1e9))}: ' \
                if side.heard else ''
            line.add(f'{gone}{side.trouble}', 'red')
        elif side.silence:
            line.add(f'does not answer for {side.silence:.0f} s', 'yellow')
        else:
            line.add(side.status)
            if side.colo not in ('', 'none'):
                line.add(f', COLO {side.colo}')
        room = self.width - line.length - 2
        path = str(side.path)
        if room >= 20:
            path = path if len(path) <= room else '...' + path[3 - room:]
            line.add(' ' * (room + 2 - len(path))).add(path, 'dim')
        return line

    def _pauses(self, side: Watched) -> Text:
        told = (f'  last {duration(side.pauses[-1])}, longest '
                f'{duration(side.longest_pause)}, {side.pause_count} times')
        label = '  guest stood still  '
        room = self.width - len(label) - len(told)
        return Text().add(label).add(
            sparkline(side.pauses, min(room, 60), self.sparks),
            'cyan').add(told)

    def _heading(self, primary: bool) -> Text:
        names = ('  NODE', 'STAGE', 'BEHIND BY', 'FORWARDED') if primary \
            else ('  NODE', 'STAGE', 'ACTIVE, HIDDEN', 'COPIED')
        line = Text()
        for name, width in zip(names, COLUMNS):
            line.add(name, 'dim', width)
        return line.add('CHECKPOINTS', 'dim')

    def _node(self, node: NodeFigures) -> List[Text]:
        stats = node.stats
        line = Text()
        cells = self._primary_cells(node) if node.is_primary \
            else self._secondary_cells(node)
        line.add(f'  {node.name}', 'bold', COLUMNS[0])
        style = STAGES.get(stats['stage'], '')
        if stats['stage'] == 'running' and not stats['protects']:
            style = 'red'
        line.add(stats['stage'], style, COLUMNS[1])
        for cell, width in zip(cells, COLUMNS[2:]):
            line.add(cell, '', width)
        line.add(f"{stats['checkpoints']} ")
        if stats['failed-checkpoints']:
            line.add(f"+{stats['failed-checkpoints']} failed ", 'red')
        if stats['checkpoints']:
            # in one unit, for want of room
            line.add(f"{millis(stats['last-checkpoint-ns'])}/"
                     f"{millis(stats['longest-checkpoint-ns'])} ms")
        room = self.width - line.length - 2
        if self.width >= WIDE and room > 0:
            line.add('  ').add(
                sparkline(node.checkpoints, room, self.sparks), 'cyan')
        return [line, *self._details(node)]

    @staticmethod
    def _primary_cells(node: NodeFigures) -> Tuple[str, str]:
        stats = node.stats
        behind = 'nothing'
        if stats['pending-requests']:
            behind = (f"{size(stats['pending-memory'])}, "
                      f"{duration(stats['oldest-pending-ns'] / 1e9)}")
        rate, requests = node.bytes.per_second, node.requests.per_second
        if rate is None or requests is None:
            return behind, size(stats['forwarded-bytes'])
        return behind, f'{size(rate)}/s {requests:.0f}/s'

    @staticmethod
    def _secondary_cells(node: NodeFigures) -> Tuple[str, str]:
        stats = node.stats
        held = f"{size(stats['active-bytes'])}, {size(stats['hidden-bytes'])}"
        rate = node.bytes.per_second
        if rate is None:
            return held, size(stats['copied-bytes'])
        return held, f'{size(rate)}/s'

    def _details(self, node: NodeFigures) -> List[Text]:
        stats = node.stats
        lines = []
        if node.is_primary and self.width >= WIDE:
            lines.append(Text().add(
                f"    {size(stats['forwarded-bytes'])} in "
                f"{stats['forwarded-requests']} requests forwarded, "
                f"{size(stats['superseded-bytes'])} superseded, at most "
                f"{size(stats['max-pending-memory'])} behind", 'dim'))
        if 'replica-state' in stats:
            lines.append(self._replica(stats))
        failover = node.failover
        if failover and stats['stage'] == 'done':
            took = stats['failover']['elapsed-ns'] / 1e9
            lines.append(Text().add('    failed over in ', '').add(
                f'{duration(took)}, {size(failover.total)} merged', 'cyan'))
        elif failover:
            lines.append(self._bar('  failover', failover))
        lost = [f'{stats[key]} {key.split("-")[0]}'
                for key in ('failed-requests', 'dropped-requests')
                if stats.get(key)]
        if lost:
            lines.append(Text().add(
                f'    {" and ".join(lost)}: the secondary is out of date',
                'red'))
        error = stats.get('error')
        if error:
            lines.append(Text().add(
                f"    {clock(error['time-ns'])} {error['reason']}: "
                f"{error['error']}", 'red'))
        return lines

    @staticmethod
    def _replica(stats: Json) -> Text:
        state, lost = stats['replica-state'], stats.get('replica-lost')
        line = Text().add(f'    replica {state}, ', '' if state == 'synced'
                          else 'yellow')
        line.add(f"{size(stats['out-of-sync-bytes'])} out of sync, "
                 f"{size(stats['copied-bytes'])} copied", 'dim')
        if lost:
            line.add(f", lost {clock(lost['time-ns'])}: {lost['text']}", 'red')
        return line

    def _bar(self, name: str, progress: Portion) -> Text:
        width = 40 if self.width >= WIDE else 20
        return Text().add(f'  {name}', '', COLUMNS[0]).add(
            bar(progress, width), 'yellow')

    @staticmethod
    def event(event: Event) -> Text:
        """Draw an event."""
        when = time.strftime('%H:%M:%S', time.localtime(event.when))
        return Text().add(f'  {when} ', 'dim').add(f'{event.side} ').add(
            event.text, 'red' if event.is_bad else '')
