"""Peak memory of a run, on a CPU."""

import torch

from tokenfuse.bench.memory import peak_memory

CPU = torch.device("cpu")
MEGA = 250_000  # floats of a megabyte


def test_the_peak_is_what_lives_at_once():
    given = torch.ones(MEGA)
    with peak_memory(CPU) as peak:
        one = given + 1
        two = one * 2
        del one
        three = two - 1
        del two, three
    assert peak() == 2_000_000


def test_views_and_changes_in_place_take_nothing():
    given = torch.ones(MEGA)
    with peak_memory(CPU) as peak:
        given.view(2, -1).add_(1).t()[:5].mul_(2)
    assert peak() == 0


def test_what_was_there_before_is_not_counted_when_it_goes():
    given = torch.ones(MEGA)
    with peak_memory(CPU) as peak:
        small = given[:10].clone()
        del given
        small = torch.cat([small, torch.ones(MEGA)])
    assert 1_000_000 < peak() <= 2_000_100


def test_longer_runs_do_not_add_up():
    with peak_memory(CPU) as peak:
        for _ in range(10):
            torch.ones(MEGA)
    assert peak() == 1_000_000
