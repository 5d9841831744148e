"""What fusing itself costs: ``python benchmarks/written_out.py > docs/results/written-out.md``.

Beside the shorter prompt, the same plan *written out*: a prompt of full length, in which every
token has the features of the survivor that it was fused into. It holds no more than the shorter one
does, and its attention and positions are those of the uncompressed prompt.
"""

import argparse

import torch

from tokenfuse import load_strategy
from tokenfuse.bench.compare import generate
from tokenfuse.bench.micro import LONGEST, encoding_once, texts
from tokenfuse.bench.retention.plan import Plan
from tokenfuse.engine import compress_with, plan_items, prompt_adapter
from tokenfuse.inference import load
from tokenfuse.micro import INSTRUMENTS
from tokenfuse.micro.evaluate import clip_inputs
from tokenfuse.micro.strata import make_stratum_clip
from tokenfuse.registry import registry

THIRD = {"keep_ratio": 0.33}
PUBLISHED = {"strategy": "ttf", "anchor": "auto", "segments": "single", "guard": "none"}
SETTINGS = {
    "published-third": PUBLISHED | THIRD,
    "third": {"strategy": "ttf"} | THIRD,
    "causal": {"strategy": "ttf", "reference": "previous"} | THIRD,
    "tome": {"strategy": "tome"} | THIRD,
}
FORMS = ("short", "proportional", "written out")
PAGE = """\
# What fusing itself costs

Right answers in per cent, `plain` / `robust`, of three forms of one plan that leaves a third of the
tokens. *Short*: the survivors alone. *Proportional*: the same with `attention: proportional`.
*Written out*: as many tokens as without compression, each with the features of the survivor that it
was fused into. That saves nothing and is no way to use a model; it tells what is lost by fusing
from what is lost because the prompt is shorter. The questions and the settings are those of
[Retention](retention/index.md); *all* is the share of all questions.

{tables}
```console
$ python benchmarks/written_out.py --questions {questions} > docs/results/written-out.md
```
"""


def written_out(adapter, inputs, strategy):
    encoded = adapter.encode(inputs, {})
    rest = dict(inputs)
    fused = {}
    for part in encoded:
        plans = plan_items(part, strategy, registry())
        fused[part.modality] = adapter.fuse(
            part, plans, lambda plan, x: plan.expand(strategy.fuse(plan, x))
        )
        for name in adapter.encoder_inputs(inputs, part.modality):
            del rest[name]
    return rest | {"mm_encoder_outputs": fused}


def prompt(adapter, inputs, config, form):
    if form == "written out":
        return written_out(adapter, inputs, load_strategy(config))
    attention = "proportional" if form == "proportional" else "plain"
    strategy = load_strategy(config | {"attention": attention})
    return compress_with(adapter, inputs, strategy, registry())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=10, help="questions per stratum")
    args = parser.parse_args()
    torch.set_num_threads(1)
    plan = Plan(questions=args.questions)
    right = {}
    for model_name, folder in INSTRUMENTS.items():
        model, processor = load(folder)
        processor.tokenizer.padding_side = "left"
        for task in plan.tasks:
            clips = [
                make_stratum_clip(stratum, seed, patches=plan.patches, measured=False)
                for stratum in plan.strata(task)
                for seed in plan.seeds(stratum)
            ]
            inputs = clip_inputs(processor, clips, [clip.question.text for clip in clips])
            adapter = encoding_once(prompt_adapter(model, registry()))
            runs = {"uncompressed": inputs} | {
                (label, form): prompt(adapter, inputs, config, form)
                for label, config in SETTINGS.items()
                for form in FORMS
            }
            for key, short in runs.items():
                given = texts(processor, generate(model, short, LONGEST)[0])
                right[key, model_name, task] = [
                    a == clip.question.answer for a, clip in zip(given, clips, strict=True)
                ]

    def cell(key, *tasks):
        shares = []
        for name in INSTRUMENTS:
            every = [answer for task in tasks for answer in right[key, name, task]]
            shares.append(f"{100 * sum(every) / len(every):.1f}")
        return " / ".join(shares)

    tables = []
    for label in SETTINGS:
        lines = [
            f"## {label}\n",
            f"| task | uncompressed | {' | '.join(FORMS)} |",
            "| --- |" + " ---: |" * (1 + len(FORMS)),
        ]
        keys = ["uncompressed", *((label, form) for form in FORMS)]
        for row, tasks in [*((task, [task]) for task in plan.tasks), ("all", plan.tasks)]:
            lines.append(f"| {row} | {' | '.join(cell(key, *tasks) for key in keys)} |")
        tables.append("\n".join(lines) + "\n")
    print(PAGE.format(tables="\n".join(tables), questions=args.questions), end="")


if __name__ == "__main__":
    main()
