"""`render.json`: how a synthetic set is rendered, settled once by the first renderer and obeyed ever after.

Byte equality is promised under one render.json, so later renderers take its micro-batch (their driver hands them its
threads), and refuse to work where the device or a library differs, unless told that pixels may differ within
tolerance; each marker names the facts its shard was rendered under.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from raysynth.core.errors import EnvironmentFault
from raysynth.synth.renderer import (
    CANARY,
    Renderer,
    SickWorker,
    canary_fault,
    facts_of,
    is_out_of_memory,
    release_memory,
)
from raysynth.synth.sets import SyntheticSet

MEASURE_SECONDS = 20.0
PASSES = 3  # of each size; the best counts, for whatever else the machine does only slows a pass down
PASSES_SECONDS = 2.0  # and fewer where they take longer than this
LARGEST = 256
LARGEST_ON_CUDA = 1024
WORTH = 1.05  # a larger micro-batch must be at least this much faster: it costs memory and finer bisection


@dataclass(frozen=True)
class Settled:
    """What render.json says."""

    micro_batch: int
    rows_per_s: float
    facts: dict[str, Any]

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU renders, so that its hours are what the set costs."""
        return bool(self.facts.get("cuda"))


def read_settled(store: SyntheticSet) -> Settled | None:
    """The set's render.json, or None before the first renderer started."""
    record = store.get_json("render.json")
    return Settled(record["micro_batch"], record["rows_per_s"], record["facts"]) if record else None


def settle(store: SyntheticSet, renderer: Renderer, micro_batch: int | None, accept_change: bool = False) -> Settled:
    """Writes render.json if absent, with a measured micro-batch where none is typed; then obeys what is there.

    Raises:
        EnvironmentFault: this renderer's facts differ from render.json and `accept_change` is false.
        SickWorker: the renderer fails its canary while it is measured.
    """
    facts = facts_of(renderer)
    settled = read_settled(store)
    if settled is None:
        size, rate = _measure(renderer, micro_batch, LARGEST_ON_CUDA if facts.get("cuda") else LARGEST)
        store.create_json("render.json", {"micro_batch": size, "rows_per_s": round(rate, 4), "facts": facts})
        settled = read_settled(store)
        assert settled is not None
    changed = {k: (settled.facts.get(k), facts.get(k)) for k in {*settled.facts, *facts}
               if settled.facts.get(k) != facts.get(k)}  # fmt: skip
    if changed and not accept_change:
        lines = "; ".join(f"{k}: {was!r} there, {now!r} here" for k, (was, now) in sorted(changed.items()))
        raise EnvironmentFault(
            f"{store.storage.url(store.file('render.json'))} says how this set is rendered, and this renderer differs "
            f"({lines}). Use the same device and versions, or compute.accept_render_change=true: the rows and their "
            "noise stay the same, pixels may differ within rounding."
        )
    return settled


def _canary(renderer: Renderer, size: int) -> None:
    fault = canary_fault(renderer, size)
    if fault:
        raise SickWorker(fault)


def _rate(micro_batch: Callable[[], Any], size: int) -> float:
    """Rows/s, the best of some micro-batches."""
    rates: list[float] = []
    began = time.perf_counter()
    while not rates or (len(rates) < PASSES and time.perf_counter() - began < PASSES_SECONDS):
        start = time.perf_counter()
        micro_batch()
        rates.append(size / (time.perf_counter() - start))
    return max(rates)


def _measure(renderer: Renderer, typed: int | None, largest: int) -> tuple[int, float]:
    """(micro-batch, rows/s as the set is rendered).

    Sizes are compared by the renderer's brief form where it has one, or a sampler of many steps would spend the time
    on the first sizes; health and the rate are the renderer's own.
    """
    if typed:
        _canary(renderer, typed)  # the first one pays for allocation, kernel choice and compilation
        size = typed
    else:
        brief = getattr(renderer, "brief", None)
        size = _fastest(brief() if brief else renderer, largest)
        release_memory(renderer)
    return size, _rate(partial(_canary, renderer, size), size)


def _fastest(renderer: Renderer, largest: int) -> int:
    """The micro-batch after doubling it while that pays, memory lasts and the time is not spent."""

    def rate(size: int) -> float:
        micro_batch = partial(renderer.render, [CANARY] + [None] * (size - 1), size)
        micro_batch()
        return _rate(micro_batch, size)

    renderer.render([CANARY], 1)  # not on the clock: it starts the device
    began = time.perf_counter()
    best, size = (1, rate(1)), 2
    while size <= largest and time.perf_counter() - began < MEASURE_SECONDS:
        try:
            found = rate(size)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            break
        # Two sizes in a row without gain end the search; one may be an unlucky measurement.
        if found > best[1] * WORTH:
            best = (size, found)
        elif size > best[0] * 2:
            break
        size *= 2
    return best[0]
