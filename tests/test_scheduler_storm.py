"""Random arrivals, lengths, ends, cancels, deadlines and shared prefixes against the scheduler.

What runs is simulated; blocks are those of a real `PrefixIndex`. Every plan is held against the
rules with all orders tried for safety (safe_orders.py).
"""

import dataclasses
import itertools

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from flexijax.cache.blocks import BlockAllocator
from flexijax.cache.prefix import PrefixIndex
from flexijax.engine.boundary import Limits, RequestState, Stage, State, apply
from flexijax.engine.scheduler import schedule
from tests.safe_orders import can_all_end

pytestmark = pytest.mark.any_jax

PAGE, STEPS, CHUNK = 2, 4, 4
DOCUMENTS = ([0] * 12, list(range(12)))


class Simulation:
    """An engine without a model: what it runs takes no time, and every plan of it is checked."""

    def __init__(self, **limits):
        self.limits = Limits(page_size=PAGE, boundary_steps=STEPS, **limits)
        self.pool = PrefixIndex(BlockAllocator(self.limits.blocks), page_size=PAGE)
        self.requests: tuple[RequestState, ...] = ()
        self.prompts: dict[int, list[int]] = {}
        self.passed: dict[int, int] = {}  # counted here, from the admissions
        self.keys, self.fresh = itertools.count(), itertools.count(1000)
        self.now = 0.0

    def submit(self, prompt, new, deadline=None):
        key = next(self.keys)
        self.prompts[key], self.passed[key] = prompt, 0
        self.requests += (
            RequestState(
                key=key,
                arrival=key,
                prompt_tokens=len(prompt),
                max_new_tokens=new,
                deadline=deadline,
            ),
        )
        return key

    def change(self, key, **fields):
        self.requests = tuple(
            dataclasses.replace(r, **fields) if r.key == key else r for r in self.requests
        )

    def boundary(self, readings=1, stops=()):
        """Plans, checks, carries the plan out and runs until the next one. stops: keys that end."""
        waiting = sorted((r for r in self.requests if r.stage is Stage.WAITING), key=order)
        for request in waiting[: self.limits.max_passes + 5]:  # the refused are not counted
            found = self.pool.match(self.prompts[request.key])
            self.change(request.key, cached=tuple(found))
        self.now += 1
        state = State(requests=self.requests, now=self.now, readings=readings)
        plan = schedule(state, self.limits)
        assert plan == schedule(state, self.limits)
        self.check(plan, readings)
        self.requests = apply(plan, self.requests, self.pool, self.limits)
        self.check_blocks()
        self.run(plan, stops)
        return plan

    def run(self, plan, stops):
        for request in self.requests:
            if request.key in plan.decode:
                assert request.stage is Stage.RUNNING
                tokens = min(request.tokens + STEPS, request.total_tokens)
                assert tokens <= len(request.blocks) * PAGE
                ended = tokens == request.total_tokens or request.key in stops
                stage = Stage.ENDED if ended else Stage.RUNNING
                self.change(request.key, tokens=tokens, stage=stage)
            if request.stage is Stage.READING:
                tokens = min(request.tokens + CHUNK, request.prompt_tokens)
                self.change(request.key, tokens=tokens)
                if tokens == request.prompt_tokens:
                    self.pool.insert(self.prompts[request.key], request.blocks)
                    self.change(request.key, stage=Stage.RUNNING)

    def check_blocks(self):
        """What requests hold and what is free is all there is; so are the rows."""
        held = set().union(*(r.blocks for r in self.requests))
        assert self.pool.num_free == self.limits.blocks - len(held)
        rows = [r.row for r in self.requests if r.admitted]
        assert len(set(rows)) == len(rows) and set(rows) <= set(range(self.limits.rows))
        for request in self.requests:
            assert len(set(request.blocks)) == len(request.blocks)
            assert request.passed == self.passed[request.key] <= self.limits.max_passes

    def check(self, plan, readings):
        """The rules one after the other, as they are written in scheduler.py."""
        requests = {r.key: r for r in sorted(self.requests, key=order)}
        assert set(plan.release) == {
            r.key
            for r in requests.values()
            if r.stage is Stage.ENDED or r.cancelled or (r.deadline or self.now + 1) <= self.now
        }
        kept = [r for key, r in requests.items() if key not in plan.release]
        waiting = [r for r in kept if r.stage is Stage.WAITING]
        never = {r.key for r in waiting if self.final(r) > self.limits.blocks}
        assert set(plan.refuse) == never

        # Block ids of each, made up for those that the plan hands out.
        held = {r.key: set(r.blocks) for r in kept if r.admitted}
        assert self.safe(held, requests)
        decode, paused = [], []
        for request in kept:
            if request.stage not in (Stage.RUNNING, Stage.PAUSED):
                continue
            tokens = min(request.tokens + STEPS, request.total_tokens)
            count = max(0, -(-tokens // PAGE) - len(request.blocks))
            trial = held | {request.key: held[request.key] | self.some(count)}
            if not count or self.safe(trial, requests):
                held = trial
                decode.append(request.key)
                assert plan.grow.get(request.key, 0) == count
            else:
                paused.append(request)
        assert plan.decode == tuple(decode)
        assert set(plan.grow) <= set(decode)
        assert plan.pause == tuple(r.key for r in paused if r.stage is Stage.RUNNING)
        was_paused = [r.key for r in kept if r.stage is Stage.PAUSED]
        assert plan.resume == tuple(key for key in decode if key in was_paused)

        rows = self.limits.rows - sum(r.admitted for r in kept)
        admitted = {a.key: a for a in plan.admit}
        assert len(admitted) == len(plan.admit) <= min(rows, readings)
        held_up = paused
        for request in [r for r in waiting if r.key not in never][: self.limits.max_passes + 1]:
            earlier = [r.key for r in held_up if r.arrival < request.arrival]
            begun = len([key for key in admitted if key in held])
            exhausted = any(self.passed[key] == self.limits.max_passes for key in earlier)
            if begun == min(rows, readings) or exhausted:
                assert request.key not in admitted
                held_up.append(request)
                continue
            count = -(-request.prompt_tokens // PAGE) - len(request.cached)
            trial = held | {request.key: {*request.cached} | self.some(count)}
            if self.safe(trial, requests):
                held = trial
                assert admitted[request.key].new_blocks == count
                assert admitted[request.key].cached == request.cached
                for key in earlier:
                    self.passed[key] += 1
            else:
                assert request.key not in admitted
                held_up.append(request)
        assert set(admitted) <= set(held)
        reading = bool(admitted) or any(r.stage is Stage.READING for r in kept)
        assert plan.prefill_share == (0.5 if decode else 1.0) * reading
        # No deadlock: while there is anybody, something happens.
        assert decode or reading or plan.release or plan.refuse or not kept or not readings

    def final(self, request):
        return -(-request.total_tokens // PAGE)

    def some(self, count):
        return {next(self.fresh) for _ in range(count)}

    def safe(self, held, requests):
        needs = [(ids, self.final(requests[key]) - len(ids)) for key, ids in held.items()]
        return can_all_end(self.limits.blocks, needs)

    def drain(self):
        """All end, in no more boundaries than if one did one thing at each.

        To begin, to read, to decode, and to be let go of.
        """
        bound = sum(
            2 + -(-r.prompt_tokens // CHUNK) + -(-r.max_new_tokens // STEPS) for r in self.requests
        )
        for _ in range(bound):
            if self.requests:
                self.boundary()
        assert not self.requests
        assert self.pool.num_free == self.limits.blocks


def order(request):
    return request.arrival


class StormMachine(RuleBasedStateMachine):
    @initialize(blocks=st.integers(4, 16), rows=st.integers(1, 5), passes=st.integers(0, 3))
    def start(self, blocks, rows, passes):
        self.run = Simulation(blocks=blocks, rows=rows, max_passes=passes)

    @rule(
        document=st.sampled_from(DOCUMENTS),
        length=st.sampled_from([0, 4, 8, 12]),
        question=st.lists(st.integers(0, 1), min_size=1, max_size=3),
        new=st.integers(1, 16),
        patience=st.one_of(st.none(), st.none(), st.integers(1, 12)),
    )
    def arrives(self, document, length, question, new, patience):
        deadline = None if patience is None else self.run.now + patience
        self.run.submit([*document[:length], *question], new, deadline)

    @precondition(lambda self: self.run.requests)
    @rule(data=st.data())
    def is_cancelled(self, data):
        self.run.change(data.draw(st.sampled_from(self.run.requests)).key, cancelled=True)

    @rule(readings=st.sampled_from([0, 1, 1, 2, 5]), data=st.data())
    def runs(self, readings, data):
        keys = [r.key for r in self.run.requests if r.stage is Stage.RUNNING]
        stops = data.draw(st.sets(st.sampled_from(keys), max_size=1)) if keys else ()
        self.run.boundary(readings, stops)

    @rule()
    def runs_on(self):
        for _ in range(3):
            self.run.boundary()

    def teardown(self):
        if hasattr(self, "run"):
            self.run.drain()


TestStormMachine = StormMachine.TestCase
TestStormMachine.settings = hypothesis.settings(
    deadline=None, max_examples=80, stateful_step_count=40
)


def test_a_large_request_is_not_starved_by_small_ones_that_keep_coming():
    run = Simulation(blocks=20, rows=4, max_passes=8)
    for _ in range(3):
        run.submit([5], 12)
    run.boundary(readings=3)
    large = run.submit([7] * 30, 8)
    for boundary in range(60):
        run.submit([boundary % 7], 12)
        run.boundary(readings=2)
    assert large not in {request.key for request in run.requests}
    assert run.passed[large] == 8


def test_a_paused_row_is_not_starved_by_requests_that_keep_coming():
    run = Simulation(blocks=20, rows=4, max_passes=8)
    first, second = run.submit([1] * 12, 20), run.submit([2] * 12, 20)
    pauses = 0
    for boundary in range(60):
        run.submit([boundary % 7] * 3, 9)
        pauses += second in run.boundary(readings=2).pause
    assert not {first, second} & {request.key for request in run.requests}
    assert pauses and run.passed[second] <= 8
