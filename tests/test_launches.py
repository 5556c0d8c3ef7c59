"""Launches counted from XLA's listings: a few lines of each kind, recorded, counts by hand."""

import pytest

from flexijax.aot import thunks
from flexijax.aot.launches import Counts, launches, trip_counts

KERNEL = "grid: [2, 1, 1] threads: [128, 1, 1]  shared_memory: 0 bytes"

DECODE = f"""\
000: kCommandBuffer [source       | next=003 (1)]
    001: kCustomKernel [source | sink] loop_broadcast_fusion {KERNEL}
    002: kCopy         [source | sink] kCopy
003: kWhile         [prev=000 (1) | next=000 (1)]
condition:
    004: kCustomKernel [source | sink] loop_compare_fusion {KERNEL}
  body:
    000: kCommandBuffer      [source       | next=008 (1)]
        005: kCustomKernel [source       | next=006 (1)] fusion_2 {KERNEL}
        006: kCustomKernel [prev=005 (1) | next=007 (1)] flexijax_decode_slots__1 \
grid: [4, 7, 16] threads: [128, 1, 2]  shared_memory: 39680 bytes
        007: kCuDnn [prev=006 (1) | sink        ] kCuDnn
    008: kDynamicSliceFusion [prev=000 (1) | sink] params=1, results=1
        009: kCopy [source | sink] kCopy
000: kCommandBuffer [prev=003 (1) | sink        ]
    010: kCopy [source | sink] kCopy
"""

NESTED = f"""\
001: kMemset       [source       | next=002 (3)] kMemset
002: kWhile        [prev=001 (1) | sink        ]
condition:
    003: kCustomKernel [source | sink] loop_compare_fusion_3 {KERNEL}
  body:
    007: kConditional        [prev=006 (1) | next=012 (1)]
      false_branch:
        004: kCustomKernel [source       | next=005 (1)] gemm_fusion_dot {KERNEL}
        005: kGemm         [prev=004 (1) | sink        ] kGemm
      true_branch:
        006: kCustomKernel [source | sink] loop_add_fusion {KERNEL}
    008: kWhile              [prev=007 (2) | next=017 (1)]
condition:
        009: kCustomKernel [source       | next=010 (1)] input_reduce_fusion {KERNEL}
        010: kCustomKernel [prev=009 (1) | sink        ] loop_compare_fusion {KERNEL}
      body:
        011: kCustomKernel [source | sink] loop_add_fusion_1 {KERNEL}
    012: kWhile              [prev=008 (1) | next=026 (1)]
condition:
        013: kCustomKernel [source | sink] loop_compare_fusion_2 {KERNEL}
      body:
        014: kWhile        [prev=013 (1) | sink        ]
condition:
            015: kCustomKernel [source | sink] loop_compare_fusion_1 {KERNEL}
          body:
            016: kCustomKernel [source       | sink        ] loop_add_fusion_3 {KERNEL}
    017: kCopy               [prev=012 (2) | sink        ] kCopy
"""


def metadata(**names):
    """As XLA writes it, for thunk numbers such as n3="while.21"."""
    entries = (
        f'thunk_metadata {{\n  thunk_info {{\n    profile_annotation: "{name}"\n'
        f'    thunk_id: {number.removeprefix("n")}\n  }}\n  thunk_kind: "kAny"\n}}\n'
        for number, name in names.items()
    )
    return (
        'thunk_metadata {\n  thunk_info {\n    profile_annotation: "command_buffer_1"\n  }\n}\n'
        + ("".join(entries))
    )


def test_steps_and_what_lies_beside_them():
    found = thunks.parse(DECODE, metadata(n3="while.21", n6="pallas_call.3"))
    counts = launches(found, {"while.21": 16})
    assert counts.once == Counts(in_graphs=3, graphs=2)
    assert [loop.trips for loop in counts.loops] == [16]
    assert counts.step == Counts(in_graphs=3, outside=1, graphs=1)
    assert counts.total == Counts(in_graphs=3 + 48, outside=16, graphs=18, loops=1)


def test_kernels_know_their_sizes_and_instructions():
    found = thunks.parse(DECODE, metadata(n6="pallas_call.3"))
    [kernel] = [thunk for outer in found for thunk in outer if "flexijax" in thunk.kernel]
    assert (kernel.kernel, kernel.grid) == ("flexijax_decode_slots__1", (4, 7, 16))
    assert (kernel.threads, kernel.shared_bytes) == (256, 39680)
    assert kernel.instruction == "pallas_call.3"


def test_a_loop_of_unknown_trips_waits_for_its_condition():
    counts = launches(thunks.parse(DECODE), {})
    assert counts.step == Counts(in_graphs=3, outside=2, graphs=1, host_syncs=1)
    assert (counts.total.unknown_loops, counts.total.host_syncs) == (1, 1)


def test_nested_loops_multiply_and_conditionals_wait():
    named = metadata(n2="while.24", n8="while.4", n12="while.10", n14="while.1")
    counts = launches(thunks.parse(NESTED, named), {"while.24": 7, "while.10": 5, "while.1": 3})
    assert counts.once == Counts(outside=1)
    # The larger branch, one trip of the unknown loop with its condition, 5 times 3, and a copy.
    assert counts.step == Counts(
        outside=2 + 3 + 15 + 1, conditionals=1, loops=1 + 1 + 5, unknown_loops=1, host_syncs=2
    )
    assert counts.total.outside == 1 + 7 * 21
    assert counts.total.host_syncs == 14


def test_what_a_graph_holds_waits_for_nobody():
    inside = "000: kCommandBuffer [source | sink] \n" + "\n".join(
        line if line == "condition:" else f"    {line}" for line in NESTED.splitlines()
    )
    counts = launches(thunks.parse(inside), {})
    assert counts.total.outside == 0 and counts.total.host_syncs == 0
    # Conditions run in a graph, whether the trips are known or not.
    assert counts.step == Counts(
        in_graphs=1 + 2 + 3 + 3 + 1, conditionals=1, loops=3, unknown_loops=3
    )


def test_calls_add_up():
    one = launches(thunks.parse(DECODE, metadata(n3="while.21")), {"while.21": 16})
    assert (one.times(2) + one).total == one.total.times(3)


def test_trips_stand_in_the_final_hlo():
    hlo = """
  %while.21 = (s32[], f32[4]{0}) while(%tuple.1), condition=%a, body=%b, \
backend_config={"known_trip_count":{"n":"16"},"known_init_step":{"init":"0","step":"1"}}
  ROOT %while.4 = (s32[]) while(%tuple.2), condition=%c, body=%d
"""
    assert trip_counts(hlo) == {"while.21": 16}


def test_a_missing_listing_is_said(tmp_path):
    with pytest.raises(RuntimeError, match="thunk_sequence"):
        thunks.read(tmp_path)
    (tmp_path / "module_1.jit_f.thunk_sequence.txt").write_text(NESTED)
    assert len(thunks.read(tmp_path)) == 2
    (tmp_path / "module_1.jit_f.thunk_sequence_after_thunk_passes.txt").write_text(DECODE)
    assert len(thunks.read(tmp_path)) == 3
