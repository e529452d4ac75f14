"""Batches of the running requests' next tokens, and the tokens drawn from their logits."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

from pysteer import _native
from pysteer.engine.recovery import Recovery
from pysteer.engine.request import Request
from pysteer.engine.running import RunningRequests
from pysteer.engine.sampling import CandidateTokens
from pysteer.engine.statistics import EngineStatistics
from pysteer.llama.batch import LAST_ROW, NO_ROW, DecodeBatch
from pysteer.llama.context import CacheFullError, HookedContext, SpoiledDecodeError

_log = logging.getLogger(__name__)


class Share(NamedTuple):
    """Consecutive tokens of one request in a batch."""

    request: Request
    n: int


class Decoder:
    """Decodes the next tokens of all running requests, and draws from their logits.

    Args:
        context: the model's context.
        running: the requests.
        statistics: counts decodes and tokens.
        prompt_share: number of prompt tokens that a batch may have while other sequences generate.

    Attributes:
        batch: the batch under way.
    """

    def __init__(
        self,
        context: HookedContext,
        running: RunningRequests,
        statistics: EngineStatistics,
        *,
        prompt_share: int,
    ) -> None:
        self._context = context
        self._running = running
        self._statistics = statistics
        self._prompt_share = prompt_share
        self._recovery = Recovery(running, statistics)
        self._candidates = CandidateTokens(context.n_vocab)
        self.batch = DecodeBatch(context.n_batch)

    def step(self) -> None:
        """Decode one batch, or several where sequences cannot share one."""
        shares = self._shares()
        while shares and not self._running.make_room(sum(share.n for share in shares)):
            shares = self._shares()  # remaining requests go on before new ones start
        if self._context.batches_sequences:
            self._decode(shares)
            return
        for share in shares:  # llama.cpp orders the rows of a recurrent model's batch by itself
            if not self._decode([share]):
                return

    def _shares(self) -> list[Share]:
        """Return the next batch: a token of each sequence that generates, and parts of prompts.

        While some sequences generate, sequences that read prompts share `prompt_share` tokens
        evenly, so that a long prompt delays neither text nor other prompts. A request that has to
        be alone goes before all others.
        """
        alone = [request for request in self._running.active if request.alone]
        if alone:
            first = max(alone, key=lambda request: (request.suspicion, -request.order))
            return [Share(first, min(first.pending, self._context.n_batch))]
        generating = [request for request in self._running.active if request.pending == 1]
        reading = [request for request in self._running.active if request.pending > 1]
        shares = [Share(request, 1) for request in generating]
        room = self._context.n_batch - len(shares)
        if shares:
            room = min(room, self._prompt_share)
        reading.sort(key=lambda request: request.pending)
        for left, request in zip(range(len(reading), 0, -1), reading, strict=True):
            n = min(request.pending, room // left)
            if n:
                shares.append(Share(request, n))
            room -= n
        return shares

    def _decode(self, shares: Sequence[Share]) -> bool:
        """Decode a batch, and draw. False: it cannot be used, and all requests start over."""
        shares = [share for share in shares if share.request.slot is not None]
        if not shares:
            return True
        rows = self._fill(shares)
        requests = [share.request for share in shares]
        decisions = [request.steering.n_decisions for request in requests]
        self._recovery.decoding(requests)
        try:
            self._context.decode(self.batch)
        except CacheFullError:
            self._running.relieve(1)
            return True
        except SpoiledDecodeError as error:
            _undo(requests, decisions)
            self._recovery.recover(requests, requests, error)
            return False
        except Exception as error:
            _undo(requests, decisions)
            if len(shares) == 1:
                self._running.fail(shares[0].request, error)
            else:  # separate batches isolate the faulty request
                _log.info("a batch of %d sequences failed: %s", len(shares), error)
                for share in shares:
                    self._set_apart(share)
            return True
        self._statistics.decodes += 1
        self._statistics.tokens_decoded += self.batch.n_rows
        for request, n in shares:
            assert request.slot is not None
            self._running.cache.take(request.slot, n)
            request.n_past += n
        read = [
            (request, row)
            for request, row in zip(requests, rows, strict=True)
            if request.pending == 0
        ]
        failed = [
            request
            for request, row in read
            if not _native.has_usable_logits(self._context.logits(row))
        ]
        if failed:
            _undo(requests, decisions)
            self._recovery.recover(requests, failed)
            return False
        for request, row in read:
            self._passed(request)
            try:
                self._draw(request, row)
            # Of a stopping criterion or a logits processor, and not only an Exception: nothing
            # that one request's callback does may end the others.
            except BaseException as error:
                self._running.fail(request, error)
        return True

    def _passed(self, request: Request) -> None:
        """Record usable logits, so that the request's cells may be reused."""
        assert request.slot is not None
        request.slot.checked = request.n_past
        self._recovery.passed(request)

    def _fill(self, shares: Sequence[Share]) -> list[int]:
        """Fill the batch; return the last row of each share."""
        rows: list[int] = []
        self.batch.clear()
        for request, n in shares:
            start, stop = request.n_past, request.n_past + n
            assert request.slot is not None
            outputs = LAST_ROW if stop == request.n_tokens else NO_ROW
            tokens = request.tokens(start, stop)
            rows.append(self.batch.add(request.slot.number, start, tokens, outputs))
        return rows

    def _set_apart(self, share: Share) -> None:
        """Take back a request's part of a failed decode, and decode it alone next."""
        request = share.request
        assert request.slot is not None
        request.alone_until = request.n_past + share.n
        kept = min(request.n_past, request.steering.first_to_decode)
        request.n_past = self._running.cache.recover(request.slot, kept)

    def _draw(self, request: Request, row: int) -> None:
        """Draw the next token of a request from the logits of the batch's row `row`."""
        changed = request.steering.reprocess_from(request.n_past)
        if changed < request.n_past:
            assert request.slot is not None
            request.n_past = self._running.cache.cut(request.slot, changed)
            return
        logits = self._context.logits(row)
        if request.keep_first_logits and request.handle.first_logits is None:
            request.handle.first_logits = logits.copy()
        if request.stopping_criteria is not None and request.stopping_criteria(
            request.evaluated(), logits.copy()
        ):
            self._running.finish(request, "stop")
            return
        token = request.sampler.sample(self._candidates, logits)
        ended = request.writing.add(token)
        if ended is not None:
            self._running.finish(request, ended)
            return
        text = request.writing.take()
        if text:
            request.handle.push(text)
        if request.n_tokens == request.length_limit:
            self._running.finish(request, "length")
            return
        request.append(token)


def _undo(requests: Sequence[Request], decisions: Sequence[int]) -> None:
    """Take back the routers' decisions in a failed decode."""
    for request, n in zip(requests, decisions, strict=True):
        request.steering.undo(n)
