"""A trio event loop in a background thread, for callers that live in asyncio, in no loop, or in another trio.

Imports only errors. Three rules keep blocking calls, awaited calls, streams and cancellation safe:

- A callback that crosses into a loop never raises, because that would end the loop.
- Wake-ups are coalesced: all that is ready before the other loop runs costs one ``call_soon_threadsafe``.
- The user's `Stream` is not referenced from inside, so dropping it cancels the work.
"""

from ullm.hosting.bridge.handles import BackgroundTask, Stream
from ullm.hosting.bridge.thread import TrioThread

__all__ = ["BackgroundTask", "Stream", "TrioThread"]
