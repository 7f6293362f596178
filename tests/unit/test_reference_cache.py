"""References computed once: the exact cache of klein-9b-kv, how long it holds, and the approximate one of others."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import pytest
import torch
from flux2_kit.flux2_core import reference_cache as cache_module
from flux2_kit.flux2_core import variants
from flux2_kit.flux2_core.cli import REFERENCE_CACHES
from flux2_kit.flux2_core.dit import DiTConfig, Flux2DiT
from flux2_kit.flux2_core.key_values import BlockKeyValues
from flux2_kit.flux2_core.latents import image_ids, latents_to_tokens, reference_tokens, seed_noise, text_ids
from flux2_kit.flux2_core.linear import Linear
from flux2_kit.flux2_core.lora import LoraSetting, apply_loras, merge_loras, remove_loras
from flux2_kit.flux2_core.lora_factors import Lora, LoraFactors, LoraReport
from flux2_kit.flux2_core.memory import MemoryNeeds
from flux2_kit.flux2_core.picture_metadata import make_record, parse_record
from flux2_kit.flux2_core.pipeline import GenerateRequest, SamplingConfig, load_pipeline, sample_latents
from flux2_kit.flux2_core.placement import PlacedPipeline
from flux2_kit.flux2_core.reference_cache import ReferenceCacheMode, reference_caches
from flux2_kit.flux2_core.streaming import stream_dit
from flux2_kit.flux2_core.variants import VARIANTS
from flux2_kit.training.adapters import AdapterConfig, TrainableAdapters
from PIL import Image
from torch import Tensor

CONFIG = DiTConfig(
    hidden_size=64,
    num_heads=2,
    num_double_blocks=2,
    num_single_blocks=3,
    context_dim=24,
    has_guidance_embedder=False,
    rope_axes=(8, 8, 8, 8),
)
KV = replace(VARIANTS["klein-9b-kv"], dit=CONFIG)
BASE = replace(VARIANTS["klein-base-9b"], dit=CONFIG, num_steps=4)
SAMPLING = SamplingConfig(width=64, height=80, num_steps=2, seed=1)
REFERENCES = [seed_noise(2, 1, 32, 48), seed_noise(3, 1, 64, 16)]


def build_dit(*, has_guidance_embedder: bool = False) -> Flux2DiT:
    dit = Flux2DiT(replace(CONFIG, has_guidance_embedder=has_guidance_embedder)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in dit.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = values / parameter.shape[1] ** 0.5 if parameter.dim() > 1 else 1 + 0.3 * values
    return dit


def random_text(seed: int, rows: int = 1) -> Tensor:
    return torch.randn(rows, 5, CONFIG.context_dim, generator=torch.Generator().manual_seed(seed))


def sample(dit: Flux2DiT, references: Sequence[Tensor] = REFERENCES, text_seed: int = 1, **changes) -> Tensor:
    sampling = replace(SAMPLING, **changes)
    cfg = {"negative_text": random_text(9)} if sampling.cfg_scale else {}
    return sample_latents(dit, KV, sampling, random_text(text_seed), references=references, **cfg)


def random_lora(seed: int) -> Lora:
    generator = torch.Generator().manual_seed(seed)
    layers = {
        name: (
            LoraFactors(
                lora_A=torch.randn(2, module.in_features, generator=generator),
                lora_B=0.05 * torch.randn(module.out_features, 2, generator=generator),
                alpha=2.0,
            ),
        )
        for name, module in Flux2DiT(CONFIG).named_modules()
        if isinstance(module, Linear) and "_blocks" in name
    }
    report = LoraReport(dialects=("test",), groups={}, unmatched=())
    return Lora(name="lora", config=CONFIG, layers=layers, report=report, metadata={})


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """One entry for every pass over references alone."""
    found: list[int] = []
    original = cache_module.compute_alone
    monkeypatch.setattr(cache_module, "compute_alone", lambda *args: found.append(1) or original(*args))
    return found


def test_one_pass_serves_every_seed_prompt_size_and_number_of_steps(passes):
    dit = build_dit()
    runs = [{}, {"seed": 5, "text_seed": 7}, {"width": 96, "num_steps": 3}, {"num_images": 2}, {"cfg_scale": 3.0}]
    for run in runs:
        assert torch.equal(sample(dit, **run), sample(build_dit(), **run)), run
    assert len(passes) == 1 + len(runs)


def test_other_references_their_order_and_guidance_are_other_caches(passes):
    dit = build_dit()
    variations = [REFERENCES, REFERENCES[::-1], REFERENCES[:1], [REFERENCES[0] + 1e-6, REFERENCES[1]]]
    results = [sample(dit, references) for references in variations]
    assert len(passes) == 4 and len({result.sum().item() for result in results}) == 4
    sample(dit, variations[1])
    assert len(passes) == 4, "all of them are small enough to stay"
    dev = build_dit(has_guidance_embedder=True)
    for guidance in (2.0, 3.0, 3.0):
        reference_caches(dev).exact(dev, REFERENCES, guidance)
    assert len(passes) == 6


def test_loras_have_caches_of_their_own(passes):
    dit, lora = build_dit(), random_lora(1)
    plain = sample(dit)
    apply_loras(dit, [LoraSetting(lora=lora)])
    adapted = sample(dit)
    remove_loras(dit)
    apply_loras(dit, [LoraSetting(lora=lora)])  # as every run of a node does
    assert torch.equal(sample(dit), adapted) and len(passes) == 2
    for other in ({"lora": lora, "strength": 0.5}, {"lora": random_lora(2)}, {"lora": lora, "include": ("single",)}):
        apply_loras(dit, [LoraSetting(**other)])
        fresh = build_dit()
        apply_loras(fresh, [LoraSetting(**other)])
        assert torch.equal(sample(dit), sample(fresh)), other
    remove_loras(dit)
    before = len(passes)
    assert torch.equal(sample(dit), plain) and len(passes) == before


def test_a_lora_that_is_gone_is_not_taken_for_one_in_its_place():
    """Adapters are told by identity, so a cache holds on to those it was made with."""
    dit, lora = build_dit(), random_lora(1)
    held = weakref.ref(lora.layers["single_blocks.0.linear1"][0])
    apply_loras(dit, [LoraSetting(lora=lora)])
    sample(dit)
    remove_loras(dit)
    del lora
    gc.collect()
    assert held() is not None
    reference_caches(dit).clear()
    gc.collect()
    assert held() is None


def test_changed_weights_and_adapters_in_training_are_computed_anew(passes):
    dit = build_dit()
    sample(dit)
    merge_loras(dit, [LoraSetting(lora=random_lora(1))])
    merged = sample(dit)
    apply_loras(expected := build_dit(), [LoraSetting(lora=random_lora(1))])
    torch.testing.assert_close(merged, sample(expected), rtol=1e-3, atol=1e-4)
    dit.load_state_dict(build_dit().state_dict())
    assert torch.equal(sample(dit), sample(build_dit()))
    adapters = TrainableAdapters(dit, AdapterConfig(rank=2), generator=torch.Generator().manual_seed(0))
    adapters.attach()
    before = len(passes)
    for step in (1, 2):
        for parameter in adapters.parameters():
            parameter.data.fill_(0.01 * step)
        sample(dit)
    assert len(passes) == before + 2


def test_caches_stay_small_together_and_go_with_their_dit(monkeypatch, passes):
    monkeypatch.setattr(cache_module, "SMALL_BYTES", 0)
    dit = build_dit()
    caches = reference_caches(dit)
    for references in (REFERENCES[:1], REFERENCES, REFERENCES[:1]):
        sample(dit, references)
        tokens = sum(latents[0, 0].numel() for latents in references)
        assert caches._kept.num_bytes == 2 * 5 * tokens * CONFIG.hidden_size * 4
    assert len(passes) == 3, "there is room for one"
    gc.collect()
    number = len(cache_module._caches)
    del dit, caches
    gc.collect()
    assert len(cache_module._caches) == number - 1


def test_without_a_plan_free_memory_decides_where_a_cache_goes_and_whether_it_stays(monkeypatch, passes):
    dit, free = build_dit(), 2**40
    monkeypatch.setattr(cache_module, "device_budget", lambda device: free)
    expected = sample(dit)
    free = 2**10
    assert torch.equal(sample(dit), expected) and len(passes) == 1
    assert len(reference_caches(dit)._kept) == 0, "it was on the device, where it is in the way now"
    assert torch.equal(sample(dit), expected) and len(passes) == 2
    assert torch.equal(sample(dit), expected) and len(passes) == 2, "in host memory it is in nobody's way"
    reference_caches(dit).leave_device()
    assert len(reference_caches(dit)._kept) == 1
    reference_caches(dit).place = "device"
    reference_caches(dit).clear()
    for _ in range(2):
        assert torch.equal(sample(dit), expected) and len(passes) == 3, "a plan counts on it"
    reference_caches(dit).leave_device()
    assert len(reference_caches(dit)._kept) == 0


@pytest.mark.parametrize("mode", ["exact", "approximate"])
@pytest.mark.parametrize("cfg_scale", [None, 3.0])
def test_pictures_of_a_batch_are_those_made_alone(mode, cfg_scale):
    """One reference for all and one of its own for each picture."""
    dit = build_dit()
    own = torch.cat([seed_noise(seed, 1, 32, 32) for seed in (11, 12)])
    variant = KV if mode == "exact" else BASE
    sampling = replace(SAMPLING, num_images=2, cfg_scale=cfg_scale or 1.0, num_steps=3, reference_cache=mode)
    noise, texts, negative = seed_noise(1, 2, 80, 64), random_text(1, 2), random_text(9)
    both = sample_latents(
        dit, variant, sampling, texts, negative_text=negative, references=[REFERENCES[0], own], noise=noise
    )
    for row in range(2):
        alone = sample_latents(
            dit,
            variant,
            sampling,
            texts[row : row + 1],
            negative_text=negative,
            references=[REFERENCES[0], own[row : row + 1]],
            noise=noise[row : row + 1],
        )
        torch.testing.assert_close(both[row : row + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["exact", "approximate"])
@pytest.mark.parametrize("weight_format", [None, "fp8", "nf4"])
def test_streamed_blocks_and_quantised_weights_compute_the_same(mode, weight_format):
    if weight_format == "nf4":
        pytest.importorskip("bitsandbytes")
    variant = KV if mode == "exact" else BASE
    lora = LoraSetting(lora=random_lora(1))

    def make(num_resident: int | None) -> Tensor:
        dit = build_dit()
        for name, module in dit.named_modules():
            if isinstance(module, Linear) and weight_format is not None and "_blocks" in name:
                module.quantise(weight_format)
        if num_resident is not None:
            stream_dit(dit, "cpu", num_resident=num_resident)
        apply_loras(dit, [lora])
        sampling = replace(SAMPLING, cfg_scale=2.0, reference_cache=mode)
        run = [
            sample_latents(dit, variant, sampling, random_text(1), negative_text=random_text(2), references=REFERENCES)
            for _ in range(2)
        ]
        assert torch.equal(*run)
        return run[0]

    resident = make(None)
    assert torch.equal(make(1), resident)
    assert resident.isfinite().all()


def test_a_streamed_dit_keeps_its_cache(passes):
    dit = build_dit()
    streamer = stream_dit(dit, "cpu", num_resident=1)
    first = sample(dit)
    streamer.set_num_resident(3)
    dit.to("cpu")
    assert torch.equal(sample(dit), first) and len(passes) == 1


def test_what_the_approximate_cache_holds_is_what_the_step_attended_to():
    """A step that is run a second time, now without reference tokens, gives the same velocity."""
    dit = build_dit()
    extra_tokens, extra_ids = reference_tokens([latents.expand(2, -1, -1, -1) for latents in REFERENCES])
    tokens, ids, text = latents_to_tokens(seed_noise(1, 2, 64, 80)), image_ids(4, 5), random_text(1, 2)
    sigma, cache = torch.tensor([0.8, 0.3]), [BlockKeyValues(extra_tokens.shape[1]) for _ in range(5)]
    with torch.inference_mode():
        prepared = dit.prepare(torch.cat((ids, extra_ids)), text, text_ids(5))
        plain = dit.velocity(torch.cat((tokens, extra_tokens), dim=1), sigma, prepared)
        full = dit.velocity(torch.cat((tokens, extra_tokens), dim=1), sigma, prepared, cache)
        again = dit.velocity(tokens, sigma, dit.prepare(ids, text, text_ids(5)), cache)
    assert torch.equal(full, plain)
    torch.testing.assert_close(again, full[:, : tokens.shape[1]], rtol=1e-4, atol=1e-5)


def test_approximate_differs_from_the_second_step_on_and_runs_without_reference_tokens(monkeypatch):
    dit, lengths = build_dit(), []
    velocity = Flux2DiT.velocity
    monkeypatch.setattr(
        Flux2DiT,
        "velocity",
        lambda self, tokens, *args: lengths.append(tokens.shape[1]) or velocity(self, tokens, *args),
    )

    def make(mode: str, num_steps: int) -> Tensor:
        sampling = replace(SAMPLING, reference_cache=mode, num_steps=num_steps, cfg_scale=1.0)
        return sample_latents(dit, BASE, sampling, random_text(1), references=REFERENCES)

    assert torch.equal(make("approximate", 1), make("off", 1))
    lengths.clear()
    approximate = make("approximate", 3)
    assert lengths == [20 + 10, 20, 20]
    difference = (approximate - make("off", 3)).norm() / approximate.norm()
    assert 1e-4 < difference < 1
    assert torch.equal(approximate, make("approximate", 3)), "nothing is left of one picture in the next"
    assert len(reference_caches(dit)._kept) == 0


def test_a_cache_elsewhere_holds_the_same_numbers():
    here, there = BlockKeyValues(2), BlockKeyValues(2, torch.device("cpu", 0))
    keys, values = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    for block in (here, there):
        assert block.join(keys, values)[0] is keys
        joined = block.join(keys, values)
        assert torch.equal(joined[0], torch.cat((keys, keys[:, :, -2:]), dim=2))
        assert torch.equal(joined[1], torch.cat((values, values[:, :, -2:]), dim=2))
        assert block.num_bytes == 2 * 2 * 3 * 2 * 4 * 4
        assert block.keys.untyped_storage().nbytes() == block.num_bytes // 2, "no slice of something larger"


def test_modes():
    assert get_args(ReferenceCacheMode) == REFERENCE_CACHES
    assert SamplingConfig().resolved(KV).reference_cache == "exact"
    for name in ("klein-9b", "dev", "tiny"):
        assert SamplingConfig().resolved(VARIANTS[name]).reference_cache == "off"
        assert SamplingConfig(reference_cache="approximate").resolved(VARIANTS[name]).reference_cache == "approximate"
        with pytest.raises(ValueError, match=f"exact, which {name} does not do; it does auto, off, approximate"):
            SamplingConfig(reference_cache="exact").resolved(VARIANTS[name])
    with pytest.raises(ValueError, match="approximate, which klein-9b-kv does not do; it does auto, off, exact"):
        SamplingConfig(reference_cache="approximate").resolved(KV)
    with pytest.raises(ValueError, match="reference_cache is 'yes'; allowed are auto, off, exact, approximate"):
        SamplingConfig(reference_cache="yes")  # pyright: ignore[reportArgumentType]


def test_records_name_the_mode_where_it_is_not_the_variants_own(tmp_path):
    def recorded(variant, mode: ReferenceCacheMode, references=("a.png",)) -> tuple[str | None, str]:
        files = {name: tmp_path / name for name in ("dit", "autoencoder", "text_encoder")}
        sampling = SamplingConfig(reference_cache=mode).resolved(variant)
        record = make_record(sampling, variant, prompt="x", negative_prompt=None, references=references, **files)
        assert parse_record({"flux2_kit": record.to_json()}) == record
        return record.reference_cache, record.to_text()

    tiny, kv = VARIANTS["tiny"], VARIANTS["klein-9b-kv"]
    mode, text = recorded(tiny, "approximate")
    assert mode == "approximate" and "Reference cache: approximate" in text
    assert recorded(kv, "off")[0] == "off"
    for variant, given, references in ((tiny, "auto", ("a",)), (kv, "exact", ("a",)), (tiny, "approximate", ())):
        mode, text = recorded(variant, given, references)
        assert mode is None and "Reference cache" not in text


def test_pipelines_within_a_budget_use_the_cache_too(random_tiny_files, monkeypatch, passes):
    monkeypatch.setitem(variants.VARIANTS, "tiny", replace(VARIANTS["tiny"], reference_cache="exact"))
    request = GenerateRequest(
        prompt="a red circle",
        references=(Image.new("RGB", (64, 64), "blue"),),
        sampling=SamplingConfig(num_steps=1, seed=1),
    )
    needs = MemoryNeeds(reference_sizes=((64, 64),), num_streamed=4)
    pictures = []
    for settings in ({}, {"vram_budget_gib": 1, "needs": needs}):
        pipeline = load_pipeline(
            "tiny",
            dit=random_tiny_files.dit,
            autoencoder=random_tiny_files.autoencoder,
            text_encoder=random_tiny_files.text_encoder,
            **settings,
        )
        assert isinstance(pipeline, PlacedPipeline)
        passes.clear()
        pictures += [pipeline.generate(request).images[0].tobytes() for _ in range(2)]
        # Where networks take turns, what the cache takes of the device is needed for the autoencoder.
        assert len(passes) == (2 if pipeline.plan.takes_turns else 1)
        place = pipeline.plan.reference_cache
        pipeline.lowers = True
        assert (place, pipeline.plan.dit.is_streamed) == ((None, False) if not settings else ("device", True))
        if place == "device":
            next(iter(pipeline._lower_dit()))
            assert reference_caches(pipeline.dit).place == "host"
            pictures.append(pipeline.generate(request).images[0].tobytes())
            pictures.append(pipeline.generate(request).images[0].tobytes())
            assert len(passes) == 3, "what is in host memory stays"
    assert len(set(pictures)) == 1
