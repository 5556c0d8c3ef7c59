"""The laws where pages are coded: what stands in a tier is exact up to its step, and no further.

Law 1 against full attention over pages that the float64 oracle has approximated; law 2 in coded
bytes, law 3 too; law 6 as ever. See also test_laws.py, test_laws_programs.py for law 7,
test_bad_input.py for law 8, and test_codes.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexijax
from flexijax.cache.cache import all_rows
from flexijax.cache.coded_offloaded import CodedOffloadedGroup
from flexijax.cache.coded_selected import CodedGroup
from flexijax.cache.memory import cache_bytes, request_bytes
from flexijax.cache.offloaded import OffloadedGroup
from flexijax.cache.selected import SelectedGroup
from flexijax.engine.continuation import Continuation, read
from flexijax.engine.model_runner import ModelRunner
from flexijax.engine.plan import make_program
from flexijax.engine.requests import check_cache
from flexijax.pallas_kernels import platform
from flexijax.pallas_kernels.page_codes import reference
from flexijax.pallas_kernels.page_codes.xla import key_bits
from flexijax.policies.base import HeadGroup, Tier
from flexijax.policies.codec import Codec
from flexijax.policies.coded_tiers import with_codecs
from flexijax.policies.sketch import Sketch
from tests.tiny_models import tiny_model
from tests.tiny_runs import PAGE, SMALL, STEPS, dense_qkv, prompt_of, request_of

pytestmark = pytest.mark.usefixtures("short_chunks")

WIDTH = 8
# With one codec for both tiers slots are coded too; else they hold what the host's codes stand for.
CODED = {
    "int4": dataclasses.replace(SMALL, device_codec="int4", host_codec="int4"),
    "mixed": dataclasses.replace(SMALL, device_codec="int8", host_codec="int4"),
}


@pytest.fixture(scope="module")
def lm():
    return tiny_model()


def approximated(k, v, bits):
    """Pages k, v [..., page, H], by the oracle: values are coded rotated, here rotated back."""
    turn = reference.hadamard(k.shape[-1])
    coded_k, _ = reference.approximated(k, axis=-2, bits=key_bits(bits))
    coded_v, _ = reference.approximated(v @ turn, axis=-1, bits=bits)
    return coded_k, coded_v @ turn


# Law 1: with room for the whole context what is attended is every page, at its codes.


def with_pages_approximated(fed, layout, first, last):
    """Pages first .. last - 1 of a continuation by full attention, where `layout` codes them."""
    for layer, groups in enumerate(layout.groups):
        arrays = fed.cache.layer(layer, 0)
        group = arrays.groups[0]
        k, v = np.array(group.k), np.array(group.v)  # [1, K, H, P, page], [1, K, P, page, H]
        for of in groups:
            bits = 0 if of.codec is None else of.codec.bits
            for head in of.heads if bits else ():
                for page in range(first, last):
                    made = approximated(k[0, head, :, page].T, v[0, head, page], bits)
                    k[0, head, :, page], v[0, head, page] = made[0].T, made[1]
        group = dataclasses.replace(group, k=jnp.asarray(k), v=jnp.asarray(v))
        arrays = dataclasses.replace(arrays, groups=(group,))
        fed.cache = fed.cache.with_layer(layer, 0, arrays)


@pytest.mark.parametrize("name", CODED)
def test_with_budget_for_all_logits_are_those_over_the_oracles_pages(name, lm):
    prompt, tokens = prompt_of(45), prompt_of(3 * STEPS, seed=1)
    roomy = dataclasses.replace(CODED[name], budget_tokens=96)
    sizes = dict(max_tokens=len(prompt) + len(tokens), max_new_tokens=len(tokens))
    coded, full = (make_program(lm, of, **sizes) for of in (roomy, roomy.as_full()))
    reading = read(lm, [coded, full], prompt)
    mine, theirs = Continuation(lm, coded, reading), Continuation(lm, full, reading)
    exact = Continuation(lm, full, reading)
    at, apart = 0, 0.0
    for start in range(0, len(tokens), STEPS):
        held = theirs.length // PAGE
        with_pages_approximated(theirs, coded.layout, at, held)
        at, piece = held, tokens[start : start + STEPS]
        expected, got = theirs.feed(piece), mine.feed(piece)
        error = np.abs(got - expected).max(-1) / np.abs(expected).max(-1)
        assert error.max() < 2e-5
        apart = max(apart, np.abs(exact.feed(piece) - expected).max())
    assert apart > 1e-3, "codes made no difference, so nothing was tested"


# Laws 2 and 3: tiers agree to the bit in what codes stand for, and only promoted pages move.


def copies_of(group, layer_cache, at, row, index, page, block):
    """[(keys, values, bits) ...]: a page of a head in each tier; values not rotated any more."""
    arrays, host, codec = layer_cache.groups[at], layer_cache.host[at], group.codec
    slot = None
    if group.kind == "offloaded" and page in (pages := arrays.slot_page[row, index].tolist()):
        slot = pages.index(page)
    words, bits = [], 0 if codec is None else codec.bits
    if isinstance(arrays, CodedGroup):
        words = [arrays.codes[block, index]]
    elif codec is not None:
        words = [host.words[block, index]]
    if slot is not None and isinstance(arrays, CodedOffloadedGroup):
        words.append(arrays.slots[row, index, slot])
    found = [(*decoded(of, bits), bits) for of in words]
    for of in words:
        np.testing.assert_array_equal(of, words[0])
    if isinstance(arrays, SelectedGroup):
        found = [(arrays.k[block, index], arrays.v[block, index], 0)]
    if isinstance(arrays, OffloadedGroup):
        if codec is None:
            found = [(host.k[block, index], host.v[block, index], 0)]
        if slot is not None:
            found.append((arrays.k[row, index, :, slot].T, arrays.v[row, index, slot], bits))
    return found


def decoded(words, bits):
    k, v = Codec(bits).decode(jnp.asarray(words), SIZES.page)
    return np.asarray(k), np.asarray(v)


SIZES = make_program(tiny_model(), SMALL, max_tokens=8).layout.sizes


def assert_pages_are_exact_up_to_their_steps(engine, running, truth):
    """truth: per layer queries, keys and values [T, K, H] of the request's text."""
    layout, cache, row = engine.program.layout, jax.device_get(all_rows(engine.cache)), running.row
    length, prompt = int(cache.lengths[row]), len(running.request.tokens)
    turn, coarse = reference.hadamard(WIDTH), 0.0
    for layer, at, group in layout.all_groups():
        for index, head in enumerate(group.heads):
            for page in range(length // PAGE):
                block = cache.block_table[row][page]
                copies = copies_of(group, cache.layers[layer], at, row, index, page, block)
                k, v, bits = copies[0]
                for other in copies[1:]:
                    np.testing.assert_array_equal(other[0], k)
                    np.testing.assert_array_equal(other[1], v)
                of_page = slice(page * PAGE, (page + 1) * PAGE)
                if layer > 0 and of_page.stop > prompt:  # what a small budget changes
                    continue
                for got, axis, dense in ((k, 0, truth[layer][1]), (v, 1, truth[layer][2])):
                    dense = dense[of_page, head].astype(np.float64)
                    steps = np.zeros(dense.shape)
                    if bits:
                        dense = dense @ turn if axis else dense
                        wide = bits if axis else key_bits(bits)
                        _, steps = reference.approximated(dense, axis=axis, bits=wide)
                    # Keys of programs that add up in another order may differ by so much.
                    assert (np.abs(got - dense) <= steps / 2 + 1e-5).all()
                    coarse = max(coarse, np.abs(got - dense).max())
    assert coarse > 1e-4, "nothing was coded"
    return cache


def residents(layout, cache, row, length):
    """{(layer, head, page)} of full pages in slots."""
    return {
        (layer, head, page)
        for layer, at, group in layout.all_groups()
        if group.kind == "offloaded"
        for index, head in enumerate(group.heads)
        for page in cache.layers[layer].groups[at].slot_page[row, index].tolist()
        if page >= 0 and page * PAGE < length
    }


@pytest.mark.parametrize("name", CODED)
def test_tiers_agree_in_codes_and_only_promoted_pages_move(name, lm):
    program = make_program(lm, CODED[name], max_tokens=94, max_new_tokens=24, batch=2)
    layout, engine = program.layout, ModelRunner(lm, program, progress=None)
    for index, length in enumerate((37, 52)):
        engine.admit(request_of(length, max_new_tokens=40, index=index), "")
    requests, qkv = list(engine.running.values()), dense_qkv(lm, 96)
    promoted, before = [0, 0], jax.device_get(all_rows(engine.cache))
    while True:
        engine.step()
        if not all(running.active for running in requests):
            break
        after = before
        for running in requests:
            text = [*running.request.tokens, *running.tokens]
            after = assert_pages_are_exact_up_to_their_steps(engine, running, qkv(text[:-1]))
            row, length = running.row, int(after.lengths[running.row])
            arrived = residents(layout, after, row, length) - residents(layout, before, row, length)
            promoted[row] += len(arrived)
            assert engine.stats(running).promoted_pages == promoted[row]
        before = after
    assert min(promoted) > 0, "nothing moved, so nothing was tested"


@pytest.mark.parametrize("name", CODED)
def test_bytes_are_those_of_codes_ranges_and_the_tail(name, lm):
    cache, length, new = CODED[name], 45, 20
    [made] = flexijax.generate(lm, [prompt_of(length)], max_new_tokens=new, cache=cache)
    layout = make_program(lm, cache, max_tokens=length + new, max_new_tokens=new).layout
    exact, sizes = 2 * PAGE * WIDTH * 4, layout.sizes

    def page_bytes(codec):
        bits = {"int8": 8 + 8, "int4": 5 + 4}[codec]  # of a key's element and a value's
        return PAGE * WIDTH * bits // 8 + 4 * (WIDTH + PAGE)

    on_device, on_host = page_bytes(cache.device_codec), page_bytes(cache.host_codec)
    stable, unstable = 3, 1
    pages, slots = -(-(length + new - 1) // PAGE), 4 + 2
    tail = 3 * exact  # two pages of steps and a begun one
    slot, slot_tail = exact, 0
    if cache.device_codec == cache.host_codec:
        slot, slot_tail = on_device, tail
    metrics = made.metrics
    device = unstable * (pages * on_device + tail) + stable * (slots * slot + slot_tail)
    assert metrics.device_kv_bytes - metrics.summary_bytes == device
    assert metrics.host_kv_bytes == stable * ((length + new - 1) // PAGE) * on_host
    assert metrics.promoted_bytes == metrics.promoted_pages * on_host
    filled = (length + 16) // PAGE - length // PAGE
    assert metrics.offloaded_bytes == stable * filled * on_host
    assert metrics.promoted_pages > 0, "nothing moved, so nothing was tested"
    assert request_bytes(layout, length + new - 1).device == metrics.device_kv_bytes
    # And all arrays of a whole cache: pools of all blocks.
    without = dataclasses.replace(cache, device_codec=None, host_codec=None)
    other = make_program(lm, without, max_tokens=length + new, max_new_tokens=new).layout
    (device, host), more = (cache_bytes(of, cache.find_policy()) for of in (layout, other))
    saved = unstable * (sizes.blocks * (exact - on_device) - tail)
    assert more[0] - device == saved + stable * (slots * (exact - slot) - slot_tail)
    assert more[1] - host == stable * sizes.blocks * (exact - on_host)


# Law 6: who shares the batch, or comes again, changes nothing.


def test_neighbours_and_earlier_requests_change_no_token(lm):
    """Rows of an engine on a CPU lie in arrays of their own, that of `generate` in one."""
    prompts, cache = [prompt_of(length, seed=length) for length in (45, 70)], CODED["int4"]
    greedy = flexijax.Sampling(logprobs=True)
    asked = dict(max_new_tokens=24, sampling=greedy)
    alone = [
        flexijax.generate(lm, [prompt], cache=cache, max_batch=1, **asked)[0] for prompt in prompts
    ]
    engine = flexijax.Engine(lm, cache=cache, max_requests=2, max_context=96)
    first = engine.submit(prompts[0], **asked)
    while engine.step():
        pass
    streams = [engine.submit(prompt, **asked) for prompt in prompts]
    while engine.step():
        pass
    for mine, stream in zip(alone, streams, strict=True):
        other = stream.result()
        assert other.token_ids == mine.token_ids
        np.testing.assert_allclose(other.logprobs, mine.logprobs, atol=2e-5)
    again = streams[0].result()
    assert again.logprobs == first.result().logprobs, "a second time the bits differ"
    # A prompt reads its own pages exactly; so it could not go on from another's.
    assert again.metrics.cached_tokens == 0


# Law 8: what cannot be coded is refused by name; names and policies are in test_bad_input.py.


def test_what_has_no_codes_yet_is_refused(lm):
    cache = CODED["int4"]
    mesh = jax.make_mesh((1,), ("heads",))
    with pytest.raises(ValueError, match="device_codec and host_codec are for one device"):
        flexijax.generate(lm, [[1, 2]], max_new_tokens=2, cache=cache, mesh=mesh)
    with (
        platform.compiling_for("gpu"),
        pytest.raises(ValueError, match="device_codec='int4' has no kernels for a GPU yet"),
    ):
        check_cache(lm, cache)
    odd = tiny_model("llama", head_dim=12)
    with pytest.raises(ValueError, match="device_codec='int4' needs a head_dim that is a multiple"):
        flexijax.generate(odd, [[1, 2]], max_new_tokens=2, cache=CODED["int4"])


def test_a_head_group_says_which_of_its_tiers_can_be_coded():
    exact, coded = Tier(None), Tier(None, codec=Codec(4))
    with pytest.raises(ValueError, match="device's pages of a head group that is kept dense"):
        HeadGroup((0,), (coded,))
    room, host = Tier(8, codec=Codec(8)), Tier(None, "host", codec=Codec(4))
    with pytest.raises(ValueError, match="only have the codec of its host pages"):
        HeadGroup((0,), (room, host), score=Sketch(2))
    assert HeadGroup((0,), (Tier(8), host), score=Sketch(2)).codec == Codec(4)
    groups = ((HeadGroup((0,), (exact,), attends=4, score=Sketch(2)),),)
    assert with_codecs(groups, {}, policy="own") == groups
    [[made]] = with_codecs(groups, {"device": Codec(4)}, policy="own")
    assert made.ladder == (coded,)
