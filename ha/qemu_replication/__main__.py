# SPDX-License-Identifier: GPL-2.0-or-later
"""As python3 -m qemu_replication."""

import sys

from .cli import main

sys.exit(main(sys.argv[1:]))
