"""Search for stop strings in a growing text: each of its characters is looked at once per stop string.

By Knuth, Morris and Pratt: of each stop string only the length of its beginning that the text ends with is
remembered. So long stop strings cost what short ones do, and the table of a stop string, which its searches
share, is only made as far as any text has matched it.
"""

from __future__ import annotations

from collections import deque


class StopString:
    """One stop string, and the table that all searches for it share."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._borders = [0]
        """At ``i``: length of the longest proper prefix of ``text`` that ``text[: i + 1]`` ends with."""

    def border(self, length: int) -> int:
        """Return the length of the longest proper prefix of ``text`` that its first ``length`` end with."""
        text, borders = self.text, self._borders
        for index in range(len(borders), length):
            size = borders[index - 1]
            while size and text[size] != text[index]:
                size = borders[size - 1]
            borders.append(size + (text[size] == text[index]))
        return borders[length - 1]

    def search(self, piece: str, matched: int, *, to_end: bool) -> tuple[int, int | None]:
        """Search in the next piece of a text.

        Args:
            matched: characters of the stop string that the text before it ends with.
            to_end: go on behind a hit, since it does not count.

        Returns:
            ``matched`` for the next piece, and where in this one the stop string ends; None if nowhere.
        """
        text, place = self.text, 0
        while place < len(piece):
            if not matched:
                place = piece.find(text[0], place)
                if place < 0:
                    return 0, None
            character = piece[place]
            while matched and text[matched] != character:
                matched = self.border(matched)
            matched += text[matched] == character
            place += 1
            if matched == len(text):
                if not to_end:
                    return matched, place
                matched = self.border(matched)
        return matched, None


class HeldText:
    """The end of a text that may be the beginning of a stop string, and so is not shown yet."""

    def __init__(self) -> None:
        self._pieces: deque[tuple[str, bool]] = deque()
        self.length = 0

    def append(self, piece: str, *, shown: bool = True) -> None:
        """Add to its end.

        Args:
            shown: whether `take` returns it, or drops it.
        """
        if piece:
            self._pieces.append((piece, shown))
            self.length += len(piece)

    def take(self, length: int) -> str:
        """Remove that many characters from its beginning, and return those that are shown."""
        taken: list[str] = []
        self.length -= length
        while length > 0:
            piece, shown = self._pieces.popleft()
            if len(piece) > length:
                self._pieces.appendleft((piece[length:], shown))
            if shown:
                taken.append(piece[:length])
            length -= len(piece)
        return "".join(taken)
