"""Finding weights by variant name, and downloads up to the network's edge."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from flux2_kit.flux2_core import weights
from flux2_kit.flux2_core.autoencoder import AutoencoderConfig, Flux2Autoencoder
from flux2_kit.flux2_core.dit import DiTConfig, Flux2DiT
from flux2_kit.flux2_core.variants import VARIANTS
from flux2_kit.flux2_core.weights import download, find_weights, plan_download
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import save_file

SMALL = DiTConfig(
    hidden_size=64,
    num_heads=2,
    num_double_blocks=1,
    num_single_blocks=1,
    context_dim=48,
    has_guidance_embedder=False,
    rope_axes=(8, 8, 8, 8),
)
KLEIN = replace(VARIANTS["klein-4b"], dit=SMALL)
KLEIN_BASE = replace(VARIANTS["klein-base-4b"], dit=SMALL)


def put_dit(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(Flux2DiT(SMALL).state_dict(), path)
    return path


def put_autoencoder(path: Path, latent_channels: int = 32, statistics: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    widths = (8, 8, 8, 8)
    config = AutoencoderConfig(
        encoder_widths=widths, decoder_widths=widths, latent_channels=latent_channels, num_norm_groups=4
    )
    state = Flux2Autoencoder(config).state_dict()
    save_file({k: v for k, v in state.items() if statistics or not k.startswith("bn.")}, path)
    return path


def put_qwen(path: Path, hidden: int = 2560) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.layers.{i}.self_attn.{p}.weight": torch.ones(1) for i in range(36) for p in ("q_proj", "q_norm")}
    save_file(tensors | {"model.embed_tokens.weight": torch.ones(2, hidden)}, path)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    return folder


def in_cache(cache: Path, repository: str, filename: str) -> Path:
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text("0123abc")
    return folder / "snapshots" / "0123abc" / filename


def test_an_explicit_path_wins_and_must_exist(tmp_path):
    path = put_dit(tmp_path / "mine.safetensors")
    assert find_weights(KLEIN, "dit", path) == path
    with pytest.raises(ValueError, match=r"no\.safetensors does not exist; give the path of the DiT's weights"):
        find_weights(KLEIN, "dit", tmp_path / "no.safetensors")


@pytest.mark.parametrize("place", ["diffusion_models", "diffusion_models/flux2", "unet", "."])
def test_comfyui_models_folder(tmp_path, place):
    put_dit(tmp_path / place / "flux-2-klein-base-4b.safetensors")
    with pytest.raises(ValueError, match="found no weights"):
        find_weights(KLEIN, "dit", models_dir=tmp_path)
    path = put_dit(tmp_path / place / "flux-2-klein-4b-fp8.safetensors")
    assert find_weights(KLEIN, "dit", models_dir=tmp_path) == path
    path = put_dit(tmp_path / place / "flux-2-klein-4b.safetensors")
    assert find_weights(KLEIN, "dit", models_dir=tmp_path) == path


def test_an_autoencoder_of_flux1_is_not_taken_for_ours(tmp_path):
    put_autoencoder(tmp_path / "vae" / "ae.safetensors", latent_channels=16, statistics=False)
    with pytest.raises(ValueError, match=r"ae\.safetensors is an autoencoder with 16 latent channels"):
        find_weights(KLEIN, "autoencoder", models_dir=tmp_path)
    path = put_autoencoder(tmp_path / "vae" / "flux2-vae.safetensors")
    assert find_weights(KLEIN, "autoencoder", models_dir=tmp_path) == path


def test_text_encoder_of_the_right_size(tmp_path):
    put_qwen(tmp_path / "text_encoders" / "qwen_3_4b.safetensors", hidden=4096)
    with pytest.raises(ValueError, match="of another size than klein-4b needs"):
        find_weights(KLEIN, "text_encoder", models_dir=tmp_path)
    path = put_qwen(tmp_path / "clip" / "qwen_3_4b.safetensors")
    assert find_weights(KLEIN, "text_encoder", models_dir=tmp_path) == path


def test_hugging_face_cache(cache):
    repository = "black-forest-labs/FLUX.2-klein-4B"
    dit = put_dit(in_cache(cache, repository, "flux-2-klein-4b.safetensors"))
    put_autoencoder(in_cache(cache, repository, "vae/diffusion_pytorch_model.safetensors"))
    text_encoder = put_qwen(in_cache(cache, repository, "text_encoder/model.safetensors")).parent
    assert find_weights(KLEIN, "dit") == dit
    assert find_weights(KLEIN, "autoencoder").name == "diffusion_pytorch_model.safetensors"
    assert find_weights(KLEIN, "text_encoder") == text_encoder
    # What is common to the variants is found in any of their repositories; the DiT is not.
    assert find_weights(KLEIN_BASE, "text_encoder") == text_encoder
    with pytest.raises(ValueError, match="found no weights of klein-base-4b's DiT"):
        find_weights(KLEIN_BASE, "dit")


def test_a_diffusers_folder_in_the_cache(cache):
    repository = "black-forest-labs/FLUX.2-klein-4B"
    path = put_dit(in_cache(cache, repository, "transformer/diffusion_pytorch_model.safetensors"))
    assert find_weights(KLEIN, "dit") == path.parent


def test_an_incomplete_download_is_told(cache):
    repository = "black-forest-labs/FLUX.2-klein-4B"
    index = in_cache(cache, repository, "text_encoder/model.safetensors.index.json")
    index.parent.mkdir(parents=True)
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(ValueError, match=r"did not take .*model-00001-of-00002\.safetensors"):
        find_weights(KLEIN, "text_encoder")


def test_the_message_says_where_it_looked_and_what_to_do(tmp_path, cache):
    with pytest.raises(ValueError, match="found no weights") as caught:
        find_weights(VARIANTS["klein-9b"], "dit", models_dir=tmp_path)
    message = str(caught.value)
    for part in (
        "flux-2-klein-9b.safetensors",
        f"{tmp_path} (diffusion_models/, unet/",
        str(cache),
        "black-forest-labs/FLUX.2-klein-9B",
        "flux2 download klein-9b",
        "hf auth login",
    ):
        assert part in message
    assert "\n" not in message
    with pytest.raises(ValueError, match="found no weights") as caught:
        find_weights(VARIANTS["klein-9b"], "autoencoder")
    assert "hf auth login" not in str(caught.value)


def test_tiny_is_bundled(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "TINY_FOLDER", tmp_path)
    with pytest.raises(ValueError, match=r"install FLUX.2 Kit again"):
        find_weights(VARIANTS["tiny"], "dit")
    (tmp_path / "text_encoder").mkdir()
    assert find_weights(VARIANTS["tiny"], "text_encoder") == tmp_path / "text_encoder"


def test_an_unknown_component():
    with pytest.raises(ValueError, match="known components: dit, autoencoder, text_encoder"):
        find_weights(KLEIN, "vae")  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda variant: variant.name)
def test_plans(variant):
    plan = plan_download(variant)
    assert variant.license in plan.note
    assert ("hf auth login" in plan.note) == variant.gated
    if variant.name == "tiny":
        assert plan.files == () and "nothing to download" in plan.note
        return
    names = [file.filename for file in plan.files]
    assert names[0].endswith(".safetensors") and names[2:] == ["text_encoder/*", "tokenizer/*"]
    assert plan.size_bytes > 15e9


class FakeApi:
    files = (
        ("flux-2-klein-4b.safetensors", 70),
        ("vae/diffusion_pytorch_model.safetensors", 5),
        ("text_encoder/config.json", 1),
        ("text_encoder/model-00001-of-00001.safetensors", 20),
        ("tokenizer/tokenizer.json", 4),
        ("transformer/diffusion_pytorch_model.safetensors", 70),
    )

    def model_info(self, repository: str, files_metadata: bool) -> SimpleNamespace:
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, size=size) for name, size in self.files])


def test_download_fetches_the_plan_and_reports_bytes(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repository, name: f"/cache/{name}")
    calls: list[tuple[str, int, int]] = []
    paths = download(VARIANTS["klein-4b"], lambda *call: calls.append(call))
    assert [path.as_posix() for path in paths] == [f"/cache/{name}" for name, _ in FakeApi.files[:5]]
    assert [call[1] for call in calls] == [0, 70, 75, 76, 96, 100] and {call[2] for call in calls} == {100}
    assert download(VARIANTS["klein-4b"], should_stop=lambda: True) == []
    assert download(VARIANTS["tiny"]) == []


def test_download_refused_failed_and_changed(monkeypatch):
    class RefusedError(GatedRepoError):
        def __init__(self) -> None:
            Exception.__init__(self, "403")

    def refuse(*_: object, **__: object) -> None:
        raise RefusedError

    def disconnect(*_: object, **__: object) -> None:
        raise ConnectionResetError("the line went dead")

    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(
        ValueError, match=r"accept the licence at https://huggingface.co/black-forest-labs/FLUX.2-klein-4B"
    ):
        download(VARIANTS["klein-4b"])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", disconnect)
    with pytest.raises(ValueError, match=r"the line went dead; .*flux2 download klein-4b` again: it resumes"):
        download(VARIANTS["klein-4b"])
    monkeypatch.setattr(FakeApi, "files", ())
    with pytest.raises(ValueError, match=r"has no file flux-2-klein-4b\.safetensors"):
        download(VARIANTS["klein-4b"])
