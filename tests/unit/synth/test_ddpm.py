"""The renderer against plain diffusers, and the engine's two promises: own noise, own bytes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raysynth.core.errors import DataError
from raysynth.core.experiment import Sampling
from raysynth.synth.ddpm import DDPMRenderer, compile_network
from raysynth.synth.renderer import CANARY, Row, canary_fault, noise_seed, to_uint8
from raysynth.synth.samplers import cast_weights, denoise, guide, guided_steps, initial_noise, make_sampler
from tests.generators import SPEC, exported

SAMPLERS: list[Any] = ["ddim", "dpm++", "ddpm"]
N = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An exported generator of a few real steps on digits."""
    place = tmp_path_factory.mktemp("export")
    exported(place)
    return str(place)


def rows(n: int = N) -> list[Row | None]:
    return [row(str(i)) for i in range(n)]


def row(name: str) -> Row:
    return Row(name, noise_seed(0, name, 0), {f"label_{c}": int(c == name) for c in SPEC.classes})


def renderer(folder: str, sampler: Literal["ddim", "dpm++", "ddpm"] = "dpm++", **keys: Any) -> DDPMRenderer:
    return DDPMRenderer(folder, Sampling(sampler=sampler, **({"steps": 5} | keys)), threads=1)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_row_alone_has_the_bytes_it_has_in_a_batch(folder: str, sampler: Any, guidance: float) -> None:
    made = renderer(folder, sampler, guidance_scale=guidance, guidance_rescale=0.7, steps=4)
    whole = made.render(rows(), N)
    assert whole.shape == (N, 1, 8, 8)
    assert whole.dtype == np.float32
    for place, wanted in enumerate(rows()):
        alone: list[Row | None] = [None] * N
        alone[place] = wanted
        assert made.render(alone, N)[place].tobytes() == whole[place].tobytes()
    assert made.render(rows(), N).tobytes() == whole.tobytes()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_another_micro_batch_has_the_same_noise_and_pixels_within_tolerance(folder: str, sampler: Any) -> None:
    made = renderer(folder, sampler, eta=1.0 if sampler == "ddim" else 0.0)
    whole = made.render(rows(), N)
    np.testing.assert_allclose(made.render(rows()[2:3], 1)[0], whole[2], atol=1e-4)
    np.testing.assert_allclose(made.render([*rows()[2:4], None], 3)[:2], whole[2:4], atol=1e-4)


def test_initial_noise_is_each_rows_own() -> None:
    def own(*seeds: int | None) -> torch.Tensor:
        return initial_noise([None if s is None else torch.Generator().manual_seed(s) for s in seeds], (1, 4, 4))

    assert torch.equal(own(7, 8, 9)[1], own(8)[0])
    assert not own(None).any()
    assert torch.equal(own(8)[0], torch.randn((1, 4, 4), generator=torch.Generator().manual_seed(8)))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_plain_diffusers_gives_the_same_image_from_the_same_noise(folder: str, sampler: Any) -> None:
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel

    unet: Any = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval()
    kinds: Any = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler, "dpm++": DPMSolverMultistepScheduler}
    scheduler = kinds[sampler].from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(5)
    own = torch.Generator().manual_seed(row("1").seed)
    x = torch.randn((1, 1, 8, 8), generator=own)
    condition = torch.zeros(1, SPEC.dim)
    condition[0, 1] = 1.0
    for t in scheduler.timesteps:
        with torch.no_grad():
            output = unet(x, t, None, class_labels=condition).sample
        x = scheduler.step(output, t, x, generator=own).prev_sample
    np.testing.assert_allclose(renderer(folder, sampler).render(rows(), N)[1], x[0].clamp(-1, 1), atol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_stock_scheduler_gives_the_same_bytes(folder: str, sampler: Any) -> None:
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

    made = renderer(folder, sampler)
    kinds: Any = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler, "dpm++": DPMSolverMultistepScheduler}
    scheduler = kinds[sampler].from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(5)
    generators = [torch.Generator().manual_seed(row(str(i)).seed) for i in range(N)]
    x = initial_noise(generators, made.shape).contiguous(memory_format=torch.channels_last)
    told = torch.from_numpy(np.stack([made._condition(r) for r in rows()]))
    for t in scheduler.timesteps:
        output = made.unet(x, t, None, class_labels=told).sample
        x = scheduler.step(output, t, x, generator=generators).prev_sample
    assert made.render(rows(), N).tobytes() == x.clamp(-1, 1).contiguous().numpy().tobytes()


class HostWaits(TorchDispatchMode):
    """Names of operators that bring device data to the host or host data to the device, either of which waits."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)}
        if func._schema.name in ("aten::to", "aten::_to_copy", "aten::copy_") and len(devices) > 1:
            self.found.append(func._schema.name)
        return result


@pytest.mark.parametrize(("sampler", "waits"), [("ddim", 0), ("dpm++", 0), ("ddpm", 5)])
def test_the_host_never_waits_for_the_device_between_steps(folder: str, sampler: Any, waits: int) -> None:
    # The meta device has no values: reading one, as a scheduler's index lookup does on a GPU, would raise.
    made = renderer(folder, sampler, guidance_scale=2.0)
    unet, told = made.unet.to("meta"), torch.zeros((N, SPEC.dim), device="meta")
    scheduler = make_sampler(made.scheduler_config, made.sampling)
    timesteps, images = scheduler.timesteps.to("meta"), torch.zeros((N, *made.shape), device="meta")
    with torch.inference_mode(), HostWaits() as watch:
        out = denoise(unet, scheduler, timesteps, images, told, told[0], [torch.Generator()] * N, made.sampling)
    assert out.shape == images.shape
    # Ancestral steps draw their noise on the CPU, each row its own: one copy a step.
    assert len(watch.found) == waits, watch.found


@pytest.mark.parametrize(("guidance", "images"), [(1.0, N), (2.0, 2 * N)])
def test_one_pass_a_step_whose_size_follows_the_guidance(folder: str, guidance: float, images: int) -> None:
    made, seen = renderer(folder, "ddim", guidance_scale=guidance), []
    made.unet.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    made.render(rows(), N)
    assert seen == [images] * 5


@pytest.mark.parametrize(
    ("interval", "expected"),
    [(None, range(10)), ([0, 1], range(10)), ([0.2, 0.8], range(2, 8)), ([0.25, 1], range(2, 10))],
)
def test_guidance_interval_counts_as_diffusers_guiders_do(interval: Any, expected: range) -> None:
    from diffusers.guiders import ClassifierFreeGuidance

    start, stop = interval or (0.0, 1.0)
    theirs: Any = ClassifierFreeGuidance(guidance_scale=3.0, start=start, stop=stop)
    enabled = []
    for step in range(10):
        theirs.set_state(step, 10, torch.tensor(0))
        enabled += [step] if theirs._is_cfg_enabled() else []
    assert list(guided_steps(Sampling(steps=10, guidance_scale=3.0, guidance_interval=interval))) == enabled
    assert enabled == list(expected)
    assert not guided_steps(Sampling(steps=10, guidance_scale=1.0, guidance_interval=interval))


def test_outside_the_guidance_interval_one_pass_without_guidance(folder: str) -> None:
    def run(**keys: Any) -> tuple[list[int], np.ndarray]:
        made, seen = renderer(folder, "ddim", **keys), []
        made.unet.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
        return seen, made.render(rows(), N)

    seen, images = run(guidance_scale=3.0, guidance_interval=[0.2, 0.6])
    assert seen == [N, 2 * N, 2 * N, N, N]
    everywhere = run(guidance_scale=3.0, guidance_interval=[0.0, 1.0])[1]
    assert everywhere.tobytes() == run(guidance_scale=3.0)[1].tobytes()
    assert not np.allclose(images, everywhere, atol=1e-3)
    assert not np.allclose(images, run()[1], atol=1e-3)


def test_weights_cast_once_give_autocasts_bytes(folder: str) -> None:
    def run() -> torch.Tensor:
        x, told = torch.randn(N, *made.shape, generator=torch.Generator().manual_seed(0)), torch.eye(SPEC.dim)[:N]
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            return made.unet(x, torch.tensor(500), None, class_labels=told, return_dict=False)[0]

    made = renderer(folder)
    before = run()
    cast_weights(made.unet, torch.bfloat16)
    assert {p.dtype for p in made.unet.parameters()} == {torch.float32, torch.bfloat16}
    assert torch.equal(run(), before)


def test_the_network_compiles_as_one_graph_a_shape(folder: str) -> None:
    keys: dict[str, Any] = {"guidance_scale": 3.0, "guidance_interval": [0.4, 0.8]}
    plain = renderer(folder, **keys)
    made = DDPMRenderer(folder, plain.sampling, compiled=True)
    assert (made.facts()["compile"], plain.facts()["compile"]) == (True, False)
    assert made.network is not made.unet
    graphs: list[int] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    # Without code generation, which takes a minute and is torch's to test: the graph's operators are the network's.
    made.network = compile_network(made.unet, count)
    assert made.render(rows(), N).tobytes() == plain.render(rows(), N).tobytes()
    made.render([row("1"), *[None] * (N - 1)], N)
    assert len(graphs) == 2


class Echo(torch.nn.Module):
    """A network in the place of the U-Net that predicts its input."""

    def forward(self, x: Any, t: Any, _: None, class_labels: Any, return_dict: bool) -> tuple[Any]:
        return (x * 1.0,)


def test_a_thread_that_renders_may_compile_as_many_shapes(folder: str) -> None:
    made = renderer(folder, "ddim", steps=2, guidance_scale=2.0, guidance_interval=[0.0, 0.5])
    made.compiled, made.network = True, compile_network(Echo(), "eager")
    sizes = [1, 3, 5, 7, 9, 11]  # two shapes each
    with ThreadPoolExecutor(1) as thread:
        for size in sizes:
            assert thread.submit(made.render, [None] * size, size).result().shape[0] == size


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_any_number_of_steps(folder: str, sampler: Any, steps: int) -> None:
    images = renderer(folder, sampler, steps=steps).render(rows(2), 2)
    assert np.isfinite(images).all()
    assert np.abs(images).max() <= 1
    assert images.std() > 0


def test_guidance_is_diffusers_formula_and_rescale_is_lins_per_image() -> None:
    source = torch.Generator().manual_seed(0)
    null, conditional = torch.randn(2, 3, 1, 4, 4, generator=source)
    plain = null + 4.0 * (conditional - null)
    torch.testing.assert_close(guide(null, conditional, 4.0, 0.0), plain)
    full = guide(null, conditional, 4.0, 1.0)
    torch.testing.assert_close(full.flatten(1).std(1), conditional.flatten(1).std(1))
    torch.testing.assert_close(guide(null, conditional, 4.0, 0.7), 0.7 * full + 0.3 * plain)
    torch.testing.assert_close(guide(null[:1], conditional[:1], 4.0, 0.7), guide(null, conditional, 4.0, 0.7)[:1])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_changes_pixels_not_noise(folder: str, sampler: Any) -> None:
    one, two = (renderer(folder, sampler, guidance_scale=g) for g in (1.0, 4.0))
    assert not np.array_equal(one.render(rows(), N), two.render(rows(), N))
    # What a network that ignores the condition makes of them is decided by the noise alone.
    one.network = two.network = Echo()
    assert np.array_equal(one.render(rows(), N), two.render(rows(), N))


def test_not_a_number_stays_visible(folder: str) -> None:
    made = renderer(folder)
    made.unet.conv_out.bias.fill_(float("nan"))
    assert np.isnan(made.render(rows(), N)).all()
    assert canary_fault(made, 2) == "pixels are not finite"


def test_canary_is_rendered_without_condition(folder: str) -> None:
    made = renderer(folder)
    assert canary_fault(made, 2) is None
    unknown = Row("unknown", CANARY.seed, {f"label_{c}": None for c in SPEC.classes})
    images = made.render([CANARY, unknown], 2)
    assert not np.array_equal(images[0], images[1])


def test_a_class_it_never_saw_is_refused(folder: str) -> None:
    made = renderer(folder)
    made.spec.seen.remove("3")
    with pytest.raises(DataError, match="'3'"):
        made.render(rows(), N)


def test_facts_name_what_decides_bytes(folder: str) -> None:
    facts = renderer(folder).facts()
    assert facts["device"] == "cpu"
    assert facts["threads"] == 1
    assert facts["dtype"] == "fp32"
    assert facts["torch"] == torch.__version__


def test_pixels_are_rounded_once() -> None:
    image = np.array([[[-1.0, 1.0, 0.0, 2.0]]], np.float32)
    assert to_uint8(image).reshape(-1).tolist() == [0, 255, 128, 255]
