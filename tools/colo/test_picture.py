#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Check that the demo's picture shows what it was told."""

import unittest
import xml.etree.ElementTree as ET
from dataclasses import replace
from typing import List

from picture import (AMBER, GREEN, HOSTS, LEFT, RED, RIGHT, Look, Protection,
                     Timeline, Work, copied_words, draw)
from svg import Scale

SVG = '{http://www.w3.org/2000/svg}'

MIB = 1024 * 1024
GOOD = Timeline(
    victim='host1', survivor='host2', killed_side='primary', began=1000,
    first=Protection('host2', (1010, 1011), 1013, 190 * MIB, 192 * MIB),
    killed=1020, running=1020.07, first_output=1020.2, merged=1020.18,
    again=Protection('host3', (1022, 1022.5), 1024, 3 * MIB, 192 * MIB),
    ended=1028,
    checkpoints=[(1014.5, 1014.53), (1016, 1016.06), (1017.5, 1017.54),
                 (1026, 1026.03)],
    work={'host1': [Work(1008 + n / 10, n) for n in range(120)],
          'host2': [Work(1013 + n / 10, 50 + n) for n in range(150)],
          'host3': [Work(1024 + n / 10, 150 + n) for n in range(40)]},
    looks=[Look(1013 + n / 5, 1024 * (n % 7), MIB) for n in range(70)],
    merge=[(1020.1, 0, 65536), (1020.15, 32768, 65536)], safe=95,
    at_kill=119, taken_over=121, at_end=199, checked=36864,
    host_checked=36865, wrong=0, footer='with what')


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
        """A killed primary."""
        root = self.drawn(GOOD)
        texts = self.texts(root)
        self.assertIn('The primary is killed. Nothing is lost.', texts)
        self.assertIn('0 wrong blocks', texts)
        self.assertIn('the guest runs on host2 70 ms later', texts)
        self.assertIn('host2 went on with; none is missing', texts)
        self.assertIn('121 on host2', texts)
        self.assertIn('119 at the kill', texts)
        self.assertIn('95 guaranteed', texts)
        self.assertIn('since the last checkpoint may be gone.', texts)
        self.assertIn('protected again after 4.0 s, 3.0 of 192 MiB copied',
                      texts)
        # the guest has written while it was copied
        self.assertEqual(copied_words(193 * MIB, 192 * MIB),
                         'all 192 MiB copied')
        self.assertIn('with what', texts)
        for phase in ('alone', 'disks copied', 'memory', 'protected',
                      'alone on host2', 'protected again'):
            self.assertIn(phase, texts)
        self.assertIn('64 KiB of overlays merged 180 ms after the kill',
                      texts)
        self.assertIn('The guest stood still for each checkpoint (ms): 4 of '
                      'them, median 40 ms, longest 60 ms', texts)
        self.assertIn('36,864', texts)
        self.assertIn('36,865', texts)
        bars = [element.findtext(f'{SVG}title')
                for element in root.iter(f'{SVG}rect')
                if element.get('class') == 'checkpoint']
        self.assertEqual(bars, ['checkpoint 1: 30 ms', 'checkpoint 2: 60 ms',
                                'checkpoint 3: 40 ms', 'checkpoint 4: 30 ms'])
        self.assertEqual(self.badge(root), [GREEN])

    def test_stands_still(self) -> None:
        """No line runs through the time between the kill and the failover."""
        root = self.drawn(replace(GOOD, running=1022, first_output=1022.1))
        time = Scale(1008, GOOD.ended, LEFT, RIGHT)
        gap = time.at(GOOD.killed + 0.1), time.at(1021.9)
        for curve in root.iter(f'{SVG}polyline'):
            if curve.get('fill') == 'none' and curve.get('stroke') in HOSTS:
                points = [float(point.split(',')[0])
                          for point in curve.get('points', '').split()]
                crosses = min(points) < gap[0] and max(points) > gap[1]
                # the close-up has another scale, and ends before 600
                self.assertFalse(crosses and max(points) > 700, points)

    def test_newer_is_gone(self) -> None:
        """What no checkpoint has held is not guaranteed, and not hidden."""
        root = self.drawn(replace(GOOD, taken_over=100))
        texts = self.texts(root)
        self.assertIn('The primary is killed. The last checkpoint is kept.',
                      texts)
        self.assertIn('19 newer than the checkpoint are gone', texts)
        self.assertIn('host2 went on with; 19 newer ones are gone', texts)
        self.assertEqual(self.badge(root), [AMBER])

    @staticmethod
    def badge(root: ET.Element) -> List[str]:
        """Return the colours of what has round corners."""
        return [element.get('fill', '') for element in root.iter(f'{SVG}rect')
                if element.get('rx') == '8']

    def test_something_lost(self) -> None:
        """It does not look like the other."""
        root = self.drawn(replace(GOOD, wrong=3, taken_over=90,
                                  problems=['the guest read wrong <blocks>']))
        texts = self.texts(root)
        self.assertIn('The primary is killed. Something is lost.', texts)
        self.assertIn('3 wrong blocks', texts)
        self.assertIn('host2 went on with; fewer than guaranteed', texts)
        self.assertIn('the guest read wrong <blocks>', texts)
        self.assertEqual(self.badge(root), [RED])

    def test_secondary_killed(self) -> None:
        """Nothing is merged then, and maybe nothing was ever behind."""
        root = self.drawn(replace(GOOD, victim='host2', survivor='host1',
                                  killed_side='secondary', merged=None,
                                  merge=[], looks=[]))
        texts = self.texts(root)
        self.assertIn('The secondary is killed. Nothing is lost.', texts)
        self.assertNotIn('since the last checkpoint may be gone.', texts)
        self.assertIn('host2 is killed', texts)
        self.assertIn('Nothing to merge: the primary has its own disks.',
                      texts)

    def test_ticks(self) -> None:
        """Round values, all of them inside."""
        self.assertEqual(Scale(0, 337, 0, 1).ticks(5), [0, 100, 200, 300])
        self.assertEqual(Scale(17.2, 36, 0, 1).ticks(4), [20, 25, 30, 35])


if __name__ == '__main__':
    unittest.main(verbosity=2)
