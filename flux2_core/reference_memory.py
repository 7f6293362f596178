"""How many bytes cached references take, and the steps that attend to them; counted as in `memory_estimates`.

A cache holds keys and values of every block. In a step, each block joins them to its own: beside the **21 u** of a
single block there are then u + r for its keys and u + r for its values, where its own keys (1 u) have gone: **u + 2 r**
more (r: reference tokens of all rows). While they are joined, one of both is there a second time on its way from host
memory, or repeated for more rows: 15 u + 3 r.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from .dit import DiTConfig
from .memory_estimates import Computation, TokenCounts, forward_bytes

Place = Literal["device", "host"]
"""Where a cache is kept."""


def reference_cache_bytes(config: DiTConfig, num_tokens: int, num_rows: int, item_bytes: int) -> int:
    """Keys and values of all blocks."""
    num_blocks = config.num_double_blocks + config.num_single_blocks
    return 2 * num_blocks * num_rows * num_tokens * config.hidden_size * item_bytes


def cached_step_bytes(config: DiTConfig, tokens: TokenCounts, num_reference_tokens: int, how: Computation) -> int:
    """Peak of the activations of a step that attends to a cache, the cache itself aside.

    Args:
        tokens: without those of references.
    """
    vector = tokens.num_rows * config.hidden_size * how.item_bytes
    u, r = (tokens.num_tokens + tokens.num_text_tokens) * vector, num_reference_tokens * vector
    return max(forward_bytes(config, tokens, how) + u + 2 * r, 15 * u + 3 * r)


def sampling_bytes(
    config: DiTConfig,
    tokens: TokenCounts,
    num_reference_tokens: int,
    how: Computation,
    mode: Literal["off", "exact", "approximate"],
) -> int:
    """Peak of sampling with references in one of the modes of `reference_cache`, the cache included.

    Args:
        tokens: with those of references.
    """
    if mode == "off" or not num_reference_tokens:
        return forward_bytes(config, tokens, how)
    picture = replace(tokens, num_tokens=tokens.num_tokens - num_reference_tokens)
    first = first_pass_bytes(config, picture, num_reference_tokens, how, is_exact=mode == "exact")
    rows = 1 if mode == "exact" else tokens.num_rows
    kept = reference_cache_bytes(config, num_reference_tokens, rows, how.item_bytes)
    return kept + max(first, cached_step_bytes(config, picture, num_reference_tokens, how))


def first_pass_bytes(
    config: DiTConfig, tokens: TokenCounts, num_reference_tokens: int, how: Computation, *, is_exact: bool
) -> int:
    """Peak of the pass that fills a cache: over the references alone, or a step that computes them as well."""
    if is_exact:
        alone = TokenCounts(num_rows=1, num_tokens=num_reference_tokens, num_text_tokens=0)
        return forward_bytes(config, alone, how)
    return forward_bytes(config, replace(tokens, num_tokens=tokens.num_tokens + num_reference_tokens), how)
