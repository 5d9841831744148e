"""What holds for the whole test run."""

import logging
import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

for profile, examples in {"tokenfuse": 50, "full": 200}.items():
    settings.register_profile(
        profile,
        max_examples=examples,
        deadline=None,
        derandomize=bool(os.environ.get("CI")),
        suppress_health_check=[HealthCheck.too_slow],  # a busy machine is no defect
    )
settings.load_profile("tokenfuse")

# One thread for each worker of xdist: the tensors are tiny.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--record", type=Path, help="JSON file for what the adapters' kit finds")
    parser.addoption(
        "--full", action="store_true", help="the kit in full for every family, and more examples"
    )


def pytest_configure(config):
    # What goes on the page of models is the whole kit.
    config.option.full |= config.option.record is not None
    if config.option.full:
        settings.load_profile("full")
    config.addinivalue_line("markers", "full: left out unless pytest is told --full")


def pytest_collection_modifyitems(config, items):
    if not config.option.full:
        config.hook.pytest_deselected(items=[x for x in items if x.get_closest_marker("full")])
        items[:] = [x for x in items if not x.get_closest_marker("full")]


_outcomes = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if item.config.getoption("--record"):
        # Not above: what is imported here is imported before shapes are checked at run time.
        from record import note

        note(_outcomes, item, report)
    return report


def pytest_sessionfinish(session):
    if path := session.config.getoption("--record"):
        from record import write

        write(path, _outcomes)


@pytest.fixture(scope="module")
def one_thread():
    """For tiny tensors, over which a second thread only keeps the first waiting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Deprecations(logging.Handler):
    """Collects what transformers logs, not warns, about its deprecations."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def emit(self, record):
        message = record.getMessage()
        if re.search(r"deprec|will be removed|removed in v", message, re.IGNORECASE):
            self.seen.append(f"{record.name}: {message}")


# From the start: `warning_once` says a thing once per process, perhaps while tests are collected.
_deprecations = Deprecations()
logging.getLogger("transformers").addHandler(_deprecations)


@pytest.fixture(autouse=True)
def _no_logged_deprecation():
    yield
    seen, _deprecations.seen = _deprecations.seen, []
    assert not seen, "transformers deprecates what tokenfuse uses:\n" + "\n".join(seen)
