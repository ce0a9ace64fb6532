"""`render.json`: how a synthetic set is rendered, settled once by the first renderer and obeyed ever after.

Byte equality is promised under one render.json, so later renderers take its micro-batch (their driver hands them its
threads), and refuse to work where the device or a library differs, unless told that pixels may differ within
tolerance; each marker names the facts its shard was rendered under.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from raysynth.core.errors import EnvironmentFault
from raysynth.synth.renderer import CANARY, Renderer, SickWorker, canary_fault, is_out_of_memory
from raysynth.synth.sets import SyntheticSet

MEASURE_SECONDS = 20.0
PASSES = 3  # of each size; the best counts, for whatever else the machine does only slows a pass down
PASSES_SECONDS = 2.0  # and fewer where they take longer than this
LARGEST = 256
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
    facts = renderer.facts()
    settled = read_settled(store)
    if settled is None:
        size, rate = _measure(renderer, micro_batch)
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


def _pass(renderer: Renderer, size: int) -> float:
    """Rows/s of one micro-batch."""
    began = time.perf_counter()
    fault = canary_fault(renderer, size)
    if fault:
        raise SickWorker(fault)
    return size / (time.perf_counter() - began)


def _rate(renderer: Renderer, size: int) -> float:
    """Rows/s, the best of some micro-batches."""
    began, rates = time.perf_counter(), [_pass(renderer, size)]
    while len(rates) < PASSES and time.perf_counter() - began < PASSES_SECONDS:
        rates.append(_pass(renderer, size))
    return max(rates)


def _measure(renderer: Renderer, typed: int | None) -> tuple[int, float]:
    """(micro-batch, rows/s): doubles the micro-batch while that pays, memory lasts and the time is not spent."""
    warm = typed or 1
    _pass(renderer, warm)  # the first one pays for allocation, kernel choice and compilation
    if typed:
        return typed, _rate(renderer, typed)
    began = time.perf_counter()
    best, size = (1, _rate(renderer, 1)), 2
    while size <= LARGEST and time.perf_counter() - began < MEASURE_SECONDS:
        try:
            renderer.render([CANARY] + [None] * (size - 1), size)
            rate = _rate(renderer, size)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            break
        # Two sizes in a row without gain end the search; one may be an unlucky measurement.
        if rate > best[1] * WORTH:
            best = (size, rate)
        elif size > best[0] * 2:
            break
        size *= 2
    return best
