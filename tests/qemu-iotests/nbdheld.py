# SPDX-License-Identifier: GPL-2.0-or-later
"""
Many requests of NBD that are done at the same time, and how many segments it
took to send what comes of it.
"""

from contextlib import closing
import socket
import struct

import iotests
from nbdclient import Connection
from nbdserver import CMD_FLUSH, CMD_WRITE, SOCKET_SECONDS
import replication
from replication import KIB, MIB

# Where struct tcp_info counts the segments with data that were received
DATA_SEGS_IN = 152
ALIGN = 4 * KIB
# With one that is held and one more, as many as may be in flight
WRITES = 62
HELD = 1 << 40
SMALL_BUFFER = 4 * KIB


def segments(sock: socket.socket) -> int:
    """How many times something was received"""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO,
                           DATA_SEGS_IN + 4)
    return int(struct.unpack_from('I', info, DATA_SEGS_IN)[0])


def shrink(sock: socket.socket) -> None:
    """Also what a listener accepts"""
    for option in socket.SO_SNDBUF, socket.SO_RCVBUF:
        sock.setsockopt(socket.SOL_SOCKET, option, SMALL_BUFFER)


class VM(replication.VM):
    """Its server listens where the test knows the port"""

    def nbd_server_start(self) -> None:
        with socket.create_server(('127.0.0.1', 0)) as listener:
            shrink(listener)
            self.address = listener.getsockname()
            self.send_fd_scm(fd=listener.fileno())
            self.cmd('getfd', fdname='listener')
        self.cmd('nbd-server-start',
                 addr={'type': 'fd', 'data': {'str': 'listener'}})


class HeldCase(iotests.QMPTestCase):
    """Requests that all wait for a write, so that they go on at once"""

    align = ALIGN
    # It does a request while it is asked to, so that many end at once
    image = f'image.driver=null-co,image.size={MIB},image.read-zeroes=on'

    def setUp(self) -> None:
        self.vm = VM()
        self.vm.add_object('iothread,id=iothread0')
        # With a node instead of a drive, qemu-io would wait for the graph
        # lock, which a request that is held keeps
        self.vm.add_drive_raw('if=none,id=drive,node-name=disk,'
                              f'driver=blkdebug,align={self.align},'
                              f'{self.image}')
        self.vm.launch()
        self.addCleanup(self.vm.shutdown)
        self.vm.export('disk')

    def connect(self, extended: bool = False) -> 'closing[Connection]':
        sock = socket.socket()
        shrink(sock)
        sock.settimeout(SOCKET_SECONDS)
        sock.connect(self.vm.address)
        return closing(Connection(sock, extended))

    def hold_write(self, client: Connection) -> None:
        """A write of less than a block, which others must not overlap"""
        self.vm.io('drive', 'break pwritev_rmw_head A')
        client.send(CMD_WRITE, HELD, 1, 1)
        self.vm.io('drive', 'wait_break A')

    def hold_writes(self, client: Connection) -> None:
        """Have many wait for one, until it is let go"""
        self.hold_write(client)
        for cookie in range(WRITES):
            client.send(CMD_WRITE, cookie, 0, self.align)
        # requests arrive in order: when this one is answered, all have
        client.send(CMD_FLUSH, WRITES)
        self.assertEqual(client.reply(), WRITES)

    def let_go(self) -> None:
        self.vm.io('drive', 'resume A')
