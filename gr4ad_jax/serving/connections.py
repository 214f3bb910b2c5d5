"""Connections of clients: how many there may be, and how long one may take to ask for something.

uvicorn bounds the time between two requests, but neither how long a request's head may take nor how
many connections are held open: sockets that say nothing would use up the process's files, and then
nothing else could be opened, answers to health checks included.
"""

from __future__ import annotations

import asyncio
import resource

from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_CONNECTIONS = 2_000
SLOW_S = 10.0  # that the head of a request, or a client's reading of an answer, may take
BACKLOG = 64  # connections that may be accepted before any of them is counted
OWN_FILES = 300  # of the process, beside connections: store, logs, libraries, a few backlogs
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\n\r\n"


def most_connections() -> int:
  """As many as leave the process the files that it needs for itself (`ulimit -n`)."""
  files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
  if files == resource.RLIM_INFINITY:
    return MOST_CONNECTIONS
  return min(MOST_CONNECTIONS, max(files - OWN_FILES, files // 4, 1))


class BoundedConnection(H11Protocol):
  """uvicorn's own connection with bounds: on its number, and on how long it may do nothing.

  Where there are as many as may be, a new one ends the one whose client has been silent longest.
  """

  since_s: float  # the loop's time when its client last sent something or got an answer
  _head_timer: asyncio.TimerHandle  # ends a connection that no request's head arrives on
  _read_timer: asyncio.TimerHandle | None = None  # ends one whose client does not read

  @property
  def waits(self) -> bool:
    """Whether it is its client's turn: to send a request or the rest of one, or to read."""
    answered = self.cycle is None or self.cycle.response_complete
    return answered or self.cycle.more_body or self.flow.write_paused

  def connection_made(self, transport: asyncio.Transport) -> None:
    """Counts it, and ends another one where they are too many."""
    super().connection_made(transport)
    self._expect_head()
    most = most_connections()
    if len(self.connections) <= most:
      return
    there = [other for other in self.connections if not other.transport.is_closing()]
    if len(there) <= most:
      return
    waiting = [other for other in there if other.waits and other is not self]
    if waiting:
      min(waiting, key=lambda other: other.since_s).transport.abort()
    else:
      transport.write(_FULL)
      transport.close()

  def data_received(self, data: bytes) -> None:
    """Takes a part of a request, whose head must be whole in time."""
    self.since_s = self.loop.time()
    super().data_received(data)
    if self.cycle is not None and not self.cycle.response_complete:
      self._head_timer.cancel()
    elif self._head_timer.cancelled() and not self.transport.is_closing():
      self._expect_head()

  def on_response_complete(self) -> None:
    """From now on the client has been silent."""
    self.since_s = self.loop.time()
    super().on_response_complete()

  def pause_writing(self) -> None:
    """The client does not read as fast as it is answered."""
    super().pause_writing()
    self._read_timer = self.loop.call_later(SLOW_S, self.transport.abort)

  def resume_writing(self) -> None:
    """It does again."""
    super().resume_writing()
    if self._read_timer is not None:
      self._read_timer.cancel()

  def connection_lost(self, exc: Exception | None) -> None:
    """Nothing is waited for any more."""
    super().connection_lost(exc)
    self._head_timer.cancel()
    if self._read_timer is not None:
      self._read_timer.cancel()

  def _expect_head(self) -> None:
    self.since_s = self.loop.time()
    # Ends it in the way in which uvicorn ends those that ask for nothing more.
    self._head_timer = self.loop.call_later(SLOW_S, self.timeout_keep_alive_handler)
