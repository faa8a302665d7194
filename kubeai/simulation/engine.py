"""A continuous-batching engine with a paged, prefix-cached KV cache, as a pure state machine.

It owns the queue, the batch and the KV blocks of one replica. It handles tokens only as counts and
block hashes; the caller knows a sequence's output when it submits it.
Time is a number that callers hand in (seconds, any origin), so the same engine runs in real time
(the mock engine) and in virtual time. It is deterministic: same calls, same answers.

The rules are those of vLLM's scheduler (V1), which this module follows:

- Work proceeds in steps. A step takes the running sequences first, in arrival order, then waiting
  ones, up to ``max_batch`` sequences or ``step_tokens`` tokens. A prompt that exceeds the remaining
  budget is computed in several steps (chunked prefill).
- A sequence whose prompt is computed generates one token per step, the first in the step that
  completes its prefill.
- When a sequence enters the batch, its leading full blocks are reused if their hashes are in the
  cache, except for the last token, which must be computed to sample from.
- When the blocks run out, the most recently started sequence frees its blocks and restarts from the
  head of the queue (preemption by recomputation).
- Blocks of finished sequences stay in the cache until they are evicted: least recently used first,
  the tail of a sequence before its head.

One difference: two sequences that compute the same block at the same time share it afterwards,
where vLLM keeps both copies.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Sequence as Seq
from typing import NamedTuple

import msgspec


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """An engine's speed and memory. A rate of 0 means instant.

    The duration of a step has two models: ``decode_tokens_per_s``, independent of the batch size;
    or the hardware's (``presets``): the maximum of the time to read the weights and the time to
    compute, plus the time to read the keys and values of decoding sequences.
    """

    max_batch: int = 256  # sequences in a step
    step_tokens: int = 2048  # tokens in a step
    prefill_tokens_per_s: float = 8000.0  # of the whole engine
    decode_tokens_per_s: float = 50.0  # of each sequence in the batch
    weights_s: float = 0.0  # minimum step time; if set, decoded tokens also cost compute time
    context_tokens_per_s: float = 0.0  # rate of reading the context of decoding sequences
    # Rate of attention in prefill, in pairs of a prompt token and a token before it. What long
    # prompts cost more than in proportion.
    attention_pairs_per_s: float = 0.0
    cache_blocks: int = 4096
    block_tokens: int = 16

    def step_s(
        self, prefill_tokens: int, decodes: int, context_tokens: int = 0, pairs: int = 0
    ) -> float:
        """The duration of a step with these prompt tokens and decoding sequences.

        ``context_tokens``: total context length of the decoding sequences. ``pairs``: of a prompt
        token and a token before it.
        """
        duration = 0.0
        computed = prefill_tokens + (decodes if self.weights_s else 0)
        if computed and self.prefill_tokens_per_s:
            duration = computed / self.prefill_tokens_per_s
        duration = max(duration, self.weights_s)
        if decodes and self.decode_tokens_per_s:
            duration += 1.0 / self.decode_tokens_per_s
        if context_tokens and self.context_tokens_per_s:
            duration += context_tokens / self.context_tokens_per_s
        if pairs and self.attention_pairs_per_s:
            duration += pairs / self.attention_pairs_per_s
        return duration


class Sequence:
    """One prompt and its progress. Created by :meth:`Engine.submit`; read-only for callers."""

    __slots__ = (
        "arrived_s",
        "block_end",
        "blocks",
        "cached_tokens",
        "computed",
        "done",
        "finished_s",
        "first_token_s",
        "hashes",
        "output_tokens",
        "owner",
        "produced",
        "prompt_tokens",
        "scheduled",
        "shared",
        "total",
    )

    def __init__(
        self, prompt_tokens: int, output_tokens: int, hashes: Seq[int], owner: object, now: float
    ) -> None:
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens  # number it will generate
        self.hashes = hashes  # of its full blocks, prompt and output together
        self.owner = owner  # the caller's; opaque to the engine
        self.arrived_s = now
        self.first_token_s = math.nan
        self.finished_s = math.nan
        self.cached_tokens = 0  # prompt tokens found in the cache when it first entered the batch
        self.produced = 0  # output tokens so far
        self.done = False  # finished or cancelled
        self.total = prompt_tokens  # tokens known: prompt + produced
        self.computed = 0  # of those, tokens whose keys and values are in memory
        self.scheduled = 0  # tokens in the current step
        self.blocks = 0  # KV blocks that it holds
        self.shared = 0  # of those, the leading ones that others can find by hash
        self.block_end = 0  # below this many tokens it neither fills a block nor needs another


class Step(NamedTuple):
    """The completed step's results and when to call again."""

    advanced: list[Sequence]  # each generated a token, or (``output_tokens`` 0) was computed
    next_s: float | None  # the end of the current step; None: idle


class Engine:
    """One replica's engine. Call ``submit``, then ``step`` at each time that it returns."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.cache = BlockCache(config.cache_blocks)
        self.prefix_queries = 0  # prompt tokens looked up in the cache
        self.prefix_hits = 0  # of those, found
        self.prompt_tokens = 0  # of sequences that have entered the batch
        self.output_tokens = 0
        self.finished = 0
        self.preemptions = 0
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._batch: list[Sequence] = []
        self._ends_s: float | None = None  # end of the current step

    @property
    def waiting(self) -> int:
        """Number of queued sequences."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of sequences in the batch."""
        return len(self._running)

    def submit(
        self,
        now: float,
        prompt_tokens: int,
        output_tokens: int,
        hashes: Seq[int] = (),
        owner: object = None,
    ) -> Sequence:
        """Queue a sequence. Call ``step`` afterwards if no step is in progress.

        ``output_tokens`` 0: only the prompt is computed (embeddings). ``hashes``: one per full
        block of prompt and output, each covering all tokens up to the block's end; () keeps the
        sequence out of the prefix cache. ValueError if the sequence can never fit.
        """
        if prompt_tokens < 1 or output_tokens < 0:
            raise ValueError("a sequence must have a prompt")
        if prompt_tokens + output_tokens > self.config.cache_blocks * self.config.block_tokens:
            raise ValueError("the sequence is longer than the KV cache")
        sequence = Sequence(prompt_tokens, output_tokens, hashes, owner, now)
        self._waiting.append(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Remove a sequence (its client disconnected); no effect if it is done."""
        if sequence.done:
            return
        sequence.done = True
        try:
            self._waiting.remove(sequence)
        except ValueError:
            self._running.remove(sequence)
            self._release(sequence)

    def step(self, now: float) -> Step:
        """Complete the step that is due and start the next one at ``now`` if there is work."""
        advanced: list[Sequence] = []
        if self._ends_s is not None:
            if now < self._ends_s:
                return Step(advanced, self._ends_s)
            advanced = self._complete(self._ends_s)
            self._ends_s = None
        if self._running or self._waiting:
            self._ends_s = self._begin(now)
        return Step(advanced, self._ends_s)

    def _begin(self, now: float) -> float | None:
        self._batch = []
        prefill, decodes, context = 0, 0, 0
        budget = self.config.step_tokens
        preemptions = self.preemptions
        index = 0
        while budget and index < len(self._running):
            sequence = self._running[index]
            tokens = min(sequence.total - sequence.computed, budget)
            # Fast path: most sequences have room for a token without completing a block.
            if sequence.computed + tokens >= sequence.block_end and not self._grow(
                sequence, sequence.computed + tokens
            ):
                self._preempt(self._running.pop())
                continue
            if sequence.produced and tokens == 1:
                decodes += 1
                context += sequence.computed
            else:
                prefill += tokens
            budget -= tokens
            sequence.scheduled = tokens
            self._batch.append(sequence)
            index += 1
        if preemptions == self.preemptions:  # else memory is short: admit no more sequences
            prefill += self._enter(budget)
        if not self._batch:
            return None
        pairs = self._pairs() if self.config.attention_pairs_per_s else 0
        return now + self.config.step_s(prefill, decodes, context, pairs)

    def _pairs(self) -> int:
        """Pairs of a prompt token that this step computes and a token before it."""
        return sum(
            sequence.scheduled * (2 * sequence.computed + sequence.scheduled) // 2
            for sequence in self._batch
            if not sequence.produced or sequence.scheduled > 1
        )

    def _enter(self, budget: int) -> int:
        """Admit waiting sequences to the step; returns the number of their tokens it computes."""
        entered = 0
        block = self.config.block_tokens
        while self._waiting and entered < budget and len(self._running) < self.config.max_batch:
            sequence = self._waiting[0]
            findable = min((sequence.total - 1) // block, len(sequence.hashes))
            found = self.cache.match(sequence.hashes, findable)
            cached = found * block
            tokens = min(sequence.total - cached, budget - entered)
            needed = -(-(cached + tokens) // block)
            if not self.cache.admit(sequence.hashes, found, needed - found):
                break
            self._waiting.popleft()
            self._running.append(sequence)
            sequence.blocks, sequence.shared, sequence.computed = needed, found, cached
            self._share(sequence, cached + tokens)
            if not sequence.produced:
                self._count_lookup(sequence, cached)
            sequence.scheduled = tokens
            self._batch.append(sequence)
            entered += tokens
        return entered

    def _count_lookup(self, sequence: Sequence, cached: int) -> None:
        sequence.cached_tokens = cached
        self.prompt_tokens += sequence.prompt_tokens
        if sequence.hashes:
            self.prefix_queries += sequence.prompt_tokens
            self.prefix_hits += cached

    def _complete(self, ended_s: float) -> list[Sequence]:
        advanced = []
        finished = False
        for sequence in self._batch:
            if sequence.done:  # cancelled during the step
                continue
            sequence.computed += sequence.scheduled
            if sequence.computed < sequence.total:
                continue
            advanced.append(sequence)
            if sequence.output_tokens:
                if not sequence.produced:
                    sequence.first_token_s = ended_s
                sequence.produced += 1
                sequence.total += 1
                self.output_tokens += 1
            if sequence.produced == sequence.output_tokens:
                sequence.done = finished = True
                sequence.finished_s = ended_s
                self.finished += 1
                self._release(sequence)
        if finished:
            self._running = [sequence for sequence in self._running if not sequence.done]
        self._batch = []
        return advanced

    def _grow(self, sequence: Sequence, computed: int) -> bool:
        needed = -(-computed // self.config.block_tokens) - sequence.blocks
        if needed > 0:
            if not self.cache.take(needed):
                return False
            sequence.blocks += needed
        self._share(sequence, computed)
        return True

    def _share(self, sequence: Sequence, computed: int) -> None:
        """Add the blocks that ``computed`` tokens fill to the cache."""
        block = self.config.block_tokens
        full = min(computed // block, len(sequence.hashes))
        if full > sequence.shared:
            self.cache.share(sequence.hashes[sequence.shared : full])
            sequence.shared = full
        sequence.block_end = computed - computed % block + (block if computed % block else 1)

    def _release(self, sequence: Sequence) -> None:
        self.cache.release(sequence.hashes[: sequence.shared], sequence.blocks - sequence.shared)
        sequence.blocks = sequence.shared = 0

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        sequence.computed = 0
        self._waiting.appendleft(sequence)
        self.preemptions += 1


class BlockCache:
    """KV blocks: a count of private ones, reference-counted shared ones, and idle ones to evict."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._private = 0
        self._shared: dict[int, int] = {}  # hash → holders
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def used(self) -> int:
        """Blocks held by sequences."""
        return self._private + len(self._shared)

    def match(self, hashes: Seq[int], limit: int) -> int:
        """The number of leading blocks, at most ``limit``, that are in memory."""
        shared, idle = self._shared, self._idle
        for index in range(limit):
            found = hashes[index]
            if found not in shared and found not in idle:
                return index
        return limit

    def admit(self, hashes: Seq[int], found: int, fresh: int) -> bool:
        """Hold the first ``found`` blocks and take ``fresh`` private ones; False if no room."""
        revived = sum(1 for index in range(found) if hashes[index] not in self._shared)
        if self.used + revived + fresh > self.capacity:
            return False
        for index in range(found):
            self._hold(hashes[index])
        return self.take(fresh)

    def take(self, count: int) -> bool:
        """Take private blocks, evicting idle ones; False, taking none, if there is no room."""
        if self.used + count > self.capacity:
            return False
        for _ in range(self.used + len(self._idle) + count - self.capacity):
            self._idle.popitem(last=False)
        self._private += count
        return True

    def share(self, hashes: Seq[int]) -> None:
        """Make private blocks, which are now full, shared."""
        self._private -= len(hashes)
        for block in hashes:
            self._hold(block)

    def release(self, hashes: Seq[int], private: int) -> None:
        """Release private and shared blocks, the last one first so that it is evicted first."""
        self._private -= private
        for block in reversed(hashes):
            holders = self._shared[block] - 1
            if holders:
                self._shared[block] = holders
            else:
                del self._shared[block]
                self._idle[block] = None

    def _hold(self, block: int) -> None:
        self._idle.pop(block, None)
        self._shared[block] = self._shared.get(block, 0) + 1
