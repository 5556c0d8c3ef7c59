"""The kernel of `pallas.py` in Triton itself, for implementation="triton".

jax deprecates Pallas through Triton; jax-triton stays. The kernel takes plain pointers, so PyTorch
can launch it too, and TRITON_INTERPRET=1 runs it on a CPU. The parts are merged by XLA.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from flexijax.pallas_kernels import platform
from flexijax.pallas_kernels.partials import merge
from flexijax.pallas_kernels.sparse_decode.tuning import MIN_ROWS, TuningConfig


@triton.jit
def flexijax_decode(
    q_ptr,  # [B, K, G, H]
    k_ptr,  # [blocks, K, PAGE, H], or slots [B, K, H, n, PAGE]
    v_ptr,  # [blocks, K, PAGE, H], or slots [B, K, n, PAGE, H]
    ids_ptr,  # int32[B, K, n]; not read for slots
    counts_ptr,  # int32[B, K, n]
    out_ptr,  # float32[splits, B, K, G, H]
    lse_ptr,  # float32[splits, B, K, G]
    SCALE: tl.constexpr,
    SLOTS: tl.constexpr,
    PAGES: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    split, head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    owner = request * heads + head
    row, column = tl.arange(0, ROWS), tl.arange(0, PADDED)
    in_width = column < WIDTH
    in_group = (row < GROUP)[:, None] & in_width[None, :]
    q_place = (owner * GROUP + row)[:, None] * WIDTH + column[None, :]
    q = tl.load(q_ptr + q_place, mask=in_group, other=0.0).to(k_ptr.dtype.element_ty)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, PADDED], tl.float32)
    for i in range(STEPS):
        token = (split * STEPS + i) * BLOCK + tl.arange(0, BLOCK)
        index, place = token // PAGE, token % PAGE
        listed = index < PAGES
        count = tl.load(counts_ptr + owner * PAGES + index, mask=listed, other=0)
        valid = place < count
        if SLOTS:
            stored = owner * PAGES + index
            # One condition a block, so that loads along the tokens stay 128 bits wide.
            needed = token < tl.where(tl.sum(count, 0) != 0, PAGES * PAGE, 0)
            channel = (owner.to(tl.int64) * WIDTH + column)[:, None] * (PAGES * PAGE)
            k_mask = in_width[:, None] & needed[None, :]
            k = tl.load(k_ptr + channel + token[None, :], mask=k_mask, other=0.0)
        else:
            block_id = tl.load(ids_ptr + owner * PAGES + index, mask=listed, other=0)
            stored = block_id * heads + head
            valid = valid & (block_id >= 0)
            k_row = (stored.to(tl.int64) * PAGE + place)[None, :] * WIDTH
            k_mask = in_width[:, None] & valid[None, :]
            k = tl.load(k_ptr + k_row + column[:, None], mask=k_mask, other=0.0)
        v_row = (stored.to(tl.int64) * PAGE + place)[:, None] * WIDTH
        v_mask = valid[:, None] & in_width[None, :]
        v = tl.load(v_ptr + v_row + column[None, :], mask=v_mask, other=0.0)
        logits = tl.dot(q, k, input_precision=PRECISION) * (SCALE * 1.4426950408889634)
        logits = tl.where(valid[None, :], logits, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        shrink = tl.exp2(peak - safe)
        weights = tl.exp2(logits - safe[:, None])
        total = total * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None]
        out = tl.dot(weights.to(v.dtype), v, acc=out, input_precision=PRECISION)
        peak = new_peak
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("-inf"), (peak + tl.log2(total)) * 0.6931471805599453)
    part = (split * tl.num_programs(2) * heads + owner) * GROUP + row
    out_place = part[:, None] * WIDTH + column[None, :]
    tl.store(out_ptr + out_place, out / total[:, None], mask=in_group)
    tl.store(lse_ptr + part, lse, mask=row < GROUP)


def options(
    *, batch: int, heads: int, group: int, width: int, pages: int, page: int, itemsize: int
) -> tuple[TuningConfig, tuple[int, int, int], dict[str, int]]:
    """Configuration, grid and compile-time arguments of a launch except SCALE, SLOTS, PRECISION.

    All in elements; itemsize in bytes of a key's element.
    """
    config = TuningConfig.choose(
        heads=batch * heads, tokens=pages * page, row_bytes=width * itemsize
    )
    constants = {
        "PAGES": pages,
        "GROUP": group,
        "WIDTH": width,
        "PAGE": page,
        "BLOCK": config.block_tokens,
        "STEPS": config.steps,
        "ROWS": max(MIN_ROWS, triton.next_power_of_2(group)),
        "PADDED": triton.next_power_of_2(width),
    }
    return config, (config.splits, heads, batch), constants


def paged_decode(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_ids: jax.Array,
    token_counts: jax.Array,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Attention of q [B, K, G, H] over pages [blocks, K, page, H]; see `dispatch.paged_decode`.

    block_ids and token_counts int32[B, K, n] -> out [B, K, G, H], lse float32[B, K, G].
    """
    page = k_pages.shape[2]
    return _decode(q, k_pages, v_pages, block_ids, token_counts, page, scale, slots=False)


def slot_decode(
    q: jax.Array, k_slots: jax.Array, v_slots: jax.Array, token_counts: jax.Array, *, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Attention of q [B, K, G, H] over a head's own slots; see `dispatch.slot_decode`.

    k_slots [B, K, H, S, page], v_slots [B, K, S, page, H], token_counts int32[B, K, S]
    -> out [B, K, G, H], lse float32[B, K, G].
    """
    page = v_slots.shape[3]
    return _decode(q, k_slots, v_slots, token_counts, token_counts, page, scale, slots=True)


def _decode(q, k, v, block_ids, counts, page, scale, *, slots):
    batch, heads, group, width = q.shape
    config, grid, constants = options(
        batch=batch,
        heads=heads,
        group=group,
        width=width,
        pages=counts.shape[2],
        page=page,
        itemsize=k.dtype.itemsize,
    )
    parts = (config.splits, batch, heads, group)
    out, lse = platform.triton_call(
        q,
        k,
        v,
        block_ids,
        counts,
        kernel=flexijax_decode,
        out_shape=[
            jax.ShapeDtypeStruct((*parts, width), jnp.float32),
            jax.ShapeDtypeStruct(parts, jnp.float32),
        ],
        grid=grid,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        constants={
            **constants,
            "SCALE": scale,
            "SLOTS": slots,
            "PRECISION": "tf32x3" if k.dtype == jnp.float32 else "ieee",
        },
    )
    out, lse = merge(out, lse)
    return out.astype(q.dtype), lse
