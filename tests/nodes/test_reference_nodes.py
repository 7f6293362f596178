"""References in nodes: encoded once whatever graph they are in, computed once for all steps where that is asked for."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

TINY = "tiny (bundled)"


@pytest.fixture
def models(nodes):
    """(dit, ae, positive) of random weights."""
    (dit,) = nodes["Flux2KitLoadDiT"].load(TINY, "auto", "default")
    (ae,) = nodes["Flux2KitLoadAE"].load(TINY)
    (text_encoder,) = nodes["Flux2KitLoadTextEncoder"].load(TINY, "default")
    (positive,) = nodes["Flux2KitEncodePrompt"].encode(text_encoder, "a red circle")
    return SimpleNamespace(dit=dit, ae=ae, positive=positive)


@pytest.fixture
def sample(nodes, models):
    """FLUX.2 Sample with two steps, no CFG and a reference."""

    def run(image: torch.Tensor | None = None, **changed):
        references = None
        if image is not None:
            (references,) = nodes["Flux2KitEncodeReference"].encode(models.ae, image, True, False)
        usual = {"dit": models.dit, "positive": models.positive, "num_steps": 2, "cfg_scale": 1.0, "seed": 1}
        node = nodes["Flux2KitSample"]
        return node.sample(**usual | {"width": 64, "height": 64} | changed, references=references)[0]["samples"]

    return run


def random_image() -> torch.Tensor:
    return torch.rand(1, 64, 80, 3, generator=torch.Generator().manual_seed(0))


def test_a_picture_is_encoded_once_in_all_graphs_of_an_autoencoder(sample, models, monkeypatch):
    calls: list[int] = []
    encode = type(models.ae).encode
    monkeypatch.setattr(type(models.ae), "encode", lambda *args: calls.append(1) or encode(*args))
    first = sample(random_image())
    assert torch.equal(sample(random_image(), seed=1), first) and len(calls) == 1
    changed = random_image()
    changed[0, 5, 5] += 1 / 255
    assert not torch.equal(sample(changed), first) and len(calls) == 2


def test_a_variant_with_a_cache_uses_it_for_all_runs(sample, models, monkeypatch):
    passes: list[int] = []
    # The pack is loaded as ComfyUI does, beside the installed package.
    cache_module = sys.modules[f"{type(models.dit.dit).__module__.rpartition('.')[0]}.reference_cache"]
    compute = cache_module.compute_alone
    monkeypatch.setattr(cache_module, "compute_alone", lambda *args: passes.append(1) or compute(*args))
    caching = replace(models.dit, variant=replace(models.dit.variant, reference_cache="exact"))
    first = sample(random_image(), dit=caching)
    assert torch.equal(sample(random_image(), dit=caching), first)
    assert not torch.equal(sample(random_image(), dit=caching, seed=2), first)
    assert len(passes) == 1
    off = sample(random_image(), dit=caching, reference_cache="off")
    assert torch.equal(off, sample(random_image())) and not torch.equal(off, first)
    assert torch.equal(sample(dit=caching), sample()), "without references it is the plain model"


def test_the_approximate_cache_is_asked_for_by_name(sample, models, host, monkeypatch):
    shown: list[str] = []
    monkeypatch.setattr(host, "show_text", lambda text, node_id: shown.append(text))
    approximate = sample(random_image(), reference_cache="approximate")
    exact = sample(random_image())
    assert not torch.equal(approximate, exact) and torch.allclose(approximate, exact, atol=1)
    assert ["references approximate" in text for text in shown] == [True, False]
    caching = replace(models.dit, variant=replace(models.dit.variant, reference_cache="exact"))
    with pytest.raises(ValueError, match="reference_cache is approximate, which tiny does not do; it does auto, off"):
        sample(random_image(), dit=caching, reference_cache="approximate")
