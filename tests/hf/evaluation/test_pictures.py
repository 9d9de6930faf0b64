"""The picture of the recall suite: every figure is where its mask, task, depth, context and memory say."""

from itertools import combinations

import numpy
import pytest

pytest.importorskip("matplotlib")

from matplotlib.collections import QuadMesh
from matplotlib.colors import to_hex, to_rgb
from PIL import Image

from flash_dmattn_hf.evaluation import picture_masks, pictures

DEPTHS, MEBI = [10, 50, 90], 2**20
NAMES = ["dense", "sinks + window", "all weights (trained at w = 512)", "importance (trained at w = 512)", "SnapKV"]


def row(mask, kind, window, quality, contexts=(4096,), tasks=("pass_key", "several_keys", "common_words")):
    """A row whose figures all follow from `quality`, from 0 to 1. Cells differ in depth and context."""
    size = max(contexts) if window is None else window
    cells = [
        {"task": task, "context": context, "depth": depth, "num_prompts": 4, "tokens": quality, "answers": quality}
        | {"all_right": quality * (depth or 0) / 100 * min(contexts) / context}
        for task in tasks
        for context in contexts
        for depth in (DEPTHS if task != "common_words" else [None])
    ]
    measured = {"cache_bytes": size * MEBI // 64, "perplexity": 9 - quality, "kld": 1 - quality}
    if kind == "peer":
        measured = dict.fromkeys(measured)
    return {"mask": mask, "kind": kind, "keep_window_size": window, **measured, "recall": cells}


def one_window(**options):
    """Rows as of scripts/quality_table.py: two models of one kind, one of them better than dense, and a peer."""
    kinds = ["dense", "sinks + window", "importance", "importance", "peer"]
    qualities = [0.8, 0.2, 0.9, 0.6, 0.4]
    windows = [None, 512, 512, 512, 512]
    return [row(*parts, **options) for parts in zip(NAMES, kinds, windows, qualities, strict=True)]


def several_windows(*windows, **options):
    """Rows as of `recall_suite`."""
    rows = [row("dense", "dense", None, 0.8, **options)]
    for number, window in enumerate(windows):
        rows.append(row(f"sinks + window, w = {window}", "sinks + window", window, 0.1 * number, **options))
        rows.append(row(f"importance, w = {window}", "importance", window, 0.3 + 0.1 * number, **options))
    return rows


CASES = {
    "one window": one_window(),
    "many masks": [*one_window(), *(row(f"method {number}", "peer", 512, 0.1) for number in range(8))],
    "windows": several_windows(64, 250, 256, 1024),
    "contexts": several_windows(512, contexts=(1024, 2048, 4096)),
    "windows and long contexts": several_windows(512, 1024, contexts=[2**power for power in range(10, 18)]),
    "no depths": one_window(tasks=["common_words"]),
}


def parts(figure):
    """A figure and all that are in it."""
    yield figure
    for part in figure.subfigs:
        yield from parts(part)


def texts(figure):
    """The texts that are drawn."""
    found = [text for part in parts(figure) for text in part.texts]
    found += [text for part in parts(figure) for legend in part.legends for text in legend.get_texts()]
    for axes in filter(lambda axes: axes.get_visible(), figure.axes):
        found += [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            found += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [text for text in found if text.get_visible() and text.get_text()]


def shaded(figure):
    """The panels with shaded cells, with their shares and the numbers in the cells."""
    for axes in figure.axes:
        for mesh in (child for child in axes.get_children() if isinstance(child, QuadMesh)):
            shares = mesh.get_array()
            numbers = {(int(y), int(x)): text.get_text() for text in axes.texts for x, y in [text.get_position()]}
            written = [
                [float(numbers[line, column]) / 100 for column in range(shares.shape[1])] for line in range(len(shares))
            ]
            yield axes, shares, numpy.array(written)


def panel(figure, label):
    """The panel with an axis of this label."""
    (found,) = [
        axes for axes in figure.axes if label in axes.get_xlabel().splitlines() + axes.get_ylabel().splitlines()
    ]
    return found


def names(labels):
    return [label.get_text().replace("\n", " ") for label in labels]


@pytest.mark.parametrize("rows", CASES.values(), ids=CASES)
def test_no_text_covers_another_or_leaves_the_picture(rows):
    figure = pictures.figure_of(rows, "a model with a long name on a device, and all the versions " * 5)
    figure.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent().padded(-1)) for text in texts(figure)]
    assert len(boxes) > 30
    for (text, box), (other, other_box) in combinations(boxes, 2):
        assert not box.overlaps(other_box), (text, other)
    for text, box in boxes:
        assert all(figure.bbox.contains(x, y) for x, y in box.corners()), text


def test_one_context_is_a_table_for_each_task_with_depths():
    rows = CASES["one window"]
    first, second = shaded(pictures.figure_of(rows, ""))
    assert [axes.get_title() for axes, _, _ in (first, second)] == ["pass_key", "several_keys"]
    assert names(first[0].get_yticklabels()) == NAMES and names(first[0].get_xticklabels()) == ["10", "50", "90"]
    for (_, shares, written), task in ((first, "pass_key"), (second, "several_keys")):
        expected = [[cell["all_right"] for cell in row["recall"] if cell["task"] == task] for row in rows]
        assert numpy.array_equal(shares, expected) and numpy.abs(shares - written).max() <= 0.005 + 1e-9
    for axes, _, _ in (first, second):
        assert axes.get_ylim()[0] > axes.get_ylim()[1]  # dense, the first row, is above


def test_several_contexts_are_a_heat_map_for_each_mask_and_task():
    rows = several_windows(256, 512, contexts=(1024, 2048))
    figure = pictures.figure_of(rows, "")
    found = list(shaded(figure))
    assert [axes.get_title() for axes, _, _ in found] == [row["mask"] for row in rows] * 2
    for (axes, shares, written), row in zip(found, rows, strict=False):
        cells = {
            (cell["depth"], cell["context"]): cell["all_right"] for cell in row["recall"] if cell["task"] == "pass_key"
        }
        assert numpy.array_equal(shares, [[cells[depth, context] for context in (1024, 2048)] for depth in DEPTHS])
        assert numpy.abs(shares - written).max() <= 0.005 + 1e-9
        assert names(axes.get_xticklabels()) == ["1024", "2048"]
        assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the start of the text is above
    assert names(found[0][0].get_yticklabels()) == ["10", "50", "90"]
    columns = {
        row["mask"]: axes.get_subplotspec().colspan.start for (axes, _, _), row in zip(found, rows, strict=False)
    }
    assert list(columns.values()) == [0, 1, 2, 1, 2]
    assert sum(not axes.get_visible() for axes in figure.axes) == 2  # beside the second window there is no dense


def test_one_window_has_a_bar_for_each_mask_and_measure():
    rows = CASES["one window"]
    figure = pictures.figure_of(rows, "")
    memory = panel(figure, "key-value cache of 4096 tokens (MiB)")
    assert names(memory.get_yticklabels()) == NAMES
    assert names(memory.texts) == ["64.00", "8.00", "8.00", "8.00", "-"]
    perplexity, answers = panel(figure, "perplexity"), panel(figure, "answers right, all tasks, N = 4096 (%)")
    assert names(perplexity.texts) == ["8.200", "8.800", "8.100", "8.400", "-"]
    assert [bar.get_width() for bar in perplexity.patches] == pytest.approx([0, 0.6, -0.1, 0.2, 0])  # from dense
    assert {bar.get_x() for bar in perplexity.patches} == {8.2}
    assert names(panel(figure, "KLD to dense, nats per token").texts)[-2:] == ["0.4000", "-"]
    assert names(answers.texts) == ["80.0", "20.0", "90.0", "60.0", "40.0"]
    assert [bar.get_width() for bar in answers.patches] == pytest.approx([80, 20, 90, 60, 40])
    assert answers.get_xlim() == (0, 119)  # with room for the text beside a bar of 100
    assert len({to_hex(bar.get_facecolor()) for bar in answers.patches}) == len(rows)
    assert not any(part.legends for part in parts(figure))


def test_several_windows_are_one_line_for_each_mask():
    rows = several_windows(512, 256, 1024)
    rows += [row("trained, w = 512", "importance", 512, 0.5), row("SnapKV, w = 512", "peer", 512, 0.5)]
    figure = pictures.figure_of(rows, "")
    (legend,) = [legend for part in parts(figure) for legend in part.legends]
    assert names(legend.get_texts()) == ["dense", "sinks + window", "importance", "trained"]
    answers = panel(figure, "answers right, all tasks, N = 4096 (%)")
    lines = {line.get_label(): line for line in answers.lines}
    assert list(lines["importance"].get_xdata()) == [4, 8, 16]
    assert list(lines["importance"].get_ydata()) == pytest.approx([40, 30, 50])
    assert list(lines["trained"].get_xdata()) == [8] and list(lines["dense"].get_xdata()) == [64]
    assert len({line.get_color() for line in legend.get_lines()}) == 4
    assert names(answers.get_xticklabels()) == ["64.00 dense", "16.00 w = 1024", "8.00 w = 512", "4.00 w = 256"]


def test_masks_differ_in_color_and_marker():
    rows = [*several_windows(512), *(row(f"method {number}", "peer", 512, 0.1) for number in range(50))]
    found = picture_masks.styles(rows)
    assert len(found) == 53 and len(set(found.values())) == 53
    assert found["importance"] == picture_masks.styles(several_windows(128, 512))["importance"]


CONES = {
    "all": numpy.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
"""What is seen of linear RGB (Machado, Oliveira and Fernandes, 2009)."""


@pytest.mark.parametrize("seen", CONES.values(), ids=CONES)
def test_the_color_blind_tell_colors_apart(seen):
    def lab(color):
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(color)]
        to_xyz = numpy.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
        x, y, z = numpy.cbrt(to_xyz @ numpy.clip(seen @ numpy.array(linear), 0, 1) / to_xyz.sum(1))
        return numpy.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    colors = [*picture_masks.COLORS, "black", "white", picture_masks.styles(several_windows(8))["sinks + window"].color]
    for one, other in combinations(colors, 2):
        assert numpy.linalg.norm(lab(one) - lab(other)) > 15, (one, other)


@pytest.mark.parametrize("case", ["many masks", "windows and long contexts"])
def test_the_file_is_small(case, tmp_path):
    path = tmp_path / "picture.png"
    pictures.draw(CASES[case], path, "a title")
    with Image.open(path) as image:
        assert 1000 < image.width <= 1600
    assert path.stat().st_size < 200_000
