"""What the README states and the code decides has to agree."""

from __future__ import annotations

from pathlib import Path

import flux2_kit
import pytest
from flux2_kit.flux2_core.variants import VARIANTS, Variant
from flux2_kit.flux2_core.weights import TEXT_ENCODER_NAMES

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
TEXT_ENCODERS = {15360: "Mistral-Small-3.2-24B", 12288: "Qwen3-8B", 7680: "Qwen3-4B"}


def table_row(variant: Variant) -> str:
    assert variant.dit_file is not None
    repository = variant.dit_file.repository
    cells = (
        variant.name,
        f"`{variant.dit_file.filename}` of [{repository.split('/')[1]}](https://huggingface.co/{repository})",
        f"{TEXT_ENCODERS[variant.dit.context_dim]}, `{TEXT_ENCODER_NAMES[variant.text_encoder][0]}`",
        str(variant.num_steps),
        f"{variant.cfg_scale:g}",
        "-" if variant.guidance is None else f"{variant.guidance:g}",
        variant.license + (", gated" if variant.gated else ""),
    )
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("variant", [v for v in VARIANTS.values() if v.dit_file], ids=lambda v: v.name)
def test_the_table_of_variants_states_the_defaults(variant: Variant) -> None:
    assert table_row(variant) in README


def test_continuous_integration_runs_the_readme_s_test_command() -> None:
    command = README.split("## The tests with the second")[1].split("```")[1].strip()
    assert f"\n{command}\n" in (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")


def test_every_picture_and_link_of_the_readme_exists() -> None:
    targets = [part.split(")")[0] for part in README.split("](")[1:]]
    local = [target for target in targets if "://" not in target]
    assert local
    assert [target for target in local if not (REPOSITORY / target).exists()] == []


def test_every_node_is_listed_with_its_own_words() -> None:
    names = flux2_kit.NODE_DISPLAY_NAME_MAPPINGS
    rows = [f"| {names[key]} | {node.DESCRIPTION} |" for key, node in flux2_kit.NODE_CLASS_MAPPINGS.items()]
    assert [row for row in rows if row not in README] == []
