# SPDX-License-Identifier: GPL-2.0-or-later
"""A protected VM: what keeps it so, and its command line."""
