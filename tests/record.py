"""What the conformance kit found, as a file.

``pytest tests/adapters/test_conformance.py --record FILE``.

Each class of the kit becomes an entry: what its model is, and how many tests passed. Entries of
other versions of transformers stay in the file, so that one file holds several.
"""

from __future__ import annotations

import json

import transformers

from tokenfuse.testing import AdapterConformance


def note(outcomes, item, report):
    """Count the outcome of a test of the kit, by class."""
    cls = getattr(item, "cls", None)
    if cls is None or not issubclass(cls, AdapterConformance):
        return
    if report.when == "call" or report.outcome != "passed":
        found = outcomes.setdefault(cls, {"passed": 0, "skipped": 0, "failed": 0})
        found[report.outcome] += 1


def write(path, outcomes):
    """Put the outcomes into the file, under the version of transformers."""
    recorded = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    recorded[transformers.__version__] = {
        cls.__name__.removeprefix("Test_"): entry(cls, found) for cls, found in outcomes.items()
    }
    path.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n", "utf-8")


def entry(cls, found):
    """What the page says of one class, or why the model cannot run in this transformers."""
    kit = cls()
    try:
        kit.model(kit.attentions[0])(**kit.inputs(kit.modalities[0]))
    except Exception as error:
        return {"reason": f"its own forward raises {type(error).__name__}"}
    return facts(cls) | found


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
    }
