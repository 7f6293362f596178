"""Latents of references, kept by content in host memory: a picture that comes again is not encoded again."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from PIL import Image
from torch import Tensor

from .autoencoder import Flux2Autoencoder
from .content_store import ContentStore, weights_state

MAX_PICTURES = 128
MAX_BYTES = 2**28
"""A picture of 1024x1024 px has 2 MiB of latents."""

_stores: WeakKeyDictionary[Flux2Autoencoder, ReferenceStore] = WeakKeyDictionary()


class ReferenceStore:
    """Latents ``[1, 128, h, w]`` of one autoencoder by what it was given."""

    def __init__(self, weights: Hashable = None) -> None:
        self.weights = weights
        """Of the autoencoder, as `content_store.weights_state` tells them; None where they cannot change."""
        self._latents: ContentStore[Tensor] = ContentStore(max_items=MAX_PICTURES, max_bytes=MAX_BYTES)

    def get(self, picture: Image.Image, *, tiled: bool) -> Tensor | None:
        """Latents in host memory, if there are any.

        Args:
            picture: as it is encoded: scaled and cropped.
            tiled: whether it is encoded in strips, which gives other numbers in the last digits.
        """
        return self._latents.get(_key(picture, tiled))

    def put(self, picture: Image.Image, latents: Tensor, *, tiled: bool) -> Tensor:
        """Keeps latents, and gives them as they are kept."""
        latents = latents.cpu()
        self._latents.put(_key(picture, tiled), latents, latents.nbytes)
        return latents

    def get_all(self, pictures: Sequence[Image.Image], *, tiled: bool) -> list[Tensor] | None:
        """The latents of all pictures; None where one of them is not known."""
        found = [self.get(picture, tiled=tiled) for picture in pictures]
        known = [latents for latents in found if latents is not None]
        return known if len(known) == len(found) else None


def reference_store(autoencoder: Flux2Autoencoder) -> ReferenceStore:
    """The store that lives as long as an autoencoder; an empty one where its weights have changed."""
    weights = weights_state(autoencoder)
    store = _stores.get(autoencoder)
    if store is None or store.weights != weights:
        store = _stores[autoencoder] = ReferenceStore(weights)
    return store


@contextmanager
def unchanged_by_moves(autoencoder: Flux2Autoencoder) -> Iterator[None]:
    """What is known stays known although the weights move to another device meanwhile: their numbers stay the same."""
    store = _stores.get(autoencoder)
    is_valid = store is not None and store.weights == weights_state(autoencoder)
    try:
        yield
    finally:
        if store is not None and is_valid:
            store.weights = weights_state(autoencoder)


def _key(picture: Image.Image, tiled: bool) -> Hashable:
    return picture.size, picture.mode, hashlib.sha256(picture.tobytes()).digest(), tiled
