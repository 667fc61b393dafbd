# SPDX-License-Identifier: GPL-2.0-or-later
"""What may go wrong."""


class Failed(Exception):
    """Something that had to work did not; the text says what."""

    def __init__(self, text: str, event: str = 'failed') -> None:
        super().__init__(text)
        # what it means to a state
        self.event = event


class Refused(Failed):
    """QEMU has answered with an error."""


class Late(Failed):
    """QEMU has not answered; it may do so later."""


class Unreachable(Failed):
    """The other keeper does not answer."""


class Busy(Unreachable):
    """It has been asked, and may be about to do what it was asked for."""


def last_line(said: str) -> str:
    """What a program has said last, which is why it has failed."""
    return (said.strip() or 'it has said nothing').splitlines()[-1]
