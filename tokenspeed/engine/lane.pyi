"""From the engine's frame to the client's socket in one call, while nothing but plain text comes.

A lane belongs to one choice. It is opened after an output that went the long way (`Stream.feed`), where everybody on
that way says that more text would only be added to an event of known bytes; it then takes tokens until one is not so
plain, and is closed before anybody looks at what it has changed. What it sends is what the long way would have sent.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Protocol

from tokenspeed.engine.messages import ChoiceTokens

class Transport(Protocol):
    """What a lane uses of asyncio's and uvloop's transports."""

    def get_extra_info(self, name: str) -> object: ...
    def is_closing(self) -> bool: ...
    def get_write_buffer_size(self) -> int: ...
    def write(self, data: bytes) -> None: ...

class Pieces:
    """What each token of a vocabulary of `size` adds to a JSON string, learnt when it first comes (72 bytes a token).

    `table` has the bytes of each. Those of `hidden` never go by a lane.
    """

    size: int
    def __init__(self, table: Mapping[int, bytes], hidden: Collection[int], size: int) -> None: ...

class Frame:
    """An event around its text: `head`, the text as a JSON string, `tail`.

    `numbered`: between head and text stand the number of the event and these bytes. `ids`: between text and tail stand
    these bytes and the list of the token ids.
    """

    def __init__(self, head: bytes, tail: bytes, numbered: bytes | None = None, ids: bytes | None = None) -> None: ...

class Way:
    """A frame for text without any of the characters `but`. With `escapes` those of complete escapes do not count.

    With `quoted` the text is written as inside of a JSON string in the JSON string.
    """

    def __init__(self, frame: Frame, but: str, escapes: bool, quoted: bool = False) -> None: ...

class Outlet:
    """A connection of which lanes write events, straight to its socket where neither TLS nor waiting bytes forbid it.

    A lane refuses while more than `limit` bytes wait. `last_sent` is the time of the last event, in seconds.
    """

    last_sent: float
    def __init__(self, transport: Transport, chunked: bool, limit: int) -> None: ...

class Gaps:
    """The times between tokens that went by lanes, counted as `Histogram` does."""

    def __init__(self, bounds: tuple[float, ...]) -> None: ...
    def take(self) -> tuple[list[int], float]:
        """The counts and the sum in seconds since the last call."""

class Lane:
    """The express lane of one choice, closed at first. Adds to `token_ids`; characters of `stops` never go by it."""

    is_open: bool
    last: float
    """When the last token came, in seconds of the loop's clock."""
    num_events: int
    """Sent since it was opened."""
    def __init__(self, pieces: Pieces, token_ids: list[int], stops: str) -> None: ...
    def open(self, way: Way, outlet: Outlet, gaps: Gaps, rest: bytes, last: float, number: int) -> None:
        """From now on tokens go by, behind the `rest` of a character.

        `last` is the time of the token before, `number` that of the next event.
        """
    def close(self) -> int:
        """No more go by. Gives how many tokens did since it was opened: the last ones of `token_ids`."""

def carry(
    gained: list[ChoiceTokens], lanes: dict[int, Lane], now: float, failed: Callable[[ChoiceTokens], None]
) -> list[ChoiceTokens]:
    """Send what open lanes take; gives the rest. `failed` is called while an exception of sending is handled."""
