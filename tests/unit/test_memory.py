"""The planner: order of preference, limits, messages, and the table of `flux2 plan`."""

from __future__ import annotations

from dataclasses import replace

import pytest
from flux2_kit.flux2_core.cli import main
from flux2_kit.flux2_core.memory import (
    GIB,
    FileFacts,
    MemoryNeeds,
    MemoryPlan,
    MemoryRequest,
    describe,
    least_plan,
    plan_memory,
)
from flux2_kit.flux2_core.memory_estimates import dit_bytes
from flux2_kit.flux2_core.variants import VARIANTS

BUDGETS = (4, 6, 8, 10, 12, 16, 24, 32, 48, 80)
NAMES = ("klein-4b", "klein-9b", "dev")


def request(name: str = "klein-9b", **settings) -> MemoryRequest:
    return MemoryRequest(variant=VARIANTS[name], **settings)


def plan(budget_gib: float | None, host_gib: float | None = None, asked: MemoryRequest | None = None) -> MemoryPlan:
    return plan_memory(
        asked or request(),
        None if budget_gib is None else round(budget_gib * GIB),
        None if host_gib is None else round(host_gib * GIB),
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rank": 32, "uses_text_encoder": False, "uses_autoencoder": False},
        {"needs": MemoryNeeds(width=2048, height=2048)},
        {"needs": MemoryNeeds(reference_sizes=((1024, 1024),) * 2, uses_cfg=True)},
        {"precision": "bf16"},
    ],
    ids=["picture", "training", "large", "references", "bf16"],
)
@pytest.mark.parametrize("name", NAMES)
def test_no_plan_exceeds_its_budget_and_more_memory_is_never_slower(name, settings):
    asked = request(name, **settings)
    before = None
    for budget in BUDGETS:
        try:
            found = plan(budget, 256, asked)
        except ValueError:
            assert before is None, "a larger budget is refused"
            continue
        assert found.peak_bytes <= budget * GIB
        if before is not None and before.checkpointing == found.checkpointing:
            order = ("nf4", "fp8", "bf16")
            exactness = order.index(found.dit.precision) - order.index(before.dit.precision)
            assert exactness > 0 or found.delay_seconds <= before.delay_seconds
        before = found
    assert before is not None


def test_with_enough_memory_nothing_is_changed():
    for budget in (None, 1000):
        found = plan(budget)
        assert not found.takes_turns and found.dit.precision == "bf16" and not found.dit.is_streamed
        assert found.text_encoder is not None and not found.text_encoder.is_streamed
        assert found.tiling == "whole"


def test_resident_fp8_goes_before_streamed_bf16_and_nf4_comes_last():
    assert plan(24).dit.precision == "bf16"
    found = plan(14)
    assert (found.dit.precision, found.dit.num_resident, found.takes_turns) == ("fp8", 32, True)
    streamed = plan(6)
    assert streamed.dit.precision == "fp8" and 0 < streamed.dit.num_resident < 32 and streamed.dit.ring_size == 2
    asked = request(uses_text_encoder=False, uses_autoencoder=False)
    least_fp8, least = (least_plan(replace(asked, precision=precision)) for precision in ("fp8", "auto"))
    assert least_fp8 is not None and least is not None and least.dit.precision == "nf4"
    between = (least_fp8.peak_bytes + least.peak_bytes) / 2 / GIB
    assert plan(between, None, asked).dit.precision == "nf4"


def test_a_precision_that_is_asked_for_is_kept_however_small_the_budget():
    for precision in ("bf16", "fp8", "nf4"):
        for budget in (6, 12, 80):
            assert plan(budget, None, request(precision=precision)).dit.precision == precision
    assert plan(80, None, request(text_encoder_precision="nf4")).text_encoder.precision == "nf4"  # pyright: ignore


def test_no_space_for_a_block_is_left_over():
    asked = request(precision="fp8", uses_text_encoder=False, uses_autoencoder=False)
    block = dit_bytes(asked.variant.dit, "fp8", 2).blocks
    for budget in (4, 5, 6, 7, 8):
        assert budget * GIB - plan(budget, None, asked).peak_bytes < 2 * max(block)


def test_a_budget_that_is_too_small_says_the_least_that_works_and_that_works():
    with pytest.raises(
        ValueError, match=r"does not fit into 1\.0 GiB: the least that works is (.*) GiB \(nf4"
    ) as caught:
        plan(1)
    least = float(str(caught.value).split("least that works is ")[1].split(" GiB")[0])
    assert plan(least).peak_bytes <= least * GIB
    with pytest.raises(ValueError, match="the least"):
        plan(least - 0.1)


def test_short_host_memory_streams_the_file_itself_from_disk():
    found = plan(8, 2)
    assert found.dit.from_disk and found.dit.precision == "bf16" and found.dit.host_bytes == 0
    assert found.text_encoder is not None and found.text_encoder.from_disk
    assert "from disk" in describe(found)
    quantised = request(dit_file=FileFacts(precision="fp8"))
    assert plan(8, 2, quantised).dit.precision == "fp8" and plan(8, 2, quantised).dit.from_disk
    assert not plan(8, 64).dit.from_disk


def test_a_file_that_cannot_be_streamed_needs_host_memory_for_less():
    asked = request(dit_file=FileFacts(can_stream=False), uses_text_encoder=False, uses_autoencoder=False)
    found = plan(4, 5, asked)
    assert (found.dit.precision, found.dit.from_disk) == ("nf4", False)
    with pytest.raises(ValueError, match=r"needs more host memory than the 1\.0 GiB that are free.*flux2 quantize"):
        plan(4, 1, asked)


def test_blocks_to_stream_are_taken_by_number():
    found = plan(80, None, request(needs=MemoryNeeds(num_streamed=30)))
    assert (found.dit.precision, found.dit.num_resident) == ("bf16", 2)
    with pytest.raises(ValueError, match="33 blocks cannot be streamed: klein-9b has 32"):
        request(needs=MemoryNeeds(num_streamed=33))


def test_blocks_give_way_to_pictures_before_these_go_through_host_memory():
    for budget in (8, 9, 10, 11, 12):
        found = plan(budget)
        assert found.dit_stays and found.tiling in ("whole", "strips"), budget
    # Weights in the file's own precision do not stand in the way of pictures either.
    assert (plan(8, None, request("klein-4b")).dit.precision, plan(9, None, request("klein-4b")).tiling) == (
        "fp8",
        "strips",
    )
    both = [plan(budget, None, request("klein-4b", precision="bf16")) for budget in (8, 10)]
    assert both[0].dit.is_streamed and not both[1].dit.is_streamed


def test_a_text_encoder_that_has_to_leave_is_streamed_as_a_whole_beside_a_dit_that_stays():
    found = plan(12)
    assert found.text_encoder is not None and found.text_encoder.num_resident == 0 and found.dit_stays
    embedding = 151936 * 4096 * 2
    assert found.text_encoder.host_bytes == found.text_encoder.streamed_bytes + embedding
    assert found.text_encoder.device_bytes == found.text_encoder.streamed_bytes * 2 // 27
    assert found.text_encoding_bytes > found.dit.resident_bytes + found.text_encoder.device_bytes
    assert plan(32).text_encoder.num_resident == 27  # pyright: ignore[reportOptionalMemberAccess]


def test_larger_work_leaves_fewer_blocks_resident():
    small = plan(8, None, request())
    for needs in (
        MemoryNeeds(width=1536, height=1536),
        MemoryNeeds(reference_sizes=((1024, 1024),) * 2),
        MemoryNeeds(num_images=2),
        MemoryNeeds(uses_cfg=True),
    ):
        found = plan(8, None, request(needs=needs))
        assert found.dit.num_resident < small.dit.num_resident
    assert plan(8, None, request(lora_bytes=GIB // 2)).dit.num_resident < small.dit.num_resident
    assert plan(8, None, request("klein-base-9b")).dit.num_resident < small.dit.num_resident, "with CFG by default"


def test_training_needs_checkpointing_to_stream():
    settings = {"rank": 32, "uses_text_encoder": False, "uses_autoencoder": False}
    assert plan(24, None, request(**settings)).checkpointing == "blocks"
    assert plan(4, None, request(**settings)).checkpointing == "offload"
    with pytest.raises(ValueError, match="does not fit"):
        plan(8, None, request(**settings, checkpointing="none"))
    with pytest.raises(ValueError, match="only with checkpointing"):
        request(**settings, checkpointing="none", needs=MemoryNeeds(num_streamed=4))
    tiny = request("tiny", rank=8, uses_text_encoder=False, uses_autoencoder=False, needs=MemoryNeeds(num_streamed=2))
    assert plan(None, None, tiny).checkpointing == "blocks"


def test_large_pictures_go_in_strips_and_very_large_ones_through_host_memory():
    asked = [request("klein-4b", needs=MemoryNeeds(width=side, height=side)) for side in (1024, 2048, 4096)]
    found = [plan(budget, None, item) for budget, item in zip((16, 8, 11), asked, strict=True)]
    assert [item.tiling for item in found] == ["whole", "strips", "host"]
    assert plan(80, None, asked[2]).tiling == "whole"
    assert plan(80, None, request(needs=MemoryNeeds(tile_autoencoder=True))).tiling == "strips"


def test_figures_that_a_release_is_to_reach():
    """Sizes of networks alone; their times are for the benchmark."""
    alone = {"uses_text_encoder": False, "uses_autoencoder": False}
    streamed = {"klein-9b": (3.0, 32), "dev": (6.0, 56)}
    for name, (limit, number) in streamed.items():
        asked = request(name, precision="fp8", needs=MemoryNeeds(num_streamed=number), **alone)
        assert plan(None, None, asked).peak_bytes <= limit * GIB
    assert plan(None, None, request(precision="fp8", **alone)).peak_bytes <= 10.5 * GIB
    training = request(precision="fp8", rank=32, checkpointing="blocks", **alone)
    assert plan(None, None, training).peak_bytes <= 12.5 * GIB
    assert plan(7, None, training).peak_bytes <= 7 * GIB
    assert plan(10, None, request("dev", precision="fp8", text_encoder_precision="nf4")).peak_bytes <= 10 * GIB
    assert plan(8, None, request("klein-9b")).peak_bytes <= 8 * GIB


def test_a_plan_in_one_line():
    size = f"about {plan(80).peak_bytes / GIB:.1f} GiB"
    assert describe(plan(80)) == f"bf16, all 32 blocks resident, {size}"
    line = describe(plan(6))
    assert line.startswith("fp8, ") and " of 32 blocks resident, text encoder streamed, " in line
    assert line.endswith(f"about {plan(6).peak_bytes / GIB:.1f} GiB")


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="allowed are auto, bf16, fp16, fp32, fp8, nf4"):
        request(precision="int8")


def test_the_table(capsys):
    assert main(["plan", "klein-9b", "--budgets", "1", "8", "80"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == "klein-9b, 1024x1024 px"
    assert rows[1].split()[:3] == ["budget", "precision", "resident"]
    assert rows[2].startswith("1 GiB   too small; the least is ")
    assert rows[3].split()[:6] == ["8", "GiB", "fp8", str(plan(8).dit.num_resident), "of", "32"]
    assert "bf16, streamed" in rows[3] and "bf16, resident" in rows[4]
    assert rows[4].endswith(f"{plan(80).peak_bytes / GIB:.1f} GiB")
    assert main(["plan", "dev", "--training", "--rank", "16", "--budgets", "16"]) == 0
    table = capsys.readouterr().out
    assert "training a LoRA of rank 16" in table and "text encoder" not in table and "checkpointing blocks" in table
    assert main(["plan", "dev", "--rank", "16", "--budgets", "16"]) == 0
    assert capsys.readouterr().out == table
    assert main(["plan", "dev", "--training", "--budgets", "16"]) == 0
    assert "training a LoRA of rank 32" in capsys.readouterr().out
    assert main(["plan", "klein-9b", "--budgets", "1"]) == 1
    assert main(["plan", "klein-9b", "--budgets", "-1"]) == 1
    assert "numbers of GiB above 0" in capsys.readouterr().err


def test_the_table_tells_where_references_are_cached(capsys):
    assert main(["plan", "klein-9b-kv", "--references", "3", "--budgets", "8", "48"]) == 0
    title, names, small, large = capsys.readouterr().out.splitlines()
    assert title.endswith("3 references") and "  reference cache  " in names
    assert "  host  " in small and "  device  " in large
    assert main(["plan", "klein-9b", "--references", "1", "--budgets", "8"]) == 0
    assert "reference cache" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--image_size", "0", "64"], "the height is 0 px; it must be a multiple of 16 and at least 64"),
        (["--image_size", "1024", "1001"], "the width is 1001 px; it must be a multiple of 16"),
        (["--guidance_scale", "nan"], "cfg_scale is nan; it must be a finite number"),
        (["--references", "-1"], "--references is -1; give 0 or more"),
        (["--references", "11"], "11 references were given; at most 10"),
        (["--batch_size", "0"], "--batch_size is 0; give 1 or more"),
        (["--rank", "0"], "--rank is 0; give 1 or more"),
        (["--training", "--text_encoder_precision", "fp8"], "leave --text_encoder_precision out"),
        (["--host_memory", "nan"], "--host_memory is nan; give a number of GiB"),
        (["--host_memory", "-3"], "--host_memory is -3"),
        (["--budgets", "8", "nan"], "--budgets has nan"),
    ],
)
def test_numbers_that_cannot_be_are_refused(capsys, options, said):
    assert main(["plan", "klein-9b", *options]) == 1
    assert said in capsys.readouterr().err
