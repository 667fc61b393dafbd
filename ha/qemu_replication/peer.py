# SPDX-License-Identifier: GPL-2.0-or-later
"""How one keeper asks the other.

A request is a line of JSON, and so is the answer.  With a key, a request is
signed together with a number that the one who is asked has drawn, and the
answer with one of who asks besides: nobody else can ask or answer, nor say
again what was said before.  With certificates, TLS does that.
"""

import asyncio
import hashlib
import hmac
import json
import secrets
import ssl
from typing import Awaitable, Callable, Optional, Tuple

from .check import psk, tls_context
from .config import Config, Json
from .errors import Busy, Failed, Unreachable

MAX_LINE = 1 << 20
Answer = Callable[[Json], Awaitable[Json]]


def _tls(config: Config, end: str) -> Optional[ssl.SSLContext]:
    if config.tls.kind != 'x509':
        return None
    return tls_context(config, end)


class Peer:
    """Both directions."""

    def __init__(self, config: Config, answer: Answer) -> None:
        self._config = config
        self._answer = answer
        # nobody has the one that is made up where there is none
        self._key = psk(config) or secrets.token_bytes() \
            if config.tls.kind == 'psk' else b''
        self._server: Optional[asyncio.AbstractServer] = None

    def _sign(self, *parts: str) -> str:
        return hmac.new(self._key, '\n'.join(parts).encode(),
                        hashlib.sha256).hexdigest()

    def _pack(self, nonce: str, way: str, body: Json) -> bytes:
        text = json.dumps(body)
        return json.dumps([text, self._sign(nonce, way, text)]).encode() \
            + b'\n'

    def _unpack(self, nonce: str, way: str, line: bytes) -> Json:
        try:
            text, signed = json.loads(line)
            good = hmac.compare_digest(signed, self._sign(nonce, way, text))
            body = json.loads(text)
        except (ValueError, TypeError) as exc:
            raise Unreachable('the other keeper talks nonsense') from exc
        if not good or not isinstance(body, dict):
            raise Unreachable('the other keeper has another key')
        return body

    async def serve(self) -> None:
        """Listen to the other one."""
        self._server = await asyncio.start_server(
            self._serve_one, self._config.address, self._config.ports.keeper,
            limit=MAX_LINE, ssl=_tls(self._config, 'server'))

    async def close(self) -> None:
        """Stop listening."""
        if self._server:
            self._server.close()

    async def _serve_one(self, reader: asyncio.StreamReader,
                         writer: asyncio.StreamWriter) -> None:
        nonce = secrets.token_hex(16)
        try:
            writer.write(nonce.encode() + b'\n')
            line = await asyncio.wait_for(reader.readline(),
                                          self._config.limits.answer)
            # QEMU may be asked twice for it, which helps the next one who
            # asks; nobody waits as long
            asked = self._unpack(nonce, 'ask', line)
            body = await asyncio.wait_for(self._answer_meant(asked),
                                          3 * self._config.limits.answer)
            writer.write(self._pack(nonce + str(asked.get('nonce', '')),
                                    'tell', body))
            await writer.drain()
        except (OSError, ValueError, asyncio.TimeoutError, Failed):
            # whoever it was gets no answer
            pass
        finally:
            writer.close()

    async def _answer_meant(self, body: Json) -> Json:
        """Hosts may have several VMs; who is older does not say which."""
        us = self._config.vm.name, self._config.here
        if (body.get('vm', us[0]), body.get('to', us[1])) == us:
            return await self._answer(body)
        return {'wrong': f'the keeper on {self._config.address}, port '
                f'{self._config.ports.keeper}, is that of {us[0]} on {us[1]}'}

    async def ask(self, what: str, **more: object) -> Json:
        """Ask the other keeper."""
        asked = asyncio.Event()
        try:
            return await asyncio.wait_for(self._ask(what, more, asked),
                                          self._config.limits.answer)
        except asyncio.TimeoutError as exc:
            kind = Busy if asked.is_set() else Unreachable
            raise kind(f'the keeper on {self._config.peer} does not '
                       'answer') from exc
        except (OSError, ValueError) as exc:
            text = getattr(exc, 'strerror', None) or exc
            raise Unreachable(f'no keeper on {self._config.peer}: {text}'
                              ) from exc

    async def _ask(self, what: str, more: Json, asked: asyncio.Event) -> Json:
        context = _tls(self._config, 'client')
        reader, writer = await asyncio.open_connection(
            self._config.peer_address, self._config.ports.keeper,
            limit=MAX_LINE, ssl=context)
        try:
            nonces, line = await self._talk(reader, writer, what, more,
                                            asked)
            body = self._unpack(nonces, 'tell', line)
            if 'wrong' in body:
                raise Unreachable(body['wrong'])
            return body
        finally:
            writer.close()

    async def _talk(self, reader: asyncio.StreamReader,
                    writer: asyncio.StreamWriter, what: str, more: Json,
                    asked: asyncio.Event) -> Tuple[str, bytes]:
        nonce = (await reader.readline()).decode().strip()
        ours = secrets.token_hex(16)
        writer.write(self._pack(nonce, 'ask', {
            'ask': what, 'vm': self._config.vm.name, 'to': self._config.peer,
            'nonce': ours, **more}))
        asked.set()
        line = await reader.readline()
        if not line:
            raise OSError(0, 'it has closed the connection')
        return nonce + ours, line
