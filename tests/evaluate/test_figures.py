"""figures.py: files of the right size and colours, and series that show the numbers given."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from test_report import results

from hps.evaluate import figures, report


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("figures")
    report.write_report(results(), out)
    return out


@pytest.mark.parametrize(
    "name, inches",
    [
        ("margins", (3.6, 0.9 + 3 * 0.27)),
        ("reward_kl", (5.0, 3.6)),
        ("curves", (8.0, 2.9)),
        ("schedule", (5.0, 3.4)),
        ("series_strength", (7.0, 2.9)),
        ("series_n", (4.4, 2.9)),
    ],
)
def test_figures_are_real_and_show_their_methods_colours(written, name, inches):
    image = np.round(imread(written / "figures" / f"{name}.png")[..., :3] * 255).astype(np.int64)
    assert image.shape[:2] == pytest.approx((inches[1] * figures.DPI, inches[0] * figures.DPI), abs=1)
    colours = set(np.unique(image @ [65536, 256, 1]).tolist())
    assert len(colours) > 50  # anti-aliased text and lines
    wanted = {
        "margins": (0, 1, 2),
        "reward_kl": (0, 1, 2),
        "curves": (1, 2),
        "schedule": (0, 1),
        "series_strength": (0, 1),
        "series_n": (0,),
    }[name]
    for i in wanted:
        assert int(figures.COLOURS[i][1:], 16) in colours
    # nothing is cut off: the outermost pixels are white
    assert all((edge == 255).all() for edge in (image[0], image[-1], image[:, 0], image[:, -1]))


def drawn(of_results, name):
    """The figure of a series: panel title -> line label -> (points (n, 2), x ranges, y ranges) as on the canvas."""
    (plan,) = [plan for plan in figures.plans(of_results) if plan.name == f"series_{name}"]
    figure = Figure(figsize=plan.size, layout="constrained")
    plan.draw(figure, of_results)
    panels = {}
    for axes in figure.axes:
        lines = panels[axes.get_title()] = {}
        for container in axes.containers:
            line, _, bars = container.lines
            ends = [np.reshape([s for s in bar.get_segments() if len(s)], (-1, 2, 2)) for bar in bars]
            *across, up = ends  # those of x, if there are any, come before those of y
            lines[container.get_label()] = line.get_xydata(), across[0][:, :, 0] if across else None, up[:, :, 1]
    return figure, panels


def test_a_series_over_a_metric_shows_the_numbers_given():
    figure, panels = drawn(results(), "strength")
    assert list(panels) == ["RM2", "reward"]  # no row has junk
    assert {label for lines in panels.values() for label in lines} == {"down", "one"}
    points, across, up = panels["reward"]["down"]
    assert points.tolist() == [[5.2, 1.78], [6.1, 1.14], [0, 0.59]]  # in the order of the rows
    assert across == pytest.approx(np.array([[4.9, 5.6], [5.5, 6.6], [0, 0]]))
    assert up == pytest.approx(np.array([[1.6, 1.9], [1.0, 1.3], [0.5, 0.7]]))
    points, across, up = panels["RM2"]["one"]
    assert points.tolist() == [[6.1, 0.512]] and up == pytest.approx(np.array([[0.3, 0.7]]))
    hollow = [line for axes in figure.axes for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert [line.get_xydata().tolist() for line in hollow] == [[[5.2, 0.6]], [[5.2, 1.78]]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["down", "one"]
    assert figure._supxlabel.get_text() == "KL (exact)"


def test_a_series_over_numbers_of_ours_shows_them():
    figure, panels = drawn(results(), "n")
    points, across, up = panels["win %"]["up"]
    assert points.tolist() == [[5, 54.5], [20.5, 70.25]] and across is None
    assert up == pytest.approx(np.array([[51, 57], [68, 73]]))
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["5", "20.5"]
    assert figure._supxlabel.get_text() == "candidates"
    assert not [line for line in figure.axes[0].lines if line.get_markerfacecolor() == "white"]


def test_a_missing_number_breaks_its_line_and_an_empty_figure_is_left_out():
    broken = results()
    del broken["rows"][1]["metrics"]["true_reward"]
    points, _, up = drawn(broken, "strength")[1]["reward"]["down"]
    assert np.isnan(points).any(1).tolist() == [False, True, False]
    assert up == pytest.approx(np.array([[1.6, 1.9], [0.5, 0.7]]))
    for row in broken["rows"]:
        row["metrics"].pop("kl_exact")
    assert [plan.name for plan in figures.plans(broken)] == ["margins", "series_n", "curves", "schedule"]


def test_eight_lines_and_five_panels_are_told_apart():
    wide = results()
    names = [f"line {i}" for i in range(8)]
    panels = ["rm2", "harm", "true_reward", "length", "kl_exact"]
    wide["series"] = {
        "wide": {"x": {"metric": "kl_exact"}, "panels": panels, "lines": {name: ["SFT", "DPO-BT"] for name in names}}
    }
    figure, found = drawn(wide, "wide")
    assert len(figure.axes) == 5 and all(list(lines) == names for lines in found.values())
    main = [container.lines[0] for container in figure.axes[0].containers]
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in main}
    assert len(looks) == 8
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names
    boxes = [axes.get_position().bounds[:2] for axes in figure.axes]
    assert len({round(y, 3) for _, y in boxes}) == 2 and len({round(x, 3) for x, _ in boxes}) == 3


def test_labels_of_close_points_do_not_cover_each_other():
    figure = Figure(figsize=(5, 3.6), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 10], [0, 10], linestyle="none")
    figures._label_points(
        figure, axes, [(5.0, 5.0, "first", "k"), (5.1, 5.1, "second", "k"), (10.0, 10.0, "edge", "k")]
    )
    boxes = [text.get_window_extent() for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == ["first", "second", "edge"]
    assert not boxes[0].overlaps(boxes[1])
    assert boxes[2].x1 <= axes.bbox.x1 and boxes[2].y1 <= axes.bbox.y1
