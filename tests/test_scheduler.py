"""The rules of the scheduler, an example each; pages of 4 tokens, boundaries every 4 steps."""

import dataclasses

import pytest

from flexijax.cache.blocks import BlockAllocator
from flexijax.cache.prefix import PrefixIndex
from flexijax.engine.boundary import Limits, Reason, RequestState, Stage, State, apply
from flexijax.engine.scheduler import schedule, why_refused

pytestmark = pytest.mark.any_jax

LIMITS = Limits(blocks=20, rows=4, page_size=4)


def waiting(key, prompt=8, new=8, **fields):
    return RequestState(key=key, arrival=key, prompt_tokens=prompt, max_new_tokens=new, **fields)


def decoding(key, blocks, prompt=8, new=8, tokens=None, stage=Stage.RUNNING, **fields):
    return waiting(
        key,
        prompt,
        new,
        stage=stage,
        row=key,
        blocks=tuple(blocks),
        tokens=prompt if tokens is None else tokens,
        **fields,
    )


def plan_of(*requests, now=0.0, readings=1, **limits):
    state = State(requests=requests, now=now, readings=readings)
    return schedule(state, dataclasses.replace(LIMITS, **limits))


def test_nothing_to_do_is_an_empty_plan():
    plan = plan_of()
    assert not (plan.release or plan.refuse or plan.admit or plan.grow or plan.decode)
    assert plan.prefill_share == 0


def test_an_admission_takes_a_row_and_the_blocks_of_the_prompt():
    (admission,) = plan_of(waiting(7, prompt=9, new=30)).admit
    assert (admission.key, admission.row, admission.new_blocks) == (7, 0, 3)


def test_as_many_readings_begin_as_asked_for_in_order_of_arrival():
    requests = waiting(3), waiting(1), waiting(2)
    assert [a.key for a in plan_of(*requests, readings=2).admit] == [1, 2]
    assert [a.row for a in plan_of(*requests, readings=2).admit] == [0, 1]
    assert plan_of(*requests, readings=0).admit == ()


def test_cached_blocks_are_shared_and_not_taken():
    cached = tuple(range(5))
    first = decoding(0, range(6), prompt=24, new=4)
    second = waiting(1, prompt=24, new=4, cached=cached)
    (admission,) = plan_of(first, second, blocks=9).admit  # 6 + 1 held, 2 for their last pages
    assert (admission.cached, admission.new_blocks) == (cached, 1)
    assert not plan_of(first, dataclasses.replace(second, cached=()), blocks=9).admit


def test_a_row_grows_by_what_the_coming_steps_fill():
    plan = plan_of(decoding(0, range(2), tokens=7), decoding(1, range(2, 5), tokens=8))
    assert plan.grow == {0: 1}  # 7 + 4 tokens in 2 blocks; 8 + 4 tokens in 3
    assert plan.decode == (0, 1)
    assert plan_of(decoding(0, range(2)), boundary_steps=9).grow == {0: 2}  # never past its end


def test_a_row_that_cannot_grow_pauses_with_all_it_holds_and_goes_on_when_it_can():
    """10 blocks, 2 free: the first may need 2 more, the second 4."""
    first, second = decoding(0, range(4), prompt=16), decoding(1, range(4, 8), prompt=16, new=16)
    plan = plan_of(first, second, blocks=10)
    assert (plan.grow, plan.decode, plan.pause) == ({0: 1}, (0,), (1,))
    assert not plan.release
    paused = dataclasses.replace(second, stage=Stage.PAUSED)
    ended = dataclasses.replace(first, stage=Stage.ENDED)
    plan = plan_of(ended, paused, blocks=10)
    assert (plan.grow, plan.decode, plan.resume, plan.pause) == ({1: 1}, (1,), (1,), ())


def test_what_ended_was_cancelled_or_came_too_late_is_released_and_its_row_is_taken():
    requests = (
        decoding(0, range(4), stage=Stage.ENDED, cancelled=True),
        decoding(1, range(4, 8), cancelled=True),
        decoding(2, range(8, 12), stage=Stage.READING, deadline=5.0),
        waiting(3, deadline=4.0),
        waiting(4, deadline=6.0),
    )
    plan = plan_of(*requests, now=5.0, rows=3)
    late = Reason.DEADLINE
    assert plan.release == {0: Reason.ENDED, 1: Reason.CANCELLED, 2: late, 3: late}
    assert [(a.key, a.row) for a in plan.admit] == [(4, 0)]
    assert plan.decode == ()


def test_what_can_never_fit_is_refused_at_once_even_behind_others():
    requests = *map(waiting, range(20)), waiting(20, prompt=70, new=11)
    plan = plan_of(*requests, readings=0)
    assert plan.refuse == {
        20: "70 tokens and max_new_tokens=11 more need 21 blocks of 4 tokens, and there are 20: "
        "shorten either, or raise device_bytes and host_bytes"
    }
    assert why_refused(waiting(1, prompt=70, new=10), LIMITS) is None


def test_later_ones_pass_a_blocked_head_so_many_times_and_no_more():
    running = decoding(0, range(10), prompt=40, new=4)
    head = waiting(1, prompt=60, passed=7)
    plan = plan_of(running, head, waiting(2), waiting(3), readings=3)
    assert [a.key for a in plan.admit] == [2]  # the eighth time
    assert plan.passed == {1: 8}
    plan = plan_of(running, dataclasses.replace(head, passed=8), waiting(3), readings=3)
    assert plan.admit == () and plan.passed == {}


def test_a_paused_row_is_passed_no_more_often_than_a_waiting_request():
    first = decoding(0, range(4), prompt=16)
    paused = decoding(1, range(4, 8), prompt=16, new=16, stage=Stage.PAUSED, passed=7)
    late = waiting(2, prompt=1, new=1)
    plan = plan_of(first, paused, late, blocks=10)
    assert [a.key for a in plan.admit] == [2] and plan.passed == {1: 8}
    assert not plan_of(first, dataclasses.replace(paused, passed=8), late, blocks=10).admit


def test_an_older_request_does_not_pass_a_younger_row():
    first = decoding(1, range(4), prompt=16)
    paused = decoding(2, range(4, 8), prompt=16, new=16, stage=Stage.PAUSED, passed=8)
    plan = plan_of(waiting(0, prompt=1, new=1), first, paused, blocks=10)
    assert [a.key for a in plan.admit] == [0] and plan.passed == {}


def test_nobody_is_looked_at_behind_more_than_could_be_passed():
    running = decoding(0, range(10), prompt=40, new=4)
    blocked = [waiting(key, prompt=60) for key in (1, 2)]
    assert not plan_of(running, *blocked, waiting(3), max_passes=1).admit
    assert plan_of(running, *blocked, waiting(3), max_passes=2).passed == {1: 1, 2: 1}


def test_an_unsafe_admission_waits_though_its_prompt_would_fit():
    """Each may come to need 12 blocks: of 19, 17 would be held, and neither could end."""
    first = decoding(0, range(8), prompt=32, new=16)
    assert not plan_of(first, waiting(1, prompt=32, new=16), blocks=19).admit
    assert plan_of(first, waiting(1, prompt=32, new=16), blocks=20).admit


@pytest.mark.parametrize(
    ("requests", "share"),
    [
        ((decoding(0, range(4)),), 0.0),
        ((decoding(0, range(4)), waiting(1)), 0.5),
        ((decoding(0, range(4)), decoding(1, range(4, 8), stage=Stage.READING)), 0.5),
        ((waiting(1),), 1.0),
    ],
    ids=["nothing to read", "admitted", "reading", "nothing decodes"],
)
def test_prompts_are_read_for_half_of_the_time_while_anything_decodes(requests, share):
    assert plan_of(*requests).prefill_share == share


def test_a_plan_is_carried_out_on_the_pool():
    pool = PrefixIndex(BlockAllocator(LIMITS.blocks), page_size=4)
    prompt = list(range(9))
    old = pool.allocate(3)
    pool.insert(prompt, old)
    requests = (
        decoding(0, old, prompt=9, stage=Stage.ENDED),
        decoding(1, pool.allocate(2)),
        waiting(2, prompt=9, cached=tuple(pool.match(prompt))),
        waiting(3, prompt=900),
    )
    plan = schedule(State(requests=requests, now=0.0), LIMITS)
    running, reading = apply(plan, requests, pool, LIMITS)
    assert (running.key, running.stage, len(running.blocks)) == (1, Stage.RUNNING, 3)
    assert (reading.key, reading.stage, reading.row) == (2, Stage.READING, 0)
    assert reading.blocks[:2] == tuple(old[:2]) and len(reading.blocks) == 3
    assert (reading.tokens, reading.cached) == (8, ())
    assert pool.num_free == 20 - 3 - 3
    assert (pool.counts.hits, pool.counts.hit_tokens) == (1, 8)


def test_what_is_about_to_be_shared_is_not_evicted_for_another():
    """9 blocks: 5 hold nothing, 2 an older prompt, 2 a newer one. The first request needs 6."""
    pool = PrefixIndex(BlockAllocator(9), page_size=4)
    old, new = [1] * 9, [2] * 9
    for prompt in (old, new):
        blocks = pool.allocate(2)
        pool.insert(prompt, blocks)
        pool.release(blocks)
    cached = tuple(pool.match(old))
    requests = waiting(0, prompt=23, new=1), waiting(1, prompt=9, new=1, cached=cached)
    limits = dataclasses.replace(LIMITS, blocks=9)
    plan = schedule(State(requests=requests, now=0.0, readings=2), limits)
    _, second = apply(plan, requests, pool, limits)
    assert second.blocks[:2] == cached and pool.match(old) == list(cached)
    assert pool.num_free == 0 and pool.match(new) == []
