"""What the conformance kit found, as a file.

``pytest tests/adapters/test_conformance.py --record FILE``.

Each class of the kit that the run holds becomes an entry: what its model is, how many tests passed,
and which tests the kit had. Entries of other classes and of other versions of transformers stay in
the file as they are.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from types import SimpleNamespace

import transformers

from tokenfuse import get_strategy
from tokenfuse.errors import UnsupportedModelError
from tokenfuse.sessions._decoder import refuse_unfit_cuts
from tokenfuse.testing import AdapterConformance

OUTCOMES = ("passed", "skipped", "failed")


def note(outcomes, item, report):
    """Count the outcome of a test of the kit, by class."""
    cls = getattr(item, "cls", None)
    if cls is None or not issubclass(cls, AdapterConformance):
        return
    if report.when == "call" or report.outcome != "passed":
        found = outcomes.setdefault(cls, dict.fromkeys(OUTCOMES, 0) | {"tests": set()})
        found[report.outcome] += 1
        found["tests"].add(item.originalname)


def write(path, outcomes):
    """Put the outcomes into the file, under the version of transformers."""
    recorded = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    recorded.setdefault(transformers.__version__, {}).update(
        {cls.__name__.removeprefix("Test_"): entry(cls, found) for cls, found in outcomes.items()}
    )
    path.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n", "utf-8")


def kit_tests(cls):
    """The tests that a class of the kit has in full: how many there are of each name."""
    counts = {}
    for name, test in inspect.getmembers(cls, inspect.isfunction):
        if name.startswith("test_"):
            sizes = []
            metafunc = SimpleNamespace(
                fixturenames=list(inspect.signature(test).parameters),
                parametrize=lambda _, values, sizes=sizes: sizes.append(len(values)),
                # The options of this run of pytest: all are on.
                config=SimpleNamespace(getoption=lambda _: True),
            )
            cls().pytest_generate_tests(metafunc)
            counts[name] = math.prod(sizes)
    return counts


def digest(tests):
    """What stands for the names of some tests."""
    return hashlib.sha256("\n".join(sorted(tests)).encode()).hexdigest()[:12]


def entry(cls, found):
    """What the page says of one class, or why the model cannot run in this transformers."""
    kit, ran = cls(), {"kit": digest(found["tests"])}
    try:
        kit.model(kit.attentions[0])(**kit.inputs(kit.modalities[0]))
    except Exception as error:
        return ran | {"reason": f"its own forward raises {type(error).__name__}"}
    return facts(cls) | ran | {outcome: found[outcome] for outcome in OUTCOMES}


def facts(cls):
    """What one class of the kit is about, told from its model and a compressed prompt."""
    kit = cls()
    model = kit.model(kit.attentions[0])
    adapter = kit.adapter_of(model)
    short = kit.compress(model, kit.inputs(kit.modalities[-1]))
    outputs = short["mm_encoder_outputs"].values()
    positions = short["position_ids"]
    return {
        "model": type(model).__name__,
        "adapter": adapter.name,
        "modalities": list(kit.modalities),
        "frames_as_images": kit.frames_as_images,
        "attention": list(kit.attentions),
        "rope": "1-D" if positions.ndim == 2 else f"M-RoPE, {len(positions)} rows",
        "deepstack": any(getattr(x, "deepstack_features", None) is not None for x in outputs),
        "saliency": "saliency" in adapter.supplies,
        "inside": inside(model),
        "tower": adapter.cuts_tower,
    }


def inside(model):
    """Whether strategies can act inside the LLM, or what is in their way."""
    try:
        refuse_unfit_cuts(model, get_strategy("uniform", layer=1))
    except UnsupportedModelError as error:
        known = {"sliding window": "sliding windows", "no attention": "linear attention"}
        return next(short for part, short in known.items() if part in str(error))
    return "yes"
