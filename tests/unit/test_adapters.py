"""Adapters in training: what they compute, their gradients, what they keep, and their way into files and back."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from flux2_kit.flux2_core.dit import DiTConfig, Flux2DiT
from flux2_kit.flux2_core.latents import image_ids, text_ids
from flux2_kit.flux2_core.linear import Linear
from flux2_kit.flux2_core.lora import LiveFactors, LoraSetting, apply_loras, linear_layers
from flux2_kit.flux2_core.lora_factors import DiffFactors, Lora, LoraFactors, LoraReport
from flux2_kit.flux2_core.lora_files import linear_shapes, read_lora
from flux2_kit.flux2_core.lora_writer import write_lora
from flux2_kit.training import adapters as adapters_module
from flux2_kit.training.adapters import (
    AdapterConfig,
    TrainableAdapters,
    TrainedAdapter,
    TrainedLokr,
    TrainedLora,
    config_from_lora,
    lokr_shapes,
)
from torch import Tensor

CONFIG = DiTConfig(
    hidden_size=64,
    num_heads=2,
    num_double_blocks=2,
    num_single_blocks=2,
    context_dim=48,
    has_guidance_embedder=True,
    rope_axes=(8, 8, 8, 8),
)
SHAPES = linear_shapes(CONFIG)
BLOCK_LAYERS = [name for name in SHAPES if name.split(".")[0] in ("double_blocks", "single_blocks")]
EXPORT_LIMIT = 2e-6

# LoKr of 64 and 192, 384, 576: rank 4 leaves some w2 whole and others not.
KINDS = {
    "LoRA": AdapterConfig(rank=4),
    "LoRA, alpha": AdapterConfig(rank=4, alpha=3.0),
    "rsLoRA": AdapterConfig(rank=4, alpha=3.0, rank_stabilized=True),
    "DoRA": AdapterConfig(rank=4, alpha=3.0, dora=True),
    "LoKr": AdapterConfig(kind="lokr", rank=5, alpha=3.0),
    "LoKr, factor 4": AdapterConfig(kind="lokr", rank=4, alpha=3.0, lokr_factor=4),
    "LoKr, whole": AdapterConfig(kind="lokr", rank=1000),
    "LoKr, DoRA": AdapterConfig(kind="lokr", rank=5, alpha=3.0, dora=True),
}
every_kind = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


def relative_l2(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_values(shape: torch.Size, generator: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=generator)
    return values / shape[1] ** 0.5 if len(shape) > 1 else 1 + 0.3 * values


def build_dit() -> Flux2DiT:
    dit = Flux2DiT(CONFIG).requires_grad_(False)
    generator = seeded()
    for parameter in dit.parameters():
        parameter.data = random_values(parameter.shape, generator)
    return dit


def make_trained(adapters: torch.nn.Module, seed: int = 1) -> None:
    """Random values everywhere; magnitudes not far from what they are."""
    generator = seeded(seed)
    for name, parameter in adapters.named_parameters():
        if name.endswith("magnitude"):
            parameter.data *= 0.7 + 0.6 * torch.rand(parameter.shape, generator=generator)
        else:
            parameter.data.copy_(random_values(parameter.shape, generator))


def build(config: AdapterConfig, trained: bool = True) -> tuple[Flux2DiT, TrainableAdapters]:
    dit = build_dit()
    adapters = TrainableAdapters(dit, config, generator=seeded())
    if trained:
        make_trained(adapters)
    adapters.attach()
    return dit, adapters


def run(dit: Flux2DiT) -> Tensor:
    generator = seeded(2)
    tokens = torch.randn(2, 15, 128, generator=generator).to(dit.dtype)
    text = torch.randn(2, 7, 48, generator=generator).to(dit.dtype)
    return dit(tokens, image_ids(3, 5), text, text_ids(7), torch.tensor([0.96, 0.25]), torch.ones(2))


def one_layer(
    config: AdapterConfig, out_features: int = 96, in_features: int = 64, dtype: torch.dtype = torch.float32
) -> tuple[Linear, TrainedAdapter]:
    """A frozen layer with a trained adapter on it."""
    layer = Linear(in_features, out_features).requires_grad_(False)
    layer.weight.data = random_values(layer.weight.shape, seeded(3)).to(dtype)
    make = TrainedLora if config.kind == "lora" else TrainedLokr
    adapter = make(layer.weight, config, seeded())
    make_trained(adapter)
    layer.adapters = (adapter,)
    return layer, adapter


# What is adapted.


def test_all_linears_of_the_blocks_are_adapted_and_the_state_has_their_names():
    dit, adapters = build(KINDS["LoRA"])
    assert list(adapters.linears) == BLOCK_LAYERS and len(BLOCK_LAYERS) == 20
    assert set(adapters.state_dict()) == {
        f"layers.{layer.replace('.', '_')}.{name}" for layer in BLOCK_LAYERS for name in ("lora_A", "lora_B")
    }
    assert not any("lora" in name for name in dit.state_dict())
    assert not any(parameter.requires_grad for parameter in dit.parameters())


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (("img_attn",), (), [n for n in BLOCK_LAYERS if "img_attn" in n]),
        ((r"^single_blocks\.1\.", "final"), (), [n for n in SHAPES if n.startswith(("single_blocks.1.", "final"))]),
        (("",), (), list(SHAPES)),
        ((), ("double", r"linear2$"), ["single_blocks.0.linear1", "single_blocks.1.linear1"]),
        (("_in",), ("^guidance", r"\.out_layer"), ["img_in", "txt_in", "time_in.in_layer"]),
    ],
)
def test_patterns_choose_layers(include, exclude, expected):
    adapters = TrainableAdapters(
        build_dit(), AdapterConfig(rank=2, include=include, exclude=exclude), generator=seeded()
    )
    assert list(adapters.linears) == expected


@pytest.mark.parametrize("patterns", [{"include": ("bloks",)}, {"exclude": ("",)}, {"include": ("(",)}])
def test_patterns_that_are_wrong_are_refused_with_names_to_choose_from(patterns):
    with pytest.raises(ValueError, match=r"named like double_blocks\.0\.img_attn\.qkv, .*16 more"):
        TrainableAdapters(build_dit(), AdapterConfig(**patterns), generator=seeded())


def test_include_with_an_exclude_of_all_as_musubi_writes_it_says_what_to_leave_out():
    with pytest.raises(ValueError, match="leave no layer to adapt; leave out exclude, which takes away from include"):
        TrainableAdapters(build_dit(), AdapterConfig(include=("single",), exclude=(".*",)), generator=seeded())


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "loha"}, {"rank": 0}, {"rank": 2.5}, {"rank": True}, {"alpha": 0.0}, {"alpha": float("nan")},
        {"dropout": 1.0}, {"dropout": -0.1}, {"lokr_factor": 0},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).replace("kind", "adapter")):
        AdapterConfig(**wrong)


def test_scale():
    assert AdapterConfig(rank=16).scale == 1
    assert AdapterConfig(rank=16, alpha=8).scale == 0.5
    assert AdapterConfig(rank=16, alpha=8, rank_stabilized=True).scale == 2
    assert AdapterConfig(rank=16, rank_stabilized=True).scale == 4


# The beginning.


@every_kind
def test_untrained_adapters_change_nothing(config):
    expected = run(build_dit())
    dit, adapters = build(config, trained=False)
    assert torch.equal(run(dit), expected)
    zero = [adapters.adapter(layer).get_parameter(adapters.adapter(layer).zero_name) for layer in adapters.linears]
    assert not any(parameter.count_nonzero() for parameter in zero)
    assert all(
        parameter.count_nonzero() for parameter in adapters.parameters() if not any(parameter is z for z in zero)
    )


def test_lora_a_begins_kaiming_uniform_and_the_generator_decides():
    first, again, other = (
        TrainableAdapters(build_dit(), AdapterConfig(rank=64, include=("linear1",)), generator=seeded(seed))
        for seed in (0, 0, 1)
    )
    lora_A = first.adapter("single_blocks.0.linear1").lora_A
    bound = 64**-0.5  # kaiming with a = sqrt(5): 1 / sqrt(in)
    assert 0.99 * bound < lora_A.abs().max() <= bound
    assert lora_A.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        assert name.endswith("lora_B") or not torch.equal(value, other.state_dict()[name])


@torch.inference_mode()
def test_they_can_be_made_and_trained_inside_inference_mode():
    with torch.inference_mode(False):
        dit = build_dit()
    adapters = TrainableAdapters(dit, AdapterConfig(rank=2, dora=True), generator=seeded())
    adapters.attach()
    assert run(dit).is_inference()
    with torch.inference_mode(False):
        run(dit).sum().backward()
    assert all(parameter.grad is not None for parameter in adapters.parameters())


# What is computed.


def dense_delta(adapter: TrainedAdapter, dtype: torch.dtype = torch.float32) -> Tensor:
    """The change of the weight by its definition, magnitude aside."""
    p = {name: parameter.to(dtype) for name, parameter in adapter.named_parameters()}
    if "lora_A" in p:
        return adapter.scale * p["lora_B"] @ p["lora_A"]
    return adapter.scale * torch.kron(p["w1"], p["w2"] if "w2" in p else p["w2_a"] @ p["w2_b"])


def dense_output(x: Tensor, layer: Linear, adapter: TrainedAdapter) -> Tensor:
    """The adapted layer by its definition, with dense matrices."""
    weight = layer.weight.float() + dense_delta(adapter)
    if adapter.magnitude is not None:
        weight = adapter.magnitude * weight / weight.detach().norm(dim=1, keepdim=True)
    return F.linear(x, weight)


@every_kind
def test_outputs_and_gradients_are_those_of_the_dense_weight(config):
    layer, adapter = one_layer(config)
    x = torch.randn(2, 5, 64, generator=seeded(4)).requires_grad_()
    target = torch.randn(2, 5, 96, generator=seeded(5))
    inputs = [x, *adapter.parameters()]
    expected = dense_output(x, layer, adapter)
    expected_gradients = torch.autograd.grad((expected - target).square().mean(), inputs)
    got = layer(x)
    gradients = torch.autograd.grad((got - target).square().mean(), inputs)
    assert relative_l2(F.linear(x, layer.weight), expected) > 0.1
    assert relative_l2(got, expected) < 1e-6
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert relative_l2(gradient, wanted) < 2e-6


@pytest.mark.parametrize("chunk_bytes", [2**26, 4 * 64 * 28, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["DoRA", "LoKr, DoRA"])
def test_norms_of_dora_are_those_of_the_dense_weight(name, dtype, chunk_bytes, monkeypatch):
    monkeypatch.setattr(adapters_module, "CHUNK_BYTES", chunk_bytes)
    layer, adapter = one_layer(KINDS[name], dtype=dtype)
    expected = (layer.weight.double() + dense_delta(adapter, torch.float64)).norm(dim=1)
    assert relative_l2(adapter.base_norm, expected) > 0.05
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = adapter.adapted_norm(layer.weight)
    assert got.dtype == torch.float32 and not got.requires_grad
    assert relative_l2(got, expected) < 1e-6


@pytest.mark.parametrize("weight_format", ["fp8", "nf4"])
@pytest.mark.parametrize("name", ["LoRA", "DoRA", "LoKr", "LoKr, DoRA"])
def test_adapters_on_a_quantised_base_are_those_on_its_dense_weights(name, weight_format):
    outputs, gradients, calls = [], [], []
    for is_quantised in (True, False):
        dit = build_dit().requires_grad_(False)
        for layer in (linear for name, linear in linear_layers(dit).items() if name in BLOCK_LAYERS):
            layer.quantise(weight_format)
            if not is_quantised:
                layer.weight = torch.nn.Parameter(layer.dense_weight(torch.float32), requires_grad=False)
                layer.weight_format, layer.weight_scale = None, None
        adapters = TrainableAdapters(dit, KINDS[name], generator=seeded())
        make_trained(adapters)
        adapters.attach()
        made = []
        layer = adapters.linears["single_blocks.0.linear1"]
        layer.dense_weight = lambda dtype=None, layer=layer, made=made: (
            made.append(1) or Linear.dense_weight(layer, dtype)
        )
        outputs.append(run(dit))
        outputs[-1].square().sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in adapters.parameters()]))
        calls.append(len(made))
    assert relative_l2(*outputs) <= 1e-5
    assert relative_l2(*gradients) <= 1e-4
    assert (calls[0] > 0) == ("DoRA" in name)  # multiplied out for the adapter only where it looks at the weight


def test_dropout_is_on_the_input_of_the_adapter_and_only_in_training():
    layer, adapter = one_layer(AdapterConfig(rank=4, dropout=0.5))
    x = torch.randn(3, 64, generator=seeded(4))
    torch.manual_seed(0)
    got = layer(x)
    torch.manual_seed(0)
    dropped = F.dropout(x, 0.5)
    assert 0 < (dropped == 0).sum() < dropped.numel()
    expected = F.linear(x, layer.weight) + dropped @ adapter.lora_A.T @ adapter.lora_B.T
    torch.testing.assert_close(got, expected)
    adapter.eval()
    torch.testing.assert_close(layer(x), dense_output(x, layer, adapter))


@every_kind
def test_masters_stay_fp32_on_a_base_in_bf16(config):
    dit, _ = build(config)
    exact = run(dit)
    dit = build_dit().bfloat16()
    adapters = TrainableAdapters(dit, config, generator=seeded())
    make_trained(adapters)
    adapters.attach()
    output = run(dit)
    assert output.dtype == torch.bfloat16
    assert relative_l2(output, exact) < 0.1
    output.float().square().mean().backward()
    for parameter in adapters.parameters():
        assert parameter.dtype == torch.float32 and parameter.grad.dtype == torch.float32
    assert all(parameter.grad is None and parameter.dtype == torch.bfloat16 for parameter in dit.parameters())


@every_kind
def test_nothing_dense_is_kept_for_the_backward_pass(config):
    layer, adapter = one_layer(replace(config, dropout=0.1), 768, 512, torch.bfloat16)
    x = torch.randn(1, 4, 512).bfloat16().requires_grad_()
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(x)
    output.sum().backward()
    if config.rank == 1000:  # all of LoKr's w2 is trained: [32, 32] and less
        assert adapter.get_parameter("w2").numel() < 1200
    foreign = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() != layer.weight.data_ptr()]
    assert len(foreign) < len(kept)
    # Inputs, outputs, masks of dropout, factors; the largest is the whole w2 at factor 4.
    assert max(tensor.numel() for tensor in foreign) <= 768 * 512 / 16
    allowed = sum(t.numel() * t.element_size() for t in adapter.parameters()) + 30 * 4 * 768 * 2
    assert sum(tensor.numel() * tensor.element_size() for tensor in foreign) < allowed < 768 * 512


# With other adapters.


@pytest.mark.parametrize("name", ["LoRA", "DoRA"])
def test_other_adapters_stay_through_attach_and_detach(name):
    lora = build(KINDS["LoRA, alpha"])[1].to_lora("base", torch.float32)
    dit = build_dit()
    plain = run(dit)
    apply_loras(dit, [LoraSetting(lora=lora)])
    before = run(dit)
    adapters = TrainableAdapters(dit, KINDS[name], generator=seeded())
    assert torch.equal(run(dit), before)
    adapters.attach()
    adapters.attach()
    assert {len(linear.adapters) for linear in adapters.linears.values()} == {2}
    assert torch.equal(run(dit), before)
    make_trained(adapters, seed=7)
    assert relative_l2(run(dit), before) > 0.01
    adapters.detach()
    assert torch.equal(run(dit), before) and not torch.equal(before, plain)
    apply_loras(dit, [])
    assert torch.equal(run(dit), plain)


# Optimiser and state.


@every_kind
def test_loraplus_puts_the_zero_factors_into_a_group_of_their_own(config):
    _, adapters = build(config, trained=False)
    (group,) = adapters.parameter_groups(1e-4)
    assert group["name"] == "adapters" and group["lr"] == 1e-4
    assert [id(p) for p in group["params"]] == [id(p) for p in adapters.parameters()]
    slow, fast = adapters.parameter_groups(1e-4, loraplus_ratio=16)
    assert slow["lr"] == 1e-4 and fast["lr"] == pytest.approx(16e-4) and slow["name"] != fast["name"]
    assert len(fast["params"]) == 20 and not any(p.count_nonzero() for p in fast["params"])
    assert sorted(id(p) for p in slow["params"] + fast["params"]) == sorted(id(p) for p in adapters.parameters())
    torch.optim.AdamW([slow, fast])
    for wrong in (0, -1, float("inf")):
        with pytest.raises(ValueError, match="greater than 0"):
            adapters.parameter_groups(1e-4, loraplus_ratio=wrong)


@every_kind
def test_the_state_dict_restores_all(config):
    dit, adapters = build(config)
    expected = run(dit)
    state = {name: value.clone() for name, value in adapters.state_dict().items()}
    other_dit, other = build(config, trained=False)
    other.load_state_dict(state, strict=True)
    assert torch.equal(run(other_dit), expected)


# Files.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_kind
def test_the_lora_is_what_its_file_gives_back(config, dtype, tmp_path):
    _, adapters = build(config)
    lora = adapters.to_lora("x", dtype, {"ss_network_dim": "4"})
    read = read_lora(write_lora(tmp_path / "x.safetensors", lora), CONFIG)
    assert read.metadata["ss_network_dim"] == "4"
    assert list(read.layers) == list(lora.layers) == BLOCK_LAYERS
    for layer, (expected,) in lora.layers.items():
        (got,) = read.layers[layer]
        assert (got.kind, got.rank, got.scale) == (expected.kind, expected.rank, 1)
        assert got.tensors().keys() == expected.tensors().keys()
        for name, tensor in expected.tensors().items():
            assert tensor.dtype == (torch.float32 if name == "magnitude" else dtype) and not tensor.requires_grad
            assert torch.equal(got.tensors()[name], tensor)


@pytest.mark.parametrize(
    ("name", "dialect"),
    [(name, dialect) for name in KINDS for dialect in ("comfy", "kohya")]
    + [(name, "diffusers") for name in KINDS if "LoKr" not in name],
)
def test_files_compute_what_was_trained(name, dialect, tmp_path):
    dit, adapters = build(KINDS[name])
    with torch.no_grad():
        expected = run(dit)
    read = read_lora(write_lora(tmp_path / "x.safetensors", adapters.to_lora("x"), dialect), CONFIG)
    dit = build_dit()
    assert relative_l2(run(dit), expected) > 0.02
    apply_loras(dit, [LoraSetting(lora=read)])
    if name == "LoRA":
        assert torch.equal(run(dit), expected)
    assert relative_l2(run(dit), expected) < EXPORT_LIMIT


def test_the_lora_is_a_copy():
    _, adapters = build(KINDS["DoRA"])
    lora = adapters.to_lora("x")
    before = {name: t.clone() for name, t in lora.layers[BLOCK_LAYERS[0]][0].tensors().items()}
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.zero_()
    for name, tensor in lora.layers[BLOCK_LAYERS[0]][0].tensors().items():
        assert torch.equal(tensor, before[name])


# Warm start.


@pytest.mark.parametrize("dialect", ["comfy", "kohya"])
@every_kind
def test_training_goes_on_from_a_file_with_the_config_that_it_implies(config, dialect, tmp_path):
    dit, adapters = build(replace(config, include=("single_blocks", "img_attn", "img_in")))
    with torch.no_grad():
        expected = run(dit)
    lora = read_lora(write_lora(tmp_path / "x.safetensors", adapters.to_lora("x"), dialect), CONFIG)
    implied = config_from_lora(lora)
    assert (implied.kind, implied.dora) == (config.kind, config.dora)
    dit, adapters = build(implied, trained=False)
    adapters.load_lora(lora)
    assert list(adapters.linears) == list(lora.layers)
    assert relative_l2(run(dit), expected) < EXPORT_LIMIT
    saved = adapters.to_lora("y").layers
    for layer, (factors,) in lora.layers.items():
        for name, tensor in factors.tensors().items():
            assert torch.equal(saved[layer][0].tensors()[name], tensor)


@pytest.mark.parametrize("name", ["LoRA, alpha", "rsLoRA", "DoRA", "LoKr"])
def test_a_file_of_another_scale_starts_at_the_same_function(name):
    dit, adapters = build(KINDS[name])
    expected = run(dit)
    dit, other = build(replace(KINDS[name], alpha=11.0, rank_stabilized=False), trained=False)
    other.load_lora(adapters.to_lora("x", torch.float32))
    assert relative_l2(run(dit), expected) < EXPORT_LIMIT


def test_the_implied_config_names_no_layers_where_they_are_the_usual_ones():
    _, adapters = build(KINDS["LoRA"])
    assert config_from_lora(adapters.to_lora("x")) == KINDS["LoRA"]


def kohya_lora(tmp_path: Path, ranks: dict[str, int], alpha: float) -> Lora:
    layers = {}
    for index, (layer, rank) in enumerate(ranks.items()):
        out_features, in_features = SHAPES[layer]
        generator = seeded(index)
        layers[layer] = (
            LoraFactors(
                lora_A=torch.randn(rank, in_features, generator=generator) / in_features**0.5,
                lora_B=torch.randn(out_features, rank, generator=generator),
                alpha=alpha,
            ),
        )
    lora = Lora(name="x", config=CONFIG, layers=layers, report=LoraReport(dialects=(), groups=()), metadata={})
    return read_lora(write_lora(tmp_path / "x.safetensors", lora, "kohya"), CONFIG)


def test_a_file_with_alpha_beside_its_factors_goes_on_with_both(tmp_path):
    lora = kohya_lora(tmp_path, {"double_blocks.0.img_attn.qkv": 4, "single_blocks.1.linear2": 4}, alpha=3.0)
    config = config_from_lora(lora)
    assert (config.rank, config.alpha, config.scale) == (4, 3.0, 0.75)
    _, adapters = build(config, trained=False)
    adapters.load_lora(lora)
    for layer, (factors,) in lora.layers.items():
        for name, tensor in factors.tensors().items():
            assert torch.equal(adapters.adapter(layer).get_parameter(name), tensor)


def test_layers_of_smaller_rank_are_widened_without_a_change(tmp_path):
    lora = kohya_lora(tmp_path, {"double_blocks.0.img_attn.qkv": 6, "double_blocks.0.img_attn.proj": 2}, alpha=3.0)
    dit = build_dit()
    apply_loras(dit, [LoraSetting(lora=lora)])
    expected = run(dit)
    config = config_from_lora(lora)
    assert (config.rank, config.alpha) == (6, None)  # scales differ, so each is multiplied in
    dit, adapters = build(config, trained=False)
    adapters.load_lora(lora)
    assert relative_l2(run(dit), expected) < EXPORT_LIMIT
    proj = adapters.adapter("double_blocks.0.img_attn.proj")
    assert not proj.lora_B[:, 2:].count_nonzero() and proj.lora_A[2:].count_nonzero()
    run(dit).square().mean().backward()
    assert proj.lora_B.grad[:, 2:].count_nonzero()


def test_layers_that_the_file_lacks_begin_as_always(tmp_path):
    lora = kohya_lora(tmp_path, {"single_blocks.1.linear2": 4}, alpha=4.0)
    dit = build_dit()
    apply_loras(dit, [LoraSetting(lora=lora)])
    expected = run(dit)
    dit, adapters = build(KINDS["LoRA"], trained=False)
    adapters.load_lora(lora)
    assert len(adapters.linears) == 20 and relative_l2(run(dit), expected) < EXPORT_LIMIT


def test_files_that_do_not_fit_are_refused_and_nothing_is_changed(tmp_path):
    source = build(KINDS["LoRA"])[1].to_lora("start.safetensors")
    one = build(replace(KINDS["LoRA"], include=("single_blocks",)), trained=False)[1]
    (factors,) = source.layers["single_blocks.1.linear2"]
    mixed = dict(list(source.layers.items())[12:])
    diff = (DiffFactors(diff=torch.zeros(*SHAPES["single_blocks.1.linear2"])),)
    halves = (replace(factors, rows=(0, 32), lora_B=factors.lora_B[:32]),)
    cases = [
        (source, "start.safetensors adapts 16 layers that are not trained"),
        (build(replace(one.config, rank=3))[1].to_lora("r3"), "r3 has rank 3, and rank 4 .*; set the rank to 3"),
        (build(replace(one.config, dora=True))[1].to_lora("d"), "is a LoRA of magnitude, lora_A, lora_B, and"),
        (build(replace(one.config, kind="lokr"))[1].to_lora("k"), "is a LoKr of w1, w2"),
        (replace(source, layers=mixed | {"single_blocks.1.linear2": diff}), "linear2 of start.* is a diff of diff"),
        (replace(source, layers=mixed | {"single_blocks.1.linear2": halves}), "changes separate rows of single_block"),
        (replace(source, config=replace(CONFIG, context_dim=32)), "another size of DiT"),
    ]  # fmt: skip
    before = {name: value.clone() for name, value in one.state_dict().items()}
    for lora, message in cases:
        if "adapts" not in message:
            lora = replace(lora, layers={k: v for k, v in lora.layers.items() if k in one.linears})
        with pytest.raises(ValueError, match=message):
            one.load_lora(lora)
        assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())
    lokr = build(KINDS["LoKr"])[1]
    with pytest.raises(ValueError, match=r"w1.*take kind, rank and factor from the file"):
        lokr.load_lora(build(KINDS["LoKr, factor 4"])[1].to_lora("k"))


def test_kinds_that_are_not_trained_imply_no_config():
    layer = "single_blocks.1.linear2"
    lora = build(KINDS["LoRA"])[1].to_lora("x")
    diff = (DiffFactors(diff=torch.zeros(*SHAPES[layer])),)
    with pytest.raises(ValueError, match="one in a file"):
        config_from_lora(replace(lora, layers=dict(lora.layers) | {layer: diff}))
    lokr = build(KINDS["LoKr"])[1].to_lora("x")
    (factors,) = lokr.layers[layer]
    both = replace(factors, w1=None, w1_a=torch.zeros(8, 1), w1_b=torch.zeros(1, 8))
    with pytest.raises(ValueError, match="shapes that are not trained here"):
        config_from_lora(replace(lokr, layers=dict(lokr.layers) | {layer: (both,)}))


@pytest.mark.parametrize(
    ("shape", "rank", "factor", "expected"),
    [
        ((27648, 3072), 16, -1, {"w1": (144, 48), "w2_a": (192, 16), "w2_b": (16, 64)}),
        ((27648, 3072), 96, -1, {"w1": (144, 48), "w2": (192, 64)}),
        ((27648, 3072), 95, -1, {"w1": (144, 48), "w2_a": (192, 95), "w2_b": (95, 64)}),
        ((27648, 3072), 16, 8, {"w1": (8, 8), "w2_a": (3456, 16), "w2_b": (16, 384)}),
        ((127, 250), 16, 8, {"w1": (1, 5), "w2_a": (127, 16), "w2_b": (16, 50)}),
        ((128, 128), 64, 128, {"w1": (1, 1), "w2": (128, 128)}),
    ],
)
def test_shapes_of_lokr_are_those_of_lycoris(shape, rank, factor, expected):
    assert lokr_shapes(shape, AdapterConfig(kind="lokr", rank=rank, lokr_factor=factor)) == expected


def test_changes_of_longer_norm_are_scaled_down_in_both_factors():
    config = AdapterConfig(rank=4, alpha=8.0, max_norm=1.5)
    _, adapters = build(config, trained=False)
    generator = torch.Generator().manual_seed(1)
    for index, adapter in enumerate(map(adapters.adapter, adapters.linears)):
        with torch.no_grad():
            adapter.get_parameter("lora_B").normal_(std=0.01 if index % 2 else 1.0, generator=generator)
    before = {name: value.clone() for name, value in adapters.state_dict().items()}
    adapters.limit_norms(torch.tensor(False))
    assert all(torch.equal(value, before[name]) for name, value in adapters.state_dict().items())
    adapters.limit_norms(torch.tensor(True))
    num_scaled = 0
    for layer, adapter in ((layer, adapters.adapter(layer)) for layer in adapters.linears):
        lora_A, lora_B = adapter.get_parameter("lora_A"), adapter.get_parameter("lora_B")
        old_A, old_B = (before[f"layers.{layer.replace('.', '_')}.{name}"] for name in ("lora_A", "lora_B"))
        norm = (2 * old_B.double() @ old_A.double()).norm().item()
        if norm <= 1.5:
            assert torch.equal(lora_A, old_A) and torch.equal(lora_B, old_B)
            continue
        num_scaled += 1
        torch.testing.assert_close(2 * lora_B @ lora_A, (1.5 / norm) * 2 * old_B @ old_A)
        torch.testing.assert_close(lora_A / old_A, (lora_B[0, 0] / old_B[0, 0]).expand_as(lora_A), rtol=1e-4, atol=0)
    assert 0 < num_scaled < len(adapters.linears)


@pytest.mark.parametrize("checkpointing", ["none", "blocks"])
def test_masters_are_cast_once_for_all_passes_of_a_step(checkpointing, monkeypatch):
    gradients, casts = [], []
    to = Tensor.to

    def count(self, *args, **kwargs):
        casts[-1] += self.data_ptr() in masters and args[:1] == (torch.bfloat16,)
        return to(self, *args, **kwargs)

    for held in (False, True):
        dit = build_dit().bfloat16()
        dit.checkpointing = checkpointing
        adapters = TrainableAdapters(dit, KINDS["LoRA, alpha"], generator=seeded())
        make_trained(adapters)
        adapters.attach()
        masters = {parameter.data_ptr() for parameter in adapters.parameters()}
        casts.append(0)
        with monkeypatch.context() as patch, adapters.cast_once(torch.bfloat16) if held else nullcontext():
            patch.setattr(Tensor, "to", count)
            run(dit).float().square().mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in adapters.parameters()]))
        assert not any(layer.held for layer in adapters.layers.values())
    assert torch.equal(*gradients) and gradients[0].count_nonzero()
    assert casts == [len(masters) * (2 if checkpointing == "blocks" else 1), 0]


def test_layers_with_several_loras_of_separate_rows_add_up_in_one_product():
    layer, adapter = one_layer(AdapterConfig(rank=4, alpha=6.0), 96, 64)
    make = functools.partial(torch.randn, generator=seeded(5))
    parts = [
        LiveFactors(LoraFactors(lora_A=make(3, 64), lora_B=make(32, 3), alpha=1.5, rows=rows), 0.7, layer.weight)
        for rows in ((0, 32), (64, 96))
    ]
    layer.adapters = (*parts, adapter)
    x = make(2, 5, 64).requires_grad_()
    output = layer(x)
    dense = layer.weight + adapter.factors().delta() * 1.5
    for part in parts:
        rows = F.pad(0.7 * part.factors.delta(), (0, 0, part.factors.rows[0], 96 - part.factors.rows[1]))
        dense = dense + rows
    expected = F.linear(x, dense)
    torch.testing.assert_close(output, expected)
    gradient = make(2, 5, 96)
    got = torch.autograd.grad(output, (x, adapter.lora_A, adapter.lora_B), gradient)
    wanted = torch.autograd.grad(expected, (x, adapter.lora_A, adapter.lora_B), gradient)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)
