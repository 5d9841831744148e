"""Markdown tables."""

from tokenfuse.bench.markdown import table


def test_text_is_aligned_left_and_numbers_right():
    assert table(["a", "b", "c"], [["x", "1", "2"]], left=2) == (
        "| a | b | c |\n| --- | --- | ---: |\n| x | 1 | 2 |\n"
    )


def test_a_cell_stays_one_cell_on_one_line():
    assert table(["a"], [["x |\n  y"]]).splitlines()[2] == "| x \\| y |"
