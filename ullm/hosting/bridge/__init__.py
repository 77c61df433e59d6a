"""A trio event loop in a background thread, for callers that live in asyncio, in no loop, or in another trio.

The engine's tree always runs on trio. `TrioThread` lets it be used from elsewhere: blocking calls, awaited
calls and streams, cancellation in both directions. Three rules keep it safe:

- A callback that crosses into a loop never raises, because that would end the loop.
- Wake-ups are coalesced: everything that became ready before the other loop got round to it costs one
  ``call_soon_threadsafe`` together.
- What the user holds (`Stream`) is not referenced from inside, so dropping it cancels the work.
"""

from ullm.hosting.bridge.handles import Job, Stream
from ullm.hosting.bridge.thread import TrioThread

__all__ = ["Job", "Stream", "TrioThread"]
