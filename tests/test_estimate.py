"""Bytes, instructions and times of programs for a GPU, against counts by hand."""

import dataclasses

import pytest

from flexijax.aot import estimate as assumed
from flexijax.aot import thunks
from flexijax.aot.capacity import Compiled, capacities
from flexijax.aot.disassembly import KernelReport
from flexijax.aot.estimate import Estimate, estimate, issue_seconds
from flexijax.aot.footprint import footprint, shipped_profile
from flexijax.aot.issue import Issued, issued, loop_trips
from flexijax.aot.targets import target
from flexijax.aot.traffic import Module
from flexijax.config import CacheConfig
from flexijax.models import presets

H100 = target("h100")
PTX = """
.visible .entry flexijax_kernel(
    mov.b32 	%r31, 0;
    mov.b32 	%r630, %r31;
$L__BB0_1:
    add.s32 	%r26, %r630, 64;
    setp.ne.b32 	%p41, %r26, 320;
    mov.b32 	%r630, %r26;
    @%p41 bra 	$L__BB0_1;
    @%p2 bra 	$L__BB0_3;
    st.global.b32 	[%rd1], %r26;
$L__BB0_3:
    ret;
"""
SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   UIADD3 UR10, UR4, 0x40, URZ ;
.L_x_0:
        /*0020*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR6][R2.64] ;
        /*0030*/              @!P1 HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0040*/               @P2 BRA `(.L_x_0) ;
        /*0050*/              @!P0 EXIT ;
        /*0060*/                   STG.E desc[UR6][R2.64], R4 ;
        /*0070*/                   EXIT ;
.L_x_1:
        /*0080*/                   BRA `(.L_x_1);
        /*0090*/                   NOP;
"""
HLO = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[16]{0})->f32[16]{0}}

%fused_gather (param_0: bf16[32768,16,128], param_1: s32[16,2048]) -> bf16[16,16,128] {
  %param_0 = bf16[32768,16,128]{2,1,0} parameter(0)
  %param_1 = s32[16,2048]{1,0} parameter(1)
  %slice.1 = s32[16,1]{1,0} slice(%param_1), slice={[0:16], [0:1]}
  ROOT %gather.1 = bf16[16,16,128]{2,1,0} gather(%param_0, %slice.1), slice_sizes={1,16,128}
}

%fused_scatter (param_0.1: bf16[32768,16,128], param_1.1: s32[16], param_2.1: f32[16,128]) -> \
bf16[32768,16,128] {
  %param_0.1 = bf16[32768,16,128]{2,1,0} parameter(0)
  %param_1.1 = s32[16]{0} parameter(1)
  %param_2.1 = f32[16,128]{1,0} parameter(2)
  %bitcast.1 = bf16[524288,128]{1,0} bitcast(%param_0.1)
  %convert.1 = bf16[16,128]{1,0} convert(%param_2.1)
  %scatter.1 = bf16[524288,128]{1,0} scatter(%bitcast.1, %param_1.1, %convert.1), to_apply=%set
  ROOT %bitcast.2 = bf16[32768,16,128]{2,1,0} bitcast(%scatter.1)
}

ENTRY %main (pool: bf16[32768,16,128], table: s32[16,2048], host: u32[64]) -> f32[16] {
  %pool = bf16[32768,16,128]{2,1,0} parameter(0)
  %table = s32[16,2048]{1,0} parameter(1)
  %host = u32[64]{0:S(5)} parameter(2)
  %at = s32[16]{0} parameter(3)
  %values = f32[16,128]{1,0} parameter(4)
  %q = bf16[16,1,4,128]{3,2,1,0} parameter(5)
  %ids = s32[16,1,64]{2,1,0} parameter(6)
  %taken = bf16[16,16,128]{2,1,0} fusion(%pool, %table), kind=kLoop, calls=%fused_gather
  %put = bf16[32768,16,128]{2,1,0} fusion(%pool, %at, %values), kind=kInput, calls=%fused_scatter
  %rows = bf16[524288,128]{1,0} bitcast(%put)
  %moved = u32[64]{0} custom-call(%host, %at), custom_call_target="__gpu$xla.gpu.triton"
  %pages = (f32[32,16,1,4,128]{4,3,2,1,0}, f32[32,16,1,4]{3,2,1,0}) custom-call(%q, %rows, \
%rows, %ids, %ids), custom_call_target="__gpu$xla.gpu.triton", operand_layout_constraints=\
{bf16[16,1,4,128]{3,2,1,0}, bf16[524288,128]{1,0}, bf16[524288,128]{1,0}, s32[16,1,64]{2,1,0}, \
s32[16,1,64]{2,1,0}}, metadata={op_name="jit(f)/flexijax_decode_pages/pallas_call"}
  %both = (f32[16,4,128]{2,1,0}, bf16[524288,128]{1,0}, bf16[524288,128]{1,0}) custom-call(%q, \
%rows, %rows, %at, %ids), custom_call_target="__gpu$xla.gpu.triton", operand_layout_constraints=\
{bf16[16,1,4,128]{3,2,1,0}, bf16[524288,128]{1,0}, bf16[524288,128]{1,0}, s32[16]{0}, \
s32[16,1,64]{2,1,0}}, output_to_operand_aliasing={{1}: (1, {}), {2}: (2, {})}, \
metadata={op_name="jit(f)/flexijax_decode_attention/pallas_call"}
  %codes = u32[4096,8,2,4,16]{4,3,2,1,0} parameter(7)
  %mean = f32[16,8,128]{2,1,0} parameter(8)
  %keys = bf16[4096,8,16,128]{3,2,1,0} parameter(9)
  %filled = s32[16,1]{1,0} parameter(10)
  %encoded = u32[4096,8,2,4,16]{4,3,2,1,0} custom-call(%codes, %mean, %mean, %keys, %filled), \
custom_call_target="__gpu$xla.gpu.triton", operand_layout_constraints=\
{u32[4096,8,2,4,16]{4,3,2,1,0}, f32[16,8,128]{2,1,0}, f32[16,8,128]{2,1,0}, \
bf16[4096,8,16,128]{3,2,1,0}, s32[16,1]{1,0}}, output_to_operand_aliasing={{}: (0, {})}, \
metadata={op_name="jit(f)/flexijax_sketch_encode/x"}
  ROOT %sum = f32[16]{0} fusion(%values), kind=kLoop, calls=%gone
}
"""


def kernel(**changes):
    sizes = dict(registers=64, spill_bytes=0, shared_bytes=0, occupancy=1.0)
    return dataclasses.replace(
        KernelReport(name="flexijax_scores", threads=128, grid=(132, 4, 1), **sizes), **changes
    )


def test_instructions_of_a_loop_count_as_often_as_it_goes_round():
    assert loop_trips(PTX) == [5]
    assert issued(SASS, PTX) == Issued(2 + 5 * 3 + 3 + 1, exact=True)


@pytest.mark.parametrize(
    ("old", "new", "trips"),
    [
        ("setp.ne.b32 	%p41, %r26, 320", "setp.lt.s32 	%p41, %r26, 300", 5),
        ("setp.ne.b32 	%p41, %r26, 320", "setp.ne.b32 	%p41, %r26, %r7", None),
        ("mov.b32 	%r31, 0", "ld.param.b32 	%r31, [p]", None),
        ("mov.b32 	%r630, %r26", "mov.b32 	%r630, %r9", None),
    ],
    ids=["less-than", "bound-unknown", "start-unknown", "not-carried"],
)
def test_trips_that_are_not_constant_are_not_guessed(old, new, trips):
    assert old in PTX
    assert loop_trips(PTX.replace(old, new)) == [trips]
    assert issued(SASS, PTX.replace(old, new)).exact == (trips is not None)


def test_a_flag_in_place_of_a_counter_goes_round_twice():
    flag = """
    mov.pred 	%p3, 0;
    mov.pred 	%p55, -1;
$L__BB0_1:
    mov.pred 	%p1, %p55;
    mov.pred 	%p55, %p3;
    @%p1 bra 	$L__BB0_1;
"""
    assert loop_trips(flag) == [2]
    assert loop_trips(flag.replace("%p55, %p3", "%p55, %p4")) == [None]


def test_a_loop_that_was_unrolled_is_counted_as_it_stands():
    straight = SASS.replace("@P2 BRA `(.L_x_0)", "@P2 BAR.SYNC 0x0")
    assert issued(straight, PTX) == Issued(9, exact=True)


def test_bytes_of_instructions_by_hand():
    module, row = Module(HLO, page_size=16), 128 * 2
    # 16 blocks of 16 rows read and written, and one id each.
    assert module.nbytes("taken") == 2 * 16 * 16 * row + 16 * 4
    # In place: the rows that are written, the values and the ids they come from.
    assert module.nbytes("put") == 16 * row + 16 * 128 * 4 + 16 * 4
    # Keys and values of 64 pages of 16 requests, whatever the pool holds.
    parts = 4 * 32 * 16 * 4 * (128 + 1)
    assert module.nbytes("pages") == 2 * 16 * 64 * 16 * row + 2 * 16 * 64 * 4 + 16 * 4 * row + parts
    # The same in place: what is written there is a token's.
    both = 2 * 16 * 64 * 16 * row + 16 * 4 + 16 * 64 * 4 + 16 * 4 * row + 4 * 16 * 4 * 128
    assert module.nbytes("both") == both
    assert module.nbytes("encoded") == 2 * 16 * 8 * 128 * 4 + 16 * 8 * 16 * row + 16 * 4
    assert module.nbytes("moved") == 0  # from the host: as many pages as the text asks for
    assert module.nbytes("nowhere") == 0


def test_the_rate_of_issue_by_hand():
    # 4 warps of 132 * 4 blocks, over 132 cores with 4 schedulers each: 4 warps a scheduler.
    assert issue_seconds(kernel(issued=500), H100) == pytest.approx(2000 / 1.98e9)


def test_an_estimate_adds_up():
    listing = """\
000: kCommandBuffer [source | sink]
    001: kCustomKernel [source | sink] flexijax_scores__3 grid: [132, 4, 1] threads: [128, 1, 1] \
 shared_memory: 0 bytes
    002: kCustomKernel [source | sink] fusion grid: [1, 1, 1] threads: [32, 1, 1] \
 shared_memory: 0 bytes
003: kCopy [source | sink] kCopy
004: kConditional [source | sink]
  branch_0:
    005: kCopy [source | sink] kCopy
"""
    metadata = 'profile_annotation: "taken"\n thunk_id: 2\n'
    slow = kernel(issued=500_000, names=("flexijax_scores", "flexijax_scores__3"))
    found = estimate(thunks.parse(listing, metadata), HLO, [slow], target=H100, page_size=16)
    by_issue = 4 * 500_000 / 1.98e9
    by_bytes = Module(HLO, 16).nbytes("taken") / 3.35232e12
    assert found.work == pytest.approx(
        by_issue / assumed.ISSUE_EFFICIENCY + by_bytes / assumed.DRAM_EFFICIENCY
    )
    assert found.graph_nodes == 2 * assumed.GRAPH_NODE_SECONDS
    assert found.outside == 3 * assumed.LAUNCH_SECONDS  # two copies and the graph
    assert found.host_syncs == assumed.HOST_SYNC_SECONDS
    [ours] = found.kernels
    assert (ours.name, ours.launches) == ("flexijax_scores", 1)
    assert ours.issue_seconds == pytest.approx(by_issue)
    twice = found + found
    assert twice.seconds == pytest.approx(found.times(2).seconds)
    assert twice.kernels == found.times(2).kernels


def test_requests_at_equal_memory():
    config = presets.config("llama-3.1-8b")
    cache = CacheConfig(profile=shipped_profile("llama-3.1-8b", 64))
    common = dict(name="llama-3.1-8b", context=32768, target=H100)
    counted, _ = footprint(config, cache=cache, batch=16, **common)
    spare, step = 10**9, Estimate(work=5e-3, graph_nodes=1e-3)
    found = capacities(
        config,
        cache=cache,
        compiled=Compiled(counted, step, spare),
        device_bytes=(80 * 10**9,),
        **common,
    )
    flexi, full = found
    assert (flexi.policy, full.policy) == ("flexi", "full")
    # Full attention: 128 KiB a token. A prompt while it is read: 4 KiB a token of one layer's keys
    # and values, and 8 KiB of hidden states.
    weights, request, reading = counted.sizes.weights, 131072 * 32768, 12288 * 32768
    assert counted.sizes.prefill == reading
    assert full.requests == (80 * 10**9 - weights - reading - spare) // request
    for one in found:
        assert one.used_bytes <= one.device_bytes
    more, _ = footprint(config, cache=cache, batch=flexi.requests + 1, **common)
    assert sum(dataclasses.astuple(more.sizes)) - more.sizes.host_pages + spare > 80 * 10**9
    # As long as the compiled batch took, and the bytes that more requests read.
    extra = (flexi.requests - 16) * counted.step.attention.total / 16
    assert flexi.estimated_seconds == pytest.approx(6e-3 + extra / (0.875 * 3.35232e12), rel=1e-3)
    assert flexi.estimated_tokens_per_second == flexi.requests / flexi.estimated_seconds
    assert full.estimated_seconds == pytest.approx(full.roofline_seconds / 0.875)
    none = capacities(
        config,
        cache=cache,
        compiled=Compiled(counted, step, spare),
        device_bytes=(10**9,),
        **common,
    )
    assert [(one.requests, one.estimated_tokens_per_second) for one in none] == [(0, 0), (0, 0)]
