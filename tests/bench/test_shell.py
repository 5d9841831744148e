"""Commands on pages stay what they are, however many lines they take."""

import shlex

from hypothesis import given
from hypothesis import strategies as st

from tokenfuse.bench.markdown import WIDEST, shell

WORD = st.sampled_from(["--out", "-x", "a b"]) | st.text(
    st.characters(codec="ascii", exclude_categories=["C"]), min_size=1, max_size=30
)


@given(st.lists(WORD, min_size=1, max_size=20))
def test_a_command_of_several_lines_is_the_same_command(words):
    text = shell(shlex.join(words))
    assert shlex.split(text.removeprefix("$ ").replace("\\\n", " ")) == words


def test_an_option_stays_with_its_value():
    text = shell("tokenfuse bench " + " ".join(f"--option-{i} value" for i in range(12)))
    lines = text.splitlines()
    assert max(map(len, lines)) <= WIDEST
    assert all(line.removesuffix(" \\").endswith("value") for line in lines)
