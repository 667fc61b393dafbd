#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Check that the demo's picture shows what it was told."""

import unittest
import xml.etree.ElementTree as ET
from dataclasses import replace
from typing import Any, List

from forms import Synced
from guesthost import MIB, Beat
from pair import Look
from picture import (AMBER, GREEN, HOSTS, LEFT, RED, RIGHT, Death, Protection,
                     Timeline, draw)
from svg import Scale

SVG = '{http://www.w3.org/2000/svg}'


def beat(when: float, tx: int) -> Beat:
    """What the guest had done at a time."""
    return Beat(when, 0, True, tx, 0, 0, 0)


def synced(began: float, ended: float, copied: int) -> Synced:
    """So many MiB of the disks were copied."""
    return Synced(began, ended, 0, copied * MIB, 192 * MIB)


FIRST = Death(
    side='primary', victim='host1', survivor='host2', when=1020,
    running=1020.07, first_output=1020.2, merged=1020.18,
    merge=[(1020.1, 0, 65536), (1020.15, 32768, 65536)], safe=95, at_kill=119,
    taken_over=121)
SECOND = Death(
    side='primary', victim='host2', survivor='host1-2', when=1028,
    running=1028.05, first_output=1028.1, merged=1028.2, merge=[], safe=185,
    at_kill=199, taken_over=200)
GOOD = Timeline(
    began=1000, ended=1030,
    protections=[
        Protection('host2', synced(1010, 1011, 190), 1013),
        Protection('host1-2', synced(1022, 1022.5, 3), 1024)],
    deaths=[FIRST, SECOND],
    checkpoints=[(1014.5, 1014.53), (1016, 1016.06), (1017.5, 1017.54),
                 (1026, 1026.03)],
    work={'host1': [beat(1008 + n / 10, n) for n in range(120)],
          'host2': [beat(1013 + n / 10, 50 + n) for n in range(150)],
          'host1-2': [beat(1024 + n / 10, 160 + n) for n in range(60)]},
    looks=[Look(1013 + n / 5, 1024 * (n % 7), MIB) for n in range(80)],
    at_end=219, checked=36864, host_checked=36866, wrong=0,
    footer='with what')


class PictureTest(unittest.TestCase):
    """The picture as a program reads it."""

    @staticmethod
    def texts(root: ET.Element) -> List[str]:
        """Return all that is written."""
        return [element.text or '' for element in root.iter(f'{SVG}text')]

    def drawn(self, timeline: Timeline) -> ET.Element:
        """Draw it; nothing is outside of the picture."""
        root = ET.fromstring(draw(timeline))
        width, height = (float(root.get(name, '0'))
                         for name in ('width', 'height'))
        for element in root.iter():
            for name, most in (('x', width), ('x2', width), ('cx', width),
                               ('y', height), ('y2', height), ('cy', height)):
                place = float(element.get(name, '0'))
                self.assertTrue(0 <= place <= most, element.attrib)
        return root

    def test_nothing_lost(self) -> None:
        """Both hosts are killed, and both times the other goes on."""
        root = self.drawn(GOOD)
        texts = self.texts(root)
        for text in (
                'host1 is killed, then host2. Nothing is lost.',
                '0 wrong blocks', 'host1 is killed', 'host2 is killed',
                'the guest runs on host2 70 ms later',
                'the guest runs on host1-2 50 ms later',
                'host2 went on with; none is missing',
                'host1-2 went on with; none is missing',
                '121 on host2', '119 at the kill', '95 guaranteed',
                '200 on host1-2', '199 at the kill', '185 guaranteed',
                'Without colo-compare, what the guest has told the outside '
                'since the last checkpoint may be gone.',
                'protected again after 4.0 s, 3.0 of 192 MiB copied',
                'host1-2: host1 is back, with its disks', 'with what',
                'alone', 'disks copied', 'memory', 'protected',
                'alone on host2', 'protected again', 'alone on host1-2',
                'overlays merged 180 ms after the kill',
                'overlays merged 200 ms after the kill',
                'The guest stood still for each checkpoint (ms): 4 of them, '
                'median 40 ms, longest 60 ms', '73,730'):
            self.assertIn(text, texts)
        # the guest has written while it was copied
        self.assertEqual(str(synced(0, 1, 193)),
                         'all 192 MiB copied')
        bars = [element.findtext(f'{SVG}title')
                for element in root.iter(f'{SVG}rect')
                if element.get('class') == 'checkpoint']
        self.assertEqual(bars, ['checkpoint 1: 30 ms', 'checkpoint 2: 60 ms',
                                'checkpoint 3: 40 ms', 'checkpoint 4: 30 ms'])
        self.assertEqual(self.badge(root), [GREEN])

    def test_stands_still(self) -> None:
        """No line runs through the time between a kill and the failover."""
        root = self.drawn(self.dies(FIRST, running=1022, first_output=1022.1))
        time = Scale(1008, GOOD.ended, LEFT, RIGHT)
        gap = time.at(1020.1), time.at(1021.9)
        # the close-ups come after the charts, and have another scale
        curves = [[float(point.split(',')[0])
                   for point in curve.get('points', '').split()]
                  for curve in root.iter(f'{SVG}polyline')
                  if curve.get('fill') == 'none'
                  and curve.get('stroke') in HOSTS][:5]
        self.assertEqual(len(curves), 5)
        for points in curves:
            self.assertFalse(min(points) < gap[0] and max(points) > gap[1],
                             points)

    @staticmethod
    def dies(death: Death, **changes: Any) -> Timeline:
        """One of the deaths is another one."""
        other = replace(death, **changes)
        return replace(GOOD, deaths=[other if each is death else each
                                     for each in GOOD.deaths])

    def test_newer_is_gone(self) -> None:
        """What no checkpoint has held is not guaranteed, and not hidden."""
        for death, taken_over, gone in (FIRST, 100, 19), (SECOND, 190, 9):
            root = self.drawn(self.dies(death, taken_over=taken_over))
            texts = self.texts(root)
            self.assertIn('host1 is killed, then host2. The last checkpoint '
                          'is kept.', texts)
            self.assertIn(f'{gone} newer than the checkpoint are gone', texts)
            self.assertIn(f'{death.survivor} went on with; {gone} newer ones '
                          'are gone', texts)
            self.assertEqual(self.badge(root), [AMBER])

    @staticmethod
    def badge(root: ET.Element) -> List[str]:
        """Return the colours of what has round corners."""
        return [element.get('fill', '') for element in root.iter(f'{SVG}rect')
                if element.get('rx') == '8']

    def test_something_lost(self) -> None:
        """It does not look like the other."""
        root = self.drawn(replace(
            self.dies(SECOND, taken_over=180), wrong=3,
            problems=['the guest read wrong <blocks>']))
        texts = self.texts(root)
        self.assertIn('host1 is killed, then host2. Something is lost.',
                      texts)
        self.assertIn('3 wrong blocks', texts)
        self.assertIn('host1-2 went on with; fewer than guaranteed', texts)
        self.assertIn('the guest read wrong <blocks>', texts)
        self.assertEqual(self.badge(root), [RED])

    def test_secondary_killed(self) -> None:
        """Nothing is merged then, and maybe nothing was ever behind."""
        first = replace(FIRST, side='secondary', victim='host2',
                        survivor='host1', merged=None, merge=[])
        second = replace(SECOND, victim='host1', survivor='host2-2')
        again = Protection('host2-2', synced(1022, 1022.5, 3), 1024)
        work = dict(GOOD.work)
        work['host2-2'] = work.pop('host1-2')
        texts = self.texts(self.drawn(replace(
            GOOD, deaths=[first, second], looks=[], work=work,
            protections=[GOOD.protections[0], again])))
        self.assertIn('host2 is killed, then host1. Nothing is lost.', texts)
        self.assertIn('host2 is killed', texts)
        self.assertIn('Nothing to merge: the primary has its own disks.',
                      texts)
        self.assertIn('host2-2: host2 is back, with its disks', texts)

    def test_ticks(self) -> None:
        """Round values, all of them inside."""
        self.assertEqual(Scale(0, 337, 0, 1).ticks(5), [0, 100, 200, 300])
        self.assertEqual(Scale(17.2, 36, 0, 1).ticks(4), [20, 25, 30, 35])


if __name__ == '__main__':
    unittest.main(verbosity=2)
