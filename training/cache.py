"""What training reads: the cached tensors of a dataset, checked against it before anything is trained.

Caches are filled by `encode.cache_latents` and `encode.cache_text`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ..flux2_core.variants import Variant
from .cache_manifest import (
    SOURCE_FIELDS,
    Manifest,
    What,
    cache_folder,
    group_subsets,
    hash_pictures,
    known_hashes,
    manifest_prefix,
    manifest_settings,
    portable,
    read_manifests,
)
from .cache_plan import (
    CacheFile,
    PictureFiles,
    TextFile,
    find,
    plan_pictures,
    plan_text,
    read_cached,
    sources,
    subset_of,
)
from .dataset import Dataset, DatasetItem
from .dataset_config import DatasetConfig, SubsetConfig
from .fingerprint import (
    AutoencoderIdentity,
    EncoderIdentity,
    TextEncoderIdentity,
    identify_autoencoder,
    identify_text_encoder,
)
from .read_ahead import read_ahead

NUM_THREADS = 8
"""That look at the headers of cached files."""
NUM_NAMED = 3
"""Pictures of a kind of trouble that a message names."""
WORDS: dict[What, tuple[str, str]] = {"latents": ("pictures", "autoencoder"), "text": ("captions", "text encoder")}
"""What is encoded, and by what."""
TRAINED_SETTINGS = ("batch_size", "num_repeats", "caption_dropout", "flip")
"""Settings of a subset that change training, but not what is cached."""

Manifests = dict[Path, "Manifest | ValueError"]
"""What was found in the cache folders, by path; those that cannot be read with the reason."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """A picture as it is trained on, on the CPU."""

    latents: Tensor
    """``[128, h, w]``, fp32."""
    references: tuple[Tensor, ...]
    """``[128, h_i, w_i]``, fp32."""
    text: Tensor
    """``[max_tokens, C]`` in the text encoder's dtype."""
    mask: Tensor | None
    """Weights of the loss ``[h, w]``, fp32, 0..1."""


@dataclass(frozen=True, kw_only=True)
class CachedItem:
    """A picture whose files are all there."""

    item: DatasetItem
    folder: Path
    files: PictureFiles
    texts: tuple[TextFile, ...]
    """One for each of the item's captions."""

    @property
    def latents_size(self) -> tuple[int, int]:
        """Height and width in latents."""
        _, height, width = self.files.latents.shape
        return height, width

    @property
    def reference_sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of each reference, in latents."""
        return tuple((file.shape[1], file.shape[2]) for file in self.files.references)


@dataclass(frozen=True, kw_only=True)
class CachedDataset:
    """A dataset whose caches are whole."""

    items: tuple[CachedItem, ...]
    """To train on; repeats are not expanded."""
    validation: tuple[CachedItem, ...]
    """Held out."""
    config: DatasetConfig
    digest: str
    """32 hexadecimal digits that change when anything that is trained on changes, and stay when folders are moved."""
    autoencoder: AutoencoderIdentity
    text_encoder: TextEncoderIdentity
    empty_caption: TextFile = field(repr=False)

    @property
    def text_dim(self) -> int:
        """Channels of the text embeddings."""
        return self.text_encoder.context_dim

    def load(
        self,
        cached: CachedItem,
        *,
        caption_index: int = 0,
        drop_caption: bool = False,
        flipped: bool = False,
        read: Callable[[Path, CacheFile], Tensor] = read_cached,
    ) -> Sample:
        """Reads the tensors of a picture.

        Args:
            cached: one of `items` or `validation`.
            caption_index: which of the item's captions.
            drop_caption: take the empty caption instead.
            flipped: take the picture, its references and its mask mirrored left to right.
            read: gives the tensor of a file.

        Raises:
            ValueError: a file was deleted or changed since the cache was opened, or the subset is not cached mirrored.
        """
        files, folder = cached.files, cached.folder
        latents, references = files.latents, files.references
        if flipped:
            if files.mirrored_latents is None:
                raise ValueError(f"{cached.item.image} is not cached mirrored; set flip in its subset, and cache again")
            latents, references = files.mirrored_latents, files.mirrored_references
        mask = None if files.mask is None else read(folder, files.mask)
        return Sample(
            latents=read(folder, latents),
            references=tuple(read(folder, reference) for reference in references),
            text=read(folder, self.empty_caption if drop_caption else cached.texts[caption_index]),
            mask=mask.flip(-1) if mask is not None and flipped else mask,
        )


def open_cache(
    dataset: Dataset,
    variant: Variant,
    *,
    autoencoder: str | Path | None = None,
    text_encoder: str | Path | None = None,
    tokenizer: str | Path | None = None,
) -> CachedDataset:
    """Finds the cached files of a dataset and checks by their headers that they are whole and of this dataset.

    Args:
        dataset: as it is now.
        variant: what is trained; among several cached text encoders it decides which one fits.
        autoencoder, text_encoder: weights that the caches must be of; None takes the ones that are cached, where
            there is one choice.
        tokenizer: that `text_encoder` is used with.

    Raises:
        ValueError: something is not cached, stale, damaged, or of other encoders; with how much and what to run.
    """
    manifests = read_manifests(dataset)
    wanted_text = wanted_latents = None
    if text_encoder is not None:
        wanted_text = identify_text_encoder(text_encoder, variant.text_encoder, tokenizer=tokenizer)
    if autoencoder is not None:
        wanted_latents = identify_autoencoder(autoencoder)

    latents = _choose(dataset, "latents", manifests, variant, wanted_latents)
    text = _choose(dataset, "text", manifests, variant, wanted_text)
    assert isinstance(latents, AutoencoderIdentity) and isinstance(text, TextEncoderIdentity)

    known = known_hashes(manifests)
    hashes = hash_pictures([path for item in dataset.items for path in sources(item)], known, num_workers=NUM_THREADS)
    digests = {path: picture.sha256 for path, picture in hashes.items()}
    items = []
    for item in dataset.items:
        subset = subset_of(dataset, item)
        items.append(
            CachedItem(
                item=item,
                folder=cache_folder(subset),
                files=plan_pictures(item, subset, latents, digests),
                texts=tuple(plan_text(caption, text) for caption in item.captions),
            )
        )
    empty = plan_text("", text)
    _check_files(items, empty, manifests, variant)
    return CachedDataset(
        items=tuple(item for item in items if not item.item.is_validation),
        validation=tuple(item for item in items if item.item.is_validation),
        config=dataset.config,
        digest=_digest(dataset, items),
        autoencoder=latents,
        text_encoder=text,
        empty_caption=empty,
    )


def _choose(
    dataset: Dataset, what: What, manifests: Manifests, variant: Variant, wanted: EncoderIdentity | None
) -> EncoderIdentity:
    """The encoder that all subsets are cached with, that fits the variant, and that was asked for."""
    things, encoder_name = WORDS[what]
    command = f"run `flux2 cache-{what} --dataset_config FILE --model_version {variant.name}`"
    candidates: dict[tuple[str, str], EncoderIdentity] = {}
    for number, (subset, _) in enumerate(group_subsets(dataset, what)):
        here = _cached_with(subset, what, manifests)
        if not here:
            raise ValueError(
                f"the {things} of {subset.place} are not cached with the present settings in {cache_folder(subset)}"
                f"{_other_settings(subset, what, manifests)}; {command}"
            )
        fitting = {(one.fingerprint, one.dtype): one for one in here if _fits(one, variant)}
        if not fitting:
            raise ValueError(
                f"the {things} of {subset.place} are cached with {_names(here)}, which is no {encoder_name} of "
                f"{variant.name}; {command}"
            )
        if number and not candidates.keys() & fitting.keys():
            raise ValueError(
                f"the {things} of {subset.place} are cached with {_names(fitting.values())}, those of other subsets "
                f"with {_names(candidates.values())}; {command} to have them all of one {encoder_name}"
            )
        candidates = {key: fitting[key] for key in fitting if not number or key in candidates}
    if not candidates:
        raise ValueError("the dataset has no pictures; check its paths with `flux2 dataset FILE`")
    if wanted is not None:
        same = {key: one for key, one in candidates.items() if one.fingerprint == wanted.fingerprint}
        if not same:
            raise ValueError(
                f"the {things} are cached with {_names(candidates.values())}, but the {encoder_name} to train with is "
                f"{wanted.description}; {command} with it"
            )
        # Of two precisions the one that encoding at run time has.
        candidates = {key: one for key, one in same.items() if one.dtype == wanted.dtype} or same
    if len(candidates) > 1:
        raise ValueError(
            f"the {things} are cached with {len(candidates)} encoders, {_names(candidates.values())}; name the "
            f"{encoder_name} to train with, or delete the manifest of the other"
        )
    return next(iter(candidates.values()))


def _cached_with(subset: SubsetConfig, what: What, manifests: Manifests) -> list[EncoderIdentity]:
    """The encoders that have a manifest of this subset with its present settings."""
    folder, prefix = cache_folder(subset), manifest_prefix(subset, what)
    found = [one for path, one in manifests.items() if path.parent == folder and path.name.startswith(prefix)]
    for manifest in found:
        if isinstance(manifest, ValueError):
            raise manifest
    return [manifest.encoder for manifest in found if isinstance(manifest, Manifest)]


def _fits(encoder: EncoderIdentity, variant: Variant) -> bool:
    if isinstance(encoder, AutoencoderIdentity):  # one serves all released variants; tiny has its own
        return encoder.reference_sides == variant.autoencoder.reference_sides
    assert isinstance(encoder, TextEncoderIdentity)
    config = variant.text_encoder
    wanted = (config.family, variant.dit.context_dim, config.max_tokens)
    return (encoder.family, encoder.context_dim, encoder.max_tokens) == wanted


def _names(encoders: Iterable[EncoderIdentity]) -> str:
    return " and ".join(dict.fromkeys(encoder.description for encoder in encoders))


def _other_settings(subset: SubsetConfig, what: What, manifests: Manifests) -> str:
    """Which settings differ from those that the same pictures are cached with, where they are."""
    folder, settings = cache_folder(subset), manifest_settings(subset, what)
    for path, manifest in manifests.items():
        if path.parent != folder or isinstance(manifest, ValueError) or manifest.what != what:
            continue
        before = manifest.settings
        if all(before.get(key) == settings[key] for key in SOURCE_FIELDS):
            changes = [
                f"{key} was {before.get(key)}, is {value}"
                for key, value in settings.items()
                if before.get(key) != value
            ]
            return f" ({', '.join(changes[:NUM_NAMED])})"
    return ""


def _check_files(items: Sequence[CachedItem], empty: TextFile, manifests: Manifests, variant: Variant) -> None:
    """Raises ValueError unless every file of every item is there and whole."""
    folders = dict.fromkeys(item.folder for item in items)
    wanted: dict[tuple[Path, str], CacheFile] = {(folder, empty.name): empty for folder in folders}
    for item in items:
        wanted |= {(item.folder, file.name): file for file in (*item.files.all, *item.texts)}
    states = dict(read_ahead(lambda place: _state(place[0], wanted[place]), wanted, NUM_THREADS))
    if all(state is None for state in states.values()):
        return
    listed: dict[Path, dict[str, set[str]]] = {}
    for path, manifest in manifests.items():
        if not isinstance(manifest, ValueError):
            for picture, names in manifest.items:
                listed.setdefault(path.parent, {}).setdefault(picture, set()).update(names)
    troubles: dict[str, list[str]] = {}
    for item in items:
        name = portable(item.item.image, item.folder)
        known = listed.get(item.folder, {}).get(name)
        shown = item.item.name or item.item.image.name
        for of_text, files in ((False, item.files.all), (True, item.texts)):
            bad = {file.name: states[item.folder, file.name] for file in files if states[item.folder, file.name]}
            if "damaged" in bad.values():
                trouble = "with damaged files in the cache"
            elif not bad:
                continue
            elif known is None:
                trouble = "new since the cache was made"
            elif not bad.keys() <= known:
                trouble = "with an edited caption" if of_text else "changed"
            else:
                trouble = "with files missing from the cache"
            names = troubles.setdefault(trouble, [])
            if shown not in names:
                names.append(shown)
    if any(states[folder, empty.name] for folder in folders):
        troubles["without the empty caption"] = [str(folder) for folder in folders if states[folder, empty.name]]
    parts = [
        f"{len(names)} {trouble} ({', '.join(names[:NUM_NAMED])}{', ...' if len(names) > NUM_NAMED else ''})"
        for trouble, names in troubles.items()
    ]
    raise ValueError(
        f"the cache does not fit the dataset's {len(items)} pictures: {'; '.join(parts)}. Run `flux2 cache "
        f"--dataset_config FILE --model_version {variant.name}`: only these are encoded"
    )


def _state(folder: Path, file: CacheFile) -> str | None:
    """What is wrong with a file: "missing", "damaged", or None."""
    try:
        return "missing" if find(folder, file) is None else None
    except ValueError:
        return "damaged"


def _digest(dataset: Dataset, items: Sequence[CachedItem]) -> str:
    settings = [{name: getattr(subset, name) for name in TRAINED_SETTINGS} for subset in dataset.config.subsets]
    keys = [
        [item.item.subset, item.item.is_validation, [file.key for file in (*item.files.all, *item.texts)]]
        for item in items
    ]
    return hashlib.sha256(json.dumps([settings, keys]).encode()).hexdigest()[:32]
