"""Recovery from decodes whose logits cannot be used: find the request at fault, and spare the rest.

Too strong a steering overflows somewhere behind its place. In attention, the NaN in its cells
reaches other sequences, whose weight of 0 times NaN is NaN: sequences of the same batch, and all
sequences that are decoded while the cells keep their data. So all results of such a decode are
dropped, the whole memory is overwritten, and all running requests are computed again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from pysteer.engine.request import Request
from pysteer.engine.running import RunningRequests
from pysteer.engine.statistics import EngineStatistics
from pysteer.errors import quoted
from pysteer.llama.context import SpoiledDecodeError

_log = logging.getLogger(__name__)

_TO_THE_END = 2**31  # beyond every position
_TRIED_UNSTEERED, _TO_ITSELF = 2, 3  # suspicion from which a request is decoded alone


class Recovery:
    """Finds the request at fault for a decode, and has the others computed again.

    A request is at fault if its logits are not usable although, since the memory was last
    overwritten, only its own cells have been computed. Until then the request is a suspect:
    decoded alone until its next usable logits, or to its end after too many suspicions.
    Every failure makes some request more suspect, so the search ends.

    Args:
        running: the requests.
        statistics: counts recoveries.
    """

    def __init__(self, running: RunningRequests, statistics: EngineStatistics) -> None:
        self._running = running
        self._statistics = statistics
        self._author: int | None = None  # a request with cells in memory, by its order
        self._mixed = False  # other requests' cells were computed, too

    def decoding(self, requests: Iterable[Request]) -> None:
        """Record the requests whose cells the next decode computes."""
        for request in requests:
            self._mixed = self._mixed or self._author not in (None, request.order)
            self._author = request.order

    def passed(self, request: Request) -> None:
        """Record usable logits of a request."""
        request.replaying = False
        if self._mixed:
            request.suspicion = 0

    def recover(
        self,
        requests: Sequence[Request],
        failed: Sequence[Request],
        error: SpoiledDecodeError | None = None,
    ) -> None:
        """Drop all results, after a decode that cannot be used.

        Args:
            requests: the requests of the decode.
            failed: the requests whose logits are not usable.
            error: the error of the decode, if any.
        """
        self._statistics.recoveries += 1
        guilty = failed[0] if len(requests) == 1 and not self._mixed else None
        _log.info(
            "a decode of %d sequences cannot be used: %s",
            len(requests),
            error or f"the logits of {len(failed)} are not finite",
        )
        for request in failed:
            request.suspicion += 1
        if guilty is not None:
            self._running.fail(guilty, _reason(guilty, error))
        for request in self._running.active:
            steered = request.steering.native is not None
            if guilty is not None:
                request.suspicion = min(request.suspicion, int(steered))
            elif steered:
                request.suspicion = max(request.suspicion, 1)
            request.alone_until = _alone_until(request, steered)
        self._running.start_over()
        self._author, self._mixed = None, False


def _alone_until(request: Request, steered: bool) -> int:
    if request.suspicion >= _TO_ITSELF:
        return _TO_THE_END
    return request.n_tokens if request.suspicion >= (1 if steered else _TRIED_UNSTEERED) else 0


def _reason(request: Request, error: SpoiledDecodeError | None) -> SpoiledDecodeError:
    """Return the error of the request at fault."""
    terms = request.steering.plan.terms
    if not terms:
        return error or SpoiledDecodeError(
            "the model itself, without steering, gives logits that are not finite for this "
            "prompt: the file is damaged, or a value overflows; try another quantisation"
        )
    asked = ", ".join(f"{quoted(term.category)} at strength {term.strength:g}" for term in terms)
    return SpoiledDecodeError(
        f"steering by {asked}: {error or 'the logits are not finite; lower the strength'}"
    )
