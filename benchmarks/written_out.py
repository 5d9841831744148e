"""What fusing itself costs: ``python benchmarks/written_out.py > docs/results/written-out.md``.

Beside the shorter prompt, the same plan *written out*: a prompt of full length, in which every
token has the features of the survivor that it was fused into.
"""

import argparse
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace

import torch

from tokenfuse import FusionPlan
from tokenfuse.bench.encoded import EncodedPrompt
from tokenfuse.bench.markdown import table
from tokenfuse.bench.micro import LONGEST
from tokenfuse.bench.retention.plan import Plan
from tokenfuse.compression import compress_prompt, prompt_adapter
from tokenfuse.config import get_configuration
from tokenfuse.inference.generate import answers
from tokenfuse.inference.inputs import batch_inputs
from tokenfuse.inference.load import load
from tokenfuse.micro import INSTRUMENTS
from tokenfuse.micro.strata import make_stratum_clip
from tokenfuse.registry import default_registry

THIRD = {"keep_ratio": 0.33}
SETTINGS = {
    # Written out, every token stands in its place again, and frames in the order of time.
    "published-third-time": {"strategy": "ttf", "order": "time"} | THIRD,
    "first": {"strategy": "ttf", "anchor": "first", "segments": "auto"} | THIRD,
    "causal": {"strategy": "ttf", "reference": "previous"} | THIRD,
    "tome": {"strategy": "tome"} | THIRD,
}
FORMS = ("short", "proportional", "everywhere", "keys written out", "written out")
PAGE = """\
# What fusing itself costs

Right answers in per cent, `plain` / `robust`, of five forms of one plan that leaves a third of the
tokens. The questions and the settings are those of [Retention](retention/index.md); *all* is the
share of all questions.

- *Short*: the survivors alone.
- *Proportional*: the same with `attention: proportional`.
- *Everywhere*: that, but all that a survivor stands for counts for every query, also for those that
  would not have seen it yet.
- *Keys written out*: each layer sees the keys and values of the survivors in all places of what was
  fused into them, as many as without compression. What was fused reads nothing itself.
- *Written out*: as many tokens as without compression, each with the features of the survivor that
  it was fused into, read in every layer like any other.

The last two save nothing and are no way to use a model. They tell what is lost by fusing from what
is lost because the prompt is shorter.

{tables}
```console
$ python benchmarks/written_out.py --questions {questions} > docs/results/written-out.md
```
"""


def written_out(prompt, configuration):
    """The full-length prompt, and the column that each of its tokens was fused into."""
    adapter, strategy = prompt.adapter, configuration.strategy
    encoded = prompt.encoded(configuration)
    plans = {part.modality: [strategy.plan(x) for x in part.items] for part in encoded}
    whole = [
        replace(
            part,
            output=adapter.fuse(
                part, plans[part.modality], lambda plan, x: plan.expand(strategy.fuse(plan, x))
            ),
        )
        for part in encoded
    ]
    same = {
        part.modality: [FusionPlan.identity(x.num_tokens) for x in part.items] for part in encoded
    }
    long = compress_prompt(adapter, prompt.prompt, configuration, encoded=whole, plans=same)
    owners = {part.modality: part.owners(plans[part.modality]) for part in encoded}
    return long, prompt.prompt.owners(owners)


@contextmanager
def owned(model, owners):
    """Each layer reads, in every place of the prompt, the state of the token's owner."""

    def hook(_, args):
        states = args[0]
        if states.shape[1] == owners.shape[1]:
            return (states.gather(1, owners[..., None].expand_as(states)), *args[1:])
        return args

    with ExitStack() as hooks:
        for layer in model.get_decoder().layers:
            hooks.enter_context(layer.register_forward_pre_hook(hook))
        yield


def given(model, processor, prompt, config, form):
    if form.endswith("written out"):
        long, owners = written_out(prompt, get_configuration(config))
        with owned(model, owners) if form.startswith("keys") else nullcontext():
            return answers(model, processor, long, max_new_tokens=LONGEST)
    attention = "plain" if form == "short" else "proportional"
    short = prompt.shorten(get_configuration(config | {"attention": attention}))
    if form == "everywhere":
        shares = short.turn.shares
        first = torch.zeros_like(shares.first_query)
        short.turn = replace(short.turn, shares=replace(shares, first_query=first))
    return answers(model, processor, short, max_new_tokens=LONGEST)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=10, help="questions per stratum")
    args = parser.parse_args()
    torch.set_num_threads(1)
    plan = Plan(questions=args.questions)
    right = {}
    for model_name, folder in INSTRUMENTS.items():
        model, processor = load(folder)
        for task in plan.tasks:
            clips = [
                make_stratum_clip(stratum, seed, patches=plan.patches, measured=False)
                for stratum in plan.strata(task)
                for seed in plan.seeds(stratum)
            ]
            inputs = batch_inputs(
                processor, [clip.video for clip in clips], [clip.question.text for clip in clips]
            )
            prompt = EncodedPrompt(prompt_adapter(model, default_registry()), inputs)
            found = {
                "uncompressed": answers(model, processor, inputs, max_new_tokens=LONGEST),
                **{
                    (label, form): given(model, processor, prompt, config, form)
                    for label, config in SETTINGS.items()
                    for form in FORMS
                },
            }
            for key, said in found.items():
                right[key, model_name, task] = [
                    a == clip.question.answer for a, clip in zip(said, clips, strict=True)
                ]

    def cell(key, *tasks):
        shares = []
        for name in INSTRUMENTS:
            every = [answer for task in tasks for answer in right[key, name, task]]
            shares.append(f"{100 * sum(every) / len(every):.1f}")
        return " / ".join(shares)

    tables = []
    for label in SETTINGS:
        keys = ["uncompressed", *((label, form) for form in FORMS)]
        groups = [*((task, [task]) for task in plan.tasks), ("all", plan.tasks)]
        rows = [[name, *(cell(key, *tasks) for key in keys)] for name, tasks in groups]
        tables.append(f"## {label}\n\n" + table(["task", "uncompressed", *FORMS], rows))
    print(PAGE.format(tables="\n".join(tables), questions=args.questions), end="")


if __name__ == "__main__":
    main()
