"""Two requests at once on one attached model: each gets what it gets alone.

Threads change places at the points that hooks mark, in every order: inside the vision tower, before
the language model reads the prompt, and before it reads a token of the answer.
"""

import contextvars
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest
import torch

from models import Halves, attach, batch, build, compress, image_then_video, one_video, two_videos
from tokenfuse.config import Configuration
from tokenfuse.errors import AttachError
from tokenfuse.sessions._attached import is_attached

POINTS = 3
"""Inside the tower, before the prompt is read, before the answer's first token is."""
ORDERS = sorted(set(itertools.permutations([0] * (POINTS + 1) + [1] * (POINTS + 1))))
OPTIONS = {
    "max_new_tokens": 2,
    "min_new_tokens": 2,
    "output_logits": True,
    "return_dict_in_generate": True,
}
SETTINGS = {
    "plain": Halves(),
    "proportional": Configuration(Halves(), attention="proportional"),
    "saliency": {"strategy": "attention", "keep_ratio": 0.5},
}


class Turns:
    """One of two threads runs at a time; at each point the order says which goes on."""

    def __init__(self, order):
        self.order, self.done = list(order), set()
        self.changed, self.own = threading.Condition(), threading.local()

    def run(self, who, work):
        self.own.who = who
        self._wait()
        try:
            return work()
        finally:
            with self.changed:
                self.done.add(who)
                self.order = [other for other in self.order if other != who]
                self.running = None
                self.changed.notify_all()

    running = None

    def point(self, *_):
        """A hook: perhaps the other thread goes on here."""
        if getattr(self.own, "who", None) is None:
            return
        with self.changed:
            self.running = None
            self.changed.notify_all()
        self._wait()

    def _wait(self):
        who = self.own.who
        with self.changed:
            mine = self.changed.wait_for(
                lambda: self.running is None and (not self.order or self.order[0] == who), 60
            )
            assert mine, "the other thread does not reach its next point"
            self.order = self.order[1:]
            self.running = who


@contextmanager
def hooked(model, turns):
    with ExitStack() as stack:
        for module in (model.model.visual.blocks[1], model.model.language_model):
            stack.callback(module.register_forward_pre_hook(turns.point).remove)
        yield


def together(model, order, *works):
    """What two threads return that change places in this order."""
    turns = Turns(order)
    with hooked(model, turns), ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(turns.run, who, work) for who, work in enumerate(works)]
        return [future.result(90) for future in futures]


@pytest.fixture(scope="module")
def model():
    return build()


def answer(model, inputs):
    out = model.generate(**inputs, **OPTIONS)
    return out.sequences, torch.stack(out.logits)


def same(mine, alone):
    assert all(torch.equal(a, b) for a, b in zip(mine, alone, strict=True))


@pytest.mark.parametrize("setting", SETTINGS)
def test_two_requests_get_what_each_gets_alone_in_every_order(model, setting):
    first, second = one_video(), image_then_video()
    with attach(model, SETTINGS[setting]) as session:
        alone = [answer(model, first), answer(model, second)]
        for order in ORDERS:
            session.reports.clear()
            found = together(
                model, order, lambda: answer(model, first), lambda: answer(model, second)
            )
            for mine, expected in zip(found, alone, strict=True):
                same(mine, expected)
            assert len(session.reports) == 2


@pytest.mark.parametrize("setting", ["plain", "proportional"])
def test_a_plain_call_beside_generate_is_compressed(model, setting):
    first, second = two_videos(), batch()
    with attach(model, SETTINGS[setting]):

        def call():
            with torch.no_grad():
                return (model(**second).logits,)

        alone = [answer(model, first), call()]
        for order in ORDERS[::5]:
            found = together(model, order, lambda: answer(model, first), call)
            for mine, expected in zip(found, alone, strict=True):
                same(mine, expected)
    assert alone[1][0].shape[1] < second["input_ids"].shape[1]


def test_later_turns_of_two_conversations_do_not_meet(model):
    def talk(inputs):
        out = model.generate(**inputs, **OPTIONS)
        ids = torch.cat([out.sequences, inputs["input_ids"][:, :1]], -1)
        cache = {name: out[name] for name in ("cache", "past_key_values") if name in list(out)}
        again = model.generate(input_ids=ids, **cache, **OPTIONS)
        return again.sequences, torch.stack(again.logits)

    first, second = one_video(), two_videos()
    with attach(model, SETTINGS["proportional"]):
        alone = [talk(first), talk(second)]
        for order in ORDERS[::5]:
            found = together(model, order, lambda: talk(first), lambda: talk(second))
            for mine, expected in zip(found, alone, strict=True):
                same(mine, expected)


@pytest.mark.parametrize("setting", SETTINGS)
def test_detaching_in_another_thread_lets_a_request_end_as_it_began(model, setting):
    inputs, held = one_video(), dict(vars(model))
    with attach(model, SETTINGS[setting]):
        expected = answer(model, inputs)
    for order in ORDERS[::5]:
        session = attach(model, SETTINGS[setting])
        mine, _ = together(model, order, lambda: answer(model, inputs), session.detach)
        assert not is_attached(model)
        assert vars(model) == held
        # Detached before the request began, there is nothing to compress.
        shorter = expected[1].shape == mine[1].shape and torch.equal(expected[1], mine[1])
        assert shorter or order[0] == 1
        with pytest.raises(AttachError, match="detached"):
            session.detach()


def test_many_threads_serve_many_requests(model):
    requests = [one_video(), two_videos(), image_then_video(), batch()] * 3
    with attach(model, SETTINGS["saliency"]) as session:
        alone = [answer(model, inputs) for inputs in requests[:4]]
        session.reports.clear()
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda inputs: answer(model, inputs), requests))
    for i, mine in enumerate(found):
        same(mine, alone[i % 4])
    assert len(session.reports) == len(requests)


def test_compress_in_two_threads_hears_its_own_tower(model):
    first, second = one_video(), two_videos()
    options = {"strategy": "attention", "keep_ratio": 0.5}
    alone = [compress(model, x, options)["input_ids"] for x in (first, second)]
    for order in ORDERS[::5]:
        found = together(
            model,
            order,
            lambda: compress(model, first, options)["input_ids"],
            lambda: compress(model, second, options)["input_ids"],
        )
        same(found, alone)


class Streamer:
    """Calls something when the prompt has been read, before the first token."""

    def __init__(self, call):
        self.call, self.puts = call, 0

    def put(self, value):
        self.puts += 1
        if self.puts == 1:
            self.call()

    def end(self):
        pass


def in_a_thread(call):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result(60)


def test_another_session_may_take_over_while_a_request_runs(model):
    inputs, sessions = one_video(), [attach(model)]
    expected = model.generate(**inputs, max_new_tokens=4)

    def swap():
        sessions[0].detach()
        sessions[0] = attach(model, Halves())

    ids = model.generate(**inputs, max_new_tokens=4, streamer=Streamer(lambda: in_a_thread(swap)))
    assert torch.equal(ids, expected)
    sessions[0].detach()


def test_a_request_in_a_copied_context_is_compressed(model):
    inputs = one_video()
    with attach(model) as session:
        context = []
        streamer = Streamer(lambda: context.append(contextvars.copy_context()))
        model.generate(**inputs, max_new_tokens=2, streamer=streamer)
        in_a_thread(lambda: context[0].run(lambda: model.generate(**inputs, max_new_tokens=2)))
        with torch.no_grad():
            logits = context[0].run(lambda: model(**inputs)).logits
        assert len(session.reports) == 3
        assert logits.shape[1] == session.columns.shape[1] < inputs["input_ids"].shape[1]


def test_a_request_inside_another_is_compressed(model):
    inputs = one_video()
    with attach(model) as session:
        inner = Streamer(lambda: model.generate(**two_videos(), max_new_tokens=2))
        ids = model.generate(**inputs, max_new_tokens=3, streamer=inner)
        assert torch.equal(ids, model.generate(**inputs, max_new_tokens=3))
        assert len(session.reports) == 3
